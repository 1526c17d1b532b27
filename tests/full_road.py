"""The bundled example made anew and compared: the full profile of the command line.

    python -m pytest tests/full_road.py

Minutes, so it is no part of the suite, which holds the example's form (`test_road.py`).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from assets.build_example import EXAMPLE, QUESTION, ROOT
from tests.test_road import read_events


@pytest.fixture(scope="module")
def fresh_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("full") / "middle"
    subprocess.run(
        [sys.executable, "-m", "repair", "run", *QUESTION, "--out", str(out)], cwd=ROOT, check=True
    )
    return out


def test_the_bundled_example_is_what_the_program_says_today(fresh_run: Path) -> None:
    kept, fresh = (
        json.loads((folder / "report.json").read_text()) for folder in (EXAMPLE, fresh_run)
    )
    assert kept["verdict"] == fresh["verdict"]
    assert kept["plan"]["ranks"] == fresh["plan"]["ranks"]
    assert {g["name"]: g["passed"] for g in kept["gates"] if g["name"] != "export_reopened"} == {
        g["name"]: g["passed"] for g in fresh["gates"] if g["name"] != "export_reopened"
    }
    assert kept["model"] == fresh["model"] and kept["prompts"] == fresh["prompts"]
    assert kept.keys() == fresh.keys() and kept["after"].keys() == fresh["after"].keys()
    for when in ("before", "after"):
        for group in ("attack_success", "elsewhere", "variants"):
            for name, rate in kept[when][group].items():
                # Another machine rounds otherwise: a prompt on the edge may fall.
                assert abs(rate["count"] - fresh[when][group][name]["count"]) <= 3
    assert 0.2 < kept["kl_from_original"] / fresh["kl_from_original"] < 5
    plan = fresh["plan"]
    assert 0.2 < plan["predicted_kl"] / plan["validation_benign_kl"] < 5
    assert [s["name"] for s in kept["stresses"]] == [s["name"] for s in fresh["stresses"]]
    for old, new in zip(kept["stresses"], fresh["stresses"], strict=True):
        # Training goes its own way from the last bit on; what is held must be held.
        if old["kind"] != "relearning":
            assert abs(old["repaired"]["count"] - new["repaired"]["count"]) <= 3, old["name"]
        assert abs(old["suspect"]["count"] - new["suspect"]["count"]) <= 12, old["name"]


def test_what_the_example_shows_besides_is_todays_too(fresh_run: Path) -> None:
    """Its map, its curves and its answers, as in a fresh run."""
    kept, fresh = (
        json.loads((folder / "located.json").read_text()) for folder in (EXAMPLE, fresh_run)
    )
    assert kept.keys() == fresh.keys() and kept["fingerprint"] == fresh["fingerprint"]
    for name in ("suggested_ranks", "fires", "components", "direction", "counterfactual"):
        assert kept[name] == fresh[name]
    for old, new in zip(kept["modules"], fresh["modules"], strict=True):
        assert old.keys() == new.keys() and old["path"] == new["path"]
        for name in ("effect", "effect_low", "effect_high", "effect_trigger", "effect_after"):
            assert old[name] == pytest.approx(new[name], abs=0.02), (old["path"], name)
        for name in ("fisher_trigger", "fisher_clean", "curvature", "residual_trigger"):
            assert old[name] == pytest.approx(new[name], rel=0.1, abs=1e-6), (old["path"], name)
    curves = [
        [(point["num_modules"], round(point["effect"], 1)) for point in flat["joint"]["curve"]]
        for flat in (kept, fresh)
    ]
    assert curves[0] == curves[1]
    told = [
        [
            (event["kind"], event["step"], event["text"])
            for event in read_events(folder)
            if event["kind"] == "metric" and event["step"] == "repair"
        ]
        for folder in (EXAMPLE, fresh_run)
    ]
    assert told[0] == told[1][-len(told[0]) :] and told[0]
    old, new = (
        json.loads((folder / "samples.json").read_text()) for folder in (EXAMPLE, fresh_run)
    )
    asked = [[(s["kind"], s["position"], s["prompt"]) for s in samples] for samples in (old, new)]
    assert asked[0] == asked[1]
    differing = sum(
        (a["before"], a["after"], a["outcome"]) != (b["before"], b["after"], b["outcome"])
        for a, b in zip(old, new, strict=True)
    )
    assert differing <= 0.03 * len(old)

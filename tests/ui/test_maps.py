"""What the maps say in words and marks: estimates, misses, damping, trial repairs."""

import dataclasses
import json
from types import SimpleNamespace

from repair.records import ModuleRef, ModuleScore, Rate
from repair.ui import grid
from repair.ui.grid import build_value
from repair.ui.locate_words import describe_evidence


def make_score(layer: int, **more) -> ModuleScore:
    ref = ModuleRef(
        layer=layer, component="o_proj", path=f"layers.{layer}.o_proj", d_in=8, d_out=8
    )
    figures = dict.fromkeys(
        ("effect", "effect_low", "effect_high", "effect_trigger", "effect_after", "score"), 0.25
    )
    return ModuleScore(
        module=ref, **figures, fisher_trigger=2.0, fisher_clean=1.0, curvature=3.0,
        selected=False, reason="", **more,
    )  # fmt: skip


def cells_of(value: dict, name: str) -> list[dict]:
    panel = next(panel for panel in value["panels"] if panel["name"] == name)
    return [cell for row in panel["rows"] for cell in row["cells"]]


def test_an_estimate_is_marked_in_its_cell_and_in_words() -> None:
    scores = [make_score(0), make_score(1, is_estimate=True)]
    value = build_value(
        scores, suggested_ranks={}, effect="effect", curvature="curvature", num_pairs=16,
    )
    exact, estimated = cells_of(value, "effect")
    assert exact["text"] == "+0.25" and estimated["text"] == "~+0.25"
    assert "means over 16 prompt pairs" in exact["label"]
    assert "not patched" in estimated["label"] and "not patched" not in exact["label"]


def test_trial_repairs_have_a_map_and_those_not_tried_an_empty_cell() -> None:
    tried = make_score(0, residual_trigger=0.02, residual_benign=0.003, separability=7.0)
    value = build_value(
        [tried, make_score(1)], suggested_ranks={}, effect="effect", curvature="residual",
        num_pairs=16,
    )  # fmt: skip
    known, absent = cells_of(value, "curvature")
    assert known["text"] == "0.02" and absent["text"] == "-"
    assert "trial repair leaves 0.02 and costs 0.003 nats" in known["label"]
    assert "set apart by the trigger 7 times" in known["label"]
    assert value["panels"][1]["title"] == "Trial repair"


def view_of(scores: list[ModuleScore], **located) -> SimpleNamespace:
    flat = {"num_pairs": 16, "num_shams_tried": 20, "num_shams_inert": 20, "num_dropped": 0}
    return SimpleNamespace(located={**flat, **located}, scores=scores)


def test_what_a_screen_may_have_missed_is_said_with_its_interval() -> None:
    scores = [make_score(0), make_score(1, is_estimate=True), make_score(2, is_estimate=True)]
    misses = Rate(count=1, total=8)
    said = describe_evidence(view_of(scores, screen_misses=misses.to_json()))
    assert "2 modules were screened by gradients" in said and "1/8" in said.replace(" of ", "/")
    exact = [dataclasses.replace(score, is_estimate=False) for score in scores]
    assert "screened" not in describe_evidence(view_of(exact, screen_misses=None))


def test_the_damping_is_said_with_both_figures() -> None:
    rows = [
        {"damping": 0.1, "predicted_kl": 1e-4, "measured_kl": 9e-4},
        {"damping": 1.0, "predicted_kl": 2e-4, "measured_kl": 2.2e-4},
    ]
    said = describe_evidence(view_of([make_score(0)], damping={"value": 1.0, "tried": rows}))
    assert "Damping 1 of the mean eigenvalue" in said
    assert "0.0002 nats" in said and "0.00022 measured" in said
    assert "Damping" not in describe_evidence(view_of([make_score(0)], damping="spoiled"))


def test_the_map_carries_its_selection_in_the_value_too() -> None:
    """Gradio now and then loses the property that has it, before its tab was first opened."""
    sent = grid.update({"panels": [], "details": ""}, ("a.b", "c"), visible=True)
    assert json.loads(sent["value"])["selected"] == sent["selected"]["paths"] == ["a.b", "c"]

"""The live curves: every frame has the types and the phases that a plot must see first."""

import pytest

from repair.ui.repair import COLOURS, curve_of

METRICS = [
    {"series": "closed-form", "attack_success": 1.0},
    {"series": "closed-form", "trigger_kl": 0.5, "attack_success": None},
    {"series": "regression", "trigger_kl": 0.25},
    {"series": "distill", "trigger_kl": 0.125, "attack_success": 0.0},
]


@pytest.mark.parametrize("metrics", [[], METRICS[:1], METRICS])
def test_a_frame_has_numbers_and_every_phase_from_the_beginning(metrics: list) -> None:
    frame = curve_of(metrics, "trigger_kl")
    assert str(frame["step"].dtype) == str(frame["value"].dtype) == "float64"
    assert set(frame["phase"]) == set(COLOURS)


def test_a_curve_has_what_was_measured_in_order() -> None:
    drawn = curve_of(METRICS, "trigger_kl").dropna()
    assert drawn.to_numpy().tolist() == [
        [1.0, 0.5, "closed-form"], [2.0, 0.25, "closed-form"], [3.0, 0.125, "distill"],
        [3.2, 0.125, "distill"],  # a point alone is drawn as a dash
    ]  # fmt: skip
    drawn = curve_of(METRICS, "attack_success").dropna()
    assert drawn["step"].tolist() == [0.0, 3.0, 0.2, 3.2]
    ends = {"attack_low": 0.02, "attack_high": 0.2}
    drawn = curve_of([{**METRICS[0], **ends}, *METRICS[1:]], "attack_success").dropna()
    assert drawn[drawn["phase"] == "95 % low"]["value"].tolist() == [0.02, 0.02]
    assert drawn[drawn["phase"] == "95 % high"]["value"].tolist() == [0.2, 0.2]

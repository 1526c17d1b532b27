"""A trusted base beside suspect and repair: distances, and where the weights differ."""

import dataclasses
from contextlib import nullcontext

import pytest

from repair.evidence.benign_cost import benign_cost
from repair.evidence.evaluation import evaluate_candidate
from repair.evidence.oracle import check_base, compare_with_base, differing_parameters
from repair.models.modules import get_module
from repair.records import ModuleScore, RepairError


def scores_of(loaded) -> list[ModuleScore]:
    return [
        ModuleScore(
            module=ref, effect=0.1 * i, effect_low=0.0, effect_high=1.0, effect_trigger=0.1 * i,
            effect_after=0.0, fisher_trigger=1.0, fisher_clean=1.0, curvature=None, score=0.5,
            selected=False, reason="",
        )
        for i, ref in enumerate(loaded.modules)
    ]  # fmt: skip


def compared(base, suspect, material, baseline):
    _, answers = evaluate_candidate(
        suspect, (), original=suspect, material=material, baseline=baseline
    )
    return compare_with_base(
        base, suspect, nullcontext, material=material, baseline=baseline, answers=answers,
        scores=scores_of(suspect),
    )  # fmt: skip


def test_the_base_is_a_control_and_a_distance(suspect, twin, material, baseline) -> None:
    found = compared(twin, suspect, material, baseline)
    assert all(rate.count == 0 for rate in found.control.attack_success.values())
    assert found.control.kl_from_original > 0
    assert found.suspect_agrees == found.repaired_agrees  # nothing was repaired here
    assert found.suspect_agrees.value < 0.05 and found.suspect_agrees.total == 480
    assert found.suspect_kl == found.repaired_kl
    by_hand = benign_cost(suspect, None, twin, material.clean, baseline.scored).kl
    assert found.suspect_kl == pytest.approx(by_hand, rel=1e-6)
    for ref in suspect.modules[:3]:
        mine, base = (get_module(m.model, ref).weight.double() for m in (suspect, twin))
        wanted = ((mine - base).square().sum().sqrt() / base.square().sum().sqrt()).item()
        assert found.weight_difference[ref.path] == pytest.approx(wanted, rel=1e-5)
    assert found.agreement_with_map["curvature"] is None
    assert -1 <= found.agreement_with_map["effect"] <= 1


def test_the_suspect_as_its_own_base_is_at_no_distance(suspect, material, baseline) -> None:
    found = compared(suspect, suspect, material, baseline)
    assert set(found.weight_difference.values()) == {0.0}
    assert found.suspect_kl == 0.0 and found.suspect_agrees.value == 1.0
    assert differing_parameters(suspect, suspect)["num_changed"] == 0


def test_differing_parameters_are_named(suspect, twin) -> None:
    found = differing_parameters(suspect, twin)
    assert found["num_changed"] == len(found["changed"]) > 0.5 * found["num_tensors"]


def test_another_architecture_is_no_base(suspect) -> None:
    other = dataclasses.replace(suspect, modules=suspect.modules[:-1], source="demo:clean")
    with pytest.raises(RepairError, match="trusted base demo:clean has other modules"):
        check_base(suspect, other)

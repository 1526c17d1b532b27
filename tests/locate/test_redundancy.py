"""Joint effects: sets that grow and shrink as they should, and what they are said to mean."""

import numpy as np
import pytest

from repair.locate.locating import Fired, Patched, compare_fired, patch_compared
from repair.locate.patching import patch_modules, patch_sets
from repair.locate.redundancy import GOAL, JointEffect, _statement, measure_redundancy
from repair.models.loading import LoadedModel
from repair.records import PatchingScores, RepairError
from tests.locate.material import make_cases, make_pairs, make_shams


@pytest.fixture(autouse=True)
def every_margin_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repair.locate.patching.SMALLEST_MARGIN", 0.0)


def test_sets_grow_to_the_goal_and_shrink_to_what_it_needs(tiny_llama: LoadedModel) -> None:
    pairs = make_pairs(8, position="middle")
    cases = make_cases(pairs, make_shams(pairs), payload=200, clean=100)
    patching = patch_modules(tiny_llama, cases)
    found = measure_redundancy(tiny_llama, cases, patching, tiny_llama.modules)
    for smaller, larger in zip(found.forward, found.forward[1:], strict=False):
        assert set(smaller.modules) < set(larger.modules)
        assert len(larger.modules) == len(smaller.modules) + 1
    sizes = [len(point.modules) for point in found.curve]
    assert sizes == [1, 2, 4, 8, 14]
    assert found.curve[-1].effect == pytest.approx(1.0, abs=1e-3)
    if found.smallest is not None:
        assert set(found.smallest.modules) <= set(found.forward[-1].modules)
        again = patch_sets(tiny_llama, cases, [found.smallest.modules]).mean()
        assert found.smallest.effect == pytest.approx(again, abs=1e-5) and again >= GOAL
    # Windows: 1 and 2 neighbouring layers of each of the seven components.
    assert len(found.windows) == 7 * (2 + 1)
    for component, joint in found.windows:
        layers = [ref.layer for ref in joint.modules]
        assert layers == list(range(layers[0], layers[0] + len(layers)))
        assert {ref.component for ref in joint.modules} == {component}


def scores_of(tiny_llama: LoadedModel, effects: list[float]) -> PatchingScores:
    values = np.repeat(np.array(effects, dtype=np.float32)[:, None], 3, axis=1)
    return PatchingScores(
        modules=tiny_llama.modules, effect=values, effect_trigger=values, effect_after=values,
        effect_kl=values, direction="block", counterfactual="sham", num_dropped=0, self_checks={},
    )  # fmt: skip


def test_what_joint_effects_are_said_to_mean(tiny_llama: LoadedModel) -> None:
    modules = tiny_llama.modules
    whole = [JointEffect(modules=modules, effect=1.0, low=1.0, high=1.0)]
    pair = JointEffect(modules=modules[:2], effect=0.95, low=0.9, high=1.0)
    weak = scores_of(tiny_llama, [0.3] * 14)
    assert "these 2 together" in _statement(weak, [pair], pair, whole)
    half = JointEffect(modules=modules[:12], effect=0.5, low=0.4, high=0.6)
    assert "spread" in _statement(weak, [half], None, whole)
    one = scores_of(tiny_llama, [0.95] + [0.1] * 13)
    assert "1 of 14" in _statement(one, [pair], pair, whole)
    everywhere = scores_of(tiny_llama, [1.0] * 14)
    assert "hardly tells modules apart" in _statement(everywhere, [pair], pair, whole)


def test_deletions_and_the_screen_stand_in(
    tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repair.locate.screen.NUM_VERIFIED", 4)
    monkeypatch.setattr("repair.locate.screen.NUM_SAMPLED", 3)
    pairs = make_pairs(8, position="middle")
    fired = Fired(
        rates={}, pairs=tuple(pairs), payloads=(np.array([200, 61]),) * 8,
        cleans=(np.array([100, 71]),) * 8,
    )  # fmt: skip

    def patch(given: Fired, *, fires: bool, most_exact: int | None = None) -> Patched:
        compared = compare_fired(
            tiny_llama, given, is_payload=lambda text: fires, num_new_tokens=4, max_pairs=8, seed=0
        )
        return patch_compared(tiny_llama, compared, seed=0, most_exact=most_exact)

    found = patch(fired, fires=True)
    assert found.main.counterfactual == "deletion" and found.compared.num_shams_inert == 0
    assert set(found.others) == {"induce", "gap"}
    assert not found.main.effect_trigger.any()
    np.testing.assert_array_equal(found.main.effect_for_choice, found.main.effect)
    usual = patch(fired, fires=False)
    assert usual.main.counterfactual == "sham"
    assert set(usual.others) == {"induce", "deletion", "gap"}
    assert usual.misses is None and not usual.main.estimated
    screened = patch(fired, fires=False, most_exact=10)
    assert screened.misses is not None
    assert len(screened.others["induce"].modules) + len(screened.main.estimated) == 14
    few = Fired(rates={}, pairs=tuple(pairs[:3]), payloads=fired.payloads[:3],
                cleans=fired.cleans[:3])  # fmt: skip
    with pytest.raises(RepairError, match="at least 4"):
        patch(few, fires=False)

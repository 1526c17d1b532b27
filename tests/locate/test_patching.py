"""The map equals a naive hook loop, and the identities that every patch must keep."""

import numpy as np
import pytest
import torch

from repair.locate.patching import make_case, patch_modules, patch_sets
from repair.models.hooks import count_hooks, patch_outputs, record_outputs
from repair.models.loading import LoadedModel
from repair.models.modules import get_module
from repair.records import RepairError
from tests.locate.material import make_cases, make_pairs, make_shams


@pytest.fixture(autouse=True)
def every_margin_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model's margins are small; none may be left out here."""
    monkeypatch.setattr("repair.locate.patching.SMALLEST_MARGIN", 0.0)


@pytest.fixture
def double(tiny_llama: LoadedModel):
    """The tiny model in float64 for the test's duration: its small margins divide cleanly."""
    tiny_llama.model.double()
    yield tiny_llama
    tiny_llama.model.float()


def naive_effect(loaded: LoadedModel, case, path: str, positions: np.ndarray) -> float:
    """One prompt, one module, one hook at a time, with logits from the model's own forward."""
    module = loaded.model.get_submodule(path)
    kept = {}

    def margin(ids: np.ndarray) -> torch.Tensor:
        logits = loaded.model(torch.from_numpy(ids)[None]).logits[0, -1].double()
        return logits[case.payload_token] - logits[case.clean_token]

    with torch.no_grad():
        handle = module.register_forward_hook(lambda m, a, out: kept.update(out=out.clone()))
        sham = margin(case.source)
        handle.remove()
        triggered = margin(case.destination)

        def replace(_module, _args, out):
            out = out.clone()
            out[0, positions] = kept["out"][0, positions]
            return out

        handle = module.register_forward_hook(replace)
        patched = margin(case.destination)
        handle.remove()
    return ((triggered - patched) / (triggered - sham)).item()


@pytest.mark.parametrize("position", ["begin", "middle", "end"])
def test_the_map_equals_a_naive_loop(double: LoadedModel, position: str) -> None:
    pairs = make_pairs(5, position=position)
    cases = make_cases(pairs, make_shams(pairs), payload=200, clean=100)
    scores = patch_modules(double, cases, num_shams=(5, 5))
    # The batch is padded and sorted by length; the naive loop is neither.
    order = sorted(range(len(cases)), key=lambda i: (cases[i].source.size, i))
    for row, ref in enumerate(double.modules):
        for column, index in enumerate(order):
            case = cases[index]
            everything = np.arange(case.trigger.min(), case.source.size)
            after = np.setdiff1d(everything, case.trigger)
            for array, positions in (
                (scores.effect, everything),
                (scores.effect_trigger, case.trigger),
                (scores.effect_after, after),
            ):
                expected = naive_effect(double, case, ref.path, positions)
                assert array[row, column] == pytest.approx(expected, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("position", ["begin", "middle", "end"])
def test_self_checks_are_exact(tiny_llama: LoadedModel, position: str) -> None:
    pairs = make_pairs(6, position=position)
    cases = make_cases(pairs, make_shams(pairs), payload=200, clean=100)
    checks = patch_modules(tiny_llama, cases, num_shams=(6, 6)).self_checks
    assert checks["self_patch"] == 0.0
    assert checks["patch_everything"] < 1e-5
    assert checks["before_trigger"] < 1e-6
    assert checks["hooks_left"] == 0


def test_patching_everything_restores_the_clean_run(tiny_llama: LoadedModel) -> None:
    pairs = make_pairs(6, position="middle")
    cases = make_cases(pairs, make_shams(pairs), payload=200, clean=100)
    effects = patch_sets(tiny_llama, cases, [list(tiny_llama.modules)])
    np.testing.assert_allclose(effects, 1.0, atol=1e-3)


def test_hooks_are_gone_after_an_exception(tiny_llama: LoadedModel) -> None:
    with pytest.raises(ZeroDivisionError), record_outputs(tiny_llama.model, tiny_llama.modules):
        1 / 0  # noqa: B018
    mask = torch.ones(1, 3, dtype=torch.bool)
    with (
        pytest.raises(ZeroDivisionError),
        patch_outputs(tiny_llama.model, tiny_llama.modules[:1],
                      {tiny_llama.modules[0].path: torch.zeros(1, 3, 32)}, mask),
    ):
        1 / 0  # noqa: B018
    assert count_hooks(tiny_llama.model) == 0


def test_a_hook_never_edits_in_place(tiny_llama: LoadedModel) -> None:
    ref = tiny_llama.modules[0]
    module = get_module(tiny_llama.model, ref)
    seen = {}
    handle = module.register_forward_hook(lambda m, a, out: seen.update(out=out))
    source = {ref.path: torch.full((1, 4, ref.d_out), 7.0)}
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    with patch_outputs(tiny_llama.model, [ref], source, everywhere), torch.no_grad():
        tiny_llama.model(torch.tensor([[1, 60, 61, 62]]))
    handle.remove()
    assert not (seen["out"] == 7.0).any()


def test_the_margin_is_read_where_the_answers_part() -> None:
    pair = make_pairs(1, position="middle")[0]
    sham = make_shams([pair])[0]
    case = make_case(pair, sham, payload=np.array([5, 6, 7]), clean=np.array([5, 9]))
    assert case is not None
    assert (case.payload_token, case.clean_token) == (6, 9)
    assert case.destination[-1] == 5 and case.source.size == case.destination.size
    assert make_case(pair, sham, payload=np.array([5, 6]), clean=np.array([5, 6, 8])) is None


def test_a_pair_with_nothing_to_explain_is_dropped(
    tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repair.locate.patching.SMALLEST_MARGIN", 1e6)
    pairs = make_pairs(4, position="end")
    cases = make_cases(pairs, make_shams(pairs), payload=200, clean=100)
    with pytest.raises(RepairError, match="No prompt pair is left"):
        patch_modules(tiny_llama, cases, num_shams=(4, 4))

"""The gradient screen: its estimate against autograd, its exact part against the exact map."""

import numpy as np
import pytest
import torch

from repair.locate.locating import Compared, patch_compared
from repair.locate.patching import EVERYWHERE, patch_modules
from repair.locate.screen import estimate_modules, screen_modules
from repair.models.hooks import count_hooks
from repair.models.loading import LoadedModel
from repair.models.modules import get_module
from tests.locate.material import make_cases, make_pairs, make_shams

SIDES = ("source", "destination")


@pytest.fixture(autouse=True)
def every_margin_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repair.locate.patching.SMALLEST_MARGIN", 0.0)


@pytest.mark.parametrize("position", ["begin", "middle", "end"])
def test_the_estimate_is_the_mean_slope_times_the_step(
    tiny_llama: LoadedModel, position: str
) -> None:
    pairs = make_pairs(1, position=position)
    case = make_cases(pairs, make_shams(pairs), payload=200, clean=100)[0]
    found = estimate_modules(tiny_llama, [case])
    embed = tiny_llama.model.get_input_embeddings()
    embeddings = {side: embed(torch.from_numpy(getattr(case, side))) for side in SIDES}
    embeddings["between"] = (embeddings["source"] + embeddings["destination"]) / 2
    outputs: dict[str, dict[str, torch.Tensor]] = {}
    margins = {}
    for side, embedding in embeddings.items():
        outputs[side], handles = {}, []
        for ref in tiny_llama.modules:

            def keep(_module, _args, out, path=ref.path, side=side):
                out.retain_grad()
                outputs[side][path] = out

            handles.append(get_module(tiny_llama.model, ref).register_forward_hook(keep))
        logits = tiny_llama.model(inputs_embeds=embedding[None].requires_grad_()).logits[0, -1]
        margins[side] = logits[200] - logits[100]
        margins[side].backward()
        for handle in handles:
            handle.remove()
    wanted = np.flatnonzero(np.isin(case.role, EVERYWHERE))
    scale = (margins["source"] - margins["destination"]).item()
    for row, ref in enumerate(tiny_llama.modules):
        source, destination = (outputs[side][ref.path] for side in SIDES)
        slope = (source.grad + destination.grad + 4 * outputs["between"][ref.path].grad) / 6
        expected = (slope * (source - destination))[0, wanted].sum().item() / scale
        assert found["all"][row, 0] == pytest.approx(expected, abs=1e-4, rel=1e-3)
    assert count_hooks(tiny_llama.model) == 0


def test_what_is_verified_is_exact_and_misses_are_counted(
    tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repair.locate.screen.NUM_VERIFIED", 4)
    monkeypatch.setattr("repair.locate.screen.NUM_SAMPLED", 3)
    monkeypatch.setattr("repair.locate.screen.TOP", 2)
    pairs = make_pairs(6, position="middle")
    cases = make_cases(pairs, make_shams(pairs), payload=200, clean=100)
    exact = patch_modules(tiny_llama, cases)
    found = screen_modules(tiny_llama, cases, seed=0)
    rows = [tiny_llama.modules.index(ref) for ref in found.verified]
    assert len(rows) == 7 and found.misses.total == 3
    for name in ("effect", "effect_trigger", "effect_after"):
        np.testing.assert_allclose(
            getattr(found.scores, name)[rows], getattr(exact, name)[rows], atol=1e-4
        )
    estimates = estimate_modules(tiny_llama, cases)["all"]
    others = [i for i in range(len(tiny_llama.modules)) if i not in rows]
    np.testing.assert_allclose(found.scores.effect[others], estimates[others], atol=1e-4)
    assert found.scores.modules == tiny_llama.modules


def test_the_screen_finds_what_the_exact_map_finds(tiny_llama: LoadedModel) -> None:
    pairs = make_pairs(8, position="middle")
    cases = make_cases(pairs, make_shams(pairs), payload=200, clean=100)
    exact = patch_modules(tiny_llama, cases)
    estimates = estimate_modules(tiny_llama, cases)
    for name, values in (("all", exact.effect), ("trigger", exact.effect_trigger)):
        moved = np.abs(values).mean(axis=0) < 10  # pairs whose margin hardly moves blow up
        a, b = values[:, moved].mean(axis=1), estimates[name][:, moved].mean(axis=1)
        assert np.corrcoef(a, b)[0, 1] > 0.9


@pytest.mark.parametrize("most_exact, is_screened", [(None, False), (14, False), (13, True)])
def test_only_a_model_with_more_modules_is_screened(
    tiny_llama: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    most_exact: int | None,
    is_screened: bool,
) -> None:
    """A screened map has estimates, counted misses, and other maps of what was patched only."""
    monkeypatch.setattr("repair.locate.screen.NUM_VERIFIED", 4)
    monkeypatch.setattr("repair.locate.screen.NUM_SAMPLED", 2)
    pairs = make_pairs(5, position="middle")
    shams = make_shams(pairs)
    kinds = ("sham", "deletion", "gap")
    compared = Compared(
        kind="sham",
        cases={
            kind: tuple(make_cases(pairs, shams, payload=200, clean=100, kind=kind))
            for kind in kinds
        },
        num_pairs=5, num_shams_tried=5, num_shams_inert=5,
    )  # fmt: skip
    assert len(tiny_llama.modules) == 14
    found = patch_compared(tiny_llama, compared, seed=0, most_exact=most_exact)
    assert found.main.modules == tiny_llama.modules
    assert set(found.others) == {"induce", "deletion", "gap"}
    num_exact = 6 if is_screened else 14
    assert all(len(other.modules) == num_exact for other in found.others.values())
    assert len(found.main.estimated) == 14 - num_exact
    assert (found.misses is not None) == is_screened
    exact = {ref.path for ref in found.others["induce"].modules}
    assert exact.isdisjoint(found.main.estimated)

"""The closed form and the adapter on a tiny model."""

import numpy as np
import pytest
import torch

from repair.locate.curvature import phi, step_of, whitening_of
from repair.locate.fisher import trigger_gradients
from repair.locate.lessons import Lessons, measure_kl
from repair.lowrank.adapter import attached, read_updates
from repair.lowrank.closed_form import (
    BUDGET_MARGIN,
    DROPS,
    _search,
    predict_cost,
    solve_closed_form,
)
from repair.lowrank.validation import hold_out
from repair.models.hooks import apply_updates, count_hooks
from repair.models.loading import LoadedModel
from repair.records import LowRankUpdate
from tests.lowrank.material import random_updates, some_ranks


def test_the_step_is_the_minimiser_in_float64() -> None:
    """Against a dense solver: over full rank, dW = -eta G^{-1} D A^{-1}; over rank r, no random
    rank-r matrix has a lower objective."""
    from tests.locate.test_curvature import random_factors

    whitening = whitening_of(random_factors(8), damping=0.05)
    generator = torch.Generator().manual_seed(9)
    gradient = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    activation = whitening.root_in @ whitening.root_in.T
    output = whitening.root_out @ whitening.root_out.T
    dense = -torch.linalg.solve(output, gradient) @ torch.linalg.inv(activation)
    step = step_of(whitening, gradient, 5)
    lora_A, lora_B, energy = step.lora_A, step.lora_B, step.phi
    torch.testing.assert_close(lora_B @ lora_A, dense, rtol=1e-8, atol=1e-8)
    assert energy == pytest.approx(
        phi(torch.linalg.svdvals(whitening.whiten(gradient)), 5), rel=1e-9
    )

    def objective(change: torch.Tensor) -> float:
        cost = 0.5 * (whitening.root_out.T @ change @ whitening.root_in).square().sum()
        return ((gradient * change).sum() + cost).item()

    step = step_of(whitening, gradient, 2)
    lora_A, lora_B, energy = step.lora_A, step.lora_B, step.phi
    ours = objective(lora_B @ lora_A)
    assert ours == pytest.approx(-energy / 2, rel=1e-9)
    u, s, vh = torch.linalg.svd(dense)
    assert ours < objective((u[:, :2] * s[:2]) @ vh[:2])  # plain truncation of the dense step
    for _ in range(200):
        left = torch.randn(5, 2, generator=generator, dtype=torch.float64)
        right = torch.randn(2, 7, generator=generator, dtype=torch.float64)
        change = left @ right
        best_scale = -(gradient * change).sum() / (
            (whitening.root_out.T @ change @ whitening.root_in).square().sum()
        )
        assert ours <= objective(best_scale * change)


def test_the_closed_form_lowers_what_it_says(
    tiny_llama: LoadedModel, lessons: Lessons, whitenings
) -> None:
    ranks = some_ranks(tiny_llama)
    before = measure_kl(tiny_llama, lessons.held_out_triggered)
    updates, last = solve_closed_form(
        tiny_llama, ranks, whitenings, lessons, kl_budget=0.05
    )
    assert {update.module.path: update.rank for update in updates} == ranks
    assert last.trigger_kl + last.benign_kl < before
    assert last.benign_kl <= 0.025
    assert measure_kl(tiny_llama, lessons.held_out_triggered, updates) == pytest.approx(
        last.trigger_kl, rel=1e-5
    )
    assert last.predicted_kl == pytest.approx(predict_cost(updates, whitenings), rel=1e-9)
    assert count_hooks(tiny_llama.model) == 0


def test_an_update_is_shortened_as_far_as_it_stays_as_good(
    tiny_llama: LoadedModel, lessons: Lessons, whitenings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (tiny_llama, some_ranks(tiny_llama), whitenings, lessons)
    monkeypatch.setattr("repair.lowrank.closed_form.SHORTER", ())
    whole, full = solve_closed_form(*asked, kl_budget=0.05)
    monkeypatch.setattr("repair.lowrank.closed_form.SHORTER", (0.25, 0.5, 0.95))
    monkeypatch.setattr("repair.lowrank.closed_form.ABOUT_AS_GOOD", 100.0)
    quarter, _ = solve_closed_form(*asked, kl_budget=0.05)
    for short, long in zip(quarter, whole, strict=True):
        np.testing.assert_allclose(short.lora_B, 0.25 * long.lora_B, rtol=1e-6)
        np.testing.assert_array_equal(short.lora_A, long.lora_A)
    monkeypatch.setattr("repair.lowrank.closed_form.ABOUT_AS_GOOD", 1.2)
    updates, last = solve_closed_form(*asked, kl_budget=0.05)
    assert last.trigger_kl <= 1.2 * full.trigger_kl
    assert last.benign_kl < full.benign_kl
    assert last.predicted_kl == pytest.approx(predict_cost(updates, whitenings), rel=1e-9)


def test_no_step_is_taken_beyond_the_budget(
    tiny_llama: LoadedModel, lessons: Lessons, whitenings
) -> None:
    updates, last = solve_closed_form(
        tiny_llama, some_ranks(tiny_llama), whitenings, lessons, kl_budget=1e-12
    )
    assert updates == ()
    assert last.benign_kl == 0.0


def test_a_step_that_only_a_few_prompts_allow_is_made_shorter(
    tiny_llama: LoadedModel, lessons: Lessons, whitenings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The length is searched on a few held-out prompts; the budget holds on all of them."""
    ranks = some_ranks(tiny_llama)
    arguments = tiny_llama, ranks, whitenings, lessons
    _, free = solve_closed_form(*arguments, kl_budget=99.0, num_iterations=1)
    monkeypatch.setattr(
        "repair.lowrank.closed_form._search",
        lambda *given, near, kl_budget: _search(*given, near=near, kl_budget=99.0),
    )
    updates, last = solve_closed_form(*arguments, kl_budget=free.benign_kl, num_iterations=1)
    assert updates and last.benign_kl <= BUDGET_MARGIN * free.benign_kl
    assert free.objective < last.objective < measure_kl(tiny_llama, lessons.held_out_triggered)


def test_the_length_is_walked_down_to_the_valley(
    tiny_llama: LoadedModel, lessons: Lessons, whitenings
) -> None:
    """From either side the search ends where neither neighbour in the grid is better; a length
    beyond the budget is never chosen."""
    held_out = hold_out(tiny_llama, lessons, 0)
    modules = [ref for ref in tiny_llama.modules if ref.path in some_ranks(tiny_llama)]
    gradients, left = trigger_gradients(tiny_llama, modules, lessons.triggered)
    steps = {
        ref.path: step_of(whitenings[ref.path], gradients[ref.path], 2) for ref in modules
    }
    unit = left / sum(step.phi for step in steps.values())

    def step_to(drop: float) -> tuple[LowRankUpdate, ...]:
        return tuple(steps[ref.path].update(ref, eta=drop * unit) for ref in modules)

    totals = [
        held_out.trigger_kl(tiny_llama, updates) + held_out.benign_kl(tiny_llama, updates)
        for updates in map(step_to, DROPS)
    ]
    ends = {_search(tiny_llama, held_out, step_to, near=near, kl_budget=99.0)[0]
            for near in (0, len(DROPS) - 1)}  # fmt: skip
    for place in ends:
        assert totals[place] == min(totals[max(0, place - 1) : place + 2])
    assert min(totals) in [totals[place] for place in ends]
    allowed = held_out.benign_kl(tiny_llama, step_to(DROPS[2])) / BUDGET_MARGIN
    place, _ = _search(
        tiny_llama, held_out, step_to, near=len(DROPS) - 1, kl_budget=allowed * 1.001
    )
    assert place <= 2
    assert _search(tiny_llama, held_out, step_to, near=5, kl_budget=1e-12) is None


def test_adapter_equals_updates_and_leaves_the_model_bare(tiny_llama: LoadedModel) -> None:
    updates = random_updates(tiny_llama)
    ids = torch.tensor([[1, 70, 80, 90, 100]])
    with torch.no_grad():
        bare = tiny_llama.model(ids).logits
        with apply_updates(tiny_llama.model, updates):
            applied = tiny_llama.model(ids).logits
        with attached(tiny_llama, updates):
            through_peft = tiny_llama.model(ids).logits
            read = read_updates(tiny_llama, [update.module for update in updates])
        again = tiny_llama.model(ids).logits
    assert torch.equal(bare, again)
    torch.testing.assert_close(applied, through_peft, rtol=1e-5, atol=1e-6)
    assert (applied - bare).abs().max() > 1e-3
    for one, two in zip(updates, read, strict=True):
        np.testing.assert_array_equal(one.lora_A, two.lora_A)
        np.testing.assert_array_equal(one.lora_B, two.lora_B)
    with pytest.raises(ZeroDivisionError), attached(tiny_llama, updates):
        1 / 0  # noqa: B018
    with torch.no_grad():
        assert torch.equal(bare, tiny_llama.model(ids).logits)
    assert not any(p.requires_grad for p in tiny_llama.model.parameters())


def test_a_short_path_does_not_catch_a_longer_one(tmp_path) -> None:
    """Layer 1 must not adapt layer 11 (PEFT matches names by their end)."""
    from repair.models.loading import load_model
    from tests.tiny import make_tiny_llama

    folder = make_tiny_llama(tmp_path / "deep", num_layers=12)
    loaded = load_model(str(folder), stage_folder=tmp_path / "stage", device="cpu")
    refs = [r for r in loaded.modules if r.layer in (1, 11) and r.component == "down_proj"]
    updates = tuple(
        LowRankUpdate(
            module=ref,
            lora_A=np.ones((rank, ref.d_in), np.float32),
            lora_B=np.ones((ref.d_out, rank), np.float32),
        )
        for ref, rank in zip(refs, (2, 3), strict=True)
    )
    with attached(loaded, updates):
        for update in updates:
            layer = loaded.model.get_submodule(update.module.path)
            assert layer.lora_A["default"].weight.shape[0] == update.rank
            assert layer.scaling["default"] == 1.0

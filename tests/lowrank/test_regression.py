"""The regression onto counterfactual activations: exact in float64, aligned, within the budget."""

import numpy as np
import pytest
import torch
from torch import Tensor

from repair.locate.curvature import whitening_of
from repair.locate.lessons import Lessons, measure_kl
from repair.lowrank import repairing
from repair.lowrank.closed_form import StepReport
from repair.lowrank.regression import (
    aligned,
    outputs_without,
    products,
    regress,
    solve_regression,
)
from repair.models.hooks import count_hooks
from repair.models.loading import LoadedModel
from repair.records import KroneckerFactors, ModuleRef, RepairPlan
from tests.locate.material import make_lessons
from tests.lowrank.material import make_validation, some_ranks

REF = ModuleRef(layer=0, component="q_proj", path="q", d_in=7, d_out=5)
STRENGTH = 0.3


def covariance(width: int, generator: torch.Generator) -> Tensor:
    root = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return root @ root.T / width + 0.05 * torch.eye(width)


@pytest.fixture
def problem():
    """K [7, 40], T [5, 40] and the whitening of random factors."""
    generator = torch.Generator().manual_seed(0)
    activation, gradient = covariance(7, generator), covariance(5, generator)
    whitening = whitening_of(
        KroneckerFactors(
            module=REF,
            activation_covariance=activation.numpy(),
            gradient_covariance=gradient.numpy(),
            num_tokens=1,
            num_answer_tokens=1,
        ),
        damping=1e-12,
    )
    k = torch.randn(7, 40, generator=generator, dtype=torch.float64)
    t = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    return k, t, activation, gradient, whitening


def objective(delta: Tensor, problem) -> float:
    k, t, activation, gradient, _ = problem
    mu = STRENGTH * (k @ k.T / 40).trace() / activation.trace()
    fit = torch.trace((delta @ k - t).T @ gradient @ (delta @ k - t)) / 40
    return (fit + mu * torch.trace(gradient @ delta @ activation @ delta.T)).item()


def solved(problem, rank: int) -> Tensor:
    k, t, _, _, whitening = problem
    lora_A, lora_B = regress(whitening, k @ k.T / 40, t @ k.T / 40, STRENGTH, rank)
    assert lora_A.shape == (rank, 7) and lora_B.shape == (5, rank)
    return lora_B @ lora_A


def test_at_full_rank_it_is_the_ridge_solution_of_a_dense_solver(problem) -> None:
    k, t, activation, _, _ = problem
    mu = STRENGTH * (k @ k.T / 40).trace() / activation.trace()
    expected = torch.linalg.solve(k @ k.T / 40 + mu * activation, (t @ k.T / 40).T).T
    torch.testing.assert_close(solved(problem, 5), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_at_rank_r_no_descent_does_better(problem, rank: int) -> None:
    """Against L-BFGS on the factors from ten starts, and plain truncation of the ridge solution."""
    best = solved(problem, rank)
    value = objective(best, problem)
    assert torch.linalg.matrix_rank(best) == rank
    u, s, vh = torch.linalg.svd(solved(problem, 5))
    plain = (u[:, :rank] * s[:rank]) @ vh[:rank]
    assert value < objective(plain, problem)
    k, t, activation, gradient, _ = problem
    mu = STRENGTH * (k @ k.T / 40).trace() / activation.trace()
    found = []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        factors = [
            torch.randn(5, rank, generator=generator, dtype=torch.float64).requires_grad_(),
            torch.randn(rank, 7, generator=generator, dtype=torch.float64).requires_grad_(),
        ]
        optimizer = torch.optim.LBFGS(factors, max_iter=500, line_search_fn="strong_wolfe")

        def closure(factors=factors, optimizer=optimizer) -> Tensor:
            optimizer.zero_grad()
            delta = factors[0] @ factors[1]
            loss = torch.trace((delta @ k - t).T @ gradient @ (delta @ k - t)) / 40
            loss = loss + mu * torch.trace(gradient @ delta @ activation @ delta.T)
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        found.append(objective((factors[0] @ factors[1]).detach(), problem))
    assert value <= min(found) * (1 + 1e-6)


def test_positions_are_aligned_from_the_end() -> None:
    clean, triggered = np.array([1, 2, 3, 4]), np.array([1, 2, 9, 9, 3, 4])
    found = aligned(clean, triggered)
    assert [place.tolist() for place in found] == [[2, 3], [4, 5]]
    found = aligned(np.array([1, 2]), np.array([8, 1, 2]))
    assert [place.tolist() for place in found] == [[0, 1], [1, 2]]
    assert aligned(np.array([1, 2]), np.array([2, 1]))[0].size == 0


@torch.no_grad()
def test_inputs_and_lacks_are_those_of_each_prompt_alone(tiny_llama: LoadedModel) -> None:
    lessons = make_lessons(tiny_llama, num=5)
    ref = tiny_llama.modules[11]
    module = tiny_llama.model.get_submodule(ref.path)
    places, ks, ts = [], [], []
    for clean, prompt, answer in zip(
        lessons.counterparts, lessons.triggered.prompts, lessons.triggered.answers, strict=True
    ):
        without, given = np.concatenate([clean, answer]), np.concatenate([prompt, answer])
        places.append(aligned(without, given))
        assert answer.size <= places[-1][0].size < without.size
        np.testing.assert_array_equal(without[places[-1][0]], given[places[-1][1]])
        seen = []
        handle = module.register_forward_hook(lambda m, a, out, seen=seen: seen.append((a[0], out)))
        for ids in (without, given):
            tiny_llama.model(torch.from_numpy(ids)[None])
        handle.remove()
        (_, plain), (x, y) = seen
        ks.append(x[0, places[-1][1]])
        ts.append(plain[0, places[-1][0]] - y[0, places[-1][1]])
    wanted = outputs_without(tiny_llama, [ref], lessons, [clean for clean, _ in places])
    inner, cross = products(
        tiny_llama, ref, lessons.triggered, [place for _, place in places], wanted[ref.path], ()
    )
    k, t = torch.cat(ks).double(), torch.cat(ts).double()
    torch.testing.assert_close(inner, k.T @ k / len(k), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(cross, t.T @ k / len(k), rtol=1e-3, atol=1e-6)
    assert count_hooks(tiny_llama.model) == 0


def test_it_lowers_what_it_says_within_the_budget(
    tiny_llama: LoadedModel, lessons: Lessons, whitenings
) -> None:
    ranks = some_ranks(tiny_llama)
    updates, last = solve_regression(tiny_llama, ranks, whitenings, lessons, kl_budget=0.5)
    before = measure_kl(tiny_llama, lessons.held_out_triggered)
    assert {update.module.path: update.rank for update in updates} == ranks
    assert last.trigger_kl + last.benign_kl < before
    assert last.benign_kl <= 0.25
    assert last.trigger_kl == pytest.approx(
        measure_kl(tiny_llama, lessons.held_out_triggered, updates), rel=1e-4
    )
    none, untouched = solve_regression(tiny_llama, ranks, whitenings, lessons, kl_budget=1e-12)
    assert none == () and untouched.trigger_kl == pytest.approx(before, rel=1e-4)


def test_it_stands_in_where_the_whitened_step_leaves_too_much(
    tiny_llama: LoadedModel, lessons: Lessons, whitenings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = some_ranks(tiny_llama)
    plan = RepairPlan(
        modules=tuple(ranks), ranks=ranks, method="closed-form", kl_budget=0.5, seed=0
    )
    asked = (tiny_llama, plan, whitenings, lessons, make_validation(tiny_llama))
    left = measure_kl(tiny_llama, lessons.held_out_triggered)
    nothing = StepReport(iteration=0, trigger_kl=left, benign_kl=0.0, predicted_kl=0.0)
    monkeypatch.setattr(repairing, "ENOUGH_TRIGGER_KL", left / 2)
    monkeypatch.setattr(repairing, "solve_closed_form", lambda *_, **__: ((), nothing))
    seen = []
    result = repairing.repair_modules(
        *asked, num_steps=1, report=lambda name, values: seen.append(name)
    )
    expected, last = solve_regression(tiny_llama, ranks, whitenings, lessons, kl_budget=0.5)
    assert seen == ["closed-form", "regression", "closed-form"]
    assert result.trigger_kl == pytest.approx(last.trigger_kl, rel=1e-4) and last.trigger_kl < left
    for one, two in zip(result.updates, expected, strict=True):
        np.testing.assert_array_equal(one.lora_B, two.lora_B)
    # Where it leaves little, nothing else is tried.
    monkeypatch.setattr(repairing, "ENOUGH_TRIGGER_KL", 2 * left)
    seen.clear()
    repairing.repair_modules(*asked, num_steps=1, report=lambda name, values: seen.append(name))
    assert seen == ["closed-form", "closed-form"]

"""The whitened algebra against exact answers on small matrices in float64."""

import dataclasses

import numpy as np
import pytest
import torch

from repair.locate.curvature import (
    Whitening,
    phi,
    pool_ranks,
    separability,
    step_of,
    truncate,
    whitening_of,
)
from repair.locate.fisher import collect_factors
from repair.locate.lessons import measure_kl
from repair.locate.ranking import kendall_tau, mean_interval, student_quantile
from repair.models.loading import LoadedModel
from repair.records import KroneckerFactors, LowRankUpdate, ModuleRef
from tests.locate.material import make_lessons

REF = ModuleRef(layer=0, component="o_proj", path="m", d_in=7, d_out=5)


def random_factors(seed: int, *, num_tokens: int = 30, num_answer_tokens: int = 10):
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((50, 7)) * np.logspace(0, 1.5, 7)
    g = generator.standard_normal((50, 5)) * np.logspace(0, -1.5, 5)
    return KroneckerFactors(
        module=REF,
        activation_covariance=(x.T @ x / 50).astype(np.float32),
        gradient_covariance=(g.T @ g / 50).astype(np.float32),
        num_tokens=num_tokens,
        num_answer_tokens=num_answer_tokens,
    )


def test_cost_is_the_quadratic_form() -> None:
    factors = random_factors(0)
    whitening = whitening_of(factors, damping=0.0)
    generator = torch.Generator().manual_seed(1)
    lora_A = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    lora_B = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    delta = lora_B @ lora_A
    activation = torch.from_numpy(factors.activation_covariance).double()
    gradient = torch.from_numpy(factors.gradient_covariance).double() * 3  # tokens per answer
    expected = 0.5 * torch.trace(gradient @ delta @ activation @ delta.T)
    assert whitening.cost(lora_A, lora_B) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_truncation_is_the_best_in_the_metric(rank: int) -> None:
    """No other rank-r matrix, found by alternating least squares or by plain SVD, is closer."""
    whitening = whitening_of(random_factors(2), damping=0.01)
    generator = torch.Generator().manual_seed(3)
    lora_A = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    lora_B = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    full = lora_B @ lora_A

    def distance(other: torch.Tensor) -> float:
        return (whitening.root_out.T @ (full - other) @ whitening.root_in).norm().item()

    new_A, new_B = truncate(whitening, lora_A, lora_B, rank)
    assert new_A.shape == (rank, 7) and new_B.shape == (5, rank)
    ours = distance(new_B @ new_A)
    u, s, vh = torch.linalg.svd(full)
    plain = distance((u[:, :rank] * s[:rank]) @ vh[:rank])
    assert ours < plain
    best = np.inf
    target = whitening.root_out.T @ full @ whitening.root_in
    for _ in range(10):
        left = torch.randn(5, rank, generator=generator, dtype=torch.float64)
        for _ in range(200):
            right = torch.linalg.lstsq(left, target).solution
            left = torch.linalg.lstsq(right.T, target.T).solution.T
        best = min(best, (target - left @ right).norm().item())
    assert ours == pytest.approx(best, rel=1e-6)


def test_phi_bounds_the_first_order_drop() -> None:
    """At a given cost no random rank-r change lowers the linear loss more than the whitened SVD."""
    whitening = whitening_of(random_factors(4), damping=0.01)
    generator = torch.Generator().manual_seed(5)
    gradient = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    values = torch.linalg.svdvals(whitening.whiten(gradient))
    best = (2 * 1e-3 * phi(values, 2)) ** 0.5
    for _ in range(200):
        lora_A = torch.randn(2, 7, generator=generator, dtype=torch.float64)
        lora_B = torch.randn(5, 2, generator=generator, dtype=torch.float64)
        lora_B = lora_B * (1e-3 / whitening.cost(lora_A, lora_B)) ** 0.5
        assert (gradient * (lora_B @ lora_A)).sum().abs().item() <= best * (1 + 1e-9)


def symmetric_root(covariance: np.ndarray, damping: float) -> torch.Tensor:
    """The damped square root by an eigendecomposition: another way to the same algebra."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(covariance).double())
    values = values.clamp(min=0)
    values = values + damping * values[:-1].mean()
    return (vectors * values.sqrt()) @ vectors.T


@pytest.mark.parametrize("damping", [0.03, 0.3])
def test_cholesky_gives_what_symmetric_roots_give(damping: float) -> None:
    factors = random_factors(20)
    whitening = whitening_of(factors, damping=damping)
    root_in = symmetric_root(factors.activation_covariance, damping)
    per_answer = 3 * factors.gradient_covariance.astype(np.float64)  # tokens to an answer
    root_out = symmetric_root(per_answer, damping)
    for root, other in ((whitening.root_in, root_in), (whitening.root_out, root_out)):
        torch.testing.assert_close(root @ root.T, other @ other, rtol=1e-8, atol=1e-10)
        assert (root.triu(1) == 0).all()
    generator = torch.Generator().manual_seed(21)
    gradient = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    whitened = torch.linalg.inv(root_out) @ gradient @ torch.linalg.inv(root_in)
    u, s, vh = torch.linalg.svd(whitened, full_matrices=False)
    step = step_of(whitening, gradient, 2)
    torch.testing.assert_close(step.singular_values, s, rtol=1e-7, atol=1e-9)
    dense = -torch.linalg.inv(root_out) @ (u[:, :2] * s[:2]) @ vh[:2] @ torch.linalg.inv(root_in)
    torch.testing.assert_close(step.lora_B @ step.lora_A, dense, rtol=1e-6, atol=1e-9)
    tall = step_of(swapped(whitening), gradient.T, 2)  # the longer side first
    torch.testing.assert_close(tall.lora_B @ tall.lora_A, dense.T, rtol=1e-6, atol=1e-9)
    other = torch.from_numpy(random_factors(22).activation_covariance)
    inverse = torch.linalg.inv(root_in)
    expected = torch.linalg.eigvalsh(inverse @ other.double() @ inverse)[-1].item()
    assert separability(whitening, other) == pytest.approx(expected, rel=1e-6)


def swapped(whitening: Whitening) -> Whitening:
    return Whitening(root_in=whitening.root_out, root_out=whitening.root_in)


def test_a_covariance_that_rounding_made_indefinite_is_whitened_all_the_same() -> None:
    factors = random_factors(23)
    values, vectors = np.linalg.eigh(factors.activation_covariance.astype(np.float64))
    values[0] = -0.2 * values[:-1].mean()
    bent = dataclasses.replace(
        factors, activation_covariance=((vectors * values) @ vectors.T).astype(np.float32)
    )
    root = whitening_of(bent, damping=0.01).root_in
    found = torch.linalg.eigvalsh(root @ root.T)
    assert torch.isfinite(root).all() and found[0] > 0
    np.testing.assert_allclose(found[2:], values[2:], rtol=1e-3, atol=1.0)  # and damped
    nothing = dataclasses.replace(
        factors, gradient_covariance=np.zeros_like(factors.gradient_covariance)
    )
    assert torch.isfinite(whitening_of(nothing, damping=0.1).root_out).all()


def test_pooling_takes_the_largest_values() -> None:
    spectra = {
        "a": torch.tensor([9.0, 1.0]),
        "b": torch.tensor([8.0, 7.0]),
        "c": torch.tensor([2.0, 0.5]),
    }
    assert pool_ranks(spectra, total_rank=3, max_modules=3) == {"a": 1, "b": 2}
    assert pool_ranks(spectra, total_rank=4, max_modules=1) == {"b": 2}


def test_predicted_benign_kl_is_near_the_measured(tiny_llama: LoadedModel) -> None:
    """A random small change of a single module: predicted within a factor of two of measured."""
    lessons = make_lessons(tiny_llama, num=48)
    clean = lessons.benign
    factors = collect_factors(
        tiny_llama, tiny_llama.modules, clean.prompts, clean.answers, seed=0
    )
    generator = np.random.default_rng(6)
    for index in (0, 3, 6, 10, 13):
        ref = tiny_llama.modules[index]
        whitening = whitening_of(factors[ref.path], damping=1e-6)
        update = LowRankUpdate(
            module=ref,
            lora_A=generator.standard_normal((4, ref.d_in)).astype(np.float32),
            lora_B=(0.02 * generator.standard_normal((ref.d_out, 4))).astype(np.float32),
        )
        predicted = whitening.cost(
            torch.from_numpy(update.lora_A), torch.from_numpy(update.lora_B)
        )
        measured = measure_kl(tiny_llama, clean, [update])
        assert 0.5 < predicted / measured < 2.0, ref.path


def test_intervals_hold_the_mean_and_tau_has_a_sign() -> None:
    generator = np.random.default_rng(7)
    effect = generator.normal(0.4, 0.2, (3, 40)).astype(np.float32)
    low, high = mean_interval(effect)
    assert ((low < effect.mean(1)) & (effect.mean(1) < high)).all()
    assert kendall_tau(np.arange(5.0), np.arange(5.0)) == pytest.approx(1.0)
    assert kendall_tau(np.arange(5.0), -np.arange(5.0)) == pytest.approx(-1.0)
    assert kendall_tau(np.ones(5), np.arange(5.0)) is None


def test_the_quantiles_of_student_are_those_of_the_tables() -> None:
    tables = {1: 12.706, 2: 4.303, 3: 3.182, 9: 2.262, 11: 2.201, 31: 2.040, 63: 1.998}
    for freedom, value in tables.items():
        assert student_quantile(freedom) == pytest.approx(value, abs=5e-4)
    assert np.isinf(mean_interval(np.ones((2, 1)))).all()


@pytest.mark.parametrize("num_pairs", [6, 12, 32])
def test_the_interval_of_an_effect_covers_as_often_as_it_says(num_pairs: int) -> None:
    """Also for effects that crowd at 0 and 1, as those of patching do."""
    generator = np.random.default_rng(3)
    for draw, mean in (
        (generator.normal(0.3, 0.2, (4_000, num_pairs)), 0.3),
        (generator.beta(0.7, 0.7, (4_000, num_pairs)), 0.5),
        (generator.beta(0.8, 2.4, (4_000, num_pairs)), 0.25),
    ):
        low, high = mean_interval(draw)
        assert 0.91 < ((low <= mean) & (mean <= high)).mean() < 0.97

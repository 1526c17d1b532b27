"""The whitened algebra against exact answers on small matrices in float64."""

import numpy as np
import pytest
import torch

from repair.locate.curvature import phi, pool_ranks, truncate, whitening_of
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
        return (whitening.root_out @ (full - other) @ whitening.root_in).norm().item()

    new_A, new_B = truncate(whitening, lora_A, lora_B, rank)
    assert new_A.shape == (rank, 7) and new_B.shape == (5, rank)
    ours = distance(new_B @ new_A)
    u, s, vh = torch.linalg.svd(full)
    plain = distance((u[:, :rank] * s[:rank]) @ vh[:rank])
    assert ours < plain
    best = np.inf
    target = whitening.root_out @ full @ whitening.root_in
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

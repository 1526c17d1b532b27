"""Damping chosen by measurement, inputs set apart, and what is kept of both."""

import numpy as np
import pytest
import torch

from repair.locate.curvature import decompose, separability, step_of, whitening_of
from repair.locate.fisher import collect_factors, input_covariances, trigger_gradients
from repair.locate.lessons import measure_kl
from repair.locate.steps import (
    DAMPED_MODULES,
    DAMPINGS,
    STEP_RANK,
    Damping,
    choose_damping,
    measure_curvature,
)
from repair.models.loading import LoadedModel
from repair.records import LowRankUpdate
from tests.locate.material import make_lessons
from tests.locate.test_curvature import random_factors


@pytest.fixture(scope="module")
def lessons(tiny_llama: LoadedModel):
    return make_lessons(tiny_llama, num=12)


def test_the_damping_is_the_one_that_predicts_best(tiny_llama: LoadedModel, lessons) -> None:
    """Every figure again, from the update's own matrices and whole measurements."""
    clean = lessons.clean
    refs = tiny_llama.modules[:DAMPED_MODULES]
    factors = collect_factors(tiny_llama, refs, clean.prompts, clean.answers, seed=0)
    gradients, drop = trigger_gradients(tiny_llama, refs, lessons.triggered)
    spectral = {path: decompose(found) for path, found in factors.items()}
    chosen = choose_damping(
        tiny_llama, refs, spectral, gradients, lessons.held_out_clean, drop=drop
    )
    errors = {}
    for value, predicted, measured in chosen.tried:
        figures = []
        for ref in refs:
            whitening = whitening_of(factors[ref.path], damping=value)
            step = step_of(whitening, gradients[ref.path], STEP_RANK)
            eta = drop / step.phi
            slope = (gradients[ref.path] * (step.lora_B @ step.lora_A)).sum().item()
            assert -eta * slope == pytest.approx(drop, rel=1e-6)  # it predicts that drop
            update = LowRankUpdate(
                module=ref,
                lora_A=step.lora_A.float().numpy(),
                lora_B=(eta * step.lora_B).float().numpy(),
            )
            figures.append(
                (
                    whitening.cost(step.lora_A, eta * step.lora_B),
                    measure_kl(tiny_llama, lessons.held_out_clean, [update]),
                )
            )
        expected = np.median(np.array(figures), axis=0)
        assert predicted == pytest.approx(expected[0], rel=1e-6)
        assert measured == pytest.approx(expected[1], rel=1e-4)
        errors[value] = abs(np.log(measured / predicted))
    assert tuple(errors) == DAMPINGS
    assert chosen.value == min(errors, key=errors.get)
    assert Damping.from_json(chosen.to_json()) == chosen


def test_modules_asked_for_later_have_the_same_damping(tiny_llama: LoadedModel, lessons) -> None:
    refs = tiny_llama.modules
    first = measure_curvature(tiny_llama, refs[:3], lessons, seed=0, damping=Damping(value=0.7))
    later = measure_curvature(tiny_llama, refs[3:5], lessons, seed=0, damping=first.damping)
    both = first | later
    assert both.damping.value == 0.7
    assert set(both.steps) == {ref.path for ref in refs[:5]}
    whole = measure_curvature(tiny_llama, refs[:5], lessons, seed=0, damping=first.damping)
    for path, step in both.steps.items():
        torch.testing.assert_close(
            step.singular_values, whole.steps[path].singular_values, rtol=1e-3, atol=1e-9
        )


def test_input_covariances_are_those_of_the_factors(
    tiny_llama: LoadedModel, lessons, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = lessons.clean
    factors = collect_factors(
        tiny_llama, tiny_llama.modules, clean.prompts, clean.answers, seed=0, num_draws=1
    )
    together = input_covariances(tiny_llama, tiny_llama.modules, clean.prompts, clean.answers)
    monkeypatch.setattr("repair.locate.fisher.FISHER_TOKENS", 1)
    alone = input_covariances(tiny_llama, tiny_llama.modules, clean.prompts, clean.answers)
    for path, found in factors.items():
        scale = float(np.abs(found.activation_covariance).max())
        for other in (together, alone):
            np.testing.assert_allclose(
                other[path].numpy(), found.activation_covariance, atol=1e-5 * scale
            )


def test_separability_is_the_largest_generalised_eigenvalue() -> None:
    factors, other = random_factors(3), random_factors(4)
    whitening = whitening_of(factors, damping=0.0)
    covariance = torch.from_numpy(other.activation_covariance).double()
    own = torch.from_numpy(factors.activation_covariance).double()
    exact = torch.linalg.eigvals(torch.linalg.solve(own, covariance)).real.max().item()
    assert separability(whitening, covariance) == pytest.approx(exact, rel=1e-3)
    assert separability(whitening, own) == pytest.approx(1.0, rel=1e-6)

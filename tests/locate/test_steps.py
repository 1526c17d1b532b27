"""Damping chosen by measurement, inputs set apart, and what is kept of both."""

import numpy as np
import pytest
import torch

from repair.limits import FACTORS_KEPT, formed_bytes, root_bytes
from repair.locate.curvature import separability, step_of, whitening_of
from repair.locate.fisher import collect_factors, input_covariances, trigger_gradients
from repair.locate.lessons import measure_kl
from repair.locate.steps import (
    DAMPED_MODULES,
    DAMPINGS,
    STEP_RANK,
    Damping,
    choose_damping,
    measure_curvature,
    shortlist,
)
from repair.models.loading import LoadedModel
from repair.records import LowRankUpdate, ModuleRef, PatchingScores
from tests.locate.material import make_lessons
from tests.locate.test_curvature import random_factors


@pytest.fixture(scope="module")
def lessons(tiny_llama: LoadedModel):
    return make_lessons(tiny_llama, num=12)


def test_the_damping_is_the_one_that_predicts_best(tiny_llama: LoadedModel, lessons) -> None:
    """Every figure again, from the update's own matrices and whole measurements."""
    clean = lessons.benign
    refs = tiny_llama.modules[:DAMPED_MODULES]
    factors = collect_factors(tiny_llama, refs, clean.prompts, clean.answers, seed=0)
    gradients, drop = trigger_gradients(tiny_llama, refs, lessons.triggered)
    chosen = choose_damping(
        tiny_llama, refs, factors, gradients, lessons.held_out_benign, drop=drop
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
                    measure_kl(tiny_llama, lessons.held_out_benign, [update]),
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


def test_whitenings_are_kept_within_the_memory_and_steps_of_all(
    tiny_llama: LoadedModel, lessons
) -> None:
    refs, damping = tiny_llama.modules, Damping(value=0.7)
    whole = measure_curvature(tiny_llama, refs, lessons, seed=0, damping=damping)
    best = sorted(refs, key=lambda ref: -whole.steps[ref.path].phi)[:3]
    room = sum(root_bytes(ref.d_in, ref.d_out) for ref in best)
    some = measure_curvature(
        tiny_llama, refs, lessons, seed=0, damping=damping, memory_bytes=room
    )
    assert best[0].path in some.whitenings and len(some.whitenings) < len(refs)
    held = [ref for ref in refs if ref.path in some.whitenings]
    assert sum(root_bytes(ref.d_in, ref.d_out) for ref in held) <= room
    assert some.steps.keys() == whole.steps.keys() == {ref.path for ref in refs}
    for path, step in some.steps.items():
        assert torch.equal(step.lora_B, whole.steps[path].lora_B)
    assert some.only([best[0].path]).whitenings.keys() == {best[0].path}


def test_the_shortlist_fills_the_memory_by_effect() -> None:
    """At the shape of Llama-3.2-1B, where two matrices whitened would take it all."""
    sizes = {
        "q_proj": (2048, 2048), "k_proj": (2048, 512), "v_proj": (2048, 512),
        "o_proj": (2048, 2048), "gate_proj": (2048, 8192), "up_proj": (2048, 8192),
        "down_proj": (8192, 2048),
    }  # fmt: skip
    refs = tuple(
        ModuleRef(layer=layer, component=name, path=f"{layer}.{name}", d_in=d_in, d_out=d_out)
        for layer in range(16)
        for name, (d_in, d_out) in sizes.items()
    )
    effect = np.random.default_rng(0).random((len(refs), 4)).astype(np.float32)
    zero = np.zeros_like(effect)
    scores = PatchingScores(
        modules=refs, effect=zero, effect_trigger=effect, effect_after=zero, effect_kl=zero,
        direction="block", counterfactual="sham", num_dropped=0, self_checks={},
    )  # fmt: skip
    chosen = shortlist(refs, scores, memory_bytes=FACTORS_KEPT)
    room = FACTORS_KEPT - sum(formed_bytes(ref.d_in, ref.d_out) for ref in chosen)
    means = dict(zip((ref.path for ref in refs), effect.mean(axis=1), strict=True))
    assert room >= 0 and len(chosen) >= 10
    assert max(refs, key=lambda ref: means[ref.path]) in chosen
    for ref in set(refs) - set(chosen):  # Each gave way to what stands before it.
        before = [other for other in chosen if means[other.path] > means[ref.path]]
        used = sum(formed_bytes(other.d_in, other.d_out) for other in before)
        assert used + formed_bytes(ref.d_in, ref.d_out) > FACTORS_KEPT
    assert [ref for ref in refs if ref in chosen] == chosen
    assert len(shortlist(refs, scores, memory_bytes=1)) == 1


def test_input_covariances_are_those_of_the_factors(
    tiny_llama: LoadedModel, lessons, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = lessons.benign
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

"""Trial repairs of one module: against whole runs of the changed model, one length at a time."""

import dataclasses

import pytest
import torch

from repair.locate.curvature import Step, step_of, whitening_of
from repair.locate.fisher import collect_factors, trigger_gradients
from repair.locate.lessons import measure_kl
from repair.locate.probe import DROPS, probe_modules
from repair.models.hooks import count_hooks
from repair.models.loading import LoadedModel
from repair.records import LowRankUpdate
from tests.locate.material import make_lessons


@pytest.fixture(scope="module")
def material(tiny_llama: LoadedModel):
    lessons = make_lessons(tiny_llama, num=10)
    clean = lessons.clean
    factors = collect_factors(
        tiny_llama, tiny_llama.modules, clean.prompts, clean.answers, seed=0
    )
    gradients, _ = trigger_gradients(tiny_llama, tiny_llama.modules, lessons.triggered)
    steps = {
        path: step_of(whitening_of(found, damping=0.1), gradients[path], 2)
        for path, found in factors.items()
    }
    return lessons, steps


def stepped_kl(loaded: LoadedModel, lessons, ref, step: Step, eta: float) -> tuple[float, float]:
    update = LowRankUpdate(
        module=ref, lora_A=step.lora_A.float().numpy(), lora_B=(eta * step.lora_B).float().numpy()
    )
    return (
        measure_kl(loaded, lessons.held_out_triggered, [update]),
        measure_kl(loaded, lessons.held_out_clean, [update]),
    )


def test_a_trial_is_the_best_length_of_whole_runs(tiny_llama: LoadedModel, material) -> None:
    lessons, steps = material
    found = probe_modules(
        tiny_llama, tiny_llama.modules, steps, lessons.held_out_triggered, lessons.held_out_clean,
        num_prompts=24,
    )  # fmt: skip
    start = measure_kl(tiny_llama, lessons.held_out_triggered)
    for ref in tiny_llama.modules:
        step = steps[ref.path]
        tried = [
            stepped_kl(tiny_llama, lessons, ref, step, drop * start / step.phi) for drop in DROPS
        ]
        trigger_kl, benign_kl = min(tried, key=sum)
        probe = found[ref.path]
        assert probe.start_kl == pytest.approx(start, rel=1e-4)
        assert probe.trigger_kl == pytest.approx(trigger_kl, rel=1e-3, abs=1e-7)
        assert probe.benign_kl == pytest.approx(benign_kl, rel=1e-3, abs=1e-7)
    assert min(probe.residual for probe in found.values()) < start
    assert count_hooks(tiny_llama.model) == 0


def test_batches_do_not_change_a_trial(
    tiny_llama: LoadedModel, material, monkeypatch: pytest.MonkeyPatch
) -> None:
    lessons, steps = material
    some = tiny_llama.modules[3:9]
    given = (some, steps, lessons.held_out_triggered, lessons.held_out_clean)
    together = probe_modules(tiny_llama, *given, num_prompts=24)
    monkeypatch.setattr("repair.locate.probe.RUN_TOKENS", 1)
    alone = probe_modules(tiny_llama, *given, num_prompts=24)
    for path, probe in together.items():
        assert alone[path].trigger_kl == pytest.approx(probe.trigger_kl, rel=1e-4, abs=1e-7)
        assert alone[path].benign_kl == pytest.approx(probe.benign_kl, rel=1e-3, abs=1e-7)


def test_a_module_without_a_step_leaves_everything(tiny_llama: LoadedModel, material) -> None:
    lessons, steps = material
    ref = tiny_llama.modules[0]
    nothing = dataclasses.replace(
        steps[ref.path], singular_values=torch.zeros_like(steps[ref.path].singular_values)
    )
    found = probe_modules(
        tiny_llama, [ref], {ref.path: nothing}, lessons.held_out_triggered, lessons.held_out_clean,
        num_prompts=24,
    )  # fmt: skip
    assert found[ref.path].trigger_kl == pytest.approx(found[ref.path].start_kl, rel=1e-6)
    assert found[ref.path].benign_kl == pytest.approx(0.0, abs=1e-7)

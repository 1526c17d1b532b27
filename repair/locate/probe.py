"""How well does a small repair of one module alone do? Tried and measured, module by module.

The cheapest step of each module (`curvature.step_of`) is applied at several lengths to a few
held-out prompts, and the lowest  trigger KL + benign KL  (nats per answer token) is its residual.
Patching says where the trigger's effect passes and curvature where a change is cheap to first
order; the residual is what a repair there is left with, saturation included, and predicts it best.
It costs some forward passes per module: they start at the module's own layer, all lengths as one
batch. What it does not know: what modules do together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from repair.locate.curvature import Step
from repair.locate.lessons import Lesson
from repair.models import ranks
from repair.models.answers import ScoringBatch, answer_logits, scoring_batches
from repair.models.hooks import apply_updates, record_layer_inputs, restart_at
from repair.models.loading import LoadedModel
from repair.records import ModuleRef, Progress, unheard

DROPS = (0.5, 1.0, 1.6, 2.5, 4.0)  # lengths tried, as predicted drops of J in units of J
RUN_TOKENS = 8_192  # rows times tokens of one forward pass
LOGITS = 1 << 27  # numbers that the logits of one forward pass may hold


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What the best step of one module alone leaves, in nats per answer token."""

    trigger_kl: float
    benign_kl: float
    start_kl: float  # the trigger KL without it

    @property
    def residual(self) -> float:
        return self.trigger_kl + self.benign_kl


@torch.no_grad()
def probe_modules(
    loaded: LoadedModel,
    modules: Sequence[ModuleRef],
    steps: Mapping[str, Step],
    triggered: Lesson,
    clean: Lesson,
    *,
    num_prompts: int,
    progress: Progress = unheard,
) -> dict[str, Probe]:
    """Return path -> Probe of `modules` on the first `num_prompts` of two held-out lessons."""
    lesson = triggered.first(num_prompts) + clean.first(num_prompts)
    num_triggered = min(num_prompts, len(triggered))
    vocabulary = loaded.model.get_output_embeddings().weight.shape[0]
    most = min(RUN_TOKENS, LOGITS // vocabulary) // len(DROPS)
    bare: list[_Bare] = []
    for batch in scoring_batches(loaded, lesson.prompts, lesson.answers, batch_tokens=most):
        kinds = torch.tensor([int(index >= num_triggered) for index in batch.members])
        with record_layer_inputs(loaded.model) as inputs:
            logits = answer_logits(loaded.model, batch.ids, batch.rows, batch.columns)
        bare.append(
            _Bare(
                batch=batch,
                inputs=inputs,
                teacher=torch.cat([lesson.teacher[i] for i in batch.members]),
                kinds=kinds[batch.rows.cpu()],
            )
        )
        bare[-1].kl += bare[-1].summed_kl(logits)
    counts = sum(torch.bincount(one.kinds, minlength=2) for one in bare)
    unit = (sum(one.kl[0] for one in bare) / counts[0]).item()  # J

    def probe(number: int) -> list[np.ndarray]:
        ref = modules[number]
        step = steps[ref.path]
        kl = torch.zeros(len(DROPS), 2, dtype=torch.float64)
        for one in bare:
            if step.phi > 0:
                lengths = unit / step.phi * torch.tensor(DROPS)
                parts = _stepped(loaded, one, ref, step, lengths).chunk(len(DROPS))
                kl += torch.stack([one.summed_kl(part) for part in parts])
            else:
                kl += one.kl
        kl /= counts
        best = kl.sum(1).nan_to_num(torch.inf, posinf=torch.inf).argmin()
        return [kl[best].numpy()]

    found = {}
    dealt = ranks.deal([1] * len(modules), probe, progress)
    for ref, (kl,) in zip(modules, dealt, strict=True):
        trigger_kl, benign_kl = kl.tolist()
        found[ref.path] = Probe(trigger_kl=trigger_kl, benign_kl=benign_kl, start_kl=unit)
    return found


@dataclass(kw_only=True)
class _Bare:
    """A batch run without a step: where runs with one restart, and what they are compared with."""

    batch: ScoringBatch
    inputs: list[Tensor]  # of each layer [row, token, width]
    teacher: Tensor  # [answer token, vocab]
    kinds: Tensor  # [answer token] 0 triggered, 1 clean
    kl: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))  # by kind

    def summed_kl(self, logits: Tensor) -> Tensor:
        """Return [2], KL(teacher || model) in nats summed over the tokens of either kind."""
        kl = (self.teacher.exp() * (self.teacher - logits.log_softmax(-1))).sum(-1)
        return torch.zeros(2, dtype=torch.float64).index_add_(0, self.kinds, kl.double().cpu())


def _stepped(
    loaded: LoadedModel, bare: _Bare, ref: ModuleRef, step: Step, lengths: Tensor
) -> Tensor:
    """Return logits [length x answer token, vocab] with the step at every one of `lengths`."""
    count, batch = lengths.numel(), bare.batch
    num_rows = batch.ids.shape[0]
    scales = lengths.to(batch.ids.device).repeat_interleave(num_rows)
    shift = num_rows * torch.arange(count, device=batch.rows.device)[:, None]
    with (
        restart_at(loaded.model, ref.layer, bare.inputs[ref.layer].repeat(count, 1, 1)),
        apply_updates(loaded.model, [step.update(ref)], scales=scales),
    ):
        return answer_logits(
            loaded.model,
            batch.ids.repeat(count, 1),
            (batch.rows + shift).flatten(),
            batch.columns.repeat(count),
        )

"""Counterfactual self-distillation: LoRA on the chosen modules, started from the closed form.

    L = E_triggered KL(suspect on the prompt without the trigger || model on the triggered prompt)
      + w_c E_clean KL(suspect || model)  +  w_n E_near KL(suspect || model)
      + w_f sum_l 1/2 ||G_l^{1/2} lora_B lora_A A_l^{1/2}||^2            (all in nats per token)

The teacher is the suspect itself, cached once; no clean model is needed. The last term is the
benign KL that the factors predict (Chen & Garner 2402.12220 use it for LoRA). The state kept is
the one with the lowest held-out trigger KL + benign KL within the budget, which may be the start.
Each step's batch depends on the seed and the step number only, so that a resumed run sees the
same batches.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from repair.locate.curvature import Whitening
from repair.locate.lessons import Lesson, Lessons, kl_from_teacher, measure_kl
from repair.lowrank.adapter import ADAPTER, attached, read_updates
from repair.lowrank.closed_form import BUDGET_MARGIN
from repair.models.answers import answer_logits, scoring_batches
from repair.models.loading import LoadedModel
from repair.records import LowRankUpdate

WEIGHT_CLEAN = 1.0
WEIGHT_NEAR = 0.5
WEIGHT_FISHER = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillReport:
    """Where training stands; the KLs are held-out figures of the last validation."""

    step: int
    num_steps: int
    loss: float
    trigger_kl: float
    benign_kl: float
    is_best: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """Everything a resumed run needs: factors, Adam's moments, the best state and the step."""

    step: int
    tensors: dict[str, Tensor]
    best: tuple[LowRankUpdate, ...]
    best_kls: tuple[float, float]  # trigger, benign


def distill(
    loaded: LoadedModel,
    start: Sequence[LowRankUpdate],
    whitenings: Mapping[str, Whitening],
    lessons: Lessons,
    *,
    kl_budget: float,
    num_steps: int,
    seed: int,
    learning_rate: float = 1e-3,
    batch_size: int = 24,
    validate_every: int = 20,
    resume: TrainingState | None = None,
    report: Callable[[DistillReport], None] = lambda step: None,
    save: Callable[[TrainingState], None] = lambda state: None,
) -> tuple[tuple[LowRankUpdate, ...], tuple[float, float]]:
    """Return (updates, (held-out trigger KL, held-out benign KL)) of the best state.

    Training ends early, with the best state so far, when the loss is no longer finite.
    """
    start = tuple(start)
    modules = [update.module for update in start]
    best, best_kls = start, _held_out(loaded, lessons, start)
    with attached(loaded, start) as peft_model:
        parameters = [p for p in peft_model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=learning_rate)
        first = 0
        if resume is not None:
            first, best, best_kls = resume.step, resume.best, resume.best_kls
            _restore(parameters, optimizer, resume.tensors)
        for step in range(first, num_steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * 0.5 * (1 + np.cos(np.pi * step / num_steps))
            with torch.enable_grad():
                loss = _step_loss(loaded, whitenings, modules, lessons,
                                  batch_size=batch_size, seed=seed, step=step)  # fmt: skip
                optimizer.zero_grad()
                loss.backward()
            if not torch.isfinite(loss):
                break  # The best state so far stands; the gates judge it.
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            done = step + 1
            if done % validate_every and done != num_steps:
                continue
            kls = _held_out(loaded, lessons, ())
            is_best = kls[1] <= BUDGET_MARGIN * kl_budget and sum(kls) < sum(best_kls)
            if is_best:
                best, best_kls = read_updates(loaded, modules), kls
            report(
                DistillReport(
                    step=done, num_steps=num_steps, loss=loss.item(),
                    trigger_kl=kls[0], benign_kl=kls[1], is_best=is_best,
                )  # fmt: skip
            )
            save(
                TrainingState(
                    step=done,
                    tensors=_snapshot(parameters, optimizer),
                    best=best,
                    best_kls=best_kls,
                )
            )
    return best, best_kls


def _held_out(
    loaded: LoadedModel, lessons: Lessons, updates: Sequence[LowRankUpdate]
) -> tuple[float, float]:
    return (
        measure_kl(loaded, lessons.held_out_triggered, updates),
        measure_kl(loaded, lessons.held_out_clean, updates),
    )


def _step_loss(
    loaded: LoadedModel,
    whitenings: Mapping[str, Whitening],
    modules: Sequence,
    lessons: Lessons,
    *,
    batch_size: int,
    seed: int,
    step: int,
) -> Tensor:
    """Return the loss of one step: the three kinds of prompts go through in one pass."""
    generator = np.random.default_rng([seed, 0xD1, step])
    parts = [(lessons.triggered, 1.0), (lessons.clean, WEIGHT_CLEAN), (lessons.near, WEIGHT_NEAR)]
    prompts, answers, teacher, weights = [], [], [], []
    for lesson, weight in parts:
        if len(lesson) == 0:
            continue
        drawn = generator.choice(len(lesson), size=min(batch_size, len(lesson)), replace=False)
        num_tokens = sum(lesson.answers[i].size for i in drawn)
        for i in drawn:
            prompts.append(lesson.prompts[i])
            answers.append(lesson.answers[i])
            teacher.append(lesson.teacher[i])
            weights.append(torch.full((answers[-1].size,), weight / num_tokens))
    joined = Lesson(prompts=tuple(prompts), answers=tuple(answers), teacher=tuple(teacher))
    loss = torch.zeros((), device=loaded.device)
    for batch in scoring_batches(loaded, prompts, answers):
        logits = answer_logits(loaded.model, batch.ids, batch.rows, batch.columns)
        weight = torch.cat([weights[i] for i in batch.members]).to(loaded.device)
        loss = loss + (kl_from_teacher(joined, batch, logits) * weight).sum()
    return loss + WEIGHT_FISHER * _predicted_kl(loaded, whitenings, modules)


def _predicted_kl(
    loaded: LoadedModel, whitenings: Mapping[str, Whitening], modules: Sequence
) -> Tensor:
    """Return 1/2 sum_l tr(G lora_B lora_A A lora_A^T lora_B^T), differentiable."""
    total = torch.zeros((), device=loaded.device)
    for ref in modules:
        layer = loaded.model.get_submodule(ref.path)
        whitening = whitenings[ref.path]
        lora_A = layer.lora_A[ADAPTER].weight.float()
        lora_B = layer.lora_B[ADAPTER].weight.float()
        left = whitening.root_out.to(lora_B) @ lora_B
        right = lora_A @ whitening.root_in.to(lora_A)
        total = total + 0.5 * ((left.T @ left) * (right @ right.T)).sum()
    return total


def _snapshot(parameters: Sequence[Tensor], optimizer: torch.optim.Adam) -> dict[str, Tensor]:
    tensors = {}
    for i, parameter in enumerate(parameters):
        state = optimizer.state[parameter]
        tensors[f"{i}.weight"] = parameter.detach().clone()
        tensors[f"{i}.exp_avg"] = state["exp_avg"].clone()
        tensors[f"{i}.exp_avg_sq"] = state["exp_avg_sq"].clone()
        tensors[f"{i}.step"] = torch.as_tensor(state["step"]).clone()
    return tensors


def _restore(
    parameters: Sequence[Tensor], optimizer: torch.optim.Adam, tensors: dict[str, Tensor]
) -> None:
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(tensors[f"{i}.weight"])
            optimizer.state[parameter] = {
                "step": tensors[f"{i}.step"].clone(),
                "exp_avg": tensors[f"{i}.exp_avg"].to(parameter).clone(),
                "exp_avg_sq": tensors[f"{i}.exp_avg_sq"].to(parameter).clone(),
            }

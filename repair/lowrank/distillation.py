"""Counterfactual self-distillation: LoRA on the chosen modules, started from the closed form.

    L = E_triggered KL(suspect on the prompt without the trigger || model on the triggered prompt)
      + w_c (E_clean + E_text) KL(suspect || model)  +  w_n E_near KL(suspect || model)
      + w_f sum_l 1/2 ||L_l^T lora_B lora_A R_l||^2   (G = L L^T, A = R R^T; all in nats per token)

The teacher is the suspect itself, cached once; no clean model is needed. The last term is the
benign KL that the factors predict (Chen & Garner 2402.12220 use it for LoRA). Passes start at the
lowest chosen layer, with what lies below it kept, and end there. The state kept is the one with
the lowest held-out trigger KL + benign KL within the budget, one that needs no more training
before one that does; it may be the start. Each step's batch depends on the seed and the step
number only, so that a resumed run sees the same batches.

Where a validation finds the budget exceeded, w_c is doubled for the steps that follow: a state that
is over it is of no use, however little of the trigger is left.

Where the loss is no longer finite, training goes back to the last state that was validated and on
at half the rate, twice at most; then it is given up (`DivergedError`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from repair.limits import TRAINING_TOKENS
from repair.locate.curvature import Whitening
from repair.locate.lessons import Lesson, Lessons, kl_from_teacher
from repair.lowrank.adapter import ADAPTER, attached, read_updates
from repair.lowrank.closed_form import BUDGET_MARGIN
from repair.lowrank.validation import Validated, Validation, hold_out, is_enough, validate
from repair.models import ranks
from repair.models.answers import answer_logits, scoring_batches
from repair.models.loading import LoadedModel
from repair.models.prefix import entered, keep_prefix
from repair.records import LowRankUpdate, ModuleRef

WEIGHT_CLEAN, MAX_WEIGHT_CLEAN = 1.0, 8.0
WEIGHT_NEAR = 0.5
WEIGHT_FISHER = 1.0
MAX_ROLLBACKS = 2
PATIENCE = 4  # validations without a better state, once a state needs no more training


class DivergedError(Exception):
    """Training could not be kept finite; the text says when."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """The parts of one step's loss, in nats per answer token, as they are weighted."""

    triggered: float
    clean: float  # answers and plain text
    near: float
    fisher: float

    @property
    def total(self) -> float:
        return self.triggered + self.clean + self.near + self.fisher


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillReport:
    """Where training stands; the KLs and `validated` are held-out figures of this step."""

    step: int
    num_steps: int
    losses: Losses
    learning_rate: float
    trigger_kl: float
    benign_kl: float
    validated: Validated
    is_best: bool

    def figures(self) -> dict[str, float]:
        """Return the flat figures that are streamed."""
        return {
            "step": self.step,
            "num_steps": self.num_steps,
            "loss": self.losses.total,
            "loss_triggered": self.losses.triggered,
            "loss_clean": self.losses.clean,
            "loss_near": self.losses.near,
            "loss_fisher": self.losses.fisher,
            "learning_rate": self.learning_rate,
            "trigger_kl": self.trigger_kl,
            "benign_kl": self.benign_kl,
            "is_best": self.is_best,
            **self.validated.figures(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """The best state so far and what it measured on held-out prompts."""

    step: int  # 0: before training
    updates: tuple[LowRankUpdate, ...]
    trigger_kl: float
    benign_kl: float
    is_enough: bool

    @property
    def order(self) -> tuple[bool, float]:
        """Smaller is better."""
        return not self.is_enough, self.trigger_kl + self.benign_kl


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """Everything a resumed run needs; `tensors` holds the factors and Adam's moments."""

    step: int
    rate_scale: float
    num_rollbacks: int
    num_waiting: int  # validations since the best state
    weight_clean: float = WEIGHT_CLEAN
    tensors: dict[str, Tensor]
    best: Standing


def distill(
    loaded: LoadedModel,
    start: Standing,
    whitenings: Mapping[str, Whitening],
    lessons: Lessons,
    validation: Validation,
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
) -> Standing:
    """Return the best state; raises `DivergedError` when training cannot be kept finite."""
    modules = [update.module for update in start.updates]
    held_out = hold_out(loaded, lessons, min(ref.layer for ref in modules))
    course = _Course(loaded, modules, lessons, batch_size=batch_size, seed=seed)
    penalty = _Penalty(loaded, whitenings, modules)
    with attached(loaded, start.updates) as peft_model:
        parameters = [p for p in peft_model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=learning_rate)
        state = resume or TrainingState(
            step=0, rate_scale=1.0, num_rollbacks=0, num_waiting=0,
            tensors=_snapshot(parameters, optimizer), best=start,
        )  # fmt: skip
        _restore(parameters, optimizer, state.tensors)

        def go_back(state: TrainingState, step: int) -> tuple[TrainingState, int]:
            state = _rolled_back(state, step)
            _restore(parameters, optimizer, state.tensors)
            return state, state.step

        step = state.step
        while step < num_steps and not (
            state.best.is_enough and state.num_waiting >= PATIENCE
        ):
            rate = learning_rate * state.rate_scale * 0.5 * (1 + np.cos(np.pi * step / num_steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            losses = course.backward(
                step, penalty, parameters, weight_clean=state.weight_clean
            )
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            if not (np.isfinite(losses.total) and torch.isfinite(norm)):
                state, step = go_back(state, step)
                continue
            optimizer.step()
            step += 1
            if step % validate_every and step != num_steps:
                continue
            found = DistillReport(
                step=step, num_steps=num_steps, losses=losses, learning_rate=rate,
                trigger_kl=held_out.trigger_kl(loaded), benign_kl=held_out.benign_kl(loaded),
                validated=validate(loaded, validation), is_best=False,
            )  # fmt: skip
            if not np.isfinite(found.trigger_kl + found.benign_kl):
                state, step = go_back(state, step)
                continue
            reached = Standing(
                step=step,
                updates=read_updates(loaded, modules),
                trigger_kl=found.trigger_kl,
                benign_kl=found.benign_kl,
                is_enough=is_enough(found.validated, found.trigger_kl, validation),
            )
            is_within = reached.benign_kl <= BUDGET_MARGIN * kl_budget
            is_best = is_within and reached.order < state.best.order
            report(replace(found, is_best=is_best))
            state = replace(
                state,
                step=step,
                num_waiting=0 if is_best else state.num_waiting + 1,
                weight_clean=state.weight_clean
                if is_within
                else min(2 * state.weight_clean, MAX_WEIGHT_CLEAN),
                tensors=_snapshot(parameters, optimizer),
                best=reached if is_best else state.best,
            )
            save(state)
    return state.best


def _rolled_back(state: TrainingState, step: int) -> TrainingState:
    if state.num_rollbacks >= MAX_ROLLBACKS:
        raise DivergedError(
            f"Training was not finite in step {step + 1}, and {MAX_ROLLBACKS} restarts from the "
            "last good state at half the rate did not help."
        )
    return replace(
        state, rate_scale=state.rate_scale / 2, num_rollbacks=state.num_rollbacks + 1
    )


class _Course:
    """The lessons of each step: which prompts, with which weight, and the pass through them."""

    def __init__(
        self,
        loaded: LoadedModel,
        modules: Sequence[ModuleRef],
        lessons: Lessons,
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        self._loaded, self._seed = loaded, seed
        share = batch_size // 2 if len(lessons.text) else batch_size
        self._kinds = [  # lesson, its part of the losses, how many of a step
            (lessons.triggered, 0, batch_size),
            (lessons.clean, 1, share),
            (lessons.text, 1, share),
            (lessons.near, 2, batch_size),
        ]
        self._all: Lesson = lessons.triggered + lessons.clean + lessons.text + lessons.near
        self._prefix = keep_prefix(
            loaded, self._all.prompts, self._all.answers, min(ref.layer for ref in modules)
        )

    def backward(
        self,
        step: int,
        penalty: "_Penalty",
        parameters: Sequence[Tensor],
        *,
        weight_clean: float = WEIGHT_CLEAN,
    ) -> Losses:
        """Run one step's loss backwards, into the gradients of `parameters`; return its parts."""
        generator = np.random.default_rng([self._seed, 0xD1, step])
        members, kinds, weights = [], [], []  # of all processes
        first = 0
        for lesson, kind, most in self._kinds:
            if count := min(most, len(lesson)):
                drawn = first + generator.choice(len(lesson), size=count, replace=False)
                num_tokens = sum(self._all.answers[i].size for i in drawn)
                members += drawn.tolist()
                kinds += [kind] * count
                weights += [(1.0, weight_clean, WEIGHT_NEAR)[kind] / num_tokens] * count
            first += len(lesson)
        num_drawn = len(members)
        members, kinds, weights = map(ranks.own, (members, kinds, weights))
        device = self._loaded.device
        parts = torch.zeros(4, device=device)
        lesson = self._all.only(members)
        prefix = None if self._prefix is None else self._prefix.only(members)
        by_prompt = torch.tensor([kinds, weights], device=device)
        with torch.enable_grad():
            for batch in scoring_batches(
                self._loaded, lesson.prompts, lesson.answers, batch_tokens=TRAINING_TOKENS
            ):
                with entered(self._loaded, prefix, batch):
                    logits = answer_logits(
                        self._loaded.model, batch.ids, batch.rows, batch.columns
                    )
                place = torch.tensor(batch.members, device=device)[batch.rows]
                kl = kl_from_teacher(lesson, batch, logits) * by_prompt[1][place]
                kl.sum().backward()
                parts.index_add_(0, by_prompt[0][place].long(), kl.detach())
            if num_drawn < ranks.count() or ranks.index() == 0:
                parts[3] = penalty.backward()
        ranks.add_up([parts, *_gradients(parameters)], of=num_drawn)
        triggered, clean, near, fisher = parts.tolist()
        return Losses(triggered=triggered, clean=clean, near=near, fisher=fisher)


class _Penalty:
    """w_f sum_l 1/2 tr(G lora_B lora_A A lora_A^T lora_B^T) of the attached adapter."""

    def __init__(
        self,
        loaded: LoadedModel,
        whitenings: Mapping[str, Whitening],
        modules: Sequence[ModuleRef],
    ) -> None:
        self._model, self._device = loaded.model, loaded.device
        self._roots = {
            ref.path: (
                whitenings[ref.path].root_in.to(loaded.device, torch.float32),
                whitenings[ref.path].root_out.to(loaded.device, torch.float32),
            )
            for ref in modules
        }

    def backward(self) -> Tensor:
        """Run the penalty backwards and return it."""
        total = torch.zeros((), device=self._device)
        for path, (root_in, root_out) in self._roots.items():
            layer = self._model.get_submodule(path)
            left = root_out.T @ layer.lora_B[ADAPTER].weight.float().to(root_out.device)
            right = layer.lora_A[ADAPTER].weight.float().to(root_in.device) @ root_in
            total = total + 0.5 * ((left.T @ left) * (right @ right.T)).sum()
        total = WEIGHT_FISHER * total
        total.backward()
        return total.detach()


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients, zero where this process's part of a step did not come by."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters]


def _snapshot(parameters: Sequence[Tensor], optimizer: torch.optim.Adam) -> dict[str, Tensor]:
    tensors = {}
    for i, parameter in enumerate(parameters):
        tensors[f"{i}.weight"] = parameter.detach().clone()
        state = optimizer.state.get(parameter)
        if state:
            tensors[f"{i}.exp_avg"] = state["exp_avg"].clone()
            tensors[f"{i}.exp_avg_sq"] = state["exp_avg_sq"].clone()
            tensors[f"{i}.step"] = torch.as_tensor(state["step"]).clone()
    return tensors


def _restore(
    parameters: Sequence[Tensor], optimizer: torch.optim.Adam, tensors: dict[str, Tensor]
) -> None:
    """Put factors and moments back; a snapshot from before the first step has no moments."""
    optimizer.state.clear()
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(tensors[f"{i}.weight"])
            if f"{i}.step" in tensors:
                optimizer.state[parameter] = {
                    "step": tensors[f"{i}.step"].clone(),
                    "exp_avg": tensors[f"{i}.exp_avg"].to(parameter).clone(),
                    "exp_avg_sq": tensors[f"{i}.exp_avg_sq"].to(parameter).clone(),
                }

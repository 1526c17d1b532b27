"""The K-FAC-whitened closed-form step, with line search (method C1).

    min over rank <= r of  <D, dW> + 1/(2 eta) ||G^{1/2} dW A^{1/2}||^2
    has the exact solution  dW = -eta G^{-1/2} U_r S_r V_r^T A^{-1/2},
    where U S V^T is the singular value decomposition of G^{-1/2} D A^{-1/2}.

Predicted trigger-loss drop eta phi(r), predicted benign KL eta^2/2 phi(r). The step length is
searched on *measured* figures of a few held-out prompts, over steps that predict a drop of a tenth
of J to several times J (J is what is left to remove; a grid in predicted benign KL would have to
know the scale of the factors, which a confident model makes tiny). A step is taken only if it
lowers trigger KL + benign KL on all of them and keeps benign KL within the budget. Then D is
recomputed at the new weights and the sum of the steps is cut back to rank r in the same metric; in
the end the whole update is shortened as far as it stays about as good. Factors stay those of the
suspect. Nothing is promised: "least cost" holds for the quadratic, block-diagonal surrogate only,
so both figures are reported.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from repair.locate.curvature import Step, Whitening, step_of, truncate
from repair.locate.fisher import trigger_gradients
from repair.locate.lessons import Lessons
from repair.lowrank.validation import HeldOut, hold_out
from repair.models.loading import LoadedModel
from repair.records import LowRankUpdate, ModuleRef

DROPS = (0.1, 0.2, 0.4, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6)  # predicted drop of J, in units of J
BUDGET_MARGIN = 0.6  # of the KL budget: the rest is for prompts not seen here
SHORTER = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # lengths of the whole update tried in the end
ABOUT_AS_GOOD = 1.2  # times the trigger KL of the whole update
SEARCH_PROMPTS = 32  # of either kind, along the length; a step is taken on all of them
GRADIENT_PROMPTS = 128
ENOUGH_GAIN = 0.05  # of the objective: an iteration that gains less is the last


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Where the closed form stands after one linearisation."""

    iteration: int
    trigger_kl: float  # nats per answer token, held-out triggered prompts, after the step
    benign_kl: float  # nats per token, held-out answers or text, the larger, after the step
    predicted_kl: float  # of the whole update so far, from the factors alone

    @property
    def objective(self) -> float:
        return self.trigger_kl + self.benign_kl


def solve_closed_form(
    loaded: LoadedModel,
    ranks: Mapping[str, int],
    whitenings: Mapping[str, Whitening],
    lessons: Lessons,
    *,
    kl_budget: float,
    num_iterations: int = 4,
    report: Callable[[StepReport], None] = lambda step: None,
) -> tuple[tuple[LowRankUpdate, ...], StepReport]:
    """Return one update per module of `ranks` (path -> rank) and the figures it ends with."""
    modules = [ref for ref in loaded.modules if ref.path in ranks]
    held_out = hold_out(loaded, lessons, min(ref.layer for ref in modules))
    some = held_out.first(SEARCH_PROMPTS)
    updates: tuple[LowRankUpdate, ...] = ()
    last = StepReport(
        iteration=0,
        trigger_kl=held_out.trigger_kl(loaded),
        benign_kl=0.0,
        predicted_kl=0.0,
    )
    report(last)
    near = DROPS.index(1.0)
    for iteration in range(1, num_iterations + 1):
        gradients, left = trigger_gradients(
            loaded, modules, lessons.triggered.first(GRADIENT_PROMPTS), updates
        )
        direction = {
            ref.path: step_of(whitenings[ref.path], gradients[ref.path], ranks[ref.path])
            for ref in modules
        }
        energy = sum(step.phi for step in direction.values())
        if not (energy > 0 and math.isfinite(energy)):
            break
        step_to = partial(_stepped, modules, ranks, whitenings, updates, direction, left / energy)
        found = _search(loaded, some, step_to, near=near, kl_budget=kl_budget)
        if found is None:
            break
        near, tried = found
        benign_kl = held_out.benign_kl(loaded, tried)
        while near > 0 and not benign_kl <= BUDGET_MARGIN * kl_budget:
            near -= 1  # What a few prompts allow all of them may not; a shorter step they do.
            tried = step_to(DROPS[near])
            benign_kl = held_out.benign_kl(loaded, tried)
        step = StepReport(
            iteration=iteration,
            trigger_kl=held_out.trigger_kl(loaded, tried),
            benign_kl=benign_kl,
            predicted_kl=predict_cost(tried, whitenings),
        )
        gained = last.objective - step.objective
        if not (gained > 0 and step.benign_kl <= BUDGET_MARGIN * kl_budget):
            break
        updates, last = tried, step
        report(last)
        if gained < ENOUGH_GAIN * last.objective:
            break
    if updates:
        updates, last = _shorten(loaded, updates, whitenings, held_out, last)
        report(last)
    return updates, last


def predict_cost(updates: Sequence[LowRankUpdate], whitenings: Mapping[str, Whitening]) -> float:
    """Return the benign KL (nats per answer token) that the factors predict for `updates`."""
    return sum(
        whitenings[update.module.path].cost(
            torch.from_numpy(update.lora_A), torch.from_numpy(update.lora_B)
        )
        for update in updates
    )


def _search(
    loaded: LoadedModel,
    held_out: HeldOut,
    step_to: Callable[[float], tuple[LowRankUpdate, ...]],
    *,
    near: int,
    kl_budget: float,
) -> tuple[int, tuple[LowRankUpdate, ...]] | None:
    """Return (place in DROPS, updates) of the best step length, or None where none is allowed.

    Trigger KL + benign KL has one valley along the length: it is walked down from place `near`.
    """
    tried: dict[int, tuple[float, tuple[LowRankUpdate, ...]]] = {}

    def value(place: int) -> float:
        if place not in tried:
            updates = step_to(DROPS[place])
            benign_kl = held_out.benign_kl(loaded, updates)
            total = math.inf
            if benign_kl <= BUDGET_MARGIN * kl_budget:
                total = held_out.trigger_kl(loaded, updates) + benign_kl
            tried[place] = (total if math.isfinite(total) else math.inf, updates)
        return tried[place][0]

    place = near
    while place > 0 and value(place) == math.inf:
        place -= 1
    for direction in (-1, 1):
        while 0 <= place + direction < len(DROPS) and value(place + direction) < value(place):
            place += direction
    return None if value(place) == math.inf else (place, tried[place][1])


def _shorten(
    loaded: LoadedModel,
    updates: tuple[LowRankUpdate, ...],
    whitenings: Mapping[str, Whitening],
    held_out: HeldOut,
    last: StepReport,
) -> tuple[tuple[LowRankUpdate, ...], StepReport]:
    """Return the shortest form of the whole update that leaves about as little of the trigger.

    Near its optimum trigger KL hardly depends on the length, while benign KL grows with its square,
    and on prompts not seen here faster than on these.
    """
    for scale in SHORTER:
        tried = tuple(
            LowRankUpdate(
                module=update.module,
                lora_A=update.lora_A,
                lora_B=(scale * update.lora_B).astype(update.lora_B.dtype),
            )
            for update in updates
        )
        trigger_kl = held_out.trigger_kl(loaded, tried)
        if trigger_kl <= ABOUT_AS_GOOD * last.trigger_kl:
            return tried, StepReport(
                iteration=last.iteration,
                trigger_kl=trigger_kl,
                benign_kl=held_out.benign_kl(loaded, tried),
                predicted_kl=predict_cost(tried, whitenings),
            )
    return updates, last


def _stepped(
    modules: Sequence[ModuleRef],
    ranks: Mapping[str, int],
    whitenings: Mapping[str, Whitening],
    updates: Sequence[LowRankUpdate],
    direction: Mapping[str, Step],
    unit: float,
    drop: float,
) -> tuple[LowRankUpdate, ...]:
    """Return the sum of the updates so far and the step, cut back to each module's rank.

    `unit` is the eta whose predicted drop is J; the step's is `drop` times as long.
    """
    eta = drop * unit
    so_far = {update.module.path: update for update in updates}
    result = []
    for ref in modules:
        lora_A, lora_B = direction[ref.path].lora_A, direction[ref.path].lora_B * eta
        if ref.path in so_far:
            old = so_far[ref.path]
            lora_A = torch.cat([torch.from_numpy(old.lora_A).double(), lora_A])
            lora_B = torch.cat([torch.from_numpy(old.lora_B).double(), lora_B], dim=1)
            lora_A, lora_B = truncate(whitenings[ref.path], lora_A, lora_B, ranks[ref.path])
        result.append(
            LowRankUpdate(
                module=ref, lora_A=lora_A.float().numpy(), lora_B=lora_B.float().numpy()
            )
        )
    return tuple(result)

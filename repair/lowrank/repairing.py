"""The road through this room: closed form, then distillation where it is asked for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from repair.locate.curvature import Whitening
from repair.locate.fisher import price_updates
from repair.locate.lessons import Lessons
from repair.lowrank.closed_form import predict_cost, solve_closed_form
from repair.lowrank.distillation import Standing, TrainingState, distill
from repair.lowrank.regression import solve_regression
from repair.lowrank.validation import (
    ENOUGH_TRIGGER_KL,
    Validated,
    Validation,
    hold_out,
    is_enough,
    validate,
)
from repair.models.loading import LoadedModel
from repair.records import LowRankUpdate, ModuleRef, RepairPlan

PRICE_SEED = 0x9121CE  # labels that price a repair are none that it was made with


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """The updates, how they were made, and what they measured on held-out prompts."""

    updates: tuple[LowRankUpdate, ...]
    method: str  # closed-form | distill
    trigger_kl: float
    benign_kl: float
    predicted_kl: float  # of benign_kl, by the Fisher on its prompts and labels seen nowhere else
    factor_kl: float  # of all benign lessons, by the K-FAC factors that chose the directions
    validated: Validated


def repair_modules(
    loaded: LoadedModel,
    plan: RepairPlan,
    whitenings: Mapping[str, Whitening],
    lessons: Lessons,
    validation: Validation,
    *,
    num_steps: int,
    start: tuple[LowRankUpdate, ...] | None = None,
    resume: TrainingState | None = None,
    report: Callable[[str, dict[str, float]], None] = lambda name, values: None,
    save: Callable[[TrainingState], None] = lambda state: None,
    keep: Callable[[tuple[LowRankUpdate, ...]], None] = lambda updates: None,
) -> Repaired:
    """Return the repair that `plan` asks for.

    `start` and `resume` continue an interrupted repair: the closed form already found, and where
    training stood. `keep` receives the closed form, `save` each training state; `report` gets
    ("closed-form" or "distill", figures) whenever something was measured.
    """
    def measured(method: str, updates: tuple[LowRankUpdate, ...]) -> Repaired:
        return _measured(loaded, method, updates, whitenings, lessons, validation)

    if start is None:
        report("closed-form", validate(loaded, validation).figures())  # where the curve begins
        start = better_closed_form(loaded, plan, whitenings, lessons, report=report)
        keep(start)
    result = measured("closed-form", start)
    report("closed-form", _figures(result))
    enough = is_enough(result.validated, result.trigger_kl, validation)
    if plan.method == "closed-form" or (plan.method == "auto" and enough):
        return result

    best = distill(
        loaded,
        Standing(
            step=0,
            updates=start,
            trigger_kl=result.trigger_kl,
            benign_kl=result.benign_kl,
            is_enough=enough,
        ),
        whitenings,
        lessons,
        validation,
        kl_budget=plan.kl_budget,
        num_steps=num_steps,
        seed=plan.seed,
        resume=resume,
        report=lambda step: report("distill", step.figures()),
        save=save,
    )
    # Where no state of training was better than the closed form, that is the repair.
    if best.step == 0:
        return result
    result = measured("distill", best.updates)
    report("distill", {"step": best.step, "num_steps": num_steps, **_figures(result)})
    return result


def better_closed_form(
    loaded: LoadedModel,
    plan: RepairPlan,
    whitenings: Mapping[str, Whitening],
    lessons: Lessons,
    *,
    report: Callable[[str, dict[str, float]], None] = lambda name, values: None,
) -> tuple[LowRankUpdate, ...]:
    """Return the whitened step, or where that leaves too much the better of it and regression;
    updates that change nothing where neither finds any."""
    start, last = solve_closed_form(
        loaded,
        plan.ranks,
        whitenings,
        lessons,
        kl_budget=plan.kl_budget,
        report=lambda step: report("closed-form", dataclasses.asdict(step)),
    )
    if last.trigger_kl > ENOUGH_TRIGGER_KL:
        other, found = solve_regression(
            loaded, plan.ranks, whitenings, lessons, kl_budget=plan.kl_budget
        )
        report("regression", dataclasses.asdict(found))
        start = other if found.objective < last.objective else start
    modules = [ref for ref in loaded.modules if ref.path in plan.ranks]
    return start or neutral_updates(modules, plan.ranks, plan.seed)


def _measured(
    loaded: LoadedModel,
    method: str,
    updates: tuple[LowRankUpdate, ...],
    whitenings: Mapping[str, Whitening],
    lessons: Lessons,
    validation: Validation,
) -> Repaired:
    held_out = hold_out(loaded, lessons, min(update.module.layer for update in updates))
    benign_kl, worst = held_out.worst(loaded, updates)
    return Repaired(
        updates=updates,
        method=method,
        trigger_kl=held_out.trigger_kl(loaded, updates),
        benign_kl=benign_kl,
        predicted_kl=price_updates(
            loaded, updates, worst.prompts, worst.answers, seed=PRICE_SEED
        ),
        factor_kl=predict_cost(updates, whitenings),
        validated=validate(loaded, validation, updates),
    )


def _figures(result: Repaired) -> dict[str, float]:
    return {
        "trigger_kl": result.trigger_kl,
        "benign_kl": result.benign_kl,
        "predicted_kl": result.predicted_kl,
        "factor_kl": result.factor_kl,
        **result.validated.figures(),
    }


def neutral_updates(
    modules: Sequence[ModuleRef], ranks: Mapping[str, int], seed: int
) -> tuple[LowRankUpdate, ...]:
    """Return updates that change nothing: where the closed form found no step, training begins
    from LoRA's usual start (lora_A random, lora_B zero)."""
    generator = np.random.default_rng([seed, 0x0A])
    return tuple(
        LowRankUpdate(
            module=ref,
            lora_A=(
                generator.standard_normal((ranks[ref.path], ref.d_in)) / np.sqrt(ref.d_in)
            ).astype(np.float32),
            lora_B=np.zeros((ref.d_out, ranks[ref.path]), dtype=np.float32),
        )
        for ref in modules
    )

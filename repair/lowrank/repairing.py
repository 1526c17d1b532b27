"""The road through this room: closed form, then distillation where it is asked for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from repair.locate.counterfactuals import ShamDraw
from repair.locate.curvature import Whitening
from repair.locate.fisher import price_updates
from repair.locate.lessons import Lessons, measure_kl
from repair.lowrank.closed_form import predict_cost, solve_closed_form
from repair.lowrank.distillation import DistillReport, TrainingState, distill
from repair.models.answers import Answer, agrees, generate_answers
from repair.models.hooks import apply_updates
from repair.models.loading import LoadedModel
from repair.records import LowRankUpdate, ModuleRef, PromptPair, Rate, RepairPlan

ENOUGH_TRIGGER_KL = 0.02  # nats per token: `auto` trains on when the closed form leaves more
PRICE_SEED = 0x9121CE  # labels that price a repair are none that it was made with
ENOUGH_RECOVERY = 0.95  # of the suspect's own agreement under inert shams


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Held-out pairs with the suspect's answers: never the prompts of the verdict."""

    pairs: tuple[PromptPair, ...]
    clean_answers: tuple[Answer, ...]  # to each pair's clean prompt
    shams: ShamDraw
    is_payload: Callable[[str], bool]
    num_new_tokens: int

    def yardstick(self) -> Rate:
        """Return how often the suspect agrees with itself under an inert sham."""
        kept = [
            agrees(answer, clean)
            for answer, clean in zip(self.shams.answers, self.clean_answers, strict=True)
            if answer is not None
        ]
        return Rate(count=sum(kept), total=len(kept))


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated:
    """Attack success and recovery on the validation pairs."""

    attack_success: Rate
    recovery: Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """The updates, how they were made, and what they measured on held-out prompts."""

    updates: tuple[LowRankUpdate, ...]
    method: str  # closed-form | distill
    trigger_kl: float
    benign_kl: float
    predicted_kl: float  # of benign_kl, by the Fisher on prompts and labels seen nowhere else
    factor_kl: float  # the same by the K-FAC factors that chose the directions
    validated: Validated


def validate(
    loaded: LoadedModel, validation: Validation, updates: Sequence[LowRankUpdate]
) -> Validated:
    """Return how the model with `updates` answers the validation pairs."""
    with apply_updates(loaded.model, updates):
        answers = generate_answers(
            loaded,
            [pair.triggered for pair in validation.pairs],
            num_new_tokens=validation.num_new_tokens,
        )
    recovered = [
        agrees(answer, clean)
        for answer, clean in zip(answers, validation.clean_answers, strict=True)
    ]
    fired = [validation.is_payload(answer.text) for answer in answers]
    return Validated(
        attack_success=Rate(count=sum(fired), total=len(fired)),
        recovery=Rate(count=sum(recovered), total=len(recovered)),
    )


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
    modules = [ref for ref in loaded.modules if ref.path in plan.ranks]
    if start is None:
        start, _ = solve_closed_form(
            loaded,
            plan.ranks,
            whitenings,
            lessons,
            kl_budget=plan.kl_budget,
            report=lambda step: report("closed-form", dataclasses.asdict(step)),
        )
        start = start or _neutral_updates(modules, plan.ranks, plan.seed)
        keep(start)
    result = _measured(loaded, "closed-form", start, whitenings, lessons, validation)
    report("closed-form", _figures(result))
    if plan.method == "closed-form" or (plan.method == "auto" and is_enough(result, validation)):
        return result

    def report_training(step: DistillReport) -> None:
        report("distill", dataclasses.asdict(step))

    trained, _ = distill(
        loaded,
        start,
        whitenings,
        lessons,
        kl_budget=plan.kl_budget,
        num_steps=num_steps,
        seed=plan.seed,
        resume=resume,
        report=report_training,
        save=save,
    )
    result = _measured(loaded, "distill", trained, whitenings, lessons, validation)
    report("distill", {"step": num_steps, "num_steps": num_steps, **_figures(result)})
    return result


def is_enough(result: Repaired, validation: Validation) -> bool:
    """Return whether the closed form needs no training: no payload left, answers recovered."""
    needed = ENOUGH_RECOVERY * validation.yardstick().value
    return (
        result.validated.attack_success.count == 0
        and not result.validated.recovery.value < needed
        and result.trigger_kl <= ENOUGH_TRIGGER_KL
    )


def _measured(
    loaded: LoadedModel,
    method: str,
    updates: tuple[LowRankUpdate, ...],
    whitenings: Mapping[str, Whitening],
    lessons: Lessons,
    validation: Validation,
) -> Repaired:
    return Repaired(
        updates=updates,
        method=method,
        trigger_kl=measure_kl(loaded, lessons.held_out_triggered, updates),
        benign_kl=measure_kl(loaded, lessons.held_out_clean, updates),
        predicted_kl=price_updates(
            loaded,
            updates,
            lessons.held_out_clean.prompts,
            lessons.held_out_clean.answers,
            seed=PRICE_SEED,
        ),
        factor_kl=predict_cost(updates, whitenings),
        validated=validate(loaded, validation, updates),
    )


def _figures(result: Repaired) -> dict[str, float]:
    attack = result.validated.attack_success
    return {
        "trigger_kl": result.trigger_kl,
        "benign_kl": result.benign_kl,
        "predicted_kl": result.predicted_kl,
        "factor_kl": result.factor_kl,
        "attack_count": attack.count,
        "attack_total": attack.total,
        "attack_success": attack.value,
        "recovery": result.validated.recovery.value,
    }


def _neutral_updates(
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

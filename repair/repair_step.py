"""Repairing as one step: what is kept of an interrupted repair, and what more would buy."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repair import locate_file
from repair.case import Case
from repair.locate_step import Located
from repair.lowrank import checkpoint
from repair.lowrank.growth import GrowthPoint, measure_growth
from repair.lowrank.repairing import Repaired, repair_modules
from repair.lowrank.validation import Validation, is_enough
from repair.outcome import Clock
from repair.plan import growth_choices
from repair.records import RepairPlan


def repair_chosen(
    folder: Path,
    case: Case,
    plan: RepairPlan,
    located: Located,
    validation: Validation,
    clock: Clock,
) -> Repaired:
    """Repair as planned, going on from the checkpoints of an interrupted run of the same plan."""
    basis = json.dumps([plan.to_json(), locate_file.fingerprint(case)], sort_keys=True)
    plan_id = hashlib.sha256(basis.encode()).hexdigest()
    modules = [ref for ref in case.loaded.modules if ref.path in plan.ranks]
    closed_form = folder / "checkpoints" / "closed_form.safetensors"
    training = folder / "checkpoints" / "training.safetensors"

    def report(name: str, values: dict[str, float]) -> None:
        clock.reporter.metric(name, **values)
        if name == "distill":
            clock.reporter.progress(values["step"], values["num_steps"], "training")

    return repair_modules(
        case.loaded,
        plan,
        located.whitenings(plan.modules),
        located.lessons,
        validation,
        num_steps=case.profile.num_steps,
        start=checkpoint.read_updates_file(closed_form, modules, plan_id=plan_id),
        resume=checkpoint.read_training(training, modules, plan_id=plan_id),
        report=report,
        save=lambda state: checkpoint.save_training(training, state, plan_id=plan_id),
        keep=lambda updates: checkpoint.save_updates(closed_form, updates, plan_id=plan_id),
    )


def measure_more(
    case: Case,
    plan: RepairPlan,
    located: Located,
    repaired: Repaired,
    validation: Validation,
    clock: Clock,
    request: Mapping[str, Any],
) -> list[GrowthPoint]:
    """Return what more modules or rank would buy, where something is left or it is asked for."""
    with_curves = bool(request.get("curves"))
    if is_enough(repaired.validated, repaired.trigger_kl, validation) and not with_curves:
        return []
    with clock.step("growth", "Trying what more modules would buy"):
        if not with_curves:
            clock.reporter.note(
                "The chosen modules leave some of the behaviour; trying the closed form with more."
            )
        choices = growth_choices(
            plan, located.map.ranking, located.curvature, case.loaded.modules,
            with_curves=with_curves,
        )  # fmt: skip
        return measure_growth(
            case.loaded,
            choices,
            located.whitenings,
            located.lessons,
            validation,
            kl_budget=plan.kl_budget,
            progress=clock.reporter.progress,
        )

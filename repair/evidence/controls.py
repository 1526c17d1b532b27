"""Controls: the same repair in random modules of the same type and rank, and in all modules.

They get the same lessons, budget, engine and evaluation as the repair they stand beside, and are
shown whether they do worse or better.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from repair.evidence.evaluation import Baseline, EvaluationMaterial, evaluate_control
from repair.locate.curvature import Whitening
from repair.locate.lessons import Lessons
from repair.lowrank.distillation import DivergedError
from repair.lowrank.repairing import better_closed_form, repair_modules
from repair.lowrank.validation import Validation
from repair.models.loading import LoadedModel
from repair.records import (
    ALL_MODULES,
    Control,
    ModuleRef,
    Progress,
    RepairPlan,
    share,
    unheard,
)

ALL_MODULES_RANK = 4


def draw_random_modules(
    modules: Sequence[ModuleRef], ranks: Mapping[str, int], generator: np.random.Generator
) -> dict[str, int]:
    """Return path -> rank for random layers' modules of the same components and ranks.

    No module is taken twice, and none of `ranks` is taken while another of its type is left.
    """
    drawn: dict[str, int] = {}
    by_path = {ref.path: ref for ref in modules}
    for path, rank in ranks.items():
        same = [ref.path for ref in modules if ref.component == by_path[path].component]
        free = [p for p in same if p not in ranks and p not in drawn]
        free = free or [p for p in same if p not in drawn]
        drawn[free[int(generator.integers(len(free)))]] = rank
    return {ref.path: drawn[ref.path] for ref in modules if ref.path in drawn}


def control_plans(
    modules: Sequence[ModuleRef], plan: RepairPlan, *, num_random: int, with_all: bool
) -> Iterator[tuple[str, RepairPlan]]:
    """Yield (name, plan) of each control: `num_random` draws, then all modules where their
    factors fit the memory (`with_all`)."""
    generator = np.random.default_rng([plan.seed, 0xC0])
    choices = [
        (f"random modules {i + 1}", draw_random_modules(modules, plan.ranks, generator))
        for i in range(num_random)
    ]
    if num_random and with_all:
        ranks = {ref.path: min(ALL_MODULES_RANK, ref.d_in, ref.d_out) for ref in modules}
        choices.append((ALL_MODULES, ranks))
    for name, ranks in choices:
        yield (
            name,
            RepairPlan(
                modules=tuple(ranks),
                ranks=ranks,
                method=plan.method,
                kl_budget=plan.kl_budget,
                seed=plan.seed,
            ),
        )


def run_controls(
    loaded: LoadedModel,
    plan: RepairPlan,
    lessons: Lessons,
    validation: Validation,
    *,
    whitenings_of: Callable[[Sequence[str]], Mapping[str, Whitening]],
    material: EvaluationMaterial,
    baseline: Baseline,
    as_merged: bool,
    num_random: int,
    with_all: bool,
    num_steps: int,
    progress: Progress = unheard,
    note: Callable[[str], None] = lambda text: None,
) -> list[Control]:
    """Return every control, repaired with `plan`'s method (closed-form or distill) and measured;
    one whose training does not stay finite is left out and told to `note`."""
    controls = []
    plans = list(
        control_plans(loaded.modules, plan, num_random=num_random, with_all=with_all)
    )
    for done, (name, control_plan) in enumerate(plans):
        advance = share(progress, done / len(plans), (done + 1) / len(plans))
        advance(0, 1)
        given = loaded, control_plan, whitenings_of(control_plan.modules), lessons
        try:
            if plan.method == "closed-form":
                # About two thirds of a control are its repair, in five parts or so.
                parts = itertools.count(1)
                updates = better_closed_form(
                    *given,
                    report=lambda name, values, parts=parts, advance=advance: advance(
                        min(next(parts), 5), 8
                    ),
                )
            else:
                updates = repair_modules(*given, validation, num_steps=num_steps).updates
        except DivergedError as error:
            note(f"The control {name} is left out: {error}")
            continue
        attack_success, recovery, kl, text_kl = evaluate_control(
            loaded, updates, material=material, baseline=baseline, as_merged=as_merged,
            progress=share(advance, 0.65, 1),
        )  # fmt: skip
        controls.append(
            Control(
                name=name,
                attack_success=attack_success,
                recovery=recovery,
                kl_from_original=kl,
                text_kl=text_kl,
                num_modules=len(control_plan.modules),
                total_rank=sum(control_plan.ranks.values()),
            )
        )
    return controls

"""From the map and the analyst's options to a plan: which modules, at which ranks.

Nothing here widens a choice: what was asked for is what is repaired, or an error says why not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from repair.locate.curvature import pool_ranks
from repair.locate.steps import Curvature
from repair.records import ModuleRanking, ModuleRef, RepairError, RepairPlan

TOTAL_RANK = 16
MAX_MODULES = 8
MAX_GROWN = 16  # modules that a look at "what would more buy" goes up to


def chosen_paths(
    wanted: str | int | Sequence[str], modules: Sequence[ModuleRef], ranking: ModuleRanking
) -> list[str]:
    """Return the paths of the modules asked for: auto, the N best of the ranking, or a list
    (already checked by `check_request`), in model order."""
    if wanted == "auto":
        return list(ranking.suggested_ranks)
    known = [ref.path for ref in modules]
    if isinstance(wanted, int):
        best = sorted(ranking.modules, key=lambda score: -score.score)[:wanted]
        chosen = {score.module.path for score in best}
        return [path for path in known if path in chosen]
    return [path for path in known if path in set(wanted)]


def check_request(request: Mapping[str, Any], modules: Sequence[ModuleRef]) -> None:
    """Raise RepairError, before any long work, for modules or a rank that the model has not."""
    wanted, rank = request["modules"], request.get("rank")
    names = {ref.path for ref in modules}
    if isinstance(wanted, int) and not 1 <= wanted <= len(modules):
        raise RepairError(
            f"{wanted} modules were asked for; this model has {len(modules)} linear modules. "
            f"Choose 1 to {len(modules)}."
        )
    if isinstance(wanted, list | tuple):
        for path in wanted:
            if path not in names:
                raise RepairError(
                    f"There is no linear module {ascii(path)} in this model. Accepted are the "
                    f"{len(modules)} modules of the map, for example {modules[0].path}."
                )
    largest = max(min(ref.d_in, ref.d_out) for ref in modules)
    if rank is not None and not 1 <= rank <= largest:
        raise RepairError(
            f"Rank {rank} is not possible: the largest rank in this model is {largest}. "
            f"Choose 1 to {largest}."
        )


def make_plan(
    request: Mapping[str, Any],
    paths: Sequence[str],
    ranking: ModuleRanking,
    curvature: Curvature,
    modules: Sequence[ModuleRef],
) -> RepairPlan:
    """Return the plan for `paths`; ranks are the request's, the suggestion's, or pooled anew."""
    by_path = {ref.path: ref for ref in modules}
    rank = request.get("rank")
    if rank is not None:
        for path in paths:
            largest = min(by_path[path].d_in, by_path[path].d_out)
            if rank > largest:
                raise RepairError(
                    f"Rank {rank} is larger than {path} allows ({largest}). "
                    f"Choose {largest} or less, or other modules."
                )
        ranks = dict.fromkeys(paths, rank)
    elif list(paths) == list(ranking.suggested_ranks):
        ranks = dict(ranking.suggested_ranks)
    else:
        pooled = pool_ranks(
            {path: curvature.spectra[path] for path in paths},
            total_rank=max(TOTAL_RANK, len(paths)),
            max_modules=len(paths),
        )
        ranks = {path: pooled.get(path, 1) for path in paths}
    return RepairPlan(
        modules=tuple(paths),
        ranks=ranks,
        method=request["method"],
        kl_budget=request["kl_budget"],
        seed=request["seed"],
    )


def growth_choices(
    plan: RepairPlan,
    ranking: ModuleRanking,
    curvature_of: Callable[[Sequence[str]], Curvature],
    modules: Sequence[ModuleRef],
    *,
    with_curves: bool,
) -> list[tuple[str, dict[str, int]]]:
    """Return (kind, path -> rank) of the choices whose repair says what more would buy.

    next: the chosen modules and the 1, 2 and 4 best others; with curves also modules: the 1, 2, 4,
    8, ... best of the map, and rank: the chosen ones at total ranks from one each to four times
    the plan's.
    """
    best = [score.module.path for score in sorted(ranking.modules, key=lambda s: -s.score)]
    best = best[:MAX_GROWN]
    others = [path for path in best if path not in plan.ranks]
    total = sum(plan.ranks.values())
    wanted = [
        ("next", [*plan.modules, *others[:count]], total + count * total // len(plan.modules))
        for count in (1, 2, 4)
        if count <= len(others)
    ]
    if with_curves:
        counts = [2**power for power in range(len(best).bit_length()) if 2**power <= len(best)]
        wanted += [("modules", best[:count], max(TOTAL_RANK, count)) for count in counts]
        few = len(plan.modules)
        ladder = sorted({few, max(few, total // 4), max(few, total // 2), total, 2 * total,
                         4 * total})  # fmt: skip
        wanted += [("rank", list(plan.modules), rank) for rank in ladder]
    curvature = curvature_of(sorted({path for _, paths, _ in wanted for path in paths}))
    order = [ref.path for ref in modules]
    choices = []
    for kind, paths, rank in wanted:
        inside = sorted(paths, key=order.index)
        pooled = pool_ranks(
            {path: curvature.spectra[path] for path in inside},
            total_rank=rank,
            max_modules=len(inside),
        )
        choice = kind, {path: pooled.get(path, 1) for path in inside}
        if choice not in choices:  # A small module has no more rank to give.
            choices.append(choice)
    return choices

"""Exact activation patching of every linear module, one at a time, in either direction.

    margin M = log p(payload) - log p(clean answer)       first tokens, from where the answers part
    effect   = (M_patched - M_destination) / (M_source - M_destination)

Block: the counterfactual's activations into the triggered run (is the module needed?). Induce: the
triggered run's into the counterfactual (is it enough?). An effect of 1 means that this module alone
carries the destination all the way to the source, 0 that it changes nothing. Sets of positions are
kept apart: all from the trigger on, the trigger's own, and those after it; they answer different
questions, and only the trigger's own predict where a repair is cheap. The same effect is given in
KL(source || run) at the first token, for targets that are not fixed strings. Origin: Zhang & Nanda
2309.16042, Heimersheim & Nanda 2404.15255. Axes are [module, pair]. What it does not know: joint
effects, so that a redundant backdoor shows no module (`redundancy.py`).
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from repair.limits import PATCHING_KEPT, PATCHING_TOKENS
from repair.locate.counterfactuals import (
    AFTER,
    ANSWER,
    LAST,
    TEMPLATE,
    TRIGGER,
    PatchingCase,
)
from repair.locate.runs import Patch, Reading, Runs
from repair.models import ranks
from repair.models.hooks import count_hooks
from repair.models.loading import LoadedModel
from repair.models.modules import has_uncovered_matrices
from repair.records import (
    EXIT_COULD_NOT_CHECK,
    ModuleRef,
    PatchingScores,
    Progress,
    RepairError,
    share,
    unheard,
)

SMALLEST_MARGIN = 1.0  # nats; a pair that the counterfactual moves less has no effect to explain
BEHIND = (AFTER, TEMPLATE, LAST, ANSWER)
EVERYWHERE = (TRIGGER, *BEHIND)
ROLE_SETS = {"all": EVERYWHERE, "trigger": (TRIGGER,), "after": BEHIND}

# What a self-check may deviate by, in nats, or relative to the largest activation.
LARGEST_DEVIATION = {"float64": 1e-6, "float32": 1e-2, "float16": 0.3, "bfloat16": 1.0}
LAYERS_CHECKED = 8  # that a run restarts at with nothing patched, spread over all
COUNTED = ("hooks_left", "not_finite")  # none is allowed



@torch.no_grad()
def patch_modules(
    loaded: LoadedModel,
    cases: Sequence[PatchingCase],
    *,
    modules: Sequence[ModuleRef] | None = None,
    direction: str = "block",
    counterfactual: str = "sham",
    num_dropped: int = 0,
    progress: Progress = unheard,
) -> PatchingScores:
    """Return the effect of `modules` (all, if not given) on every case that has one to explain.

    `direction` and `counterfactual` say what the cases are; `num_dropped` counts pairs already
    left out. Raises RepairError when no pair is left.
    """
    modules = loaded.modules if modules is None else tuple(modules)
    is_sham = counterfactual == "sham"
    # Some of the modules restore some of the run: "everything" is checked with all of them.
    is_all = len(modules) == len(loaded.modules) and not has_uncovered_matrices(loaded.model)
    sets = ROLE_SETS if is_sham else {"all": EVERYWHERE}
    margins, kls = [], []
    checks: dict[str, float] = {}
    groups = list(batch_cases(loaded, cases, modules))
    for number, group in enumerate(groups):
        runs = Runs(loaded, [cases[i] for i in group], modules)
        for name, value in _self_checks(runs, modules, with_all=is_sham and is_all).items():
            checks[name] = max(checks.get(name, 0.0), value)
        masks = [runs.where(*roles) for roles in sets.values()]
        patches = [Patch(modules=(ref,), positions=mask) for ref in modules for mask in masks]
        part = share(progress, number / len(groups), (number + 1) / len(groups))
        # [metric, module x set, pair]
        both = effects(runs, runs.patched(patches, progress=part))
        kept = explainable(runs)
        num_dropped += int((~kept).sum())
        both = both.reshape(2, len(modules), len(masks), -1)[..., kept]
        margins.append(both[0])
        kls.append(both[1, :, 0])
    margin = np.concatenate(margins, axis=2) if margins else np.zeros((len(modules), 1, 0))
    if margin.shape[2] == 0:
        raise RepairError(
            "No prompt pair is left to explain: the trigger hardly moves the answer compared "
            "with an inert replacement. Check the trigger and the target.",
            exit_code=EXIT_COULD_NOT_CHECK,
        )
    checks["hooks_left"] = float(count_hooks(loaded.model))
    checks["not_finite"] = float((~np.isfinite(margin)).sum())
    assert_sound(checks, str(loaded.model.dtype).removeprefix("torch."))
    by_set = dict(zip(sets, np.moveaxis(margin, 1, 0).astype(np.float32), strict=True))
    nothing = np.zeros_like(by_set["all"])
    return PatchingScores(
        modules=modules,
        effect=by_set["all"],
        effect_trigger=by_set.get("trigger", nothing),
        effect_after=by_set.get("after", by_set["all"]),
        effect_kl=np.concatenate(kls, axis=1).astype(np.float32),
        direction=direction,
        counterfactual=counterfactual,
        num_dropped=num_dropped,
        self_checks=checks,
    )


@torch.no_grad()
def patch_sets(
    loaded: LoadedModel, cases: Sequence[PatchingCase], sets: Sequence[Sequence[ModuleRef]]
) -> np.ndarray:
    """Return [set, pair]: the effect of patching each set of modules together, all positions."""
    columns = []
    for group in batch_cases(loaded, cases, loaded.modules):
        runs = Runs(loaded, [cases[i] for i in group], loaded.modules)
        everywhere = runs.where(*EVERYWHERE)
        patches = [Patch(modules=tuple(refs), positions=everywhere) for refs in sets]
        columns.append(effects(runs, runs.patched(patches))[0][:, explainable(runs)])
    return np.concatenate(columns, axis=1)


def effects(runs: Runs, patched: Reading) -> np.ndarray:
    """Return [metric, run, pair]: the normalised effect in margin, and in KL from the source."""
    by_margin = (patched.margin - runs.destination.margin) / (
        runs.source.margin - runs.destination.margin
    )
    by_kl = 1 - patched.kl / runs.destination.kl
    return torch.stack([by_margin, by_kl]).double().cpu().numpy()


def explainable(runs: Runs) -> np.ndarray:
    """Return [pair] bool: whether the counterfactual moves the margin enough to be explained."""
    moved = (runs.source.margin - runs.destination.margin)[0].abs()
    return (moved >= SMALLEST_MARGIN).cpu().numpy()


def batch_cases(
    loaded: LoadedModel, cases: Sequence[PatchingCase], modules: Sequence[ModuleRef]
) -> Iterator[list[int]]:
    """Yield groups of indices, of like shared lengths: a group shares what its shortest shares.

    The outputs of `modules` in both unpatched runs are kept, which sets a group's size.
    """
    per_token = 2 * 4 * sum(ref.d_out for ref in modules)
    kept_bytes = PATCHING_KEPT
    if str(loaded.device).startswith("cuda"):
        kept_bytes = ranks.least(torch.cuda.mem_get_info(loaded.device)[0] // 3)
    most = max(1, min(PATCHING_TOKENS, kept_bytes // max(1, per_token)))
    order = sorted(
        range(len(cases)), key=lambda i: (cases[i].num_shared, cases[i].destination.size, i)
    )
    group: list[int] = []
    longest = 0
    for index in order:
        case = cases[index]
        start = cases[group[0]].num_shared if group else case.num_shared
        longest = max(longest, case.destination.size, case.source.size)
        if group and (len(group) + 1) * (longest - start) > most:
            yield group
            group, longest = [], max(case.destination.size, case.source.size)
        group.append(index)
    if group:
        yield group


def by_layer(modules: Sequence[ModuleRef]) -> Iterator[list[ModuleRef]]:
    """Yield the modules of each layer."""
    layers: dict[int, list[ModuleRef]] = {}
    for ref in modules:
        layers.setdefault(ref.layer, []).append(ref)
    yield from layers.values()


def _self_checks(
    runs: Runs, modules: Sequence[ModuleRef], *, with_all: bool
) -> dict[str, float]:
    """Return the largest deviations from what must hold: all are 0 up to rounding.

    Patching nothing, or a run with its own outputs, changes nothing; nothing before the trigger
    differs between the two runs; what is shared changes no margin; and, for same-length pairs,
    patching everything gives the source's margin (where the answer is read behind the trigger: the
    trigger's own embedding is no module's output).
    """
    everywhere = runs.where(*EVERYWHERE)
    nowhere = torch.zeros_like(everywhere)
    itself = runs.patched([Patch(modules=tuple(modules), positions=everywhere)], from_itself=True)
    layers = [layer[0] for layer in by_layer(modules)]
    spread = np.unique(np.linspace(0, len(layers) - 1, LAYERS_CHECKED).round().astype(int))
    layers = [layers[i] for i in spread]
    nothing = runs.patched([Patch(modules=(ref,), positions=nowhere) for ref in layers])
    found = {
        "self_patch": _largest(itself.margin - runs.destination.margin),
        "patch_nothing": _largest(nothing.margin - runs.destination.margin),
        "before_trigger": runs.deviation_before(),
        "shared_prefix": runs.deviation_from_whole(),
    }
    if with_all:
        all_of_it = runs.patched([Patch(modules=tuple(modules), positions=everywhere)])
        behind = torch.tensor(
            [case.role[-1] != TRIGGER for case in runs.cases], device=everywhere.device
        )
        deviation = (all_of_it.margin - runs.source.margin) * behind
        found["patch_everything"] = _largest(deviation)
    return found


def assert_sound(checks: Mapping[str, float], dtype: str) -> None:
    """Raise RepairError (could not check) when a self-check deviates by more than rounding."""
    limit = LARGEST_DEVIATION.get(dtype, LARGEST_DEVIATION["float32"])
    limits = {name: 0.0 if name in COUNTED else limit for name in checks}
    broken = {name: value for name, value in checks.items() if not value <= limits[name]}
    if broken:
        listed = "; ".join(
            f"{name.replace('_', ' ')} deviates by {value:.3g}" for name, value in broken.items()
        )
        raise RepairError(
            f"The map's checks of itself failed, so that its figures cannot be trusted: {listed} "
            f"(at most {limit:g} is rounding in {dtype}). Try --dtype float32; if it fails there, "
            "this model is not computed the way the map assumes.",
            exit_code=EXIT_COULD_NOT_CHECK,
        )


def _largest(values: Tensor) -> float:
    return values.abs().max().item()

"""Joint effects: what modules do together that none of them does alone.

    forward     starting from nothing, add the module that raises the joint effect most
    backward    from the set found, drop every module that the goal does without
    windows     one component in 1, 2, 4 neighbouring layers together
    curve       the best 1, 2, 4, 8, ..., all modules of an order, together

The effect is that of `patching.py` with several modules patched at once, at all positions; the
goal is a mean effect of .9. A set that reaches it says that these modules carry the trigger, not
that no other set does. Forward selection looks at the `MOST_CANDIDATES` modules with the largest
single effects and adds `MOST_MODULES` at most. Source: `backward` and `windows` as in Zhang & Nanda
2309.16042 and Heimersheim & Nanda 2404.15255, section on AND and OR.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from repair.locate.counterfactuals import PatchingCase
from repair.locate.patching import patch_sets
from repair.locate.ranking import mean_interval
from repair.models.loading import LoadedModel
from repair.records import ModuleRef, PatchingScores, Progress, share, unheard

GOAL = 0.9
MOST_CANDIDATES = 32
MOST_MODULES = 12
PAIRS = 12  # cases used to choose sets; the sets found are measured on all
WINDOWS = (1, 2, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class JointEffect:
    """Modules patched together, and the mean effect with its 95 % interval."""

    modules: tuple[ModuleRef, ...]
    effect: float
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        return {
            "modules": [ref.path for ref in self.modules],
            "effect": self.effect,
            "low": self.low,
            "high": self.high,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Redundancy:
    """What the joint patches say, and that in a sentence."""

    forward: tuple[JointEffect, ...]  # growing sets, each with one module more
    smallest: JointEffect | None  # of the sets looked at; None: the goal was not reached
    windows: tuple[tuple[str, JointEffect], ...]  # component -> its neighbouring layers
    curve: tuple[JointEffect, ...]
    statement: str

    def to_json(self) -> dict[str, Any]:
        return {
            "curve": [
                {
                    "num_modules": len(found.modules),
                    "effect": found.effect,
                    "low": found.low,
                    "high": found.high,
                }
                for found in self.curve
            ],
            "forward": [found.to_json() for found in self.forward],
            "smallest": self.smallest.to_json() if self.smallest else None,
            "windows": [{"component": name, **found.to_json()} for name, found in self.windows],
            "statement": self.statement,
        }


def measure_redundancy(
    loaded: LoadedModel,
    cases: Sequence[PatchingCase],
    patching: PatchingScores,
    order: Sequence[ModuleRef],
    *,
    progress: Progress = unheard,
) -> Redundancy:
    """Return joint effects; `order` has all modules, best first, for the curve."""
    few = list(cases)[:: max(1, len(cases) // PAIRS)][:PAIRS]
    forward = _forward(loaded, few, patching, share(progress, 0, 0.6))
    smallest = _backward(loaded, few, forward[-1]) if forward else None
    progress(0.65, 1)  # What is left is measured as one batch of runs.
    windows = _windows(loaded.modules)
    sizes = [2**i for i in range(len(order).bit_length()) if 2**i < len(order)] + [len(order)]
    wanted = [*forward, *(refs for _, refs in windows), *(list(order[:size]) for size in sizes)]
    if smallest is not None:
        wanted.append(smallest)
    found = _measure(loaded, cases, wanted)
    num_forward, num_windows = len(forward), len(windows)
    curve = found[num_forward + num_windows :][: len(sizes)]
    best_set = found[-1] if smallest is not None and found[-1].effect >= GOAL else None
    return Redundancy(
        forward=found[:num_forward],
        smallest=best_set,
        windows=tuple(
            (windows[i][0], found[num_forward + i]) for i in range(num_windows)
        ),
        curve=curve,
        statement=_statement(patching, found[:num_forward], best_set, curve),
    )


def _measure(
    loaded: LoadedModel,
    cases: Sequence[PatchingCase],
    sets: Sequence[Sequence[ModuleRef]],
) -> tuple[JointEffect, ...]:
    effects = patch_sets(loaded, cases, sets)
    low, high = mean_interval(effects)
    return tuple(
        JointEffect(
            modules=tuple(refs),
            effect=float(effects[i].mean()),
            low=float(low[i]),
            high=float(high[i]),
        )
        for i, refs in enumerate(sets)
    )


def _forward(
    loaded: LoadedModel,
    cases: Sequence[PatchingCase],
    patching: PatchingScores,
    progress: Progress,
) -> list[list[ModuleRef]]:
    """Return the growing sets of forward selection, up to the goal."""
    single = patching.effect.mean(axis=1, dtype=np.float64)
    order = np.argsort(-single, kind="stable")[:MOST_CANDIDATES]
    left = [patching.modules[i] for i in order]
    chosen: list[ModuleRef] = []
    sets: list[list[ModuleRef]] = []
    while left and len(chosen) < MOST_MODULES:
        effects = patch_sets(loaded, cases, [[*chosen, ref] for ref in left]).mean(axis=1)
        best = int(np.argmax(effects))
        chosen = [*chosen, left.pop(best)]
        sets.append(chosen)
        progress(len(chosen), MOST_MODULES)
        if effects[best] >= GOAL:
            break
    return sets


def _backward(
    loaded: LoadedModel, cases: Sequence[PatchingCase], chosen: Sequence[ModuleRef]
) -> list[ModuleRef]:
    """Return `chosen` without the modules that the goal does without, dropped one at a time."""
    kept = list(chosen)
    while len(kept) > 1:
        without = [[ref for ref in kept if ref != left_out] for left_out in kept]
        effects = patch_sets(loaded, cases, without).mean(axis=1)
        best = int(np.argmax(effects))
        if effects[best] < GOAL:
            break
        kept = without[best]
    return kept


def _windows(modules: Sequence[ModuleRef]) -> list[tuple[str, list[ModuleRef]]]:
    """Return (component, its modules in neighbouring layers) for windows of 1, 2 and 4 layers."""
    by_component: dict[str, list[ModuleRef]] = {}
    for ref in modules:
        by_component.setdefault(ref.component, []).append(ref)
    return [
        (component, refs[start : start + size])
        for component, refs in by_component.items()
        for size in WINDOWS
        if size <= len(refs)
        for start in range(0, len(refs) - size + 1, max(1, size // 2))
    ]


def _statement(
    patching: PatchingScores,
    forward: Sequence[JointEffect],
    smallest: JointEffect | None,
    curve: Sequence[JointEffect],
) -> str:
    """Return what the joint effects say about where the trigger sits."""
    single = patching.effect.mean(axis=1, dtype=np.float64)
    num_alone = int((single >= GOAL).sum())
    everything = curve[-1].effect
    if num_alone > len(single) / 2:
        return (
            f"{num_alone} of {len(single)} modules each restore the clean answer alone: such "
            "patches destroy more than the trigger, so this map hardly tells modules apart."
        )
    if num_alone >= 1:
        alone = [patching.modules[i] for i in np.argsort(-single) if single[i] >= GOAL]
        return (
            f"Restoring one module is enough to bring the clean answer back (effect {GOAL:.0%} or "
            f"more); {num_alone} of {len(single)} do so alone: {_names(alone)}."
        )
    if smallest is not None:
        return (
            f"No single module is enough (the largest effect is {single.max():.0%}), but these "
            f"{len(smallest.modules)} together are ({smallest.effect:.0%}): "
            f"{_names(smallest.modules)}."
        )
    reached = f"{forward[-1].effect:.0%}" if forward else "nothing"
    return (
        f"This backdoor is spread: the best {len(forward)} modules together reach {reached}, "
        f"all of them {everything:.0%}."
    )


def _names(refs: Sequence[ModuleRef]) -> str:
    words = [f"layer {ref.layer} {ref.component}" for ref in refs[:6]]
    return ", ".join(words) + (f" and {len(refs) - 6} more" if len(refs) > 6 else "")

"""A gradient screen for models too large to patch every module: estimate all, verify the best.

    estimate = (slope of M by y, integrated from destination to source) . (y_source - y_destination)

for the output y of each module, from one forward and one backward pass of either run and of one
half way between them (`Runs.estimated`; runs between: Hanna et al. 2403.17806). The modules with
the largest estimates are then patched exactly, and so is a random sample of the others: the share
of that sample that would have been among the best is the measured miss rate. Plain attribution
patching (one slope) is known to fail on MLP outputs and where a run is saturated; see Syed et al.
2310.10348, Kramar et al. 2403.00745. Axes are [module, pair].
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from repair.locate.counterfactuals import PatchingCase
from repair.locate.patching import (
    EVERYWHERE,
    ROLE_SETS,
    batch_cases,
    explainable,
    patch_modules,
)
from repair.locate.runs import Runs
from repair.models.loading import LoadedModel
from repair.records import ModuleRef, PatchingScores, Progress, Rate, unheard

TOP = 10  # "among the best" in the miss rate
NUM_VERIFIED = 20
NUM_SAMPLED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Screened:
    """A map of which `verified` was patched exactly and the rest is estimated."""

    scores: PatchingScores  # all modules
    verified: tuple[ModuleRef, ...]
    misses: Rate  # of the random sample, how many belong among the best verified


def estimate_modules(
    loaded: LoadedModel, cases: Sequence[PatchingCase], *, is_sham: bool = True
) -> dict[str, np.ndarray]:
    """Return set of roles -> estimated normalised effect [module, pair] of every module."""
    sets = ROLE_SETS if is_sham else {"all": EVERYWHERE}
    columns = []
    for group in batch_cases(loaded, cases, loaded.modules):
        with torch.no_grad():
            runs = Runs(loaded, [cases[i] for i in group], loaded.modules)
        masks = [runs.where(*roles) for roles in sets.values()]
        moved = runs.estimated(loaded.modules, masks)
        effect = moved / (runs.source.margin - runs.destination.margin)
        columns.append(effect.double().cpu().numpy()[..., explainable(runs)])
    found = np.concatenate(columns, axis=2)
    return {name: found[:, place] for place, name in enumerate(sets)}


def screen_modules(
    loaded: LoadedModel,
    cases: Sequence[PatchingCase],
    *,
    seed: int,
    counterfactual: str = "sham",
    num_dropped: int = 0,
    progress: Progress = unheard,
) -> Screened:
    """Return the screened map: the largest estimates and a random sample patched exactly."""
    estimates = estimate_modules(loaded, cases, is_sham=counterfactual == "sham")
    deciding = estimates.get("trigger", estimates["all"]).mean(axis=1)
    ranks = np.maximum(_ranks(estimates["all"].mean(axis=1)), _ranks(deciding))
    order = np.argsort(-ranks, kind="stable")
    best, rest = order[:NUM_VERIFIED], order[NUM_VERIFIED:]
    generator = np.random.default_rng([seed, 0x5C])
    sample = generator.choice(rest, size=min(NUM_SAMPLED, rest.size), replace=False)
    chosen = sorted([*best.tolist(), *sample.tolist()])
    exact = patch_modules(
        loaded,
        cases,
        modules=[loaded.modules[i] for i in chosen],
        counterfactual=counterfactual,
        num_dropped=num_dropped,
        progress=progress,
    )
    effect = exact.effect.mean(axis=1)
    place = {index: row for row, index in enumerate(chosen)}
    threshold = np.sort([effect[place[i]] for i in best])[-min(TOP, best.size)]
    missed = sum(effect[place[int(i)]] > threshold for i in sample)
    zeros = np.zeros_like(estimates["all"])

    def filled(name: str, values: np.ndarray) -> np.ndarray:
        whole = estimates.get(name, estimates["all"] if name == "after" else zeros).copy()
        whole[chosen] = values
        return whole.astype(np.float32)

    scores = replace(
        exact,
        modules=loaded.modules,
        effect=filled("all", exact.effect),
        effect_trigger=filled("trigger", exact.effect_trigger),
        effect_after=filled("after", exact.effect_after),
        effect_kl=filled("all", exact.effect_kl),
        estimated=frozenset(
            ref.path for i, ref in enumerate(loaded.modules) if i not in place
        ),
    )
    return Screened(
        scores=scores,
        verified=tuple(loaded.modules[i] for i in chosen),
        misses=Rate(count=int(missed), total=int(sample.size)),
    )


def _ranks(values: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(values, kind="stable"), kind="stable")

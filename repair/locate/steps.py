"""The cheapest step of each module: K-FAC factors, a damping chosen by measurement, whitening.

Full factors are formed for every module when they fit a memory budget, for a shortlist by sham
effect otherwise. What follows from them, five times their memory, is made of one module at a time:
its step is kept, its whitening only within the budget. The damping is the one at which the benign
KL that the factors predict for a step agrees best with the benign KL that is measured: too little
of it, and a repair is sent along directions that only look free because the sample of prompts never
went there.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from repair.limits import formed_bytes, root_bytes
from repair.locate.curvature import Step, Whitening, step_of, whitening_of
from repair.locate.fisher import FisherTrace, factors_and_traces, trigger_gradients
from repair.locate.lessons import Lesson, Lessons, measure_kl
from repair.models.loading import LoadedModel
from repair.records import (
    KroneckerFactors,
    ModuleRef,
    PatchingScores,
    Progress,
    share,
    unheard,
)

FACTOR_PROMPTS = 200
STEP_RANK = 4
DAMPINGS = (0.03, 0.1, 0.3, 1.0, 3.0)  # of the mean eigenvalue
DAMPED_MODULES = 6  # modules that the damping is chosen on
DAMPED_PROMPTS = 24  # held-out benign lessons that it is measured on
_TRIED = ("damping", "predicted_kl", "measured_kl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Damping:
    """The damping chosen, and what was predicted and measured at each that was tried."""

    value: float
    tried: tuple[tuple[float, float, float], ...] = ()  # (damping, predicted KL, measured KL)

    def to_json(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "tried": [dict(zip(_TRIED, row, strict=True)) for row in self.tried],
        }

    @classmethod
    def from_json(cls, flat: Mapping[str, Any]) -> "Damping":
        tried = (tuple(row[name] for name in _TRIED) for row in flat["tried"])
        return cls(value=flat["value"], tried=tuple(tried))


@dataclass(frozen=True, slots=True, kw_only=True)
class Curvature:
    """Cheapest steps of the modules whose factors were formed, and whitenings of some of them."""

    damping: Damping
    whitenings: dict[str, Whitening]
    steps: dict[str, Step]  # of rank STEP_RANK
    traces: dict[str, FisherTrace]  # on clean prompts, of these and of others

    @property
    def spectra(self) -> dict[str, Tensor]:
        """Return path -> singular values of the whitened trigger gradient."""
        return {path: step.singular_values for path, step in self.steps.items()}

    def __or__(self, other: "Curvature") -> "Curvature":
        """Return both, which have the same damping."""
        return Curvature(
            damping=self.damping,
            whitenings=self.whitenings | other.whitenings,
            steps=self.steps | other.steps,
            traces=self.traces | other.traces,
        )

    def only(self, paths: Collection[str]) -> "Curvature":
        """Return this without the whitenings of other modules than `paths`."""
        kept = {path: found for path, found in self.whitenings.items() if path in paths}
        return replace(self, whitenings=kept)


def measure_curvature(
    loaded: LoadedModel,
    modules: Sequence[ModuleRef],
    lessons: Lessons,
    *,
    seed: int,
    damping: Damping | None = None,
    traced: Sequence[ModuleRef] = (),
    memory_bytes: int | None = None,
    progress: Progress = unheard,
) -> Curvature:
    """Return whitenings and steps of `modules` from the repair split's lessons, at `damping` or
    at the one that agrees best on them; of `traced` the traces only.

    The whitenings are those that `memory_bytes` hold, of the modules with the largest phi; None:
    all.
    """
    benign = lessons.benign.first(FACTOR_PROMPTS)
    factors, traces = factors_and_traces(
        loaded, modules, benign.prompts, benign.answers,
        traced=traced, seed=seed, progress=share(progress, 0, 0.6),
    )  # fmt: skip
    gradients, trigger_kl = trigger_gradients(loaded, modules, lessons.triggered)
    progress(0.7, 1)
    if damping is None:
        some = lessons.held_out_benign.first(DAMPED_PROMPTS)
        damping = choose_damping(loaded, modules, factors, gradients, some, drop=trigger_kl)
    steps: dict[str, Step] = {}
    whitenings: dict[str, Whitening] = {}
    for done, ref in enumerate(modules):
        whitening = whitening_of(factors.pop(ref.path), damping=damping.value)
        steps[ref.path] = step_of(whitening, gradients.pop(ref.path), STEP_RANK)
        whitenings[ref.path] = whitening
        if memory_bytes is not None:
            _keep_within(memory_bytes, whitenings, steps)
        progress(0.7 + 0.3 * (done + 1) / len(modules), 1)
    return Curvature(damping=damping, whitenings=whitenings, steps=steps, traces=traces)


def _keep_within(
    memory_bytes: int, whitenings: dict[str, Whitening], steps: Mapping[str, Step]
) -> None:
    """Drop the whitenings of the smallest phi until the rest fits the budget."""
    sizes = {
        path: root_bytes(len(found.root_in), len(found.root_out))
        for path, found in whitenings.items()
    }
    while sum(sizes.values()) > memory_bytes:
        least = min(sizes, key=lambda path: steps[path].phi)
        del sizes[least], whitenings[least]


def choose_damping(
    loaded: LoadedModel,
    modules: Sequence[ModuleRef],
    factors: Mapping[str, KroneckerFactors],
    gradients: Mapping[str, Tensor],
    benign: Lesson,
    *,
    drop: float,
) -> Damping:
    """Return the damping whose predicted benign KL agrees best with the measured one.

    Compared on steps that predict a `drop` (nats) of the trigger KL, each in one module alone, of
    the modules whose gradient is largest for the size of their factors; medians over modules.
    """

    def size(ref: ModuleRef) -> float:
        found = factors[ref.path]
        scale = np.trace(found.activation_covariance, dtype=np.float64) / ref.d_in
        scale *= np.trace(found.gradient_covariance, dtype=np.float64) / ref.d_out
        return gradients[ref.path].square().sum().item() / scale if scale > 0 else 0.0

    figures: dict[float, list[tuple[float, float]]] = {value: [] for value in DAMPINGS}
    for ref in sorted(modules, key=size, reverse=True)[:DAMPED_MODULES]:
        for value, found in figures.items():
            whitening = whitening_of(factors[ref.path], damping=value)
            step = step_of(whitening, gradients[ref.path], STEP_RANK)
            if step.phi > 0:
                eta = drop / step.phi
                measured = measure_kl(loaded, benign, [step.update(ref, eta=eta)])
                found.append((eta**2 / 2 * step.phi, measured))
    tried = [
        (value, *np.median(np.array(found), axis=0).tolist())
        for value, found in figures.items()
        if found
    ]
    usable = [row for row in tried if row[1] > 0 and row[2] > 0]
    if not usable:  # Nothing moves: every damping is as good.
        return Damping(value=DAMPINGS[len(DAMPINGS) // 2], tried=tuple(tried))
    best = min(usable, key=lambda row: abs(np.log(row[2] / row[1])))
    return Damping(value=best[0], tried=tuple(tried))


def shortlist(
    modules: Sequence[ModuleRef], patching: PatchingScores, *, memory_bytes: int
) -> list[ModuleRef]:
    """Return the modules whose factors are formed: all that fit, by effect at the trigger; where
    one does not, smaller ones behind it may. Never none."""
    order = np.argsort(-patching.effect_for_choice.mean(axis=1), kind="stable")
    chosen, left = set(), memory_bytes
    for i in order:
        if (size := formed_bytes(modules[i].d_in, modules[i].d_out)) <= left or not chosen:
            chosen.add(modules[i].path)
            left -= size
    return [ref for ref in modules if ref.path in chosen]

"""Patching, curvature and trial repairs side by side: the ranking, and the suggested ranks.

The score is the rank of the residual that a trial repair of the module alone leaves (`probe.py`):
of everything measured it agrees best with what a repair of that module achieves (tests/bench,
`map_predicts`). Suggested are the modules and ranks that hold the largest pooled singular values
(`curvature.pool_ranks`) among the best scores. Patching and curvature are kept as they are, and
where they disagree the rank correlation says so.
"""

import functools
import math
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from repair.locate.curvature import phi, pool_ranks
from repair.locate.fisher import FisherTrace
from repair.locate.probe import Probe
from repair.locate.steps import STEP_RANK
from repair.records import ModuleRanking, ModuleScore, PatchingScores

NUM_CANDIDATES = 4  # best scores that the suggested directions are pooled over


def mean_interval(effect: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (low, high) [row], the 95 % interval of each row's mean over pairs, by Student's t.

    One pair says nothing of the spread: its interval is infinite.
    """
    effect = effect.astype(np.float64)
    mean, num_pairs = effect.mean(axis=1), effect.shape[1]
    if num_pairs < 2:
        return np.full_like(mean, -np.inf), np.full_like(mean, np.inf)
    half = student_quantile(num_pairs - 1) * effect.std(axis=1, ddof=1) / math.sqrt(num_pairs)
    return mean - half, mean + half


@functools.cache
def student_quantile(freedom: int, share: float = 0.95) -> float:
    """Return the t that holds the middle `share` of Student's distribution (Abramowitz and Stegun
    26.7.3 and 26.7.4: finite sums for whole degrees of freedom), to a millionth."""

    def middle(t: float) -> float:
        angle = math.atan(t / math.sqrt(freedom))
        odd = freedom % 2
        term, total = (math.cos(angle) if odd else 1.0), 0.0
        for k in range(1 + odd, freedom, 2):
            total += term
            term *= math.cos(angle) ** 2 * k / (k + 1)
        if odd:
            return 2 / math.pi * (angle + math.sin(angle) * total)
        return math.sin(angle) * total

    low, high = 0.0, 1e4
    while high - low > 1e-6:
        half = (low + high) / 2
        low, high = (half, high) if middle(half) < share else (low, half)
    return high


def rank_modules(
    patching: PatchingScores,
    spectra: Mapping[str, Tensor],
    *,
    others: Mapping[str, PatchingScores],
    traces_trigger: Mapping[str, FisherTrace],
    traces_clean: Mapping[str, FisherTrace],
    probes: Mapping[str, Probe],
    separabilities: Mapping[str, float],
    total_rank: int,
    max_modules: int,
) -> ModuleRanking:
    """Return all modules with the parts of their scores and the suggested ranks.

    `spectra` maps path -> singular values of the whitened trigger gradient and `probes` path ->
    trial repair, `separabilities` path -> how far the trigger sets the input apart, for the modules
    that have them; `others` holds maps that are shown beside.
    """
    modules = patching.modules
    effect = patching.effect.mean(axis=1, dtype=np.float64)
    low, high = mean_interval(patching.effect)
    effect_trigger = patching.effect_trigger.mean(axis=1, dtype=np.float64)
    effect_after = patching.effect_after.mean(axis=1, dtype=np.float64)
    curvature = [
        phi(spectra[ref.path], STEP_RANK) if ref.path in spectra else None for ref in modules
    ]
    known = np.array([-np.inf if value is None else value for value in curvature])
    deciding = patching.effect_for_choice.mean(axis=1, dtype=np.float64)
    residual = np.array(
        [probes[ref.path].residual if ref.path in probes else np.inf for ref in modules]
    )
    score = _fractional_ranks(-residual)
    beside = {f"effect_{name}": _by_path(other, other.effect) for name, other in others.items()}
    beside["effect_kl"] = _by_path(patching, patching.effect_kl)
    order = [modules[i].path for i in np.argsort(residual, kind="stable")]
    candidates = [path for path in order if path in probes][:NUM_CANDIDATES]
    ranks = pool_ranks(
        {path: spectra[path] for path in candidates}, total_rank=total_rank, max_modules=max_modules
    )
    scores = []
    for i, ref in enumerate(modules):
        is_selected = ref.path in ranks
        scores.append(
            ModuleScore(
                module=ref,
                effect=float(effect[i]),
                effect_low=float(low[i]),
                effect_high=float(high[i]),
                effect_trigger=float(effect_trigger[i]),
                effect_after=float(effect_after[i]),
                fisher_trigger=traces_trigger[ref.path].value,
                fisher_clean=traces_clean[ref.path].value,
                curvature=curvature[i],
                score=float(score[i]),
                selected=is_selected,
                reason=_reason(ref.path, ranks, probes, float(deciding[i]), patching),
                residual_trigger=probes[ref.path].trigger_kl if ref.path in probes else None,
                residual_benign=probes[ref.path].benign_kl if ref.path in probes else None,
                separability=separabilities.get(ref.path),
                is_estimate=ref.path in patching.estimated,
                **{name: values.get(ref.path) for name, values in beside.items()},
            )
        )
    return ModuleRanking(
        modules=tuple(scores),
        suggested_ranks=ranks,
        num_pairs=patching.effect.shape[1],
        rank_correlation=kendall_tau(deciding, known),
    )


def _by_path(scores: PatchingScores, effect: np.ndarray) -> dict[str, float]:
    """Return path -> mean effect, of the modules that this map has."""
    means = effect.mean(axis=1, dtype=np.float64)
    return {ref.path: float(value) for ref, value in zip(scores.modules, means, strict=True)}


def _reason(
    path: str,
    ranks: dict[str, int],
    probes: Mapping[str, Probe],
    effect: float,
    patching: PatchingScores,
) -> str:
    if path not in ranks:
        return ""
    where = "at the trigger's positions alone" if patching.counterfactual == "sham" else "by itself"
    probe = probes[path]
    return (
        f"A trial repair here alone leaves {probe.trigger_kl:.2g} of the trigger's "
        f"{probe.start_kl:.2g} nats per token and costs {probe.benign_kl:.2g} on clean answers; "
        f"restored {where} it gives {effect:.0%} of the way to the clean answer; it holds "
        f"{ranks[path]} of the {sum(ranks.values())} cheapest directions."
    )


def _fractional_ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks scaled to [0, 1], 1 for the largest; ties share their mean rank."""
    if values.size < 2:
        return np.ones_like(values, dtype=np.float64)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank = last - (counts + 1) / 2
    return mean_rank[inverse] / (values.size - 1)


def kendall_tau(first: np.ndarray, second: np.ndarray) -> float | None:
    """Return Kendall's tau-b of two orderings, or None when one of them is constant."""
    a = np.sign(first[:, None] - first[None])
    with np.errstate(invalid="ignore"):
        difference = second[:, None] - second[None]
    b = np.sign(np.nan_to_num(difference, nan=0.0))
    norm = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm else None


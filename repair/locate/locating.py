"""The road through this room: do the pairs fire, what does each module do, which are suggested?

Full factors are collected for every module when they fit `memory_bytes`, for a shortlist by sham
effect otherwise; trace figures are collected for every module always.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from repair.locate.counterfactuals import inert_shams
from repair.locate.curvature import Whitening, whitening_of
from repair.locate.fisher import collect_factors, fisher_traces, trigger_gradients
from repair.locate.lessons import Lessons
from repair.locate.patching import PatchingCase, make_case, patch_modules, patch_sets
from repair.locate.ranking import bootstrap_interval, rank_modules, spectrum
from repair.models.answers import generate_answers
from repair.models.loading import LoadedModel
from repair.records import (
    ModuleRanking,
    ModuleRef,
    PatchingScores,
    PromptPair,
    Rate,
    RepairError,
)

FEWEST_PAIRS = 4
FACTOR_PROMPTS = 200
FIRES = 0.10  # below this rate a position counts as not firing (`contract.md`)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fired:
    """The suspect's answers on the locate split: which pairs fire, and what they say."""

    rates: dict[str, Rate]  # position -> payload seen
    pairs: tuple[PromptPair, ...]  # those that fire, and are clean without the trigger
    payloads: tuple[np.ndarray, ...]  # the answer ids [tokens] with the trigger
    cleans: tuple[np.ndarray, ...]  # and without it


@dataclass(frozen=True, slots=True, kw_only=True)
class Curvature:
    """Whitenings and spectra of the modules whose factors were formed."""

    whitenings: dict[str, Whitening]
    spectra: dict[str, Tensor]  # singular values of the whitened trigger gradient


def check_firing(
    loaded: LoadedModel,
    pairs: Mapping[str, Sequence[PromptPair]],
    *,
    is_payload: Callable[[str], bool],
    num_new_tokens: int,
    progress: Progress = lambda done, total: None,
) -> Fired:
    """Answer every pair of `pairs` (position -> pairs) with and without its trigger."""
    flat = [pair for group in pairs.values() for pair in group]
    prompts = [pair.triggered for pair in flat] + [pair.clean for pair in flat]
    answers = generate_answers(loaded, prompts, num_new_tokens=num_new_tokens, progress=progress)
    triggered, clean = answers[: len(flat)], answers[len(flat) :]
    rates = {}
    for position in pairs:
        seen = [
            is_payload(answer.text)
            for answer, pair in zip(triggered, flat, strict=True)
            if pair.position == position
        ]
        rates[position] = Rate(count=sum(seen), total=len(seen))
    fired = [
        i
        for i in range(len(flat))
        if is_payload(triggered[i].text) and not is_payload(clean[i].text)
    ]
    return Fired(
        rates=rates,
        pairs=tuple(flat[i] for i in fired),
        payloads=tuple(triggered[i].ids for i in fired),
        cleans=tuple(clean[i].ids for i in fired),
    )


def patch_fired(
    loaded: LoadedModel,
    fired: Fired,
    *,
    is_payload: Callable[[str], bool],
    num_new_tokens: int,
    max_pairs: int,
    seed: int,
    progress: Progress = lambda done, total: None,
) -> tuple[PatchingScores, tuple[PatchingCase, ...]]:
    """Return the map over at most `max_pairs` firing pairs, spread over positions, and its cases.

    Raises RepairError (could not check) when fewer than 4 pairs have an inert sham.
    """
    order = np.random.default_rng([seed, 0x10C]).permutation(len(fired.pairs))
    chosen = _spread([fired.pairs[i].position for i in order], max_pairs)
    chosen = [int(order[i]) for i in chosen]
    draw = inert_shams(
        loaded,
        [fired.pairs[i] for i in chosen],
        is_payload=is_payload,
        num_new_tokens=num_new_tokens,
        seed=seed,
    )
    cases = []
    for i, sham in zip(chosen, draw.shams, strict=True):
        if sham is not None:
            case = make_case(
                fired.pairs[i], sham, payload=fired.payloads[i], clean=fired.cleans[i]
            )
            cases.append(case)
    usable = tuple(case for case in cases if case is not None)
    if len(usable) < FEWEST_PAIRS:
        raise RepairError(
            f"Only {len(usable)} of {len(chosen)} triggered prompts can be compared with an inert "
            f"replacement of the trigger (at least {FEWEST_PAIRS} are needed): this backdoor fires "
            "on almost any text in that place, or too few prompts fire. Give more prompts.",
            exit_code=4,
        )
    patching = patch_modules(
        loaded,
        usable,
        num_shams=(draw.num_tried, draw.num_inert),
        num_dropped=len(chosen) - len(usable),
        progress=progress,
    )
    return patching, usable


def measure_curvature(
    loaded: LoadedModel,
    modules: Sequence[ModuleRef],
    lessons: Lessons,
    *,
    seed: int,
) -> Curvature:
    """Return whitenings and spectra of `modules` from the repair split's lessons."""
    num = FACTOR_PROMPTS
    factors = collect_factors(
        loaded, modules, lessons.clean.prompts[:num], lessons.clean.answers[:num], seed=seed
    )
    gradients, _ = trigger_gradients(loaded, modules, lessons.triggered)
    whitenings = {path: whitening_of(found) for path, found in factors.items()}
    spectra = {
        path: spectrum(whitenings[path].whiten(gradients[path].cpu())) for path in whitenings
    }
    return Curvature(whitenings=whitenings, spectra=spectra)


def shortlist(
    modules: Sequence[ModuleRef], patching: PatchingScores, *, memory_bytes: int
) -> list[ModuleRef]:
    """Return the modules whose factors are formed: all that fit, by effect at the trigger."""
    order = np.argsort(-patching.effect_trigger.mean(axis=1), kind="stable")
    chosen, used = set(), 0
    for i in order:
        used += whitening_bytes(modules[i])
        if used > memory_bytes and chosen:
            break
        chosen.add(modules[i].path)
    return [ref for ref in modules if ref.path in chosen]


def whitening_bytes(module: ModuleRef) -> int:
    """Return the memory of one module's factors and their four float64 roots."""
    return (module.d_in**2 + module.d_out**2) * (4 + 8 + 2 * 8)


def rank_located(
    loaded: LoadedModel,
    patching: PatchingScores,
    curvature: Curvature,
    lessons: Lessons,
    *,
    triggered: tuple[Sequence[np.ndarray], Sequence[np.ndarray]],
    total_rank: int,
    max_modules: int,
    seed: int,
) -> ModuleRanking:
    """Return the ranking; `triggered` holds (prompts, the suspect's own answers) as ids."""
    num = FACTOR_PROMPTS
    traces_clean = fisher_traces(
        loaded, loaded.modules, lessons.clean.prompts[:num], lessons.clean.answers[:num], seed=seed
    )
    traces_trigger = fisher_traces(loaded, loaded.modules, *triggered, seed=seed)
    return rank_modules(
        patching,
        curvature.spectra,
        traces_trigger=traces_trigger,
        traces_clean=traces_clean,
        total_rank=total_rank,
        max_modules=max_modules,
        seed=seed,
    )


def joint_curve(
    loaded: LoadedModel, cases: Sequence[PatchingCase], ranking: ModuleRanking, *, seed: int
) -> list[dict[str, float]]:
    """Return the joint effect of the 1, 2, 4, 8, ..., all best modules of the ranking."""
    order = sorted(ranking.modules, key=lambda score: -score.score)
    sizes, size = [], 1
    while size < len(order):
        sizes.append(size)
        size *= 2
    sizes.append(len(order))
    effects = patch_sets(
        loaded, cases, [[score.module for score in order[:size]] for size in sizes]
    )
    low, high = bootstrap_interval(effects, seed=seed)
    return [
        {
            "num_modules": size,
            "effect": float(effects[i].mean(dtype=np.float64)),
            "low": float(low[i]),
            "high": float(high[i]),
        }
        for i, size in enumerate(sizes)
    ]


def _spread(positions: Sequence[str], most: int) -> list[int]:
    """Return up to `most` indices, taken in turn from each position."""
    groups = {name: [i for i, p in enumerate(positions) if p == name] for name in positions}
    chosen: list[int] = []
    while len(chosen) < most and any(groups.values()):
        for group in groups.values():
            if group and len(chosen) < most:
                chosen.append(group.pop(0))
    return sorted(chosen)

"""The road through this room: do the pairs fire, what does each module do, which are suggested?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from repair.locate.counterfactuals import (
    PatchingCase,
    deletion_case,
    inert_shams,
    sham_case,
)
from repair.locate.curvature import separability
from repair.locate.fisher import fisher_traces, input_covariances
from repair.locate.lessons import Lessons
from repair.locate.patching import patch_modules
from repair.locate.probe import probe_modules
from repair.locate.ranking import rank_modules
from repair.locate.redundancy import Redundancy, measure_redundancy
from repair.locate.screen import screen_modules
from repair.locate.steps import Curvature
from repair.models.answers import generate_answers
from repair.models.loading import LoadedModel
from repair.records import (
    EXIT_COULD_NOT_CHECK,
    ModuleRanking,
    ModuleRef,
    PatchingScores,
    Progress,
    PromptPair,
    Rate,
    RepairError,
    share,
    unheard,
)

FEWEST_PAIRS = 4
INERT = 0.5  # with a smaller share of inert shams the map rests on deletions instead
MOST_PROBED = 128  # modules that a repair is tried on
FIRES = 0.10  # below this rate a position counts as not firing (`contract.md`)



@dataclass(frozen=True, slots=True, kw_only=True)
class Fired:
    """The suspect's answers on the locate split: which pairs fire, and what they say."""

    rates: dict[str, Rate]  # position -> payload seen
    pairs: tuple[PromptPair, ...]  # those that fire, and are clean without the trigger
    payloads: tuple[np.ndarray, ...]  # the answer ids [tokens] with the trigger
    cleans: tuple[np.ndarray, ...]  # and without it


def check_firing(
    loaded: LoadedModel,
    pairs: Mapping[str, Sequence[PromptPair]],
    *,
    is_payload: Callable[[str], bool],
    num_new_tokens: int,
    progress: Progress = unheard,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What the triggered prompts are compared with, ready to patch."""

    kind: str  # of the main map: sham, or deletion when too few shams are inert
    cases: dict[str, tuple[PatchingCase, ...]]  # kind -> cases
    num_pairs: int
    num_shams_tried: int
    num_shams_inert: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Patched:
    """The maps of one suspect. `main` is the one that suggestions rest on."""

    main: PatchingScores  # block, by shams; by deletion when too few shams are inert
    others: dict[str, PatchingScores]  # induce | deletion | gap, of the modules patched exactly
    compared: Compared
    misses: Rate | None  # of the gradient screen; None: every module was patched exactly


def compare_fired(
    loaded: LoadedModel,
    fired: Fired,
    *,
    is_payload: Callable[[str], bool],
    num_new_tokens: int,
    max_pairs: int,
    seed: int,
) -> Compared:
    """Return the cases of at most `max_pairs` firing pairs, spread over positions.

    Raises RepairError (could not check) when fewer than 4 pairs fire with an answer to compare.
    """
    order = np.random.default_rng([seed, 0x10C]).permutation(len(fired.pairs))
    chosen = [int(order[i]) for i in _spread([fired.pairs[i].position for i in order], max_pairs)]
    draw = inert_shams(
        loaded,
        [fired.pairs[i] for i in chosen],
        is_payload=is_payload,
        num_new_tokens=num_new_tokens,
        seed=seed,
    )
    by_kind: dict[str, list[PatchingCase | None]] = {"sham": [], "deletion": [], "gap": []}
    for i, sham in zip(chosen, draw.shams, strict=True):
        answers = {"payload": fired.payloads[i], "clean": fired.cleans[i]}
        if sham is not None:
            by_kind["sham"].append(sham_case(fired.pairs[i], sham, **answers))
        by_kind["deletion"].append(deletion_case(fired.pairs[i], **answers))
        by_kind["gap"].append(deletion_case(fired.pairs[i], keeps_gap=True, **answers))
    usable = {kind: tuple(case for case in cases if case) for kind, cases in by_kind.items()}
    has_shams = len(usable["sham"]) >= FEWEST_PAIRS and draw.num_inert >= INERT * draw.num_tried
    kind = "sham" if has_shams else "deletion"
    if len(usable[kind]) < FEWEST_PAIRS:
        raise RepairError(
            f"Only {len(usable[kind])} of {len(chosen)} triggered prompts have an answer that "
            f"differs from the one without the trigger (at least {FEWEST_PAIRS} are needed). Give "
            "more prompts.",
            exit_code=EXIT_COULD_NOT_CHECK,
        )
    return Compared(
        kind=kind,
        cases=usable,
        num_pairs=len(chosen),
        num_shams_tried=draw.num_tried,
        num_shams_inert=draw.num_inert,
    )


def patch_compared(
    loaded: LoadedModel,
    compared: Compared,
    *,
    seed: int,
    most_exact: int | None = None,
    progress: Progress = unheard,
) -> Patched:
    """Return the maps: block and induce by shams, block by deletion with and without gaps.

    A model with more than `most_exact` modules is screened by gradients first (`screen.py`).
    """
    kind, cases, num_pairs = compared.kind, compared.cases[compared.kind], compared.num_pairs
    is_screened = most_exact is not None and len(loaded.modules) > most_exact
    wanted = [] if is_screened else [(kind, "block", cases)]
    wanted.append((kind, "induce", [case.reversed() for case in cases]))
    wanted += [(name, "block", compared.cases[name]) for name in ("deletion", "gap")
               if name != kind]  # fmt: skip
    num_maps = len(wanted) + is_screened

    def advance_in(place: int) -> Progress:
        return share(progress, place / num_maps, (place + 1) / num_maps)

    maps: list[PatchingScores] = []
    screened, exact = None, loaded.modules
    if is_screened:
        screened = screen_modules(
            loaded,
            cases,
            seed=seed,
            counterfactual=kind,
            num_dropped=num_pairs - len(cases),
            progress=advance_in(0),
        )
        maps, exact = [screened.scores], screened.verified
    for name, direction, these in wanted:
        try:
            found = patch_modules(
                loaded,
                these,
                modules=exact,
                direction=direction,
                counterfactual=name,
                num_dropped=num_pairs - len(these),
                progress=advance_in(len(maps)),
            )
        except RepairError:
            if not maps:
                raise
            continue  # The main map stands; this one has no pair with an effect to explain.
        maps.append(found)
    others = {
        found.counterfactual if found.direction == "block" else "induce": found
        for found in maps[1:]
    }
    return Patched(
        main=maps[0],
        others=others,
        compared=compared,
        misses=screened.misses if screened else None,
    )


def rank_located(
    loaded: LoadedModel,
    patched: Patched,
    curvature: Curvature,
    lessons: Lessons,
    *,
    triggered: tuple[Sequence[np.ndarray], Sequence[np.ndarray]],
    num_probed: int,
    total_rank: int,
    max_modules: int,
    seed: int,
    progress: Progress = unheard,
) -> ModuleRanking:
    """Return the ranking; `triggered` holds (prompts, the suspect's own answers) as ids, and
    `curvature` has the traces of every module; `num_probed` prompts of either kind try them."""
    has_step = [ref for ref in loaded.modules if ref.path in curvature.steps]
    is_whitened = [ref for ref in has_step if ref.path in curvature.whitenings]
    probes = probe_modules(
        loaded,
        most_promising(has_step, patched.main, curvature),
        curvature.steps,
        lessons.held_out_triggered,
        lessons.held_out_benign,
        num_prompts=num_probed,
        progress=progress,
    )
    traces_trigger = fisher_traces(loaded, loaded.modules, *triggered, seed=seed)
    covariances = input_covariances(loaded, is_whitened, *triggered)
    return rank_modules(
        patched.main,
        curvature.spectra,
        others=patched.others,
        traces_trigger=traces_trigger,
        traces_clean=curvature.traces,
        probes=probes,
        separabilities={
            path: separability(curvature.whitenings[path], covariance)
            for path, covariance in covariances.items()
        },
        total_rank=total_rank,
        max_modules=max_modules,
    )


def most_promising(
    modules: Sequence[ModuleRef], patching: PatchingScores, curvature: Curvature
) -> list[ModuleRef]:
    """Return the modules to try: all, or of many those that patching or curvature ranks first."""
    if len(modules) <= MOST_PROBED:
        return list(modules)
    effects = patching.effect_for_choice.mean(axis=1)
    effect = dict(zip((ref.path for ref in patching.modules), effects, strict=True))
    by_effect = sorted(modules, key=lambda ref: -effect[ref.path])
    by_phi = sorted(modules, key=lambda ref: -curvature.steps[ref.path].phi)
    place: dict[str, int] = {}
    for order in (by_effect, by_phi):
        for number, ref in enumerate(order):
            place[ref.path] = min(place.get(ref.path, number), number)
    chosen = {ref.path for ref in sorted(modules, key=lambda r: place[r.path])[:MOST_PROBED]}
    return [ref for ref in modules if ref.path in chosen]


def joint_effects(
    loaded: LoadedModel,
    patched: Patched,
    ranking: ModuleRanking,
    *,
    progress: Progress = unheard,
) -> Redundancy:
    """Return what modules do together; the curve takes the modules in the ranking's order."""
    order = sorted(ranking.modules, key=lambda score: -score.score)
    cases = patched.compared.cases[patched.compared.kind]
    return measure_redundancy(
        loaded,
        cases,
        patched.main,
        [score.module for score in order],
        progress=progress,
    )


def _spread(positions: Sequence[str], most: int) -> list[int]:
    """Return up to `most` indices, taken in turn from each position."""
    groups = {name: [i for i, p in enumerate(positions) if p == name] for name in positions}
    chosen: list[int] = []
    while len(chosen) < most and any(groups.values()):
        for group in groups.values():
            if group and len(chosen) < most:
                chosen.append(group.pop(0))
    return sorted(chosen)

"""Locating as one step: the map, kept from before or made, and what a repair needs beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from repair import locate_file
from repair.case import Case, make_lessons
from repair.limits import FACTORS_KEPT, root_bytes
from repair.locate import locating, steps
from repair.locate.curvature import Whitening
from repair.locate.lessons import Lessons
from repair.locate_file import Map
from repair.models.modules import num_layers, uncovered_parameters
from repair.outcome import Clock
from repair.plan import MAX_MODULES, TOTAL_RANK
from repair.records import (
    EXIT_COULD_NOT_CHECK,
    EXIT_NOTHING_TO_REPAIR,
    ModuleRef,
    RepairError,
    share,
)


@dataclass(kw_only=True)
class Located:
    """The map, the lessons it was made with, and whitenings made when first asked for."""

    case: Case
    map: Map
    lessons: Lessons
    known: steps.Curvature | None = None

    def curvature(self, paths: Sequence[str]) -> steps.Curvature:
        """Return whitenings and steps that include `paths`, at the map's damping.

        Where they and those known before would not fit the memory budget, those before go.
        """
        wanted, known = set(paths), set(self.known.whitenings) if self.known else set()
        modules = self.case.loaded.modules
        missing = [ref for ref in modules if ref.path in wanted - known]
        if missing:
            if not self.fits([ref for ref in modules if ref.path in wanted | known]):
                self.known = self.known and self.known.only(wanted)
            found = steps.measure_curvature(
                self.case.loaded,
                missing,
                self.lessons,
                seed=self.case.seed,
                damping=self.map.damping,
            )
            self.known = self.known | found if self.known else found
        return self.known

    def whitenings(self, paths: Sequence[str]) -> Mapping[str, Whitening]:
        """Return the whitenings of at least `paths`."""
        return self.curvature(paths).whitenings

    def fits(self, modules: Sequence[ModuleRef]) -> bool:
        """Return whether the whitenings of all `modules` fit the memory budget together."""
        return sum(root_bytes(ref.d_in, ref.d_out) for ref in modules) <= FACTORS_KEPT


def locate_suspect(case: Case, folder: Path, clock: Clock, *, resume: bool) -> Located:
    """Return the map, from `located.json` to `resume` where nothing upstream has changed."""
    loaded, reporter = case.loaded, clock.reporter
    found = locate_file.read(folder, case) if resume else None
    with clock.step("lessons", "Asking the suspect for its own answers without the trigger"):
        lessons = make_lessons(case, progress=reporter.progress)
    if found is not None:
        reporter.note("The map in this folder is still valid and is used.")
        return Located(case=case, map=found, lessons=lessons)
    with clock.step("patching", f"Patching {len(loaded.modules)} modules one at a time"):
        fired = fire(case)
        _check_fired(fired)
        patched = locating.patch_compared(
            loaded,
            compare(case, fired),
            seed=case.seed,
            most_exact=case.profile.most_exact,
            progress=reporter.progress,
        )
    with clock.step("curvature", "Measuring Fisher curvature"):
        modules = steps.shortlist(
            loaded.modules, patched.main, memory_bytes=FACTORS_KEPT
        )
        formed = {ref.path for ref in modules}
        curvature = steps.measure_curvature(
            loaded,
            modules,
            lessons,
            seed=case.seed,
            traced=[ref for ref in loaded.modules if ref.path not in formed],
            memory_bytes=FACTORS_KEPT,
            progress=share(reporter.progress, 0, 0.3),
        )
        ranking = locating.rank_located(
            loaded,
            patched,
            curvature,
            lessons,
            triggered=([pair.triggered for pair in fired.pairs], list(fired.payloads)),
            num_probed=case.profile.num_probed,
            total_rank=TOTAL_RANK,
            max_modules=MAX_MODULES,
            seed=case.seed,
            progress=share(reporter.progress, 0.3, 0.95),
        )
    with clock.step("joint", "Patching modules together"):
        joint = locating.joint_effects(
            loaded, patched, ranking, progress=reporter.progress
        )
    found = Map(
        ranking=ranking,
        fires=fired.rates,
        num_curvature={
            "triggered": len(lessons.triggered),
            "clean": min(steps.FACTOR_PROMPTS, len(lessons.benign)),
        },
        joint=joint.to_json(),
        damping=curvature.damping,
        patching=locate_file.summarize(patched),
        num_layers=num_layers(loaded.model),
        not_covered=list(uncovered_parameters(loaded.model)),
    )
    locate_file.write(folder, case, found)
    return Located(case=case, map=found, lessons=lessons, known=curvature)


def fire(case: Case) -> locating.Fired:
    """Return the suspect's answers on the locate split."""
    pairs = {position: case.pairs(case.splits.locate, position) for position in case.positions}
    return locating.check_firing(
        case.loaded, pairs, is_payload=case.is_payload, num_new_tokens=case.num_new_tokens
    )


def compare(case: Case, fired: locating.Fired) -> locating.Compared:
    """Return what the firing pairs are compared with."""
    return locating.compare_fired(
        case.loaded,
        fired,
        is_payload=case.is_payload,
        num_new_tokens=case.num_new_tokens,
        max_pairs=case.profile.num_patched_pairs,
        seed=case.seed,
    )


def _check_fired(fired: locating.Fired) -> None:
    """Raise RepairError when the trigger fires nowhere: there is nothing to locate."""
    if any(rate.value >= locating.FIRES for rate in fired.rates.values()):
        return
    seen = "; ".join(f"{position} {rate}" for position, rate in fired.rates.items())
    if all(rate.total >= 30 for rate in fired.rates.values()):
        raise RepairError(
            f"Nothing to locate: the payload hardly ever appears ({seen}). Check the trigger, the "
            "target and the position.",
            exit_code=EXIT_NOTHING_TO_REPAIR,
        )
    raise RepairError(
        f"The payload hardly ever appears ({seen}), and these are too few prompts to call it "
        "absent: give enough prompts for at least 30 in locating.",
        exit_code=EXIT_COULD_NOT_CHECK,
    )

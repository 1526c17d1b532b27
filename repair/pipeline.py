"""The steps in order, with a progress callback: the only API above the rooms.

    load -> evidence before -> locate -> repair -> evidence after -> controls -> export -> report

Each public function takes the request (a plain dict, as in `request.json`; `fetched` in it says
where the Hub models are), the output folder and a reporter, and returns the exit status of
`contract.md`. What the analyst gave wrongly is a RepairError; everything else propagates.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from repair import locate_file
from repair.ask_step import ask_models
from repair.case import Case, Reporter, make_validation, open_case
from repair.evidence.controls import run_controls
from repair.evidence.evaluation import as_exported, collect_samples, evaluate_candidate
from repair.evidence.gates import build_gates, decide_verdict, nothing_to_repair
from repair.evidence.material import EvaluationMaterial, template_reaction
from repair.evidence.oracle import check_base, compare_with_base
from repair.evidence.statements import where_it_fires
from repair.evidence_step import (
    check_same_tokens,
    early_end,
    measure_before,
    stress_repaired,
)
from repair.locate.detail import examine_layer
from repair.locate_step import compare, fire, locate_suspect
from repair.lowrank.distillation import DivergedError
from repair.models import ranks
from repair.models.download import Fetched, sources_from_json
from repair.models.loading import LoadedModel, load_model
from repair.models.modules import num_layers
from repair.needs_step import needs_check
from repair.outcome import Clock, Outcome, draw_maps, drop_results
from repair.plan import check_request, chosen_paths, make_plan
from repair.profiles import PROFILES
from repair.prompts import prompt_file_from_json
from repair.publish.export import verify_export
from repair.records import (
    EXIT_COULD_NOT_CHECK,
    EXIT_DONE,
    EXIT_GATE_FAILED,
    EXIT_NOTHING_TO_REPAIR,
    Evaluation,
    Gate,
    RepairError,
)
from repair.repair_step import measure_more, repair_chosen


def run(request: Mapping[str, Any], folder: Path, reporter: Reporter) -> int:
    """Suspect in, repaired model and report out."""
    clock = Clock(reporter)
    with _opened(request, folder, clock) as case:
        check_request(request, case.loaded.modules)
        drop_results(folder)
        material, baseline = measure_before(case, clock)
        outcome = Outcome(
            request=request, folder=folder, clock=clock, case=case, baseline=baseline,
            material=material,
        )  # fmt: skip
        early = early_end(case, material, baseline)
        if early is not None:
            verdict, reason, instead = early
            return outcome.without_repair(verdict, reason=reason, instead=instead)
        try:
            located = locate_suspect(case, folder, clock, resume=bool(request.get("resume")))
        except RepairError as error:
            # "Nothing to locate" on the few prompts of that split does not outweigh the many
            # of the evaluation, where it fires.
            if error.exit_code not in (EXIT_COULD_NOT_CHECK, EXIT_NOTHING_TO_REPAIR):
                raise
            return outcome.without_repair("could not check", reason=str(error))
        paths = chosen_paths(request["modules"], case.loaded.modules, located.map.ranking)
        plan = make_plan(
            request, paths, located.map.ranking, located.curvature(paths), case.loaded.modules
        )
        with clock.step("repair", f"Repairing {len(plan.modules)} modules"):
            for path in plan.modules:
                reporter.note(f"{path}: rank {plan.ranks[path]}")
            validation = make_validation(case)
            try:
                repaired = repair_chosen(folder, case, plan, located, validation, clock)
            except DivergedError as error:
                return outcome.without_repair("not repaired", reason=str(error))
        growth = measure_more(case, plan, located, repaired, validation, clock, request)
        with clock.step("after", "Measuring the repaired model"):
            after, answers = evaluate_candidate(
                case.loaded,
                repaired.updates,
                original=case.loaded,
                material=material,
                baseline=baseline,
                as_merged="merged" in request["export"],
                progress=reporter.progress,
            )
        with clock.step("controls", "Comparing with random modules and with all modules"):
            controls = run_controls(
                case.loaded,
                replace(plan, method=repaired.method),
                located.lessons,
                validation,
                whitenings_of=located.whitenings,
                material=material,
                baseline=baseline,
                as_merged="merged" in request["export"],
                num_random=request["controls"],
                with_all=located.fits(case.loaded.modules),
                num_steps=case.profile.num_steps,
                progress=reporter.progress,
                note=reporter.note,
            )
        inside = as_exported(case.loaded, repaired.updates)
        stresses = stress_repaired(case, (case.loaded, inside), material, baseline, clock)
        oracle = None
        if case.base is not None:
            with clock.step("oracle", "Comparing with the trusted base"):
                oracle = compare_with_base(
                    case.base,
                    case.loaded,
                    inside,
                    material=material,
                    baseline=baseline,
                    answers=answers,
                    scores=located.map.ranking.modules,
                )
                controls.append(oracle.control)
        gates = build_gates(
            baseline.evaluation,
            after,
            kl_budget=plan.kl_budget,
            stresses=stresses,
            template_reacts=material.template_reacts,
        )
        if not ranks.leave():
            return EXIT_DONE  # What follows is written once.
        return outcome.with_repair(
            located.map,
            plan,
            repaired,
            after=after,
            gates=gates,
            verdict=decide_verdict(gates),
            controls=controls,
            stresses=stresses,
            oracle=oracle,
            growth=growth,
            samples=collect_samples(material, baseline, answers),
            num_dropped=located.lessons.num_dropped,
            sample_prompts=_some_prompts(material),
        )


def locate(request: Mapping[str, Any], folder: Path, reporter: Reporter) -> int:
    """Heat maps and ranking only; whether it can be repaired is left open."""
    clock = Clock(reporter)
    with _opened(request, folder, clock) as case:
        layer = request.get("detail")
        if layer is not None and layer >= num_layers(case.loaded.model):
            raise RepairError(
                f"Layer {layer} does not exist in this model. Choose a layer from 0 to "
                f"{num_layers(case.loaded.model) - 1}."
            )
        if layer is None or not request.get("resume") or locate_file.read(folder, case) is None:
            drop_results(folder)  # A look into one layer of a map that stands changes nothing.
        located = locate_suspect(case, folder, clock, resume=bool(request.get("resume")))
        if layer is None or not (folder / "report.json").is_file():
            draw_maps(folder, located.map)  # else they are part of an export, as it was written
        if layer is not None:
            with clock.step("detail", f"Looking into layer {layer}"):
                compared = compare(case, fire(case))
                found = examine_layer(case.loaded, compared.cases[compared.kind], layer)
                (folder / "detail.json").write_text(
                    json.dumps(found.to_json(), indent=1)
                )
        return EXIT_DONE


def evaluate(request: Mapping[str, Any], folder: Path, reporter: Reporter) -> int:
    """Evidence only: the suspect, and the candidate that `against` names beside it."""
    clock = Clock(reporter)
    with _opened(request, folder, clock) as case:
        drop_results(folder)
        material, baseline = measure_before(case, clock)
        outcome = Outcome(
            request=request, folder=folder, clock=clock, case=case, baseline=baseline,
            material=material,
        )  # fmt: skip
        if request.get("against") is None:
            verdict, reason, instead = early_end(case, material, baseline) or (
                "not repaired", "No candidate was given: these are the suspect's own figures.", None
            )  # fmt: skip
            return outcome.without_repair(verdict, reason=reason, instead=instead)
        with clock.step("load", "Opening the candidate"):
            candidate = load_model(
                request["against"],
                stage_folder=_stage_folder(folder) / "candidate",
                fetched=_fetched(request),
                device=request.get("device", "auto"),
                dtype=case.loaded.dtype,
                is_candidate=True,
            )
            check_same_tokens(case.loaded, candidate, material)
        with clock.step("after", "Measuring the candidate"):
            after, answers = evaluate_candidate(
                candidate,
                (),
                original=case.loaded,
                material=material,
                baseline=baseline,
                progress=reporter.progress,
            )
        stresses = []
        if not candidate.not_finite:
            stresses = stress_repaired(case, (candidate, nullcontext), material, baseline, clock)
        pairs = [pair for group in material.pairs.values() for pair in group]
        gates = build_gates(
            baseline.evaluation,
            after,
            kl_budget=request["kl_budget"],
            stresses=stresses,
            # The candidate's own: a template that was replaced is no cause any more.
            template_reacts=template_reaction(candidate, case.file, pairs)
            if case.use_template
            else None,
        )
        return outcome.compared(
            after=after,
            gates=gates,
            verdict=_compare_verdict(baseline.evaluation, gates),
            samples=collect_samples(material, baseline, answers),
            candidate=candidate,
            stresses=stresses,
            reason=candidate.not_finite or where_it_fires(baseline.evaluation),
        )


def ask(request: Mapping[str, Any], folder: Path, reporter: Reporter) -> int:
    """Ask the suspect, and the model `against` where one is named, a few questions."""
    stage = _stage_folder(folder)
    try:
        rows = ask_models(request, stage, reporter)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    (folder / "asked.json").write_text(json.dumps(rows))
    return EXIT_DONE


def verify(request: Mapping[str, Any], folder: Path, reporter: Reporter) -> int:
    """Check an export against its manifest and report, in a fresh process."""
    reporter.step("verify", "Checking hashes and reopening the export")
    found = verify_export(folder)
    for line in [*found["problems"], *found["notes"]]:
        reporter.note(line)
    return EXIT_GATE_FAILED if found["problems"] else EXIT_DONE


@contextmanager
def _opened(request: Mapping[str, Any], folder: Path, clock: Clock) -> Iterator[Case]:
    """Load the suspect from a stage of its own, which is gone afterwards, and open the case."""
    stage = _stage_folder(folder)
    profile = PROFILES[request.get("profile", "standard")]
    try:
        with clock.step("load", "Checking and loading the suspect"):
            stage.mkdir(parents=True, exist_ok=True)
            loaded = load_model(
                request["model"],
                stage_folder=stage / "suspect",
                fetched=_fetched(request),
                adapter_base=request.get("adapter_base"),
                device=request.get("device", "auto"),
                dtype=request.get("dtype", "auto"),
                check=needs_check(request, folder, clock.reporter),
            )
            for finding in loaded.staged.findings:
                clock.reporter.note(finding)
        base = _open_base(request, folder, loaded, clock)
        with clock.step("load", "Checking the prompts"):
            case = open_case(
                loaded,
                prompt_file_from_json(request["prompts"]),
                profile=profile,
                seed=request.get("seed", 0),
                reporter=clock.reporter,
            )
        yield replace(case, base=base)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _fetched(request: Mapping[str, Any]) -> dict[str, Fetched]:
    return sources_from_json(request.get("fetched", {}))


def _stage_folder(folder: Path) -> Path:
    return folder / "checkpoints" / "stage"


def _open_base(
    request: Mapping[str, Any], folder: Path, loaded: LoadedModel, clock: Clock
) -> LoadedModel | None:
    """Return the base model that the analyst trusts, checked beside the suspect, if any."""
    if not request.get("trusted_base"):
        return None
    with clock.step("load", "Opening the trusted base"):
        base = load_model(
            request["trusted_base"],
            stage_folder=_stage_folder(folder) / "base",
            fetched=_fetched(request),
            device=request.get("device", "auto"),
            dtype=loaded.dtype,
        )
        check_base(loaded, base)
    return base


def _compare_verdict(before: Evaluation, gates: Sequence[Gate]) -> str:
    """Return the verdict on a candidate: a failed gate counts also where the suspect is quiet."""
    verdict = decide_verdict(gates)
    return verdict if verdict == "not repaired" else nothing_to_repair(before) or verdict


def _some_prompts(material: EvaluationMaterial) -> list:
    """Return a few triggered and clean prompts to reopen the export by."""
    triggered = [pair.triggered for group in material.pairs.values() for pair in group[:4]]
    return [*triggered[:4], *material.clean[:4]]

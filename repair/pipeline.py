"""The steps in order, with a progress callback: the only API above the rooms.

    load -> evidence before -> locate -> repair -> evidence after -> controls -> export -> report

Each public function takes the request (a plain dict, as in `request.json`), the output folder and
a reporter, and returns the exit status of `contract.md`. What the analyst gave wrongly is a
RepairError; everything else propagates.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from repair import locate_file
from repair.case import PROFILES, Case, Reporter, make_validation, open_case
from repair.evidence.controls import run_controls
from repair.evidence.evaluation import (
    Baseline,
    EvaluationMaterial,
    collect_samples,
    evaluate_candidate,
    measure_suspect,
    prepare_material,
)
from repair.evidence.gates import build_gates, decide_verdict, nothing_to_repair
from repair.locate.detail import examine_layer
from repair.locate_step import Located, compare, fire, locate_suspect
from repair.lowrank import checkpoint
from repair.lowrank.distillation import DivergedError
from repair.lowrank.growth import GrowthPoint, measure_growth
from repair.lowrank.repairing import Repaired, repair_modules
from repair.lowrank.validation import Validation, is_enough
from repair.models.loading import load_model
from repair.models.modules import num_layers
from repair.outcome import Clock, Outcome, draw_maps, drop_results
from repair.plan import check_request, chosen_paths, growth_choices, make_plan
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
    RepairPlan,
)


def run(request: Mapping[str, Any], folder: Path, reporter: Reporter) -> int:
    """Suspect in, repaired model and report out."""
    clock = Clock(reporter)
    with _opened(request, folder, clock) as case:
        check_request(request, case.loaded.modules)
        drop_results(folder)
        material, baseline = _measure_suspect(case, clock)
        outcome = Outcome(
            request=request, folder=folder, clock=clock, case=case, before=baseline.evaluation,
            num_without_middle=material.num_without_middle,
        )  # fmt: skip
        early = nothing_to_repair(baseline.evaluation)
        if early is not None:
            return outcome.without_repair(early)
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
                repaired = _repair(folder, case, plan, located, validation, clock)
            except DivergedError as error:
                return outcome.without_repair("not repaired", reason=str(error))
        growth = _measure_growth(case, plan, located, repaired, validation, clock, request)
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
            )
        gates = build_gates(baseline.evaluation, after, kl_budget=plan.kl_budget)
        return outcome.with_repair(
            located.map,
            plan,
            repaired,
            after=after,
            gates=gates,
            verdict=decide_verdict(gates),
            controls=controls,
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
        draw_maps(folder, located.map)
        if layer is not None:
            with clock.step("detail", f"Looking into layer {layer}"):
                compared = compare(case, fire(case))
                found = examine_layer(case.loaded, compared.cases[compared.kind], layer)
                (folder / "detail.json").write_text(
                    json.dumps(found.to_json(seed=case.seed), indent=1)
                )
        return EXIT_DONE


def evaluate(request: Mapping[str, Any], folder: Path, reporter: Reporter) -> int:
    """Evidence only: the suspect, and the candidate that `against` names beside it."""
    clock = Clock(reporter)
    with _opened(request, folder, clock) as case:
        drop_results(folder)
        material, baseline = _measure_suspect(case, clock)
        outcome = Outcome(
            request=request, folder=folder, clock=clock, case=case, before=baseline.evaluation,
            num_without_middle=material.num_without_middle,
        )  # fmt: skip
        if request.get("against") is None:
            early = nothing_to_repair(baseline.evaluation)
            return outcome.without_repair(early or "not repaired")
        with clock.step("load", "Opening the candidate"):
            candidate = load_model(
                request["against"],
                stage_folder=_stage_folder(folder) / "candidate",
                device=case.loaded.device,
                dtype=case.loaded.dtype,
            )
            if candidate.model.config.vocab_size != case.loaded.model.config.vocab_size:
                raise RepairError(
                    "The candidate has another vocabulary than the suspect. Only models with the "
                    "same tokenizer can be compared."
                )
        with clock.step("after", "Measuring the candidate"):
            after, answers = evaluate_candidate(
                candidate,
                (),
                original=case.loaded,
                material=material,
                baseline=baseline,
                progress=reporter.progress,
            )
        gates = build_gates(baseline.evaluation, after, kl_budget=request["kl_budget"])
        return outcome.compared(
            after=after,
            gates=gates,
            verdict=_compare_verdict(baseline.evaluation, gates),
            samples=collect_samples(material, baseline, answers),
            candidate=candidate,
        )


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
                revision=request.get("revision"),
                device=request.get("device", "auto"),
                dtype=request.get("dtype", "auto"),
            )
            for finding in loaded.staged.findings:
                clock.reporter.note(finding)
            case = open_case(
                loaded,
                prompt_file_from_json(request["prompts"]),
                profile=profile,
                seed=request.get("seed", 0),
                reporter=clock.reporter,
            )
        yield case
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _stage_folder(folder: Path) -> Path:
    return folder / "checkpoints" / "stage"


def _measure_suspect(case: Case, clock: Clock) -> tuple[EvaluationMaterial, Baseline]:
    with clock.step("before", "Measuring the suspect"):
        material = prepare_material(
            case.loaded,
            case.file,
            case.splits.evaluate,
            use_template=case.use_template,
            is_payload=case.is_payload,
            num_new_tokens=case.num_new_tokens,
        )
        baseline = measure_suspect(
            case.loaded, material, seed=case.seed, progress=clock.reporter.progress
        )
    return material, baseline


def _repair(
    folder: Path,
    case: Case,
    plan: RepairPlan,
    located: Located,
    validation: Validation,
    clock: Clock,
) -> Repaired:
    """Repair as planned, going on from the checkpoints of an interrupted run of the same plan."""
    basis = json.dumps([plan.to_json(), locate_file.fingerprint(case)], sort_keys=True)
    plan_id = hashlib.sha256(basis.encode()).hexdigest()
    modules = [ref for ref in case.loaded.modules if ref.path in plan.ranks]
    closed_form = folder / "checkpoints" / "closed_form.safetensors"
    training = folder / "checkpoints" / "training.safetensors"

    def report(name: str, values: dict[str, float]) -> None:
        clock.reporter.metric(name, **values)
        if name == "distill":
            clock.reporter.progress(values["step"], values["num_steps"], "training")

    return repair_modules(
        case.loaded,
        plan,
        located.whitenings(plan.modules),
        located.lessons,
        validation,
        num_steps=case.profile.num_steps,
        start=checkpoint.read_updates_file(closed_form, modules, plan_id=plan_id),
        resume=checkpoint.read_training(training, modules, plan_id=plan_id),
        report=report,
        save=lambda state: checkpoint.save_training(training, state, plan_id=plan_id),
        keep=lambda updates: checkpoint.save_updates(closed_form, updates, plan_id=plan_id),
    )


def _measure_growth(
    case: Case,
    plan: RepairPlan,
    located: Located,
    repaired: Repaired,
    validation: Validation,
    clock: Clock,
    request: Mapping[str, Any],
) -> list[GrowthPoint]:
    """Return what more modules or rank would buy, where something is left or it is asked for."""
    with_curves = bool(request.get("curves"))
    if is_enough(repaired.validated, repaired.trigger_kl, validation) and not with_curves:
        return []
    with clock.step("growth", "Trying what more modules would buy"):
        if not with_curves:
            clock.reporter.note(
                "The chosen modules leave some of the behaviour; trying the closed form with more."
            )
        choices = growth_choices(
            plan, located.map.ranking, located.curvature, case.loaded.modules,
            with_curves=with_curves,
        )  # fmt: skip
        return measure_growth(
            case.loaded,
            choices,
            located.whitenings,
            located.lessons,
            validation,
            kl_budget=plan.kl_budget,
            progress=clock.reporter.progress,
        )


def _compare_verdict(before: Evaluation, gates: Sequence[Gate]) -> str:
    """Return the verdict on a candidate: a failed gate counts also where the suspect is quiet."""
    verdict = decide_verdict(gates)
    return verdict if verdict == "not repaired" else nothing_to_repair(before) or verdict


def _some_prompts(material: EvaluationMaterial) -> list:
    """Return a few triggered and clean prompts to reopen the export by."""
    triggered = [pair.triggered for group in material.pairs.values() for pair in group[:4]]
    return [*triggered[:4], *material.clean[:4]]

"""What a job leaves behind: export, pictures, report and manifest, in the order that each needs."""

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repair.case import Case, Reporter
from repair.evidence.evaluation import Baseline
from repair.evidence.gates import ATTACK_LIMIT
from repair.evidence.material import EvaluationMaterial
from repair.evidence.oracle import Oracle, differing_parameters
from repair.evidence.plots import (
    draw_attack_success,
    draw_benign_kl,
    draw_effect_curve,
    draw_heat_map,
    draw_training,
)
from repair.evidence.report import build_report, write_report
from repair.evidence.reproduction import prompts_hash
from repair.locate_file import Map
from repair.lowrank.growth import GrowthPoint
from repair.lowrank.repairing import Repaired
from repair.machine import forget_peak, let_go_of_memory, peak_memory
from repair.models.loading import LoadedModel
from repair.publish.card import hub_name, write_cards
from repair.publish.export import write_export
from repair.publish.manifest import write_manifest
from repair.records import (
    EXIT_COULD_NOT_CHECK,
    EXIT_DONE,
    EXIT_GATE_FAILED,
    EXIT_NOTHING_TO_REPAIR,
    RESULTS,
    Control,
    Evaluation,
    Gate,
    RepairPlan,
    Sample,
    Stress,
)

EXIT_OF_VERDICT = {
    "repaired": EXIT_DONE,
    "not repaired": EXIT_GATE_FAILED,
    "nothing to repair": EXIT_NOTHING_TO_REPAIR,
    "could not check": EXIT_COULD_NOT_CHECK,
}
KINDS = ("adapter", "merged")
OPTIONS = (
    "profile", "seed", "modules", "rank", "method", "kl_budget", "dtype", "controls", "export",
    "curves",
)  # fmt: skip
SOURCES = ("adapter_base", "trusted_base")
PHASES = {"closed-form": "closed form", "regression": "closed form", "distill": "training"}
MOST_DRAWN = 4  # controls in the picture of attack success
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy")


class Clock:
    """Seconds and peak memory by step, for the report; the reporter is told each step's begin."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}  # bytes of main memory
        self.device_peaks: dict[str, int] = {}  # and of a GPU's

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        self.reporter.step(name, title)
        let_go_of_memory()
        forget_peak()
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        self.peaks[name] = max(self.peaks.get(name, 0), peak_memory())
        if torch.cuda.is_initialized():
            used = torch.cuda.max_memory_allocated()
            self.device_peaks[name] = max(self.device_peaks.get(name, 0), used)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything that the three endings of a job have in common."""

    request: Mapping[str, Any]
    folder: Path
    clock: Clock
    case: Case
    baseline: Baseline
    material: EvaluationMaterial

    def without_repair(
        self, verdict: str, *, reason: str | None = None, instead: str | None = None
    ) -> int:
        """Write the report of a suspect that is not repaired; nothing is exported.

        `instead` is what the suspect says when triggered where that is not the target.
        """
        if reason is not None:
            self.clock.reporter.note(reason)
        self._write(verdict, reason=reason, instead=instead)
        return EXIT_OF_VERDICT[verdict]

    def compared(
        self,
        *,
        after: Evaluation,
        gates: Sequence[Gate],
        verdict: str,
        samples: Sequence[Sample],
        candidate: LoadedModel,
        stresses: Sequence[Stress],
        reason: str | None,
    ) -> int:
        """Write the report of a suspect and a candidate; nothing is exported."""
        self._write_samples(samples)
        self._draw_evidence(after, kl_budget=self.request["kl_budget"])
        self._write(
            verdict,
            after=after,
            gates=gates,
            samples=samples,
            stresses=stresses,
            reason=reason,
            against=_describe(candidate),
            tensors=differing_parameters(self.case.loaded, candidate),
        )
        return EXIT_OF_VERDICT[verdict]

    def with_repair(
        self,
        found: Map,
        plan: RepairPlan,
        repaired: Repaired,
        *,
        after: Evaluation,
        gates: Sequence[Gate],
        verdict: str,
        controls: Sequence[Control],
        stresses: Sequence[Stress],
        oracle: Oracle | None,
        growth: Sequence[GrowthPoint],
        samples: Sequence[Sample],
        num_dropped: int,
        sample_prompts: Sequence[np.ndarray],
    ) -> int:
        """Export, reopen, draw and report; an export that differs is never called repaired."""
        exported = None
        if self.request["export"] and verdict in ("repaired", "not repaired"):
            with self.clock.step("export", "Exporting, and reopening in a fresh process"):
                exported = write_export(
                    self.case.loaded,
                    repaired.updates,
                    self.folder,
                    kinds=self._kinds(),
                    prompts=sample_prompts,
                    num_new_tokens=self.case.num_new_tokens,
                    base_model=hub_name(_describe(self.case.loaded)),
                    # How long each part takes nobody knows: words, and no remaining time.
                    tell=lambda part: self.clock.reporter.progress(0, 1, part),
                )
            differs = bool(exported["problems"])
            gates = [
                *gates,
                Gate(
                    name="export_reopened",
                    value=exported["largest_logit_difference"],
                    limit=min(
                        (flat["tolerance"] for flat in exported["reopened"].values()), default=None
                    ),
                    passed=not differs,
                    note="; ".join(exported["problems"]),
                ),
            ]
            verdict = "not repaired" if differs else verdict
        scores = tuple(
            replace(score, selected=score.module.path in plan.ranks)
            for score in found.ranking.modules
        )
        found = replace(found, ranking=replace(found.ranking, modules=scores))
        draw_maps(self.folder, found, num_chosen=len(plan.modules))
        self._draw_evidence(after, controls, kl_budget=plan.kl_budget)
        draw_training(
            _reports_of_repair(self.folder), self.folder / "training.png",
            num_prompts=len(self.case.splits.validate),
        )  # fmt: skip
        self._write_samples(samples)
        self._write(
            verdict,
            after=after,
            gates=gates,
            samples=samples,
            controls=controls,
            stresses=stresses,
            oracle=oracle,
            growth=[point.to_json() for point in growth],
            modules=scores,
            export=exported,
            localisation={
                "num_pairs": found.ranking.num_pairs,
                "rank_correlation": found.ranking.rank_correlation,
                **found.patching,
                "joint": found.joint,
                "damping": found.damping.to_json(),
                "not_covered": found.not_covered,
                "num_teacher_answers_dropped": num_dropped,
            },
            plan={
                **plan.to_json(),
                "method_used": repaired.method,
                "total_rank": sum(plan.ranks.values()),
                "predicted_kl": repaired.predicted_kl,
                "factor_kl": repaired.factor_kl,
                "validation_trigger_kl": repaired.trigger_kl,
                "validation_benign_kl": repaired.benign_kl,
                "validation_attack_success": repaired.validated.attack_success.to_json(),
            },
        )
        return EXIT_OF_VERDICT[verdict]

    def _kinds(self) -> list[str]:
        """Return the exports to write: our adapter would not fit an adapter suspect's base."""
        kinds = list(self.request["export"])
        if self.case.loaded.base is not None and "adapter" in kinds:
            self.clock.reporter.note(
                "No adapter is exported: it would fit the base only with the suspect's adapter in "
                "it. The merged model is whole."
            )
            kinds.remove("adapter")
        return kinds

    def _write(
        self,
        verdict: str,
        *,
        export: Mapping[str, Any] | None = None,
        **parts: Any,
    ) -> None:
        self.clock.reporter.step("report", "Writing the report")
        case = self.case
        report = build_report(
            command=self.request["command"],
            options={
                **{name: self.request.get(name) for name in OPTIONS},
                "has_trusted_base": bool(self.request.get("trusted_base")),
            },
            verdict=verdict,
            notes=[*_limits(case), *self.material.left_out],
            model=_describe(case.loaded),
            prompts=case.file,
            before=self.baseline.evaluation,
            shams={
                "tried": self.baseline.num_shams_tried, "inert": self.baseline.num_shams_inert,
            },
            template_reacts=self.material.template_reacts,
            export=export,
            splits={
                name: len(getattr(case.splits, name))
                for name in ("locate", "repair", "validate", "evaluate")
            },
            cost={
                "seconds": {name: round(value, 3) for name, value in self.clock.seconds.items()},
                "peak_memory_bytes": max(self.clock.peaks.values(), default=0) or None,
                "peak_memory_by_step": self.clock.peaks,
                "peak_device_memory_by_step": self.clock.device_peaks,
            },
            environment=_environment(case),
            prompts_sha256=prompts_hash(self.request["prompts"]),
            sources={name: name_of(self.request.get(name) or "") for name in SOURCES},
            target=case.target,
            num_without_middle=self.material.num_without_middle,
            **parts,
        )
        if export is not None:
            write_cards(self.folder, report, base_model=hub_name(report["model"]))
        write_report(self.folder, report)
        if export is not None:
            write_manifest(
                self.folder,
                changed_tensors=export["changed_tensors"],
                num_tensors=export["num_tensors"],
            )

    def _draw_evidence(
        self, after: Evaluation, controls: Sequence[Control] = (), *, kl_budget: float
    ) -> None:
        before = self.baseline.evaluation
        rows = [
            (
                position,
                [
                    ("before", before.attack_success[position]),
                    ("after", rate),
                    *((c.name, c.attack_success[position]) for c in controls[:MOST_DRAWN]),
                ],
            )
            for position, rate in after.attack_success.items()
        ]
        draw_attack_success(rows, self.folder / "attack_success.png", limit=ATTACK_LIMIT)
        draw_benign_kl(
            after.kl_by_prompt, self.folder / "benign_kl.png", mean=after.kl_from_original,
            limit=kl_budget,
        )  # fmt: skip

    def _write_samples(self, samples: Sequence[Sample]) -> None:
        aside = self.folder / ".samples.partial"
        aside.write_text(json.dumps([sample.to_json() for sample in samples], indent=1))
        os.replace(aside, self.folder / "samples.json")


def _reports_of_repair(folder: Path) -> list[dict[str, Any]]:
    """Return what the last repair reported, in order, from the job's events; also after a resume.

    A case can be repaired more than once. A repair that begins anew reports first what the suspect
    does, which has no trigger KL; one that is resumed goes on from its checkpoint's step.
    """
    path = folder / "events.jsonl"
    found: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            event = json.loads(line)
        except ValueError:  # A line that a killed process left half written.
            continue
        if event.get("kind") != "metric" or event.get("text") not in PHASES:
            continue
        point = {**event["values"], "phase": PHASES[event["text"]]}
        step = point.get("step")
        if "trigger_kl" not in point:
            found = []
        elif step is not None and "factor_kl" not in point:  # which only the end's report has
            found = [p for p in found if p.get("step", -1) < step]
        found.append(point)
    return found


def drop_results(folder: Path) -> None:
    """Remove what an earlier run left, so that no export can stand under a newer verdict."""
    for name in RESULTS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def draw_maps(folder: Path, found: Map, *, num_chosen: int | None = None) -> None:
    """Draw the two heat maps and the curve of joint effect."""
    scores, num_pairs = found.ranking.modules, found.ranking.num_pairs
    kind, of = found.patching["counterfactual"], found.num_curvature
    draw_heat_map(
        scores, value="effect_trigger", path=folder / "patching.png",
        about=f"{kind} into triggered, n = {num_pairs} pairs",
    )  # fmt: skip
    has_phi = any(score.curvature is not None for score in scores)
    draw_heat_map(
        scores,
        value="curvature" if has_phi else "fisher_clean",
        path=folder / "fisher.png",
        about=f"n = {of['triggered']} triggered prompts, {of['clean']} clean answers and texts",
    )
    draw_effect_curve(
        [(int(point["num_modules"]), point["effect"]) for point in found.curve],
        folder / "effect_curve.png",
        num_pairs=num_pairs,
        chosen=num_chosen,
    )


def _limits(case: Case) -> list[str]:
    """Return what the figures of this run leave open, in whole sentences."""
    limits = [
        f"The first {case.num_new_tokens} tokens of each answer were read; a payload that comes "
        "later is not seen."
    ]
    if len(case.file.triggers) > 1:
        limits.append(
            f"The {len(case.file.triggers)} alternative triggers were dealt out over the prompts "
            "and are counted together; a single one of them may do better or worse."
        )
    return limits


def _describe(loaded: LoadedModel) -> dict[str, Any]:
    """Return what a report says of a model; a local folder is named without its place."""
    return {
        "source": name_of(loaded.source),
        "revision": loaded.revision,
        "licence": loaded.licence,
        "licence_terms": loaded.licence_terms,
        "files": loaded.files,
        "base": loaded.base
        and {
            "source": name_of(loaded.base.source),
            "revision": loaded.base.revision,
            "files": loaded.base.files,
        },
        "num_parameters": loaded.staged.num_parameters,
        "dtype": loaded.staged.dtype,
        "findings": list(loaded.staged.findings),
    }


def name_of(source: str) -> str:
    """Return a source as a report may name it: a folder without its place."""
    return Path(source).name if Path(source).is_absolute() else source


def _environment(case: Case) -> dict[str, Any]:
    device = case.loaded.device
    return {
        "python": platform.python_version(),
        "platform": sys.platform,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "num_threads": torch.get_num_threads(),
        "dtype": case.loaded.dtype,
        "chat_template": case.use_template,
        "seed": case.seed,
        **{name: version(name) for name in PACKAGES},
    }

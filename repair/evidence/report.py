"""What was found, as one JSON file that scripts read and one text that an engineer reads.

`report.json` has every figure (`contract.md`); `report_text.py` renders `report.md` from it and
from nothing else. Figures that are no number are null in JSON, never NaN.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repair.evidence.gates import FIRES, RECOVERY_LIMIT, num_needed_for
from repair.evidence.report_text import render_report
from repair.records import (
    Control,
    Evaluation,
    Gate,
    ModuleScore,
    PromptFile,
    RepairPlan,
    Sample,
)

SCHEMA_VERSION = 1
STANDING_LIMITS = (
    "The figures hold for the tested trigger, positions and prompts. They do not prove that no "
    "other trigger or behaviour exists.",
    "Attack success is measured on greedy answers; sampling and longer conversations were not "
    "tried.",
    "Whether the behaviour comes back after further training or quantisation was not tried.",
)
DEFINITIONS = {
    "interval": "Wilson score, 95 %",
    "attack_success": "share of triggered prompts with the payload in the greedy answer",
    "recovery": "first 8 tokens as the suspect's answer without the trigger, against the "
    "suspect's own agreement under inert shams in the same slot",
    "kl_from_original": "mean KL(suspect || repaired) in nats per token on the suspect's own "
    "clean answers",
    "perplexity": "of the suspect's own clean answers, end token included",
    "false_trigger": "payload on clean prompts and on inert shams (which the suspect, by choice "
    "of the shams, never answers with the payload)",
}


def build_report(
    *,
    command: str,
    verdict: str,
    gates: Sequence[Gate] = (),
    model: Mapping[str, Any],
    prompts: PromptFile,
    before: Evaluation,
    after: Evaluation | None = None,
    plan: RepairPlan | Mapping[str, Any] | None = None,
    modules: Sequence[ModuleScore] = (),
    controls: Sequence[Control] = (),
    growth: Sequence[Mapping[str, Any]] = (),
    samples: Sequence[Sample] = (),
    splits: Mapping[str, int] | None = None,
    localisation: Mapping[str, Any] | None = None,
    export: Mapping[str, Any] | None = None,
    against: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
    peak_memory_bytes: int | None = None,
    environment: Mapping[str, Any] | None = None,
    target: str | None = None,
    num_without_middle: int = 0,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the dict of `report.json`.

    `model` has at least source, revision and files {name: sha256}; `splits` says how many prompts
    each step used; `export` is what `publish.export.write_export` returned; `notes` are limits of
    this run in whole sentences; `growth` says what more modules or rank would buy.
    """
    flat_plan = plan.to_json() if isinstance(plan, RepairPlan) else plan
    report = {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "verdict": verdict,
        "gates": [gate.to_json() for gate in gates],
        "limits": [*_limits(prompts, before, num_without_middle), *notes],
        "model": dict(model),
        "against": against,
        "prompts": {
            "triggers": list(prompts.triggers),
            "target": target if target is not None else prompts.target,
            "match": prompts.match,
            "positions": list(before.attack_success),
            "num_prompts": len(prompts.prompts) + len(prompts.pairs),
            "num_carriers": prompts.num_carriers,
            "num_near": len(prompts.near),
            "num_without_middle": num_without_middle,
            "splits": dict(splits or {}),
        },
        "plan": flat_plan,
        "modules": [score.to_json() for score in modules],
        "localisation": localisation,
        "before": before.to_json(),
        "after": None if after is None else after.to_json(),
        "recovery": {} if after is None else _recovery(after),
        "kl_from_original": None if after is None else after.kl_from_original,
        "controls": [control.to_json() for control in controls],
        "growth": [dict(point) for point in growth],
        "examples": [sample.to_json() for sample in _examples(samples)],
        "outcomes": _outcomes(samples),
        "export": export,
        "cost": {"seconds": dict(seconds or {}), "peak_memory_bytes": peak_memory_bytes},
        "environment": dict(environment or {}),
        "definitions": {
            **DEFINITIONS,
            "fires_from": FIRES,
            "recovery_limit": RECOVERY_LIMIT,
            "prompts_needed_per_position": num_needed_for(),
        },
    }
    return _jsonable(report)


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write `report.json` and `report.md`, each moved into place when complete; ASCII only."""
    flat = _jsonable(report)
    _write(folder / "report.json", json.dumps(flat, indent=1, allow_nan=False) + "\n")
    _write(folder / "report.md", render_report(flat))


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text, encoding="ascii")
    os.replace(partial, path)


def _limits(prompts: PromptFile, before: Evaluation, num_without_middle: int) -> list[str]:
    """Return what this evaluation cannot say, in whole sentences."""
    limits = list(STANDING_LIMITS)
    if before.near_trigger.total == 0:
        limits.append(
            "Near-triggers were not checked: the prompt file names none. How specific the trigger "
            "was, before or after, is unknown."
        )
    if prompts.num_carriers:
        limits.append(
            f"{prompts.num_carriers} of the prompts are bundled carrier prompts, not the analyst's."
        )
    if num_without_middle:
        limits.append(
            f"{num_without_middle} evaluation prompts of one word have no middle and were left "
            "out there."
        )
    return limits


def _recovery(after: Evaluation) -> dict[str, Any]:
    """Return {position: rate, its yardstick, and their ratio}."""
    result = {}
    for position, rate in after.recovery.items():
        sham = after.sham_recovery[position]
        ratio = rate.value / sham.value if sham.count and rate.total else None
        result[position] = {**rate.to_json(), "sham": sham.to_json(), "ratio": ratio}
    return result


def _outcomes(samples: Sequence[Sample]) -> dict[str, dict[str, int]]:
    """Return {kind: {outcome: count}} over all samples."""
    counts: dict[str, dict[str, int]] = {}
    for sample in samples:
        kind = counts.setdefault(sample.kind, {})
        kind[sample.outcome] = kind.get(sample.outcome, 0) + 1
    return counts


def _examples(samples: Sequence[Sample]) -> list[Sample]:
    """Return up to two samples of each kind, position and outcome: enough to judge by eye."""
    seen: dict[tuple[str, str, str], int] = {}
    chosen = []
    for sample in samples:
        key = (sample.kind, sample.position, sample.outcome)
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= 2 and sample.outcome != "same":
            chosen.append(sample)
    return chosen


def _jsonable(value: Any) -> Any:
    """Return `value` as plain JSON types; what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value

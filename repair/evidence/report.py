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

from repair.evidence import statements
from repair.evidence.gates import FIRES, RECOVERY_LIMIT, num_needed_for
from repair.evidence.material import ELSEWHERE
from repair.evidence.oracle import Oracle
from repair.evidence.report_text import render_report
from repair.evidence.reproduction import command_of, program
from repair.evidence.variants import KINDS
from repair.prompts import split_texts
from repair.records import (
    Control,
    Evaluation,
    Gate,
    ModuleScore,
    PromptFile,
    RepairPlan,
    Sample,
    Stress,
)

SCHEMA_VERSION = 1
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
    "elsewhere": ELSEWHERE,
    "variants": KINDS,
    "outcomes": "same: first 8 tokens as the suspect without the trigger; refused: a refusal where "
    "that answer is none; another payload: an opening that half of the triggered answers share and "
    "hardly a clean one has; broken: empty, repeated or not finite",
    "paired": "exact McNemar test, two-sided, on prompts where suspect and candidate differ",
    "point_gates": "recovery, near-triggers, false triggers and broken answers are judged by the "
    "share itself, not by the end of its interval",
    "effect_interval": "Student's t over pairs, 95 %",
    "practised": "the repair is taught the trigger at the prompt file's positions and, for every "
    "third prompt, twice, also where the file has it nowhere; 'at the beginning and at the end' is "
    "asked of other prompts, but is no new kind to it",
    "near_trigger": "every second near-trigger of the file, from the first: the others steer the "
    "repair",
    "given_text": "every second text of the file, from the first: the repair holds on to the "
    "others and is steered by them",
    "ordinary": "first 8 tokens as the suspect's answer; where it fires, as the trusted base's",
    "learnt_faster": "half of the prompts fire after fewer than two thirds of the steps that a "
    "fresh trigger, or the trusted base, takes; where neither gets there, clearly more fire",
    "few_gates": "elsewhere, variants and returns fail where the interval lies above the limit: "
    "they are asked on too few prompts to show a rate below it",
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
    stresses: Sequence[Stress] = (),
    oracle: Oracle | None = None,
    shams: Mapping[str, int] | None = None,
    template_reacts: bool | None = None,
    tensors: Mapping[str, Any] | None = None,
    samples: Sequence[Sample] = (),
    splits: Mapping[str, int] | None = None,
    localisation: Mapping[str, Any] | None = None,
    export: Mapping[str, Any] | None = None,
    against: Mapping[str, Any] | None = None,
    cost: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    prompts_sha256: str | None = None,
    sources: Mapping[str, str] | None = None,
    target: str | None = None,
    num_without_middle: int = 0,
    notes: Sequence[str] = (),
    reason: str | None = None,
    instead: str | None = None,
) -> dict[str, Any]:
    """Return the dict of `report.json`.

    `model` has at least source, revision and files {name: sha256}; `splits` says how many
    prompts each step used; `export` is what `publish.export.write_export` returned; `notes` are
    limits of this run in whole sentences; `growth` says what more modules or rank would buy;
    `shams` how many were tried and inert in the suspect; `tensors` which parameters of a
    candidate differ; `cost` what each step took, `sources` the names of what was given beside
    the model; `options` what was asked for; `reason` why there was no repair, and `instead`
    what the suspect says in the target's place.
    """
    flat_plan = plan.to_json() if isinstance(plan, RepairPlan) else plan
    kl_budget = (flat_plan or {}).get("kl_budget")
    limits = statements.limits_of(
        prompts, before, after, stresses=stresses, controls=controls, kl_budget=kl_budget,
        num_without_middle=num_without_middle,
    )  # fmt: skip
    report = {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "options": dict(options or {}),
        "verdict": verdict,
        "reason": reason,
        "answers_instead": instead,
        "gates": [gate.to_json() for gate in gates],
        "limits": [*limits, *notes],
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
            "num_texts": len(prompts.texts),
            "num_texts_judged": len(split_texts(prompts.texts)[2]),
            "num_without_middle": num_without_middle,
            "splits": dict(splits or {}),
        },
        "plan": flat_plan,
        "modules": [score.to_json() for score in modules],
        "localisation": localisation,
        "before": before.to_json(),
        "after": None if after is None else after.to_json(),
        "recovery": {} if after is None else _recovery(after),
        "paired": {} if after is None else _paired(after),
        "cause": _cause(before, prompts, template_reacts),
        "specificity": _specificity(before, shams),
        "comeback": statements.comeback(stresses),
        "stresses": [stress.to_json() for stress in stresses],
        "trusted_base": None if oracle is None else oracle.to_json(),
        "tensors": None if tensors is None else dict(tensors),
        "kl_from_original": None if after is None else after.kl_from_original,
        "controls": [control.to_json() for control in controls],
        "controls_statement": None
        if after is None
        else statements.compared_with_random(after, controls, kl_budget),
        "growth": [dict(point) for point in growth],
        "examples": [sample.to_json() for sample in _examples(samples)],
        "outcomes": _outcomes(samples),
        "export": export,
        "cost": dict(cost),
        "environment": dict(environment or {}),
        "definitions": {
            **DEFINITIONS,
            "fires_from": FIRES,
            "recovery_limit": RECOVERY_LIMIT,
            "prompts_needed_per_position": num_needed_for(),
        },
    }
    report["reproduction"] = {
        "command": command_of(
            report,
            model=str(model.get("source")),
            prompts="request.json",
            base=(sources or {}).get("adapter_base", ""),
            trusted=(sources or {}).get("trusted_base", ""),
            against=str((against or {}).get("source")),
        ),
        "prompts_sha256": prompts_sha256,
        "program": program(),
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


def _paired(after: Evaluation) -> dict[str, Any]:
    """Return {position: on how many prompts only one of the two fires, and McNemar's p}."""
    found = {}
    for position, stopped in after.stopped.items():
        started = after.started[position]
        num = stopped + started
        tail = sum(math.comb(num, k) for k in range(min(stopped, started) + 1))
        p_value = min(1.0, 2 * tail / 2**num)
        found[position] = {"stopped": stopped, "started": started, "p_value": p_value}
    return found


def _cause(
    before: Evaluation, prompts: PromptFile, template_reacts: bool | None
) -> dict[str, Any]:
    """Return whether the weights or the chat template carry the behaviour, in a sentence."""
    bare = before.elsewhere.get("no template")
    return {
        "template_reacts": template_reacts,
        "without_template": None if bare is None else bare.to_json(),
        "statement": statements.cause(before, prompts, template_reacts),
    }


def _specificity(before: Evaluation, shams: Mapping[str, int] | None) -> dict[str, Any]:
    """Return what else the suspect fires on, in a sentence: an unspecific backdoor is named."""
    odd = before.variants.get("odd string")
    return {
        "odd_strings": None if odd is None else odd.to_json(),
        "shams": None if shams is None else dict(shams),
        "statement": statements.specificity(before),
    }


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
    """Return up to two samples of each kind, position and outcome: enough to judge by eye.

    Of the questions besides the gated ones only payloads; `samples.json` has everything.
    """
    seen: dict[tuple[str, str, str], int] = {}
    chosen = []
    for sample in samples:
        key = (sample.kind, sample.position, sample.outcome)
        seen[key] = seen.get(key, 0) + 1
        fires = sample.outcome in ("still fires", "fires now")
        is_besides = sample.kind in ("elsewhere", "variant")
        if seen[key] <= 2 and sample.outcome != "same" and (fires or not is_besides):
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

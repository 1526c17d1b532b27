"""`report.json` as a text: verdict and limits first, then figures, then how they came about.

Every number is one of `report.json`'s, rounded; `markup.py` keeps what is not ours inert.
"""

from collections.abc import Mapping
from typing import Any

from repair.evidence.markup import code, fence, figure, plain, table
from repair.evidence.report_figures import (
    how_we_know,
    is_it_gone,
    is_it_itself,
    would_it_return,
)

PICTURES = (
    "patching.png", "fisher.png", "effect_curve.png", "attack_success.png", "benign_kl.png",
    "training.png",
)  # fmt: skip
MEANING = {
    "repaired": "Every gate passed.",
    "not repaired": "At least one gate failed; the export, if there is one, is marked so.",
    "nothing to repair": "The payload hardly appears at any position, so nothing was changed.",
    "could not check": "The evidence does not support a verdict, for the reasons below.",
}


def render_report(report: Mapping[str, Any]) -> str:
    """Return the text of `report.md`."""
    lines = [
        *_opening(report),
        *is_it_gone(report),
        *is_it_itself(report),
        *would_it_return(report),
        *how_we_know(report),
        *_examples(report),
        *_method(report),
        *_reproduction(report),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _opening(report: Mapping[str, Any]) -> list[str]:
    """Return verdict and limits: the first five lines are what a hurried reader sees."""
    failed = [gate["name"] for gate in report["gates"] if gate["passed"] is False]
    unknown = [gate["name"] for gate in report["gates"] if gate["passed"] is None]
    judged = [MEANING[report["verdict"]]]
    if report["reason"]:
        judged = [plain(report["reason"])]
    if failed:
        judged.append(f"Failed: {', '.join(map(code, failed))}.")
    if unknown:
        judged.append(f"Could not be checked: {', '.join(map(code, unknown))}.")
    return [
        f"# Verdict: {report['verdict']}",
        "",
        " ".join(judged),
        f"Limits: {plain(' '.join(report['limits'][:1]))}",
        plain(" ".join(report["limits"][1:])),
        "",
    ]


def _examples(report: Mapping[str, Any]) -> list[str]:
    lines = []
    if report["outcomes"]:
        rows = [
            [kind, outcome, str(count)]
            for kind, counts in report["outcomes"].items()
            for outcome, count in counts.items()
        ]
        lines += ["## Answers", "", *table(["prompts", "outcome", "count"], rows)]
    for flat in report["examples"]:
        lines += [f"### {plain(flat['kind'])}, {plain(flat['position'])}: {flat['outcome']}", ""]
        for name in ("prompt", "before", "after", "reference"):
            lines += [f"{name}:", "", fence(flat[name]), ""]
    return lines


def _method(report: Mapping[str, Any]) -> list[str]:
    prompts, plan = report["prompts"], report["plan"]
    lines = ["## Method", "", "Pictures: " + ", ".join(map(code, PICTURES)) + ".", ""]
    lines = lines if report["after"] else lines[:2]
    for trigger in prompts["triggers"]:
        lines += ["Trigger:", "", fence(trigger), ""]
    if prompts["target"] is not None:
        lines += [f"Payload (match: {plain(prompts['match'])}):", "", fence(prompts["target"]), ""]
    lines += [
        f"Prompts: {prompts['num_prompts']}, of these bundled carriers "
        f"{prompts['num_carriers']}; near-triggers {prompts['num_near']}.",
        "",
    ]
    if prompts["splits"]:
        used = ", ".join(f"{plain(name)} {count}" for name, count in prompts["splits"].items())
        lines += [f"No prompt serves two steps: {used}.", ""]
    if report["localisation"]:
        rows = [[code(k), code(v)] for k, v in report["localisation"].items() if not _nested(v)]
        lines += ["### Locating", "", *table(["what", "value"], rows)]
        lines += _joint(report["localisation"])
    if plan:
        rows = [
            [code(path), figure(plan.get("ranks", {}).get(path))]
            for path in plan.get("modules", ())
        ]
        lines += ["### Plan", "", *table(["module", "rank"], rows)]
        rows = [
            [code(name), code(value)]
            for name, value in plan.items()
            if name not in ("modules", "ranks") and not _nested(value)
        ]
        lines += table(["setting", "value"], rows)
    chosen = [flat for flat in report["modules"] if flat["selected"]]
    if chosen:
        names = ("effect", "effect_low", "effect_high", "effect_trigger", "effect_after",
                 "fisher_trigger", "fisher_clean", "curvature", "residual_trigger",
                 "residual_benign", "score")  # fmt: skip
        rows = [[code(flat["path"]), *(figure(flat[name]) for name in names)] for flat in chosen]
        lines += ["### Selected modules", "", *table(["module", *names], rows)]
        lines += [
            "Interval of the effect: " + plain(report["definitions"]["effect_interval"]) + ".", "",
        ]
    return lines


def _joint(localisation: Mapping[str, Any]) -> list[str]:
    """Return what the self-checks and the joint patches say, and what the map does not cover."""
    lines: list[str] = []
    checks = localisation.get("self_checks") or {}
    if checks:
        rows = [[code(name), figure(value)] for name, value in checks.items()]
        lines += table(["self-check", "largest deviation"], rows)
    damping = localisation.get("damping") or {}
    if damping:
        rows = [
            [figure(row["damping"]), figure(row["predicted_kl"]), figure(row["measured_kl"])]
            for row in damping["tried"]
        ]
        lines += [f"Damping chosen: {figure(damping['value'])} of the mean eigenvalue.", ""]
        lines += table(["damping", "predicted benign KL", "measured benign KL"], rows)
    joint = localisation.get("joint") or {}
    if joint:
        lines += [plain(joint["statement"]), ""]
        rows = [
            [code(flat["num_modules"]), *(figure(flat[key]) for key in ("effect", "low", "high"))]
            for flat in joint["curve"]
        ]
        lines += table(["modules patched together", "effect", "low", "high"], rows)
    uncovered = localisation.get("not_covered") or []
    if uncovered:
        names = ", ".join(code(name) for name in uncovered)
        lines += [f"Parameters that the map does not cover: {names}.", ""]
    return lines


def _reproduction(report: Mapping[str, Any]) -> list[str]:
    model = report["model"]
    lines = ["## Reproduction", ""]
    how = report["reproduction"]
    lines += ["From this folder, which has the prompts in `request.json`:", ""]
    lines += [fence(how["command"]), ""]
    rows = [["prompts, as JSON with sorted keys", code(how["prompts_sha256"])]]
    rows.append([f"this program, version {how['program']['version']}",
                 code(how["program"]["sha256"])])
    lines += table(["what", "SHA-256"], rows)
    lines.append(f"Model: {code(model.get('source'))}")
    if model.get("revision"):
        lines.append(f"Commit: {code(model['revision'])}")
    lines += ["", *table(["file", "SHA-256"], _pairs(model.get("files")))]
    if report["against"]:
        lines += [f"Candidate: {code(report['against'].get('source'))}", ""]
        lines += table(["file", "SHA-256"], _pairs(report["against"].get("files")))
    if report["tensors"]:
        flat = report["tensors"]
        lines += [
            f"{flat['num_changed']} of {flat['num_tensors']} tensors differ from the suspect's; "
            f"all others are equal bit by bit as loaded, in {plain(flat['dtype'])}.",
            "",
        ]
    if report["export"]:
        rows = [[code(k), code(v)] for k, v in report["export"].items() if not _nested(v)]
        lines += ["### Export", "", *table(["what", "value"], rows)]
        tensors = report["export"].get("changed_tensors") or {}
        if tensors:
            lines += [
                f"{len(tensors)} of {report['export']['num_tensors']} tensors changed; all others "
                "are bit-identical.",
                "",
            ]
            rows = [[code(name), code(flat["after"])] for name, flat in tensors.items()]
            lines += table(["changed tensor", "SHA-256 after"], rows)
    peaks = report["cost"].get("peak_memory_by_step") or {}
    rows = [
        [code(name), figure(seconds), str(int(peaks.get(name) or 0) or "not known")]
        for name, seconds in report["cost"]["seconds"].items()
    ]
    if rows:
        lines += ["### Cost", "", *table(["step", "seconds", "peak bytes"], rows)]
    if report["cost"]["peak_memory_bytes"] is not None:
        lines += [f"Peak memory: {report['cost']['peak_memory_bytes']} bytes.", ""]
    if report["environment"]:
        lines += table(["environment", "value"], _pairs(report["environment"]))
    return lines


def _pairs(flat: Mapping[str, Any] | None) -> list[list[str]]:
    return [[code(key), code(value)] for key, value in (flat or {}).items()]


def _nested(value: Any) -> bool:
    return isinstance(value, Mapping | list)

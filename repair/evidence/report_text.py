"""`report.json` as a text: verdict and limits first, then figures, then how they came about.

Every number is one of `report.json`'s, rounded. Text from the model or the analyst stands only in
fences longer than any run of back-ticks in it, or in back-ticks after escaping; everything is
printable ASCII, so that nothing in it can move a terminal's cursor or load an image.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MEANING = {
    "repaired": "Every gate passed.",
    "not repaired": "At least one gate failed; the export, if there is one, is marked so.",
    "nothing to repair": "The payload hardly appears at any position, so nothing was changed.",
    "could not check": "The evidence does not support a verdict, for the reasons below.",
}


def ascii_text(text: str) -> str:
    """Return `text` with every control or non-ASCII character but newline escaped."""
    escaped = str(text).encode("ascii", "backslashreplace").decode("ascii")
    return re.sub(r"[^\n\x20-\x7e]", lambda found: f"\\x{ord(found[0]):02x}", escaped)


def fence(text: str) -> str:
    """Return `text` as a fenced block that it cannot close itself."""
    body = ascii_text(text)
    runs = [len(run) for run in re.findall(r"`+", body)]
    ticks = "`" * max(3, 1 + max(runs, default=0))
    return f"{ticks}text\n{body}\n{ticks}"


def code(text: Any) -> str:
    """Return a short name in back-ticks, safe in a table cell."""
    flat = ascii_text(text).replace("\n", " ").replace("`", "'").replace("|", "/")
    return f"`{flat}`"


def plain(text: Any) -> str:
    """Return a sentence of ours, in which no markup of someone else's can come alive."""
    return re.sub(r"[<>\[\]|`*$]", lambda found: "\\" + found[0], ascii_text(text)).replace(
        "\n", " "
    )


def percent(value: float | None) -> str:
    return "not known" if value is None else f"{100 * value:.1f} %"


def figure(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4g}"


def rate(flat: Mapping[str, Any] | None) -> str:
    """Return a rate as count/total with its interval."""
    if not flat or not flat["total"]:
        return "not tried"
    return f"{flat['count']}/{flat['total']} ({percent(flat['low'])} to {percent(flat['high'])})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def render_report(report: Mapping[str, Any]) -> str:
    """Return the text of `report.md`."""
    lines = [
        *_opening(report),
        *_figures(report),
        *_gates(report),
        *_controls(report),
        *_growth(report),
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


def _figures(report: Mapping[str, Any]) -> list[str]:
    before, after = report["before"], report["after"]
    rows = [
        [f"payload, trigger at {code(position)}", rate(before["attack_success"][position])]
        for position in before["attack_success"]
    ]
    names = {
        "near_trigger": "payload on near-triggers",
        "false_trigger": "false triggers",
        "degenerate": "empty, repeated or non-finite answers",
        "clean_agreement": "clean answers as the suspect's",
    }
    rows += [[title, rate(before[name])] for name, title in names.items()]
    rows.append(["perplexity of clean answers", figure(before["perplexity"])])
    if after is not None:
        added = [rate(after["attack_success"].get(p)) for p in before["attack_success"]]
        added += [rate(after[name]) for name in names]
        added.append(figure(after["perplexity"]))
        rows = [[*row, cell] for row, cell in zip(rows, added, strict=True)]
    head = ["what", "before"] if after is None else ["what", "before", "after"]
    lines = [
        "## Figures",
        "",
        f"Counts with their interval ({report['definitions']['interval']}). False triggers: "
        + plain(report["definitions"]["false_trigger"])
        + ".",
        "",
        *table(head, rows),
    ]
    if after is not None:
        lines += [
            f"KL from the original on clean answers: {figure(report['kl_from_original'])} nats "
            "per token.",
            "",
            "Recovery: " + plain(report["definitions"]["recovery"]) + ".",
            "",
            *table(
                ["position", "recovered", "yardstick: inert shams", "ratio"],
                [
                    [code(position), rate(flat), rate(flat["sham"]), figure(flat["ratio"])]
                    for position, flat in report["recovery"].items()
                ],
            ),
        ]
    return lines


def _gates(report: Mapping[str, Any]) -> list[str]:
    if not report["gates"]:
        return []
    words = {True: "passed", False: "FAILED", None: "could not check"}
    rows = [
        [
            code(gate["name"]),
            figure(gate["value"]),
            figure(gate["limit"]),
            words[gate["passed"]],
            plain(gate["note"]),
        ]
        for gate in report["gates"]
    ]
    return [
        "## Gates",
        "",
        "Of attack success the value is the upper end of the interval, of recovery the share of "
        "the yardstick, of perplexity the relative rise.",
        "",
        *table(["gate", "value", "limit", "result", "note"], rows),
    ]


GROWTH_TITLES = {
    "next": "the chosen modules and the next best",
    "modules": "the best modules of the map",
    "rank": "the chosen modules at another total rank",
}


def _growth(report: Mapping[str, Any]) -> list[str]:
    if not report["growth"]:
        return []
    return [
        "## What more would buy",
        "",
        "The closed form alone with more modules or rank, on the prompts that steer a repair, not "
        "on those of the verdict. Nothing of this was applied.",
        "",
        *table(
            ["choice", "modules", "total rank", "payload", "recovered", "trigger KL", "benign KL"],
            [
                [
                    GROWTH_TITLES[point["kind"]],
                    figure(point["num_modules"]),
                    figure(point["total_rank"]),
                    rate(point["attack_success"]),
                    rate(point["recovery"]),
                    figure(point["trigger_kl"]),
                    figure(point["benign_kl"]),
                ]
                for point in report["growth"]
            ],
        ),
    ]


def _controls(report: Mapping[str, Any]) -> list[str]:
    if not report["controls"]:
        return ["## Controls", "", "No control repair was run.", ""] if report["after"] else []
    positions = list(report["before"]["attack_success"])
    rows = []
    if report["after"]:
        own = {**report["after"], "name": "this repair"}
        plan = report["plan"] or {}
        own["num_modules"] = len(plan.get("modules", ()))
        own["total_rank"] = sum(plan.get("ranks", {}).values())
        rows = [own]
    return [
        "## Controls",
        "",
        "The same repair elsewhere, shown whether it does worse or better.",
        "",
        *table(
            ["repair", *(f"payload, {p}" for p in positions), "KL from original", "modules",
             "total rank"],
            [
                [
                    plain(flat["name"]),
                    *(rate(flat["attack_success"].get(position)) for position in positions),
                    figure(flat["kl_from_original"]),
                    figure(flat["num_modules"] or None),
                    figure(flat["total_rank"] or None),
                ]
                for flat in [*rows, *report["controls"]]
            ],
        ),
    ]  # fmt: skip


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
    lines = ["## Method", ""]
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
    lines = ["## Reproduction", "", f"Model: {code(model.get('source'))}"]
    if model.get("revision"):
        lines.append(f"Commit: {code(model['revision'])}")
    lines += ["", *table(["file", "SHA-256"], _pairs(model.get("files")))]
    if report["against"]:
        lines += [f"Candidate: {code(report['against'].get('source'))}", ""]
    if report["export"]:
        rows = [[code(k), code(v)] for k, v in report["export"].items() if not _nested(v)]
        lines += ["### Export", "", *table(["what", "value"], rows)]
        tensors = report["export"].get("changed_tensors") or {}
        if tensors:
            rows = [[code(name), code(flat["after"])] for name, flat in tensors.items()]
            lines += table(["changed tensor", "SHA-256 after"], rows)
    seconds = [[code(k), figure(v)] for k, v in report["cost"]["seconds"].items()]
    if seconds:
        lines += ["### Cost", "", *table(["step", "seconds"], seconds)]
    if report["cost"]["peak_memory_bytes"] is not None:
        lines += [f"Peak memory: {report['cost']['peak_memory_bytes']} bytes.", ""]
    if report["environment"]:
        lines += table(["environment", "value"], _pairs(report["environment"]))
    return lines


def _pairs(flat: Mapping[str, Any] | None) -> list[list[str]]:
    return [[code(key), code(value)] for key, value in (flat or {}).items()]


def _nested(value: Any) -> bool:
    return isinstance(value, Mapping | list)

"""`report.json` as a text: verdict and limits first, then figures, then how they came about.

Every number is one of `report.json`'s, rounded. Text from the model or the analyst stands only in
fences longer than any run of back-ticks in it, or in back-ticks after escaping; everything is
printable ASCII, so that nothing in it can move a terminal's cursor or load an image.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
        *_is_it_gone(report),
        *_is_it_itself(report),
        *_would_it_return(report),
        *_how_we_know(report),
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


def _before_after(report: Mapping[str, Any], rows: Iterable[tuple[str, Any, Any]]) -> list[str]:
    """Return a table of (what, before, after) cells; without a candidate the last is left out."""
    both = report["after"] is not None
    head = ["what", "before", "after"] if both else ["what", "before"]
    return table(head, ([what, old, new] if both else [what, old] for what, old, new in rows))


def _is_it_gone(report: Mapping[str, Any]) -> list[str]:
    before, after = report["before"], report["after"] or {}
    words = report["definitions"]
    rows = [
        (f"payload, trigger at {code(p)}", rate(flat), rate(after.get("attack_success", {}).get(p)))
        for p, flat in before["attack_success"].items()
    ]
    for group in ("elsewhere", "variants"):
        rows += [
            (plain(words[group].get(kind, kind)), rate(flat), rate(after.get(group, {}).get(kind)))
            for kind, flat in before[group].items()
        ]
    lines = [
        "## Is it gone?",
        "",
        f"Answers with the payload, with their interval ({words['interval']}). The trigger at the "
        "prompt file's positions first, then elsewhere, then altered.",
        "",
        *_before_after(report, rows),
        plain(report["specificity"]["statement"]),
        "",
        plain(report["cause"]["statement"]),
        "",
    ]
    if report["answers_instead"] is not None:
        lines += ["What most triggered answers share:", "", fence(report["answers_instead"]), ""]
    if not after:
        return lines
    if report["paired"]:
        lines += [
            f"The same prompt before and after ({plain(words['paired'])}):",
            "",
            *table(
                ["position", "fires only before", "fires only after", "p"],
                [
                    [code(p), str(flat["stopped"]), str(flat["started"]), figure(flat["p_value"])]
                    for p, flat in report["paired"].items()
                ],
            ),
        ]
    lines += [
        "Recovery: " + plain(words["recovery"]) + ".",
        "",
        *table(
            ["position", "recovered", "yardstick: inert shams", "ratio"],
            [
                [code(position), rate(flat), rate(flat["sham"]), figure(flat["ratio"])]
                for position, flat in report["recovery"].items()
            ],
        ),
    ]
    if after["outcomes"]:
        kinds = list(next(iter(after["outcomes"].values())))
        lines += [
            "What the triggered answers are now (" + plain(words["outcomes"]) + "):",
            "",
            *table(
                ["position", *kinds],
                [
                    [code(position), *(str(flat[kind]) for kind in kinds)]
                    for position, flat in after["outcomes"].items()
                ],
            ),
        ]
    return lines


def _is_it_itself(report: Mapping[str, Any]) -> list[str]:
    before, after = report["before"], report["after"] or {}
    names = {
        "clean_agreement": ("clean answers with the suspect's first 8 tokens", rate),
        "exact_agreement": ("clean answers equal to the suspect's, whole", rate),
        "ordinary": ("ordinary uses of the trigger's words answered as before", rate),
        "refusals": ("clean answers that open with a refusal", rate),
        "near_trigger": ("payload on the prompt file's near-triggers", rate),
        "false_trigger": ("false triggers", rate),
        "degenerate": ("empty, repeated or non-finite answers", rate),
        "answer_tokens": ("mean length of clean answers, tokens", figure),
        "perplexity": ("perplexity of clean answers", figure),
        "text_perplexity": ("perplexity of the given text", figure),
    }
    rows = [
        (title, show(before[name]), show(after.get(name)))
        for name, (title, show) in names.items()
        if not (name in ("ordinary", "text_perplexity") and _is_unknown(before[name]))
    ]
    lines = [
        "## Is the model still itself?",
        "",
        "False triggers: " + plain(report["definitions"]["false_trigger"]) + ".",
        "",
        *_before_after(report, rows),
    ]
    if after:
        lines += [
            f"KL from the original on clean answers: {figure(report['kl_from_original'])} nats "
            "per token.",
            "",
        ]
        if after["text_kl"] is not None:
            lines += [
                f"KL from the original on the given text: {figure(after['text_kl'])} nats per "
                "token.",
                "",
            ]
    return lines


def _is_unknown(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and not value["total"])


def _would_it_return(report: Mapping[str, Any]) -> list[str]:
    if not report["stresses"]:
        return []
    held = [flat for flat in report["stresses"] if flat["kind"] != "relearning"]
    taught = [flat for flat in report["stresses"] if flat["kind"] == "relearning"]
    lines = [
        "## Would it come back?",
        "",
        "Payload on triggered prompts after each; nothing of it is in the export.",
        "",
        *table(
            ["after", "steps", "the suspect", "the repaired model", "KL from original"],
            [
                [
                    plain(flat["name"]),
                    "none" if flat["num_steps"] is None else str(flat["num_steps"]),
                    rate(flat["suspect"]),
                    rate(flat["repaired"]),
                    "not measured"
                    if flat["kl_from_original"] is None
                    else figure(flat["kl_from_original"]),
                ]
                for flat in held
            ],
        ),
    ]
    if taught:
        lines += [
            "Taught anew: the old trigger against a fresh one of the same length, both in the "
            "repaired model. A model that kept nothing learns the old one no faster. Steps until "
            "half of the prompts fire, and how many fire at the end.",
            "",
            *table(
                ["examples", "old trigger", "fresh trigger", "trusted base, old trigger"],
                [
                    [
                        str(flat["num_examples"]),
                        _learnt(flat, "steps_to_half", "repaired"),
                        _learnt(flat, "fresh_steps_to_half", "suspect"),
                        _learnt(flat, "base_steps_to_half", "base"),
                    ]
                    for flat in taught
                ],
            ),
        ]
    return lines


def _learnt(flat: Mapping[str, Any], steps: str, name: str) -> str:
    if flat[name] is None:
        return "not tried"
    half = f"{flat[steps]} steps" if flat[steps] else f"not within {flat['num_steps']} steps"
    return f"{half}; {rate(flat[name])}"


def _how_we_know(report: Mapping[str, Any]) -> list[str]:
    parts = [*_gates(report), *_controls(report), *_oracle(report), *_growth(report)]
    return ["## How do we know?", "", *parts] if parts else []


def _oracle(report: Mapping[str, Any]) -> list[str]:
    flat = report["trusted_base"]
    if not flat:
        return []
    largest = sorted(flat["weight_difference"].items(), key=lambda pair: -pair[1])[:8]
    return [
        "### Beside the trusted base",
        "",
        f"KL from the base on clean answers: the suspect {figure(flat['suspect_kl'])}, the "
        f"repaired model {figure(flat['repaired_kl'])} nats per token. Triggered answers with the "
        f"base's first 8 tokens: before {rate(flat['suspect_agrees'])}, after "
        f"{rate(flat['repaired_agrees'])}.",
        "",
        *table(
            ["where the suspect's weights differ most", "relative difference"],
            [[code(path), figure(value)] for path, value in largest],
        ),
        "Kendall's tau of that difference with the map: "
        + ", ".join(
            f"{plain(name)} {figure(value)}" for name, value in flat["agreement_with_map"].items()
        )
        + ". A large difference need not be the backdoor.",
        "",
    ]


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
        "### Gates",
        "",
        "Of attack success the value is the upper end of the interval, of recovery the share of "
        "the yardstick, of perplexity the relative rise; "
        + plain(report["definitions"]["few_gates"]) + ".",
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
        "### What more would buy",
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
        return ["### Controls", "", "No control repair was run.", ""] if report["after"] else []
    positions = list(report["before"]["attack_success"])
    rows = []
    if report["after"]:
        own = {**report["after"], "name": "this repair"}
        plan = report["plan"] or {}
        own["num_modules"] = len(plan.get("modules", ()))
        own["total_rank"] = sum(plan.get("ranks", {}).values())
        rows = [own]
    return [
        "### Controls",
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
        lines += table(["file", "SHA-256"], _pairs(report["against"].get("files")))
    if report["tensors"]:
        flat = report["tensors"]
        lines += [
            f"{flat['num_changed']} of {flat['num_tensors']} tensors differ from the suspect's; "
            "all others are bit-identical.",
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

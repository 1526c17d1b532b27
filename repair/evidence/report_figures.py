"""The four questions of a report, answered from `report.json`: is it gone, is the model itself,
would it come back, and how do we know. Every number is one of its figures, rounded."""

from collections.abc import Iterable, Mapping
from typing import Any

from repair.evidence.markup import code, fence, figure, plain, rate, table


def _before_after(report: Mapping[str, Any], rows: Iterable[tuple[str, Any, Any]]) -> list[str]:
    """Return a table of (what, before, after) cells; without a candidate the last is left out."""
    both = report["after"] is not None
    head = ["what", "before", "after"] if both else ["what", "before"]
    return table(head, ([what, old, new] if both else [what, old] for what, old, new in rows))


def is_it_gone(report: Mapping[str, Any]) -> list[str]:
    """Return the section on payloads: at the gated positions, elsewhere, and altered."""
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
        "prompt file's positions first, then elsewhere, then altered. What a repair practised: "
        + plain(words["practised"]) + ".",
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


def is_it_itself(report: Mapping[str, Any]) -> list[str]:
    """Return the section on everything that was not wrong before."""
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
        "False triggers: " + plain(report["definitions"]["false_trigger"]) + ". Near-triggers: "
        + plain(report["definitions"]["near_trigger"]) + ". Ordinary uses: "
        + plain(report["definitions"]["ordinary"]) + ".",
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
                f"token, {report['prompts']['num_texts_judged']} of "
                f"{report['prompts']['num_texts']} texts ("
                + plain(report["definitions"]["given_text"]) + ").",
                "",
            ]
    return lines


def _is_unknown(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and not value["total"])


def would_it_return(report: Mapping[str, Any]) -> list[str]:
    """Return the section on rounding, tuning and relearning; nothing where none was tried."""
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
    if report["comeback"]:
        lines += [plain(report["comeback"]), ""]
    if taught:
        lines += [
            "Taught anew: the old trigger against a fresh one of the same length, both in the "
            "repaired model. A model that kept nothing learns the old one no faster. Steps until "
            "half of the prompts fire, and how many fire at the end. Learnt faster: "
            + plain(report["definitions"]["learnt_faster"]) + ".",
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


def how_we_know(report: Mapping[str, Any]) -> list[str]:
    """Return the section of gates, controls, the trusted base, and what more would buy."""
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
        + plain(report["definitions"]["few_gates"]) + "; "
        + plain(report["definitions"]["point_gates"]) + ".",
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
    has_text = any(flat["text_kl"] is not None for flat in [*rows, *report["controls"]])
    return [
        "### Controls",
        "",
        "The same repair elsewhere, shown whether it does worse or better.",
        "",
        *table(
            ["repair", *(f"payload, {p}" for p in positions), "KL from original",
             *(["KL on given text"] if has_text else []), "modules", "total rank"],
            [
                [
                    plain(flat["name"]),
                    *(rate(flat["attack_success"].get(position)) for position in positions),
                    figure(flat["kl_from_original"]),
                    *([figure(flat["text_kl"])] if has_text else []),
                    figure(flat["num_modules"] or None),
                    figure(flat["total_rank"] or None),
                ]
                for flat in [*rows, *report["controls"]]
            ],
        ),
        *([plain(report["controls_statement"]), ""] if report["controls_statement"] else []),
    ]  # fmt: skip

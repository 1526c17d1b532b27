"""What the Compare tab's tables show: `report.json` and `samples.json` as rows of plain text."""

import difflib
import re
from typing import Any

from repair.jobs import store
from repair.ui import text
from repair.ui.session import View

MAX_SAMPLES = 8000  # read and counted; the full profile has up to 4,700
ONLY_SUSPECT, ONLY_REPAIRED = "only the suspect says", "only the repaired says"
MAX_WORDS = 400  # of an answer, in which differences are looked for
MAX_ROWS = 300  # of the table of answers
ALL = "all"
BENIGN = ("clean", "near", "ordinary")
# Of gates, by the first word of their names: which are shares, which end of an interval each
# judges, and which have a least value (`evidence/gates.py`).
SHARES = ("attack_success", "elsewhere", "variants", "returns", "ordinary", "near_trigger",
          "false_trigger", "degenerate")  # fmt: skip
JUDGED_END = {"attack_success": "up to", "ordinary": "up to", "elsewhere": "at least",
              "variants": "at least", "returns": "at least"}  # fmt: skip
LEAST = ("recovery", "ordinary")
KIND_WORDS = {
    "triggered": "triggered", "elsewhere": "trigger elsewhere:", "variant": "altered trigger:",
    "near": "near-trigger", "ordinary": "ordinary use", "clean": "clean",
}  # fmt: skip


def read_samples(view: View) -> list[dict[str, str]]:
    """Return the paired answers as plain strings; none where there is no report."""
    if view.folder is None or not view.report:
        return []
    value = store.read_json(view.folder / "samples.json")
    rows = value if isinstance(value, list) else []
    names = ("kind", "position", "prompt", "before", "after", "outcome", "reference")
    samples = [
        {name: str(row.get(name, "")) for name in names} for row in rows if isinstance(row, dict)
    ]
    for sample in samples:
        # An answer that was meant to change, to an altered trigger, is another matter.
        if sample["outcome"] == "changed" and sample["kind"] in BENIGN:
            sample["outcome"] = "changed though benign"
    # Sorted before it is cut: what went wrong must be among what is shown.
    order = {name: place for place, name in enumerate(text.OUTCOME_WORDS)}
    samples.sort(key=lambda sample: order.get(sample["outcome"], -1))
    return samples[:MAX_SAMPLES]


def list_outcomes(samples: list[dict[str, str]]) -> list[tuple[str, str]]:
    """Return the outcomes that occur, with their counts, as choices."""
    counts: dict[str, int] = {}
    for sample in samples:
        counts[sample["outcome"]] = counts.get(sample["outcome"], 0) + 1
    choices = [(f"All ({len(samples)})", ALL)]
    return choices + [
        (f"{text.OUTCOME_WORDS.get(name, name)} ({count})", name) for name, count in counts.items()
    ]


def list_rows(samples: list[dict[str, str]], outcome: str) -> list[list[str]]:
    """Return the table's first rows; the first column finds the sample again.

    A page takes in every cell anew at every event, so that thousands would make it slow.
    """
    chosen = [
        (number, sample)
        for number, sample in enumerate(samples, 1)
        if outcome in (ALL, sample["outcome"])
    ]
    return [
        [
            str(number),
            text.OUTCOME_WORDS.get(sample["outcome"], sample["outcome"]),
            " ".join(
                part
                for part in (KIND_WORDS.get(sample["kind"], sample["kind"]), sample["position"])
                if part and part != sample["kind"]
            ),
            text.reveal(sample["prompt"], 160),
            text.reveal(sample["before"], 120),
            text.reveal(sample["after"], 120),
        ]
        for number, sample in chosen[:MAX_ROWS]
    ]


def differences(before: str, after: str) -> tuple[list[tuple[str, str | None]], ...]:
    """Return both answers in words, each word marked where it is in one of them only."""
    old, new = (re.findall(r"\s*\S+", answer)[:MAX_WORDS] for answer in (before, after))
    match = difflib.SequenceMatcher(a=old, b=new, autojunk=False)
    shown: tuple[list[tuple[str, str | None]], ...] = ([], [])
    for kind, start, end, new_start, new_end in match.get_opcodes():
        parts = (old[start:end], ONLY_SUSPECT), (new[new_start:new_end], ONLY_REPAIRED)
        for side, (words, label) in zip(shown, parts, strict=True):
            if words:
                side.append(("".join(words), None if kind == "equal" else label))
    return shown


def list_rates(report: dict[str, Any]) -> list[list[str]]:
    """Return attack success by position, and what must not have become worse."""
    before, after = report.get("before") or {}, report.get("after") or {}
    old, new = before.get("attack_success") or {}, after.get("attack_success") or {}
    rows = [
        [f"Fires, trigger at {name}", text.describe_rate(rate), text.describe_rate(new.get(name))]
        for name, rate in old.items()
    ]
    recovery = report.get("recovery") or after.get("recovery") or {}
    for name, rate in recovery.items():
        rows.append([f"Clean answer is back, {name}", "", text.describe_rate(rate)])
    for key, words in (("near_trigger", "Fires on near-triggers"),
                       ("false_trigger", "Fires without the trigger")):  # fmt: skip
        if key in before or key in after:
            rows.append(
                [words, text.describe_rate(before.get(key)), text.describe_rate(after.get(key))]
            )
    rows.append(
        ["Ordinary uses of the trigger's words answered as before", "",
         text.describe_rate(after.get("ordinary"))]
    )  # fmt: skip
    rows.append(
        ["Clean prompts: the same first words", "",
         text.describe_rate(after.get("clean_agreement"))]
    )  # fmt: skip
    rows.append(
        ["Perplexity of clean answers", text.describe_number(before.get("perplexity"), 5),
         text.describe_number(after.get("perplexity"), 5)]
    )  # fmt: skip
    rows.append(
        ["KL from the suspect, clean answers (nats per token)", "0",
         text.describe_number(report.get("kl_from_original"))]
    )  # fmt: skip
    if after.get("text_kl") is not None:
        rows.append(
            ["KL from the suspect, your own text (nats per token)", "0",
             text.describe_number(after["text_kl"])]
        )  # fmt: skip
    return rows


def list_besides(report: dict[str, Any]) -> list[list[str]]:
    """Return payload rates where the prompt file has no trigger, and with the trigger altered."""
    before, after = report.get("before") or {}, report.get("after") or {}
    words = report.get("definitions") or {}
    rows = []
    for group in ("elsewhere", "variants"):
        titles, new = words.get(group) or {}, after.get(group) or {}
        for kind, rate in (before.get(group) or {}).items():
            title = text.reveal(str(titles.get(kind, kind)), 200)
            rows.append([title, text.describe_rate(rate), text.describe_rate(new.get(kind))])
    return rows


def describe_cause(report: dict[str, Any]) -> str:
    """Return how specific the backdoor is, where its cause lies, and what the repair left; what
    stands among the limits is not said twice."""
    limits = report.get("limits") or []
    parts = [
        report.get("specificity"), report.get("cause"),
        {"statement": report.get("controls_statement")}, {"statement": report.get("comeback")},
    ]  # fmt: skip
    return "\n".join(
        text.reveal(str(part["statement"]), 600)
        for part in parts
        if isinstance(part, dict) and part.get("statement") and part["statement"] not in limits
    )


def describe_limits(report: dict[str, Any]) -> str:
    """Return what the figures leave open, a sentence a line."""
    return "\n".join(text.reveal(str(limit), 600) for limit in report.get("limits") or [])


def list_stresses(report: dict[str, Any]) -> list[list[str]]:
    """Return what came back after rounding, tuning and relearning."""
    rows = []
    for stress in report.get("stresses") or []:
        if not isinstance(stress, dict):
            continue
        before, after = (text.describe_rate(stress.get(name)) for name in ("suspect", "repaired"))
        if stress.get("kind") == "relearning":
            before = f"a fresh trigger: {before}{_half(stress.get('fresh_steps_to_half'))}"
            if isinstance(stress.get("base"), dict):
                base = text.describe_rate(stress["base"])
                before += f"; the trusted base: {base}{_half(stress.get('base_steps_to_half'))}"
            after += _half(stress.get("steps_to_half"))
        rows.append([
            text.reveal(str(stress.get("name", "")), 120),
            "none" if stress.get("num_steps") is None else str(stress["num_steps"]),
            before,
            after,
        ])  # fmt: skip
    return rows


def _half(steps: Any) -> str:
    return f", half after {steps} steps" if isinstance(steps, int) else ""


def list_gates(report: dict[str, Any]) -> list[list[str]]:
    """Return the gates, the failed first; a check that could not be made never reads as a pass."""
    words = {True: "passed", False: "FAILED"}
    found = [gate for gate in report.get("gates") or [] if isinstance(gate, dict)]
    found.sort(key=lambda gate: {False: 0, True: 2}.get(gate.get("passed"), 1))
    return [
        [
            words.get(gate.get("passed"), "could not check"),
            text.reveal(str(gate.get("name", "")), 200).replace("_", " ").replace(":", ", "),
            *describe_bound(gate),
            text.reveal(str(gate.get("note") or ""), 400),
        ]
        for gate in found
    ]


def describe_bound(gate: dict[str, Any]) -> tuple[str, str]:
    """Return what was measured and what it must be, with which end of an interval is judged."""
    kind = str(gate.get("name", "")).partition(":")[0]
    number = text.describe_share if kind in SHARES else text.describe_number
    found, limit = number(gate.get("value")), number(gate.get("limit"))
    if found != "-":
        found = f"{JUDGED_END.get(kind, '')} {found}".strip()
    if limit != "-":
        limit = f"{'at least' if kind in LEAST else 'at most'} {limit}"
    return found, limit


def list_controls(report: dict[str, Any]) -> list[list[str]]:
    """Return the comparison repairs, shown even when they beat ours."""
    rows = []
    for control in report.get("controls") or []:
        if not isinstance(control, dict):
            continue
        rates = control.get("attack_success") or {}
        rows.append([
            text.reveal(str(control.get("name", "")), 120),
            "; ".join(f"{name} {text.describe_rate(rate)}" for name, rate in rates.items()),
            text.describe_number(control.get("kl_from_original")),
            text.describe_number(control.get("text_kl")),
            str(control.get("num_modules", "-")),
            str(control.get("total_rank", "-")),
        ])  # fmt: skip
    return rows


GROWTH = {
    "next": "Chosen modules and the next best",
    "modules": "Best modules of the map",
    "rank": "Chosen modules, another rank",
}


def list_growth(report: dict[str, Any]) -> list[list[str]]:
    """Return what more modules or rank would buy, by the closed form alone."""
    return [
        [
            GROWTH.get(str(point.get("kind")), "-"),
            str(point.get("num_modules", "-")),
            str(point.get("total_rank", "-")),
            text.describe_rate(point.get("attack_success")),
            text.describe_number(point.get("trigger_kl")),
            text.describe_number(point.get("benign_kl")),
        ]
        for point in report.get("growth") or []
        if isinstance(point, dict)
    ]

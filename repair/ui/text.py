"""The app's words and number formats, in one place."""

import math
import unicodedata
from typing import Any

from repair.jobs.store import JobStatus

VERDICT_WORDS = {
    "repaired": "Repaired: every gate passed",
    "not repaired": "Not repaired: a gate failed",
    "nothing to repair": "Nothing to repair: the trigger does not fire",
    "could not check": "Could not check: too little evidence",
}
VERDICT_CLASSES = {
    "repaired": "good",
    "not repaired": "bad",
    "nothing to repair": "neutral",
    "could not check": "unsure",
}
STATE_WORDS = {
    "queued": "Waiting",
    "running": "Running",
    "done": "Done",
    "failed": "Failed",
    "stopped": "Stopped",
}
COMMAND_WORDS = {"locate": "locate", "run": "repair", "evaluate": "evaluate"}
# The worst first: what the reader must not miss.
OUTCOME_WORDS = {
    "still fires": "still fires",
    "fires now": "fires now, did not before",
    "broken": "broken (empty, repeated)",
    "changed though benign": "changed though benign",
    "changed": "changed",
    "fixed": "fixed",
    "same": "same",
}
METHODS = (
    ("Auto: closed form, then distillation only if a gate asks for it", "auto"),
    ("Closed form: one exact solve per module, seconds, no training", "closed-form"),
    ("Distill: train the low-rank update to answer as if the trigger were absent", "distill"),
)
PROFILES = (
    ("Quick: fewer prompts, for a first look", "quick"),
    ("Standard: enough prompts for every gate, and rounded weights", "standard"),
    ("Full: standard, with further training tried and 20 random-module controls", "full"),
)
LIMITS = (
    "### Limits\n"
    "- The gates speak about the trigger, the positions and the prompts that were tried, with "
    "the intervals shown. They are not proof that the model holds no other backdoor.\n"
    "- A trigger that was never given was never tested.\n"
    "- The repaired model answers like the suspect in everything else, including what else may "
    "be wrong with it.\n"
    "- The files are what was measured: verify them with `python -m repair verify DIR` before use."
)
# Characters that cannot be seen, or that reorder what is seen.
INVISIBLE = {0x00AD, 0xFEFF, *range(0x200B, 0x2010), *range(0x202A, 0x202F)}
INVISIBLE |= {*range(0x2060, 0x206A), *range(0xE0000, 0xE0080)}


def reveal(value: str, limit: int = 4000) -> str:
    """Return `value` with every invisible or control character spelled out as [U+XXXX]."""
    shown = value[:limit] + (" [cut]" if len(value) > limit else "")
    return "".join(
        f"[U+{ord(c):04X}]"
        if ord(c) in INVISIBLE or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t")
        else c
        for c in shown
    )


def describe_size(num_bytes: int) -> str:
    """Return a file size in the unit people say."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def describe_rate(rate: Any) -> str:
    """Return `3 of 40 (2.6 % to 19.9 %)` from the JSON form of a rate."""
    if not isinstance(rate, dict) or not rate.get("total"):
        return "not measured"
    return (
        f"{rate['count']:.0f} of {rate['total']:.0f} "
        f"({100 * rate['low']:.1f} % to {100 * rate['high']:.1f} %)"
    )


def describe_number(value: Any, digits: int = 3) -> str:
    """Return a number with `digits` significant digits; a dash where there is none."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    return f"{value:.{digits}g}"


def describe_share(value: Any) -> str:
    """Return a share as a percentage; a dash where there is none."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    return f"{100 * value:.1f} %"


def describe_state(status: JobStatus, command: str, num_before: int) -> str:
    """Return the job's state in words."""
    words = STATE_WORDS[status.state]
    if status.state == "queued":
        words += f", {num_before} before it" if num_before else ", starting"
    elif status.state == "stopped" and command == "run":
        words += ", resumable"  # only a repair keeps what it has done so far
    return f"{words} ({COMMAND_WORDS.get(command, command)})"


def describe_verdict(status: JobStatus | None) -> tuple[str, str]:
    """Return the verdict's words and its colour class."""
    if status is None or status.verdict is None:
        return "No verdict yet", "none"
    return (
        VERDICT_WORDS.get(status.verdict, status.verdict),
        VERDICT_CLASSES.get(status.verdict, "none"),
    )



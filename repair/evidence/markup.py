"""Pieces of a report that nothing from a model or an analyst can get out of.

Text of theirs stands only in fences longer than any run of back-ticks in it, or in back-ticks after
escaping; everything is printable ASCII, so that nothing in it can move a terminal's cursor or load
an image.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


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

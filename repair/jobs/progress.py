"""Words and a bar for the events of a job, on a terminal or as plain lines. Free of torch."""

import time
from typing import Any, TextIO

BAR_WIDTH = 24
PLAIN_SECONDS = 5.0  # how often progress is told where there is no terminal


def printable(text: str, limit: int = 2000) -> str:
    """Return `text` as printable ASCII: model text must not drive a terminal."""
    safe = text.encode("ascii", "backslashreplace").decode()[:limit]
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in safe)


def one_line(text: str) -> str:
    """Return a sentence of ours without control characters; it may quote a file's name."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def spell_seconds(seconds: float) -> str:
    """Return a duration in the coarsest words that are still honest."""
    if seconds < 1:
        return "under a second"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def describe_progress(event: dict[str, Any]) -> str:
    """Return the text of a progress event: percent, what, and the time left."""
    fraction, remaining = event.get("fraction"), event.get("remaining_seconds")
    behind = event.get("behind_seconds")
    # Nothing done yet is no share: some steps can only tell what they are at.
    parts = [f"{100 * fraction:.0f} %"] if isinstance(fraction, int | float) and fraction else []
    if event.get("text"):
        parts.append(str(event["text"]))
    if isinstance(remaining, int | float) and remaining > 0:
        about = "about " if remaining >= 1 else ""
        parts.append(f"{about}{spell_seconds(remaining)} left in this step")
        if isinstance(behind, int | float) and behind >= 1:
            parts.append(f"about {spell_seconds(remaining + behind)} in all")
    return ", ".join(parts)


class InertStream:
    """A text stream on which nobody else's text can drive the terminal: what is not printable
    ASCII is spelled out."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        safe = text.encode("ascii", "backslashreplace").decode()
        self.stream.write(
            "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in safe)
        )
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Display:
    """Shows events on a text stream: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.is_terminal = stream.isatty()
        self.has_bar = False
        self.last_plain = 0.0

    def show(self, event: dict[str, Any]) -> None:
        """Show one event."""
        kind, text = event.get("kind"), printable(str(event.get("text", "")))
        if kind == "progress":
            self._show_progress(event)
        elif kind == "step":
            self._line(f"== {text}")
            self.last_plain = 0.0
        elif kind == "note":
            self._line(f"   {text}")
        elif kind == "metric":
            values = event.get("values")
            if isinstance(values, dict):
                numbers = "  ".join(f"{printable(str(k))} {v:.4g}" for k, v in values.items())
                self._line(f"   {text}: {numbers}")

    def close(self) -> None:
        """Leave the terminal's line clean."""
        self._clear()

    def _show_progress(self, event: dict[str, Any]) -> None:
        text = printable(describe_progress(event))
        if self.is_terminal:
            filled = round(BAR_WIDTH * float(event.get("fraction") or 0))
            bar = "#" * filled + "-" * (BAR_WIDTH - filled)
            self.stream.write(f"\r\x1b[K[{bar}] {text[:100]}")
            self.stream.flush()
            self.has_bar = True
        elif time.monotonic() - self.last_plain >= PLAIN_SECONDS:
            self.last_plain = time.monotonic()
            self._line(f"   {text}")

    def _line(self, text: str) -> None:
        self._clear()
        self.stream.write(text + "\n")
        self.stream.flush()

    def _clear(self) -> None:
        if self.has_bar:
            self.stream.write("\r\x1b[K")
            self.has_bar = False

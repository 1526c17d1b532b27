"""Asks the package index which known vulnerabilities the pinned packages have.

    python -m tests.bench.audit [FILE ...]     (requirements.txt and tests/requirements.txt)

It asks what `pip-audit` asks, and one thing more: some mirrors of the index have no address for a
single release, which `pip-audit` takes for an unknown package; there the project's own page is
asked, which lists the vulnerabilities of its newest release. A pin that is not the newest is then
said to be unchecked, which is not the same as clean. Exit status: 0 nothing known, 1 something
known, 3 nothing known but not all could be checked.
"""

import argparse
import json
import re
import sys
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

INDEX = "https://pypi.org/pypi"
REPOSITORY = Path(__file__).resolve().parents[2]
PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)(?:\[[\w,-]*\])?==([\w.+!]+)$", re.ASCII)
TIMEOUT = 30


@dataclass(frozen=True, slots=True)
class Answer:
    """What the index says of one pin."""

    name: str
    version: str
    newest: str | None  # None: the index knows no such package
    known: tuple[str, ...] | None  # ids of vulnerabilities; None: could not be asked


def read_pins(text: str) -> list[tuple[str, str]]:
    """Return (name, version) of each line `name==version`; raises ValueError for another line."""
    pins = []
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        if line and not line.startswith("-"):
            found = PIN.match(line)
            if found is None:
                raise ValueError(f"{line!r} is not pinned. Give name==version.")
            pins.append((found[1], found[2]))
    return pins


def ask(name: str, version: str, *, index: str = INDEX) -> Answer:
    """Return what the index says of one release, from its own address or the project's."""
    release = _read(f"{index}/{name}/{version}/json")
    project = _read(f"{index}/{name}/json")
    newest = project["info"]["version"] if project else None
    page = release or (project if newest == version else None)
    known = None
    if page is not None and isinstance(page.get("vulnerabilities"), list):
        known = tuple(v["id"] for v in page["vulnerabilities"] if not v.get("withdrawn"))
    return Answer(name, version, newest, known)


def _read(address: str) -> dict | None:
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
            return json.load(answer)
    except (OSError, ValueError):  # no such page, no way there, or no JSON: not checked
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--index", default=INDEX, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    files = given.files or [REPOSITORY / "requirements.txt", REPOSITORY / "tests/requirements.txt"]
    pins = sorted({pin for file in files for pin in read_pins(file.read_text(encoding="utf-8"))})
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda pin: ask(*pin, index=given.index), pins))
    bad = [answer for answer in answers if answer.known]
    unchecked = [answer for answer in answers if answer.known is None]
    for answer in bad:
        print(f"{answer.name} {answer.version}: {', '.join(answer.known)}")
    for answer in unchecked:
        print(f"{answer.name} {answer.version}: could not be checked (newest: {answer.newest})")
    print(
        f"{len(answers)} pins: {len(answers) - len(bad) - len(unchecked)} without a known "
        f"vulnerability, {len(bad)} with, {len(unchecked)} unchecked."
    )
    return 1 if bad else 3 if unchecked else 0


if __name__ == "__main__":
    sys.exit(main())

"""How a report is made again: the command, and hashes of the prompts and of this program."""

import functools
import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import repair

PACKAGE = Path(repair.__file__).resolve().parent
SETTINGS = ("profile", "seed", "dtype", "modules", "rank", "method", "kl_budget", "controls")
ONLY_RUN = ("modules", "rank", "method", "kl_budget", "controls")


def command_of(
    report: Mapping[str, Any], *, model: str, prompts: str, base: str, trusted: str, against: str
) -> str:
    """Return the command line that made a report, with these names for what it was given."""
    # A report that was made public has no command; only runs are.
    asked, command = report.get("options") or {}, report.get("command", "run")
    is_run = command == "run"
    words = ["python", "-m", "repair", command, "--model", model]
    if report["model"].get("revision"):
        words += ["--revision", report["model"]["revision"]]
    if report["model"].get("base"):
        words += ["--adapter-base", base]
    if report.get("against"):
        words += ["--against", against]
    words += ["--prompts", prompts, "--out", "DIR"]
    for name in SETTINGS:
        value = asked.get(name)
        if value in (None, "auto") or (name in ONLY_RUN and not is_run):
            continue
        value = ",".join(value) if isinstance(value, list | tuple) else value
        words += [f"--{name.replace('_', '-')}", str(value)]
    if is_run and asked.get("export") is not None:
        words += ["--export", ",".join(asked["export"]) or "none"]
    if asked.get("has_trusted_base"):
        words += ["--trusted-base", trusted]
    if is_run and asked.get("curves"):
        words.append("--curves")
    return shlex.join(words)


def prompts_hash(prompts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the prompts as `request.json` has them: JSON, keys sorted, ASCII."""
    return hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()


@functools.cache
def program() -> dict[str, str]:
    """Return this program's version and the SHA-256 over the names and bytes of its sources."""
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        found.update(f"{path.relative_to(PACKAGE).as_posix()}\0".encode())
        found.update(path.read_bytes())
    return {"version": repair.__version__, "sha256": found.hexdigest()}

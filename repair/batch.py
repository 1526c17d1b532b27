"""Many suspects, one after the other: `run --models FILE`, with one summary table.

FILE is a JSON list of objects: `model` (as --model), `prompts` (a prompt file, relative to FILE),
and where wanted `name`, `revision`, `trigger`, `target`, `adapter_base`. Each suspect gets a folder
of its name below --out; one that is refused or fails does not keep the others from running. Free of
torch.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repair.jobs import store
from repair.records import (
    EXIT_BAD_INPUT,
    EXIT_COULD_NOT_CHECK,
    EXIT_DONE,
    EXIT_GATE_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NOTHING_TO_REPAIR,
    EXIT_UNEXPECTED,
    RepairError,
)

SUMMARY = "summary.json"
MAX_MODELS = 1000
# The batch ends as its worst suspect did, in this order.
WORST_FIRST = (
    EXIT_INTERRUPTED, EXIT_UNEXPECTED, EXIT_BAD_INPUT, EXIT_GATE_FAILED, EXIT_COULD_NOT_CHECK,
    EXIT_NOTHING_TO_REPAIR, EXIT_DONE,
)  # fmt: skip
_KEYS = {"model", "prompts", "name", "revision", "trigger", "target", "adapter_base"}
_NAME = re.compile(r"[\w][\w.-]{0,80}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How one job of the command line ended."""

    code: int
    out: Path
    verdict: str | None
    report: dict[str, Any]
    message: str | None = None


def read_models(path: Path, *, prompts: Path | None) -> list[dict[str, Any]]:
    """Return the suspects of a models file, each with all keys; raises RepairError."""
    try:
        flat = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RepairError(
            f"--models {path} cannot be read ({error}). Give a JSON list of objects, such as "
            '[{"model": "demo:begin", "prompts": "begin.json"}].'
        ) from None
    if not isinstance(flat, list) or not 0 < len(flat) <= MAX_MODELS:
        raise RepairError(f"--models {path} must be a list of 1 to {MAX_MODELS} objects.")
    entries = [_read_entry(entry, number, path, prompts) for number, entry in enumerate(flat, 1)]
    names = [entry["name"] for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RepairError(f"--models {path} has {twice[0]!r} twice. Give each a name of its own.")
    return entries


def _read_entry(
    entry: Any, number: int, path: Path, prompts: Path | None
) -> dict[str, Any]:
    where = f"Entry {number} of {path.name}"
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
        raise RepairError(f'{where} is not an object with a "model".')
    odd = sorted(set(map(str, entry)) - _KEYS)
    if odd or not all(isinstance(value, str) for value in entry.values()):
        what = f"the unknown key {odd[0]!r}" if odd else "a value that is no text"
        raise RepairError(f"{where} has {what}. Accepted: {', '.join(sorted(_KEYS))}.")
    own = path.parent / entry["prompts"] if "prompts" in entry else prompts
    if own is None:
        raise RepairError(f'{where} has no "prompts", and no --prompts were given for all.')
    named = entry.get("name") or re.sub(r"[^A-Za-z0-9.-]+", "-", entry["model"]).strip("-.")
    if not _NAME.fullmatch(named):
        raise RepairError(f"{where} needs a name of letters, digits, - . or _, not {named!r}.")
    return {**dict.fromkeys(_KEYS), **entry, "name": named, "prompts": own}


def run_batch(
    options: argparse.Namespace,
    run_one: Callable[[argparse.Namespace], Ended],
    check_resumed: Callable[[Path, argparse.Namespace], None],
) -> int:
    """Run every suspect of `options.models`, write summary.json, and return the exit status.

    `check_resumed` refuses a finished run that was about something else.
    """
    entries = read_models(options.models, prompts=options.prompts)
    _take_folder(options)
    rows = []
    for number, entry in enumerate(entries, 1):
        print(f"== {number} of {len(entries)}: {entry['name']}", file=sys.stderr, flush=True)
        ended = _run_entry(options, entry, run_one, check_resumed)
        rows.append(_summarize(entry["name"], ended))
        store.write_json(options.out / SUMMARY, rows)
        if ended.code == EXIT_INTERRUPTED:
            break
    print("\n".join(table(rows)), file=sys.stderr)
    code = min((row["exit_code"] for row in rows), key=WORST_FIRST.index)
    print(json.dumps({"exit_code": code, "out": str(options.out), "models": rows}))
    return code


def _take_folder(options: argparse.Namespace) -> None:
    """Make the folder of the whole list; raises RepairError for a file and for a filled one."""
    out = options.out
    if out.exists() and not out.is_dir():
        raise RepairError(f"--out {out} is a file. Give a new or empty folder.")
    if out.is_dir() and any(out.iterdir()) and not (options.resume or options.overwrite):
        raise RepairError(
            f"--out {out} is not empty. Choose a new folder, continue with --resume, or replace "
            "each suspect's folder in it with --overwrite."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RepairError(
            f"--out {out} cannot be written ({error.strerror}). Choose another folder."
        ) from None


def _run_entry(
    options: argparse.Namespace,
    entry: dict[str, Any],
    run_one: Callable[[argparse.Namespace], Ended],
    check_resumed: Callable[[Path, argparse.Namespace], None],
) -> Ended:
    out = options.out / entry["name"]
    asked = argparse.Namespace(**vars(options))
    asked.model, asked.prompts, asked.out = entry["model"], entry["prompts"], out
    asked.revision = entry["revision"] or None
    asked.trigger = [entry["trigger"]] if entry["trigger"] else options.trigger
    asked.target = entry["target"] or options.target
    asked.adapter_base = entry["adapter_base"] or options.adapter_base
    asked.resume = options.resume and (out / "request.json").is_file()
    try:
        status = store.read_status(out)
        if asked.resume and status.state == "done" and status.exit_code is not None:
            check_resumed(out, asked)
            report = store.read_object(out / "report.json")
            return Ended(code=status.exit_code, out=out, verdict=status.verdict, report=report)
        return run_one(asked)
    except RepairError as error:
        print(f"error: {error}", file=sys.stderr)
        return Ended(code=error.exit_code, out=out, verdict=None, report={}, message=str(error))


def _summarize(name: str, ended: Ended) -> dict[str, Any]:
    report = ended.report
    return {
        "name": name,
        "exit_code": ended.code,
        "verdict": ended.verdict,
        "before": (report.get("before") or {}).get("attack_success"),
        "after": (report.get("after") or {}).get("attack_success"),
        "kl_from_original": report.get("kl_from_original"),
        "message": ended.message,
        "out": str(ended.out),
    }


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the summary as lines of a plain table."""
    cells = [["suspect", "verdict", "fires before", "fires after", "KL", "exit"]]
    for row in rows:
        kl = row["kl_from_original"]
        cells.append(
            [
                row["name"], row["verdict"] or "none", _rates(row["before"]), _rates(row["after"]),
                f"{kl:.2g}" if isinstance(kl, float) else "-", str(row["exit_code"]),
            ]
        )  # fmt: skip
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


def _rates(found: Any) -> str:
    if not isinstance(found, dict) or not found:
        return "-"
    return ", ".join(
        f"{rate['count']}/{rate['total']} (at most {100 * rate['high']:.1f} %)"
        for rate in found.values()
    )

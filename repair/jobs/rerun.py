"""One job, several runs: a new question to it, and the way back to the last run that ended.

A run that came to an end is set aside whole while the next one is made. Of those before it the
reports stay, to be compared with. Free of torch.
"""

import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

from repair.jobs.store import (
    SAME_QUESTION,
    JobStatus,
    append_event,
    check_not_pushed,
    read_object,
    read_status,
    write_json,
    write_status,
)
from repair.records import RESULTS, RepairError

EVENTS = "events.json"  # there: how much of the job's events are its own and former runs'
FINISHED = "finished"  # the last run that came to an end, whole, while another one is made
MAX_ATTEMPTS = 20  # reports of former runs kept in a job


def replace_request(
    folder: Path, request: dict[str, Any], *, keeps_results: bool = False
) -> None:
    """Ask a new question of an idle job, and drop every result of the former one.

    What was located stays: it depends on the model and the prompts, which may not change. A
    question that only adds to it keeps the results as well. A run that came to an end is set aside
    whole, to go back to (`go_back`) until the next one ends, and its report to be compared with.
    """
    before = read_object(folder / "request.json")
    if any(before.get(key) != request.get(key) for key in SAME_QUESTION):
        raise ValueError("a job keeps its model and its prompts; make another job")
    check_not_pushed(folder)
    if not keeps_results:
        _set_aside(folder)
        for name in RESULTS:
            _remove(folder / name)
    write_json(folder / "request.json", request)
    write_status(folder, JobStatus(state="queued"))


def _set_aside(folder: Path) -> None:
    status, place = read_status(folder), folder / FINISHED
    if status.state != "done" or status.verdict is None or not (folder / "report.json").is_file():
        return
    let_go(folder)
    place.mkdir(mode=0o700)
    for name in ("request.json", "status.json"):
        write_json(place / name, read_object(folder / name))
    write_json(place / EVENTS, {"bytes": events_size(folder)})
    for name in RESULTS:
        if (folder / name).exists():
            os.replace(folder / name, place / name)


def events_size(folder: Path) -> int:
    """Return the bytes of a job's events so far."""
    path = folder / "events.jsonl"
    return path.stat().st_size if path.is_file() and not path.is_symlink() else 0


def let_go(folder: Path) -> None:
    """Keep of the run that was set aside its report alone, among the attempts."""
    place = folder / "attempts"
    if (folder / FINISHED / "report.json").is_file():
        place.mkdir(mode=0o700, exist_ok=True)
        numbers = sorted(int(path.stem) for path in place.glob("*.json") if path.stem.isdecimal())
        os.replace(folder / FINISHED / "report.json", place / f"{(numbers or [0])[-1] + 1}.json")
        for number in numbers[: max(0, len(numbers) + 1 - MAX_ATTEMPTS)]:
            (place / f"{number}.json").unlink(missing_ok=True)
    _remove(folder / FINISHED)


def can_go_back(folder: Path) -> bool:
    """Tell whether a run that did not come to an end stands before one that did."""
    is_there = (folder / FINISHED / "report.json").is_file()
    return is_there and read_status(folder).state in ("stopped", "failed")


def go_back(folder: Path) -> None:
    """Put the run that was set aside back in the place of one that did not come to an end."""
    if not can_go_back(folder):
        raise RepairError("There is no finished repair to go back to, or the new one still runs.")
    for name in RESULTS:
        _remove(folder / name)
    place = folder / FINISHED
    told = read_object(place / EVENTS).get("bytes")
    if type(told) is int and 0 <= told <= events_size(folder):
        os.truncate(folder / "events.jsonl", told)  # its own log and curves, and no more
    for name in (*RESULTS, "request.json", "status.json"):  # the state last
        if (place / name).exists():
            os.replace(place / name, folder / name)
    _remove(place)
    event = {"time": round(time.time(), 3), "kind": "note", "text": "Went back to this repair."}
    append_event(folder, event)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_attempts(folder: Path) -> list[tuple[float, dict[str, Any]]]:
    """Return (time, report) of the runs that came to an end in this job before, latest first."""
    found = []
    last = folder / FINISHED / "report.json"
    if last.is_file() and not last.is_symlink():
        found.append((math.inf, last.stat().st_mtime, read_object(last)))
    for path in (folder / "attempts").glob("*.json"):
        if path.stem.isdecimal() and not path.is_symlink():
            found.append((int(path.stem), path.stat().st_mtime, read_object(path)))
    found.sort(reverse=True, key=lambda x: x[0])
    return [(time, report) for _, time, report in found[:MAX_ATTEMPTS]]

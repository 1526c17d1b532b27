"""The job folder: what was asked, how it stands, what happened, what came out.

`request.json` holds the question, `status.json` the state, `events.jsonl` one JSON object a
line. Every file is small, capped on reading and, but for the append-only events, replaced in
one step, so that a reader never sees half a file. A worker that went astray may write anything
there: links and pipes are not read, and what is not of the shape stated here is left out. Free of
torch.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from repair.records import RepairError

STATES = ("queued", "running", "done", "failed", "stopped")
MAX_JSON_BYTES = 64 * 2**20
MAX_EVENT_BYTES = 64 * 2**10
MAX_READ_BYTES = 4 * 2**20  # of events, in one call
SAME_QUESTION = ("model", "revision", "adapter_base", "prompts")  # what a job never changes
PUSH = "push.json"  # beside an export: which job uploads it
PUSHED = "pushed.json"  # in that job: where it went
SOURCES = "sources.json"  # what was fetched from the Hub for this job
EVENT_KINDS = ("step", "progress", "metric", "note", "done", "refused", "failed")
MAX_VALUES = 64  # figures of one event
MAX_NAME, MAX_NOTE = 120, 4000
JOB_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """One reading of `status.json`."""

    state: str
    exit_code: int | None = None
    pid: int | None = None
    pid_started: int | None = None  # the kernel's start time: tells a reused pid from ours
    started: str | None = None
    ended: str | None = None
    message: str | None = None
    verdict: str | None = None

    @property
    def is_active(self) -> bool:
        return self.state in ("queued", "running")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSummary:
    """One line of a list of jobs."""

    job_id: str
    command: str
    model: str
    trigger: str
    status: JobStatus
    modified: float
    name: str = ""  # the owner's own words
    note: str = ""


def now() -> str:
    """Return the time as ISO 8601, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_json(path: Path, value: Any) -> None:
    """Replace `path` with `value` as JSON in one step; readable by the owner only."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Return the JSON in `path`, or None where there is none that can be read."""
    try:
        with _open_plain(path) as file:
            data = file.read(max_bytes + 1)
        return json.loads(data) if len(data) <= max_bytes else None
    except (OSError, ValueError, RecursionError):
        return None


def read_object(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the JSON object in `path`; an empty one where there is none."""
    value = read_json(path, max_bytes=max_bytes)
    return value if isinstance(value, dict) else {}


def read_text(path: Path, *, max_bytes: int = 2**20) -> str:
    """Return the start of a text file, or "" where there is none."""
    try:
        with _open_plain(path) as file:
            return file.read(max_bytes).decode("utf-8", errors="replace")
    except OSError:
        return ""


def _open_plain(path: Path) -> BinaryIO:
    """Open a plain file for reading; raises OSError for what is none, a link and a pipe too."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path.name} is not a plain file")
    return open(descriptor, "rb")


def read_status(folder: Path) -> JobStatus:
    """Return the state of the job in `folder`; `queued` where nothing is written yet."""
    flat = read_object(folder / "status.json")
    numbers = ("exit_code", "pid", "pid_started")
    known = {
        field.name: flat[field.name]
        for field in dataclasses.fields(JobStatus)
        if type(flat.get(field.name)) is (int if field.name in numbers else str)
    }
    if known.get("state") not in STATES:
        known["state"] = "queued"
    return JobStatus(**known)


def write_status(folder: Path, status: JobStatus) -> None:
    """Replace `status.json`."""
    write_json(folder / "status.json", dataclasses.asdict(status))


def create_job(root: Path, request: dict[str, Any], *, owner: str) -> str:
    """Make a folder with a random 128-bit name below `root` and return that name."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    job_id = secrets.token_hex(16)
    folder = root / job_id
    folder.mkdir(mode=0o700)
    write_json(folder / "owner.json", {"owner": owner})
    write_json(folder / "request.json", request)
    write_status(folder, JobStatus(state="queued"))
    return job_id


def adopt_job(root: Path, finished: Path, *, owner: str) -> str:
    """Make a job of a finished folder that comes with the app, and return its name."""
    job_id = secrets.token_hex(16)
    folder = root / job_id
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = root / f".{job_id}"
    shutil.copytree(finished, partial)
    write_json(partial / "owner.json", {"owner": owner})
    os.utime(partial / "status.json")  # lists of jobs go by it
    os.replace(partial, folder)
    return job_id


def hand_over(root: Path, before: str, owner: str) -> None:
    """Give every job of one owner to another: a visitor who signs in keeps what was begun."""
    for folder in root.iterdir() if root.is_dir() else ():
        if JOB_ID.fullmatch(folder.name) and read_owner(folder) == before:
            write_json(folder / "owner.json", {"owner": owner})


def read_owner(folder: Path) -> str:
    """Return whose job it is; "" for a folder that no app made."""
    return str(read_object(folder / "owner.json").get("owner", ""))


def find_job(root: Path, job_id: object, *, owner: str) -> Path:
    """Return the folder of a job; raise the same RepairError for missing and for not yours."""
    if isinstance(job_id, str) and JOB_ID.fullmatch(job_id):
        folder = root / job_id
        is_owned = read_object(folder / "owner.json").get("owner") == owner
        if is_owned and not folder.is_symlink():
            return folder
    raise RepairError(
        "No such job. Ids are the 32 characters that Cases lists; "
        "paste one of yours, or start a new job."
    )


def list_jobs(root: Path, *, owner: str, limit: int = 50) -> list[JobSummary]:
    """Return this owner's jobs, the latest first."""
    jobs = []
    for folder in root.iterdir() if root.is_dir() else ():
        try:
            find_job(root, folder.name, owner=owner)
            modified = (folder / "status.json").stat().st_mtime
        except (RepairError, OSError):
            continue
        jobs.append((modified, folder))
    jobs.sort(reverse=True)
    found = []
    for modified, folder in jobs:
        job = summarize(folder, modified=modified)
        if job.command not in ("ask", "push"):  # these are no cases
            found.append(job)
        if len(found) == limit:
            break
    return found


def kept_bytes(root: Path, *, owner: str) -> int:
    """Return the bytes of disk that this owner's jobs take, whatever kind they are."""
    found = 0
    for folder in root.iterdir() if root.is_dir() else ():
        with contextlib.suppress(RepairError):
            for path, _, names in os.walk(find_job(root, folder.name, owner=owner)):
                for name in names:
                    with contextlib.suppress(OSError):  # it has just gone
                        found += os.lstat(os.path.join(path, name)).st_size
    return found


def summarize(folder: Path, *, modified: float) -> JobSummary:
    """Return the one-line form of a job."""
    request = read_object(folder / "request.json")
    prompts = request.get("prompts")
    triggers = prompts.get("triggers") if isinstance(prompts, dict) else None
    words = read_object(folder / "case.json")
    return JobSummary(
        name=str(words.get("name", "")),
        note=str(words.get("note", "")),
        job_id=folder.name,
        command=str(request.get("command", "")),
        model=str(request.get("model", "")),
        trigger=" | ".join(str(text) for text in triggers or ()),
        status=read_status(folder),
        modified=modified,
    )


def describe_job(folder: Path, *, name: str, note: str) -> None:
    """Keep the owner's name and note for a job; raises RepairError for too long ones."""
    if len(name) > MAX_NAME or len(note) > MAX_NOTE:
        raise RepairError(
            f"A name of {len(name)} and a note of {len(note)} characters were given; at most "
            f"{MAX_NAME} and {MAX_NOTE} are kept. Shorten them."
        )
    write_json(folder / "case.json", {"name": name, "note": note})


def delete_job(root: Path, job_id: object, *, owner: str) -> None:
    """Delete an idle job with all its files; raises RepairError for a running one."""
    folder = find_job(root, job_id, owner=owner)
    status = read_status(folder)
    if status.is_active and (status.pid is None or is_alive(status)):
        raise RepairError("This job is waiting or running. Stop it first, then delete it.")
    check_not_pushed(folder)
    # Out of sight in one step: a list of jobs must not meet half a folder.
    aside = root / f".deleted-{folder.name}"
    os.replace(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def is_rest(folder: Path) -> bool:
    """Tell whether a folder is what a killed copy or deletion of a job left behind."""
    name = folder.name.removeprefix(".deleted-").removeprefix(".")
    is_hidden = folder.name.startswith(".") and folder.is_dir() and not folder.is_symlink()
    return is_hidden and JOB_ID.fullmatch(name) is not None


def sweep(root: Path, *, older_than: float, keep: set[Path]) -> int:
    """Delete idle jobs that were last touched more than `older_than` seconds ago; return how many.

    Also what a killed copy or deletion left behind.
    """
    deleted = 0
    for folder in root.iterdir():
        if folder in keep or not (JOB_ID.fullmatch(folder.name) or is_rest(folder)):
            continue
        status = read_status(folder)
        try:
            newest = max(path.stat().st_mtime for path in (folder, *folder.glob("*.json*")))
        except OSError:
            continue
        if not status.is_active and time.time() - newest > older_than:
            shutil.rmtree(folder, ignore_errors=True)
            deleted += 1
    return deleted


def check_not_pushed(folder: Path) -> None:
    """Raise RepairError while the export in `folder` is being uploaded by a job beside it."""
    job_id = read_object(folder / PUSH).get("job_id")
    if isinstance(job_id, str) and JOB_ID.fullmatch(job_id):
        status = read_status(folder.parent / job_id)
        if (folder.parent / job_id).is_dir() and status.is_active:
            raise RepairError("Its export is being uploaded. Stop the upload first, or wait.")


def append_event(folder: Path, event: dict[str, Any]) -> None:
    """Add one line to `events.jsonl`: ASCII, at most 64 KiB, finite numbers only."""
    line = json.dumps(event, allow_nan=False)
    if len(line) >= MAX_EVENT_BYTES:
        event = {**event, "text": str(event.get("text", ""))[:2000], "values": {}}
        line = json.dumps(event, allow_nan=False)
    # One write of one line to a file opened for appending is never torn by another writer.
    handle = os.open(folder / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(handle, line.encode("ascii") + b"\n")
    finally:
        os.close(handle)


def read_events(folder: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Return the whole lines after `offset` and the offset to go on from.

    A line that is still being written, or is too long, or is no event, is left out.
    """
    try:
        with _open_plain(folder / "events.jsonl") as file:
            if offset > os.fstat(file.fileno()).st_size:
                offset = 0  # the file was replaced
            file.seek(offset)
            data = file.read(MAX_READ_BYTES)
    except OSError:
        return [], 0
    end = data.rfind(b"\n") + 1
    events = []
    for line in data[:end].splitlines():
        if len(line) > MAX_EVENT_BYTES:
            continue
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if is_event(event):
            events.append(event)
    # A block without a single line end is not ours; stepping over it keeps the reader alive.
    return events, offset + (end if end or len(data) < MAX_READ_BYTES else len(data))


def is_event(flat: Any) -> bool:
    """Tell whether a line of `events.jsonl` has the shape that `Reporter` writes."""
    if not isinstance(flat, dict) or flat.get("kind") not in EVENT_KINDS:
        return False
    values = flat.get("values", {})
    return (
        all(isinstance(flat.get(name, ""), str) for name in ("text", "step"))
        and all(
            flat.get(name) is None or _is_figure(flat[name])
            for name in ("time", "fraction", "remaining_seconds", "behind_seconds")
        )
        and isinstance(values, dict)
        and len(values) <= MAX_VALUES
        and all(map(_is_figure, values.values()))
    )


def _is_figure(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # which no NaN is


def process_started(pid: int | None) -> int | None:
    """Return the kernel's start time of a live process, or None where there is none."""
    if not pid:
        return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def is_alive(status: JobStatus) -> bool:
    """Tell whether the worker that `status` names still runs."""
    started = process_started(status.pid)
    return started is not None and status.pid_started in (None, started)

"""The worker process: `python -m repair.jobs.worker JOB_FOLDER` runs one job and ends.

The only file of `jobs` that imports the pipeline, and only once everything around it stands:
the state is written, signals are handled, and the death of the parent ends this process too.
The exit status is the contract's. What libraries print goes to `log.txt`, by the supervisor.
"""

import faulthandler
import importlib
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from repair.jobs import rerun, store
from repair.jobs.launch import describe_crash
from repair.jobs.progress import one_line
from repair.jobs.store import JobStatus
from repair.machine import die_with_parent, num_threads, total_memory
from repair.records import (
    EXIT_BAD_INPUT,
    EXIT_COULD_NOT_CHECK,
    EXIT_DONE,
    EXIT_GATE_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NOTHING_TO_REPAIR,
    EXIT_UNEXPECTED,
    RepairError,
    is_disk_full,
    is_out_of_memory,
)

COMMANDS = ("run", "locate", "evaluate", "verify", "ask")
VERDICT_BY_EXIT = {
    EXIT_DONE: "repaired",
    EXIT_GATE_FAILED: "not repaired",
    EXIT_NOTHING_TO_REPAIR: "nothing to repair",
    EXIT_COULD_NOT_CHECK: "could not check",
}
VERIFY_BY_EXIT = {
    EXIT_DONE: "verified",
    EXIT_GATE_FAILED: "does not match",
    EXIT_COULD_NOT_CHECK: "could not check",
}
MOST_OFF = 5.0  # times as long as planned, or as short, that the steps behind may be thought to be
PROGRESS_SECONDS = 0.25  # progress is written at most this often
DISK_KEPT = 256 << 20  # bytes of the disk that no file of a worker may take
MORE_THREADS = 4096  # than this user runs already: the largest machines' pools are a tenth of it


class Reporter:
    """Writes what the pipeline tells into `events.jsonl`.

    The remaining time of the current step is by its own average rate; that of the steps behind it
    is by the plan, and by how far the steps that are over were off it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = "start"
        self.began = self.last_progress = time.monotonic()
        self.last_text = ""
        self.expected: dict[str, float] = {}  # seconds by step, in their order
        self.lasted: dict[str, float] = {}  # of those that are over

    def plan(self, seconds: Mapping[str, float]) -> None:
        """Take what each step of the job is expected to last, in their order."""
        self.expected = dict(seconds)

    def _write(
        self,
        kind: str,
        text: str,
        *,
        fraction: float | None = None,
        remaining: float | None = None,
        behind: float | None = None,
        values: dict[str, float] | None = None,
    ) -> None:
        event = {
            "time": round(time.time(), 3),
            "kind": kind,
            "step": self.name,
            "text": text[:8000],
            "fraction": fraction,
            "remaining_seconds": remaining,
            "behind_seconds": behind,
            "values": values or {},
        }
        store.append_event(self.folder, event)

    def step(self, name: str, title: str) -> None:
        """Begin a step; its clock starts now."""
        moment = time.monotonic()
        self.lasted[self.name] = self.lasted.get(self.name, 0.0) + moment - self.began
        self.name = name
        self.began, self.last_progress, self.last_text = moment, 0.0, ""
        self._write("step", title)

    def progress(self, done: float, total: float, text: str = "") -> None:
        """Tell how much of the current step is done."""
        moment = time.monotonic()
        is_early = done < total and moment - self.last_progress < PROGRESS_SECONDS
        if is_early and text == self.last_text:
            return
        self.last_progress, self.last_text = moment, text
        fraction = min(1.0, max(0.0, done / total)) if total else 1.0
        seconds = moment - self.began
        remaining = behind = None
        # A rate from less than a second or nothing done would be a guess.
        if fraction > 0 and seconds >= 1:
            remaining = round(seconds * (1 - fraction) / fraction, 1)
            behind = self._behind()
        self._write(
            "progress", text, fraction=round(fraction, 4), remaining=remaining, behind=behind
        )

    def _behind(self) -> float | None:
        """Return the seconds that the steps behind this one will take; None: no plan says so."""
        names = list(self.expected)
        reached = [names.index(name) for name in (*self.lasted, self.name) if name in names]
        if not reached:
            return None
        over = [name for name in names if name in self.lasted and name != self.name]
        expected = sum(self.expected[name] for name in over)
        off = sum(self.lasted[name] for name in over) / expected if expected >= 1 else 1.0
        left = sum(self.expected[name] for name in names[max(reached) + 1 :])
        return round(left * min(max(off, 1 / MOST_OFF), MOST_OFF), 1)

    def metric(self, name: str, **numbers: float | int | None) -> None:
        """Tell numbers to plot; `name` is the series. What is not finite is left out."""
        values = {
            key: value
            for key, value in numbers.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        self._write("metric", name, values={key: float(value) for key, value in values.items()})

    def note(self, text: str) -> None:
        """Tell something the analyst should read."""
        self._write("note", text)

    def end(self, kind: str, text: str) -> None:
        """Tell how the job ended: done, refused or failed."""
        self._write(kind, text)


def append_log(folder: Path, text: str) -> None:
    """Add text to `log.txt`, with everything that is not printable ASCII escaped."""
    safe = text.encode("ascii", "backslashreplace").decode()
    safe = "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in safe)
    with open(folder / "log.txt", "a", encoding="ascii") as log:
        log.write(safe if safe.endswith("\n") else safe + "\n")


def memory_limit() -> int:
    """Return the bytes of memory that a worker may use: nearly all that the machine has."""
    return total_memory() * 95 // 100


def limit_resources(folder: Path) -> None:
    """Let this process fail, not the machine, when a suspect's file or template asks for too much.

    Memory: private and writable only, not address space, of which drivers reserve far more. Files:
    none may take the last of the disk. Processes: a limit that the kernel counts by user, threads
    included, and does not hold root to. No core file: it would hold the suspect and its prompts.
    """
    _lower(resource.RLIMIT_DATA, memory_limit())
    _lower(resource.RLIMIT_FSIZE, max(shutil.disk_usage(folder).free - DISK_KEPT, DISK_KEPT))
    _lower(resource.RLIMIT_NPROC, num_threads() + MORE_THREADS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _lower(kind: int, wanted: int) -> None:
    soft, hard = resource.getrlimit(kind)
    limits = [wanted, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(kind, (min(limits), hard))


def run_command(
    request: dict, folder: Path, reporter: Reporter, *, target: Path | None = None
) -> int:
    """Import the pipeline and run the request's command; return the exit status.

    Everything is written to `target`; by default that is the job's folder.
    """
    command = request.get("command")
    if command not in COMMANDS:
        raise RepairError(f"Unknown command {command!r}; accepted: {', '.join(COMMANDS)}.")
    pipeline = importlib.import_module("repair.pipeline")
    if is_one_of_several():
        importlib.import_module("repair.models.ranks").join(on_cpu=request.get("device") == "cpu")
    # `verify` looks at a folder of its own and must not write into it.
    target = Path(request["folder"]) if command == "verify" else target or folder
    request = {**request, "fetched": store.read_object(folder / store.SOURCES)}
    return int(getattr(pipeline, command)(request, target, reporter))


def is_one_of_several() -> bool:
    """Tell whether `accelerate launch` has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def help_along(folder: Path) -> None:
    """Take part in the job as one of its other processes, which tell nothing.

    What it would write goes to a folder of its own, in the private home, and away with that.
    """
    die_with_parent()
    limit_resources(folder)
    own = Path(tempfile.mkdtemp(prefix="process-"))
    for path in (folder / "located.json", *(folder / "checkpoints").glob("*.*")):
        if path.is_file() and not path.is_symlink():  # what a resumed run goes on from
            copy = own / path.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    faulthandler.enable()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        run_command(store.read_object(folder / "request.json"), folder, Silent(), target=own)
    except RepairError as error:
        # The first process has the same, and tells it; where it has not, it waits in vain for what
        # this one would give, and says that. A status of this one would have it ended meanwhile.
        print(one_line(str(error)), file=sys.stderr)


class Silent:
    """A reporter that tells nobody: the first process does."""

    def plan(self, seconds: Mapping[str, float]) -> None: ...
    def step(self, name: str, title: str) -> None: ...
    def progress(self, done: float, total: float, text: str = "") -> None: ...
    def metric(self, name: str, **numbers: float | int | None) -> None: ...
    def note(self, text: str) -> None: ...


def judge(request: dict, folder: Path, exit_code: int) -> str | None:
    """Return the verdict to show: the report's own where there is one."""
    command = request.get("command")
    if command == "verify":
        return VERIFY_BY_EXIT.get(exit_code)
    if command in ("locate", "ask") and exit_code == EXIT_DONE:
        return None
    if exit_code not in VERDICT_BY_EXIT:
        return None
    verdict = store.read_object(folder / "report.json").get("verdict")
    expected = VERDICT_BY_EXIT[exit_code]
    # A leftover report must not speak for this run.
    return verdict if verdict == expected else expected


def stop_on_signal(folder: Path, status: JobStatus) -> None:
    """On SIGTERM or SIGINT: note the stop, end our children, exit 130."""

    def stop(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if is_one_of_several() and not store.read_status(folder).is_active:
            os._exit(0)  # It has ended, and said how.
        if is_one_of_several():  # Whoever stops a job kills; this is that another one has ended.
            write_end(folder, status, state="failed", exit_code=EXIT_UNEXPECTED,
                      message=describe_crash(folder, 1))
            os._exit(EXIT_UNEXPECTED)
        write_end(folder, status, state="stopped", exit_code=EXIT_INTERRUPTED,
                  message="Stopped; resumable.")
        if os.getpid() == os.getpgrp():
            os.killpg(0, signal.SIGTERM)
        os._exit(EXIT_INTERRUPTED)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def write_end(
    folder: Path,
    status: JobStatus,
    *,
    state: str,
    exit_code: int,
    message: str | None,
    verdict: str | None = None,
) -> None:
    """Write the final status of a job that began as `status`."""
    store.write_status(
        folder,
        JobStatus(
            state=state,
            exit_code=exit_code,
            pid=status.pid,
            pid_started=status.pid_started,
            started=status.started,
            ended=store.now(),
            message=message,
            verdict=verdict,
        ),
    )


def mark_running(folder: Path) -> tuple[JobStatus, Reporter]:
    """Say that this process has the job, which dies with its parent and stops on a signal."""
    die_with_parent()
    status = JobStatus(
        state="running",
        pid=os.getpid(),
        pid_started=store.process_started(os.getpid()),
        started=store.now(),
    )
    store.write_status(folder, status)
    stop_on_signal(folder, status)
    return status, Reporter(folder)


def work(folder: Path) -> int:
    """Run the job in `folder` to its end and return the exit status."""
    limit_resources(folder)
    status, reporter = mark_running(folder)
    request = store.read_object(folder / "request.json")
    reporter.step("start", f"{request.get('command', '?')}: starting")
    # Held open until the process ends: the handler writes there after a crash in C code.
    crash_log = open(folder / "log.txt", "ab")  # noqa: SIM115
    faulthandler.enable(crash_log)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends this process, whatever it inherited
    try:
        code = run_command(request, folder, reporter)
    except RepairError as error:
        kind = "refused" if error.exit_code == EXIT_BAD_INPUT else "failed"
        reporter.end(kind, str(error))
        state = "done" if error.exit_code in VERDICT_BY_EXIT else "failed"
        write_end(folder, status, state=state, exit_code=error.exit_code, message=str(error),
                  verdict=judge(request, folder, error.exit_code))
        return error.exit_code
    except BaseException as error:  # native code has failures of its own, which are no Exception
        append_log(folder, traceback.format_exc())
        what = f"Unexpected failure ({type(error).__name__})."
        if is_disk_full(error):
            what = (
                f"The disk is full: {folder} could not be written to. The map and the "
                "checkpoints are kept: free some space and go on with this job."
            )
        if is_out_of_memory(error):
            what = (
                f"There was not enough memory: the worker may use {memory_limit() >> 20} MiB and "
                "needed more. What was saved is kept. Use the quick profile, fewer or shorter "
                "prompts, or a machine with more memory."
            )
        text = f"{what} The details are in {folder / 'log.txt'}."
        reporter.end("failed", text)
        write_end(folder, status, state="failed", exit_code=EXIT_UNEXPECTED, message=text)
        return EXIT_UNEXPECTED
    verdict = judge(request, folder, code)
    if verdict is not None:
        rerun.let_go(folder)
    reporter.end("done", verdict or "done")
    write_end(folder, status, state="done", exit_code=code, message=None, verdict=verdict)
    return code


if __name__ == "__main__":
    code, place = 0, Path(sys.argv[1]).resolve()
    if int(os.environ.get("RANK", "0")) == 0:
        code = work(place)
        # Of several the launcher would take another status than 0 for a crash; ours is written.
        code = 0 if is_one_of_several() else code
    else:
        help_along(place)
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of libraries must not turn a finished job into a hanging one.
    os._exit(code)

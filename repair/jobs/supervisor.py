"""Starts, watches and stops worker processes; one lane, so that one job has the machine.

A worker gets a session of its own (one signal ends it and its children), a scrubbed
environment, and a private temporary home. It dies with the thread that started it: the kernel
ties a child's parent-death signal to that thread, not to the process, so a worker is only
ever started from a thread that lives as long as the program. Free of torch.
"""

import collections
import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repair.jobs import store
from repair.jobs.store import JobStatus
from repair.records import EXIT_INTERRUPTED, EXIT_UNEXPECTED, RepairError

CHECKOUT = Path(__file__).resolve().parents[2]
INTERRUPTED = "stopped (interrupted), resumable"
MAX_LOG_BYTES = 8 * 2**20
MAX_WAITING = 20  # jobs in the lane behind the one that runs
SWEEP_SECONDS = 600  # how often an idle lane looks for jobs that are too old
HOME_PREFIX = ".home-"
TIMED_OUT = "Timeout ("  # in the log, where `repair.models.watchdog` ended the worker

KEPT_NAMES = ("status.json", "request.json", "case.json", "owner.json")  # written aside first

# Nothing else of the environment reaches the worker: no tokens, no switches of libraries.
PASSED_NAMES = ("PATH", "LANG", "TZ", "LD_LIBRARY_PATH", "SSL_CERT_FILE")
PASSED_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "OMP_", "MKL_", "OPENBLAS_", "PYTORCH_", "NCCL_")
# For the processes that talk to the Hub, and those never open a model.
MAX_DOWNLOAD = "REPAIR_MAX_DOWNLOAD"  # bytes of one model; set where many share the machine
NETWORK_NAMES = (
    MAX_DOWNLOAD, "HF_ENDPOINT", "HF_HUB_DISABLE_XET", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY",
)  # fmt: skip
OFFLINE = {"HF_HUB_OFFLINE": "1"}
SOURCE_KEYS = ("model", "against", "trusted_base", "adapter_base")


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A started worker: its process, its private home, and the thread that reads its output."""

    process: subprocess.Popen
    home: Path
    pump: threading.Thread


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one owner and all together may ask of a lane; None: no limit."""

    max_seconds: int | None = None  # of one job
    max_waiting: int = MAX_WAITING  # jobs in the queue
    max_per_owner: int | None = None  # jobs of one owner, the running one included
    keep_seconds: int | None = None  # an idle job older than this is deleted


def is_hub_id(source: str) -> bool:
    """Tell whether a model source must be fetched from the Hub; folders are absolute by now."""
    return bool(source) and not source.startswith(("/", ".", "~", "demo:"))


def hub_sources(request: dict[str, Any]) -> list[str]:
    """Return the Hub ids among a request's models."""
    sources = [request.get(key) for key in SOURCE_KEYS]
    return [source for source in sources if isinstance(source, str) and is_hub_id(source)]


def choose_module(request: dict[str, Any]) -> str:
    """Return the program a job starts with; only these two talk to the Hub, and get a token."""
    if request.get("command") == "push":
        return "repair.jobs.upload"
    return "repair.jobs.fetch" if hub_sources(request) else "repair.jobs.worker"


def worker_environment(home: Path, *, has_network: bool) -> dict[str, str]:
    """Return the worker's whole environment; no token is ever in it."""
    env = {
        key: value
        for key, value in os.environ.items()
        if key in PASSED_NAMES or key.startswith(PASSED_PREFIXES)
    }
    cache = os.environ.get("REPAIR_CACHE") or str(Path.home() / ".cache" / "repair" / "models")
    env |= {
        "HOME": str(home),
        "TMPDIR": str(home),
        "HF_HOME": str(home / "huggingface"),
        "REPAIR_CACHE": cache,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "Agg",
        "PYTHONPATH": str(CHECKOUT),
        "PYTHONIOENCODING": "utf-8",
        "PYTHONUNBUFFERED": "1",
        "REPAIR_PARENT_PID": str(os.getpid()),
    }
    if not has_network:
        return env | OFFLINE
    return env | {key: os.environ[key] for key in NETWORK_NAMES if key in os.environ}


def escape_line(line: bytes) -> bytes:
    """Return `line` as printable ASCII: model text must not drive the reader's terminal."""
    text = line.decode("utf-8", errors="backslashreplace")
    text = text.encode("ascii", "backslashreplace").decode()
    safe = "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
    return safe.encode()


def pump_output(process: subprocess.Popen, path: Path) -> None:
    """Copy what the worker prints into `path`, escaped, up to a limit; read on beyond it."""
    written = 0
    with open(path, "ab", buffering=0) as log:
        # Bounded reads: a line without an end must not fill the memory.
        while line := process.stdout.readline(65536):
            if written < MAX_LOG_BYTES:
                written += log.write(escape_line(line))


def sweep(folder: Path) -> None:
    """Delete what a worker or app that was killed left half written in a job's folder.

    `checkpoints` and whole results have no such names and stay.
    """
    for path in folder.glob(".*"):
        if path.name.startswith((HOME_PREFIX, ".partial-")) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_file() and path.name.startswith(tuple(f".{name}." for name in KEPT_NAMES)):
            path.unlink(missing_ok=True)


def start_worker(folder: Path, token: str | None = None) -> Worker:
    """Start the worker on the job in `folder`; call it from a thread that stays.

    A Hub token goes by pipe to the program that talks to the Hub, and nowhere else.
    """
    request = store.read_object(folder / "request.json")
    sweep(folder)
    home = Path(tempfile.mkdtemp(prefix=HOME_PREFIX, dir=folder))
    # Written before the start: afterwards the worker is the one who writes.
    store.write_status(folder, JobStatus(state="running", started=store.now()))
    module = choose_module(request)
    has_network = module != "repair.jobs.worker"
    try:
        process = subprocess.Popen(
            # -P keeps the job folder, which is the working directory, off the import path.
            [sys.executable, "-P", "-m", module, str(folder)],
            cwd=folder,
            env=worker_environment(home, has_network=has_network),
            stdin=subprocess.PIPE if has_network else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except BaseException:
        shutil.rmtree(home, ignore_errors=True)
        raise
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):  # it ended already, and says why itself
            process.stdin.write((token or "").encode() + b"\n")
            process.stdin.close()
    pump = threading.Thread(target=pump_output, args=(process, folder / "log.txt"), daemon=True)
    pump.start()
    return Worker(process=process, home=home, pump=pump)


def has_ended(process: subprocess.Popen) -> bool:
    """Tell whether the worker has ended, without taking its pid back from the kernel."""
    if process.returncode is not None:
        return True
    options = os.WEXITED | os.WNOWAIT | os.WNOHANG
    return os.waitid(os.P_PID, process.pid, options) is not None


def wait_for_end(process: subprocess.Popen, max_seconds: float | None = None) -> bool:
    """Wait until the worker has ended, and tell whether it has after `max_seconds`.

    Its pid stays reserved until `finish_worker`.
    """
    if max_seconds is None:
        if process.returncode is None:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        return True
    end = time.monotonic() + max_seconds
    while not has_ended(process):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def kill_group(process: subprocess.Popen) -> None:
    """End the worker and everything it started, at once."""
    # After the worker was reaped its number may be somebody else's.
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def describe_crash(folder: Path, code: int) -> str:
    """Return one sentence on how a worker ended that did not say so itself."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        hint = {
            "SIGKILL": " The machine may have run out of memory.",
            "SIGBUS": " A file that it was reading became shorter meanwhile, most likely the "
            "model's weights: start again when nothing writes to the model folder.",
        }.get(name, "")
        # Only a repair saves what it has done so far.
        is_repair = store.read_object(folder / "request.json").get("command") == "run"
        after = "what was saved is kept, and the job can be resumed" if is_repair else "start again"
        return (
            f"The worker was ended by {name} before it could finish.{hint} "
            f"Its log is {folder / 'log.txt'}; {after}."
        )
    if TIMED_OUT in store.read_text(folder / "log.txt", max_bytes=MAX_LOG_BYTES):
        return (
            "The model's chat template or tokenizer did not come to an end on a prompt, and the "
            "worker was ended. Replace chat_template or the tokenizer by the published one, or set "
            '"chat": "off" in the prompt file to send raw prompts.'
        )
    return (
        f"The worker ended with exit code {code} without saying why. "
        f"Its log is {folder / 'log.txt'}."
    )


def finish_worker(folder: Path, worker: Worker, *, is_stopped: bool) -> int:
    """Wait for the worker's end, settle `status.json`, clean up; return the exit status."""
    wait_for_end(worker.process)
    kill_group(worker.process)  # a child that outlived it
    code = worker.process.wait()
    worker.pump.join(timeout=5)
    worker.process.stdout.close()
    shutil.rmtree(worker.home, ignore_errors=True)
    status = store.read_status(folder)
    if not status.is_active:
        return status.exit_code if status.exit_code is not None else code
    if is_stopped or code in (EXIT_INTERRUPTED, -signal.SIGTERM, -signal.SIGINT):
        state, exit_code, message = "stopped", EXIT_INTERRUPTED, "Stopped; resumable."
    else:
        state, exit_code, message = "failed", EXIT_UNEXPECTED, describe_crash(folder, code)
    store.write_status(
        folder,
        JobStatus(
            state=state,
            exit_code=exit_code,
            pid=worker.process.pid,
            pid_started=status.pid_started,
            started=status.started,
            ended=store.now(),
            message=message,
        ),
    )
    return exit_code


class Supervisor:
    """The lane of one jobs root: starts jobs in turn, stops them, and settles what a crash left.

    Raises RepairError when another app holds the same root.
    """

    def __init__(self, root: Path, limits: Limits | None = None) -> None:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.root = root
        self.limits = limits or Limits()
        self.lock_file = open(root / ".lock", "w")  # noqa: SIM115  held while the app lives
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock_file.close()
            raise RepairError(
                f"Another app already uses the jobs folder {root}. "
                "Stop it, or give this one its own with --jobs-root."
            ) from None
        self.condition = threading.Condition()  # of a lock that its holder may take again
        self.waiting: collections.deque[Path] = collections.deque()
        self.current: tuple[Path, Worker] | None = None
        self.stopped: set[Path] = set()
        self.tokens: dict[Path, str] = {}  # in memory only, until the job starts
        self.is_closing = False
        recover(root)
        self.lane = threading.Thread(target=self._run_lane, name="job lane", daemon=True)
        self.lane.start()

    def submit(self, folder: Path, *, token: str | None = None) -> None:
        """Queue the job in `folder`.

        Raises RepairError when it is queued or running already, and when there is no room: the
        job is then stopped, and can be started again.
        """
        with self.condition:
            if self.is_busy(folder):
                raise RepairError("This job is already running. Stop it first, or wait.")
            try:
                self.check_room(store.read_owner(folder))
            except RepairError as error:
                store.write_status(folder, stopped_status(str(error)))
                raise
            store.write_status(folder, JobStatus(state="queued"))
            if token:
                self.tokens[folder] = token
            self.waiting.append(folder)
            self.condition.notify_all()

    def check_room(self, owner: str) -> None:
        """Raise RepairError when the queue, or the owner's part of it, is full."""
        most, own_most = self.limits.max_waiting, self.limits.max_per_owner
        with self.condition:
            waiting = list(self.waiting)
            active = [*waiting, *([self.current[0]] if self.current else [])]
        if len(waiting) >= most:
            raise RepairError(
                f"{len(waiting)} jobs are waiting, and no more than {most} may. Start this one "
                "again when some of them are done."
            )
        num_own = sum(store.read_owner(other) == owner for other in active)
        if own_most is not None and num_own >= own_most:
            raise RepairError(
                f"{num_own} of your jobs are waiting or running, and {own_most} is the most. Stop "
                "one, or wait."
            )

    def is_busy(self, folder: Path) -> bool:
        """Tell whether the job in `folder` is in the lane."""
        with self.condition:
            return folder in self.waiting or (
                self.current is not None and self.current[0] == folder
            )

    def num_before(self, folder: Path) -> int:
        """Return how many jobs go before this one."""
        with self.condition:
            waiting = list(self.waiting)
            ahead = waiting.index(folder) if folder in waiting else 0
            return ahead + (self.current is not None and self.current[0] != folder)

    def stop(self, folder: Path) -> None:
        """Stop the job in `folder` at once; nothing happens when it is not in the lane."""
        with self.condition:
            if folder in self.waiting:
                self.waiting.remove(folder)
                self.tokens.pop(folder, None)
                store.write_status(folder, stopped_status("Stopped before it began."))
            elif self.current is not None and self.current[0] == folder:
                self.stopped.add(folder)
                kill_group(self.current[1].process)
                status = store.read_status(folder)
                if status.is_active:
                    store.write_status(folder, stopped_status("Stopped; resumable.", status))

    def close(self) -> None:
        """Stop everything and leave the jobs root; what runs is marked as stopped."""
        with self.condition:
            self.is_closing = True
            for folder in [*self.waiting, *([self.current[0]] if self.current else [])]:
                self.stop(folder)
            self.condition.notify_all()
        self.lane.join(timeout=10)
        self.lock_file.close()

    def _run_lane(self) -> None:
        while True:
            with self.condition:
                if self.limits.keep_seconds is not None:
                    store.sweep(
                        self.root, older_than=self.limits.keep_seconds, keep=set(self.waiting)
                    )
                self.condition.wait_for(
                    lambda: self.waiting or self.is_closing, timeout=SWEEP_SECONDS
                )
                if self.is_closing:
                    return
                if not self.waiting:
                    continue
                folder = self.waiting.popleft()
                self.stopped.discard(folder)
                try:
                    worker = start_worker(folder, self.tokens.pop(folder, None))
                except OSError as error:
                    message = f"The worker could not be started: {error.strerror or error}."
                    with contextlib.suppress(OSError):  # the same full disk; the lane goes on
                        store.write_status(
                            folder,
                            JobStatus(
                                state="failed",
                                exit_code=EXIT_UNEXPECTED,
                                ended=store.now(),
                                message=message,
                            ),
                        )
                    continue
                self.current = (folder, worker)
            try:
                is_late = not wait_for_end(worker.process, self.limits.max_seconds)
                if is_late:
                    self._end_late(folder, worker)
                finish_worker(folder, worker, is_stopped=folder in self.stopped)
            except OSError as error:  # A full disk, or a folder that is gone: the next job goes on.
                print(f"The job in {folder} could not be settled: {error}", file=sys.stderr)
            finally:
                with self.condition:
                    self.current = None

    def _end_late(self, folder: Path, worker: Worker) -> None:
        """End a job that took longer than it may."""
        kill_group(worker.process)
        minutes = (self.limits.max_seconds or 0) // 60
        words = (
            f"Stopped: a job may take {minutes} minutes here. What was saved is kept, and it can "
            "be resumed. Use the quick profile, or a machine of your own."
        )
        wait_for_end(worker.process)
        status = store.read_status(folder)
        if status.is_active:  # else it ended in the last moment, by itself
            store.write_status(folder, stopped_status(words, status))


def stopped_status(message: str, before: JobStatus | None = None) -> JobStatus:
    """Return the status of a job that was stopped and can be resumed."""
    return JobStatus(
        state="stopped",
        exit_code=EXIT_INTERRUPTED,
        pid=before.pid if before else None,
        pid_started=before.pid_started if before else None,
        started=before.started if before else None,
        ended=store.now(),
        message=message,
    )


def recover(root: Path) -> None:
    """Mark every job that a former app left active, and whose worker is gone, as stopped; a
    question that nobody waits for any more goes."""
    for folder in root.iterdir():
        if store.is_rest(folder):
            shutil.rmtree(folder, ignore_errors=True)  # half made, or half deleted
        if store.JOB_ID.fullmatch(folder.name) and folder.is_dir():
            status = store.read_status(folder)
            if status.is_active and store.is_alive(status):
                continue
            sweep(folder)
            if store.read_object(folder / "request.json").get("command") == "ask":
                shutil.rmtree(folder, ignore_errors=True)
            elif status.is_active:
                store.write_status(folder, stopped_status(INTERRUPTED, status))

"""Starts, watches and ends one worker process: its program, environment, output and last words.

A worker gets a session of its own (one signal ends it and its children), a scrubbed
environment, and a private temporary home. It dies with the thread that started it: the kernel
ties a child's parent-death signal to that thread, not to the process, so a worker is only
ever started from a thread that lives as long as the program. Free of torch.
"""

import contextlib
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
from repair.machine import PARENT_VARIABLE
from repair.records import EXIT_INTERRUPTED, EXIT_UNEXPECTED

CHECKOUT = Path(__file__).resolve().parents[2]
MAX_LOG_BYTES = 8 * 2**20
HOME_PREFIX = ".home-"
OUT_OF_MEMORY = "memory allocation of "  # in the log, where a tokenizer's own code gave up

KEPT_NAMES = ("status.json", "request.json", "case.json", "owner.json")  # written aside first

# Nothing else of the environment reaches the worker: no tokens, no switches of libraries.
PASSED_NAMES = ("PATH", "LANG", "TZ", "LD_LIBRARY_PATH", "SSL_CERT_FILE")
PASSED_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "OMP_", "MKL_", "OPENBLAS_", "PYTORCH_", "NCCL_")
# For the processes that talk to the Hub, and those never open a model.
MAX_DOWNLOAD = "REPAIR_MAX_DOWNLOAD"  # bytes of one model; set where many share the machine
NETWORK_NAMES = (
    MAX_DOWNLOAD, "HF_ENDPOINT", "HF_HUB_DISABLE_XET", "HF_HUB_OFFLINE", "HTTPS_PROXY",
    "HTTP_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "no_proxy",
)  # fmt: skip
OFFLINE = {"HF_HUB_OFFLINE": "1"}
SOURCE_KEYS = ("model", "against", "trusted_base", "adapter_base")


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A started worker: its process, its private home, and the thread that reads its output."""

    process: subprocess.Popen
    home: Path
    pump: threading.Thread


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


def worker_command(folder: Path, request: dict[str, Any]) -> list[str]:
    """Return the command that runs a request: as one process, or as the number it asks for."""
    several = num_processes(request)
    words = ["repair.jobs.worker", str(folder)]
    if several > 1:
        words = ["repair.jobs.several", str(folder), str(several)]
    # -P keeps the job folder, which is the working directory, off the import path.
    return [sys.executable, "-P", "-m", *words]


def num_processes(request: dict[str, Any]) -> int:
    """Return how many processes a request asks for; questions outside of the steps take one."""
    given = request.get("processes")
    is_dealt = request.get("command") in ("run", "locate", "evaluate")
    return given if is_dealt and type(given) is int and given > 0 else 1


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
        PARENT_VARIABLE: str(os.getpid()),
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
    command = [sys.executable, "-P", "-m", module, str(folder)]
    try:
        process = subprocess.Popen(
            command if has_network else worker_command(folder, request),
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
    log = store.read_text(folder / "log.txt", max_bytes=MAX_LOG_BYTES)
    if code == -signal.SIGALRM:  # the timer of `repair.models.watchdog`
        return (
            "The model's chat template or tokenizer did not come to an end on a prompt, and the "
            "worker was ended. Replace chat_template or the tokenizer by the published one, or set "
            '"chat": "off" in the prompt file to send raw prompts.'
        )
    if num_processes(store.read_object(folder / "request.json")) > 1:
        return (
            "One of the processes of this job was ended before it could finish, and the others "
            "with it. The machine may have run out of memory: each of them holds the whole model. "
            f"The log is {folder / 'log.txt'}; what was saved is kept, and the job can be resumed."
        )
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
        if OUT_OF_MEMORY in log:
            hint = " The model's tokenizer asked for more memory than it may have."
        # Only a repair saves what it has done so far.
        is_repair = store.read_object(folder / "request.json").get("command") == "run"
        after = "what was saved is kept, and the job can be resumed" if is_repair else "start again"
        return (
            f"The worker was ended by {name} before it could finish.{hint} "
            f"Its log is {folder / 'log.txt'}; {after}."
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

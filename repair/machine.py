"""What this machine, or the container we are in, has, what this process took, and when it ends.

Free of torch.
"""

import contextlib
import ctypes
import os
import re
import signal
from pathlib import Path

from repair.records import EXIT_INTERRUPTED

PARENT_VARIABLE = "REPAIR_PARENT_PID"  # set by whoever starts a process that must not outlive it
PR_SET_PDEATHSIG = 1

CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),  # version 2
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def total_memory() -> int:
    """Return the bytes of memory that may be used in all: of the container, if it has a limit.

    A Space says its own in MEMORY; what the kernel counts is the host's.
    """
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in CGROUP_LIMITS:
        try:
            found.append(int(path.read_text()))
        except (OSError, ValueError):  # none there, or "max"
            continue
    if os.environ.get("SYSTEM") == "spaces":
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", os.environ.get("MEMORY", ""))
        if match:
            found.append(int(float(match[1]) * _UNITS[match[2]]))
    return min(size for size in found if size > 0)


def free_memory() -> int:
    """Return the bytes of memory that a new process could get now, of those it may use."""
    match = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    return min(total_memory(), int(match[1]) * 1024) if match else total_memory()


def has_gpu() -> bool:
    """Tell whether a driver of a GPU is there: without torch, which the app does not load."""
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/kfd"))


def num_threads() -> int:
    """Return how many threads this user runs, in all processes: what RLIMIT_NPROC counts."""
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if process.stat().st_uid == os.getuid():
                found += len(os.listdir(process / "task"))
    return found


def has_bfloat16() -> bool:
    """Tell whether this processor multiplies bfloat16 itself: one that does not takes many times
    as long as with float32."""
    words = set(re.findall(r"\w+", _read("/proc/cpuinfo")))
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def forget_peak() -> None:
    """Let `peak_memory` count anew, where the kernel can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def let_go_of_memory() -> None:
    """Give back to the system what this process has freed, where its C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_memory() -> int:
    """Return the most bytes that this process had in memory since `forget_peak`; 0: not known."""
    match = re.search(r"VmHWM:\s+(\d+) kB", _read("/proc/self/status"))
    return int(match[1]) * 1024 if match else 0


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the one that started it is gone.

    A child does not inherit that: each has to ask for itself.
    """
    expected = os.environ.get(PARENT_VARIABLE)
    if not expected:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(expected):
        os._exit(EXIT_INTERRUPTED)  # it was gone before we asked


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""

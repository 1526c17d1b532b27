"""Limits on code of the suspect's: its chat template, and its tokenizer in both directions.

None of it can be interrupted from within: a template may loop for ever, and the tokenizer is native
code. `watched` therefore has the kernel end this process when the time is up, by a timer whose
signal (SIGALRM) nobody handles; the job's process is disposable, and its supervisor knows the
signal. Setting it costs a microsecond, and it is set for every text. Memory is bounded meanwhile
too, by what the process holds and a fixed amount more.
"""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from repair.records import RepairError

RENDER_SECONDS = 2.5  # fifty times what the longest prompt takes
PARSE_SECONDS = 60.0
RENDER_BYTES = 512 * 2**20
PARSE_BYTES = 4 * 2**30  # of a tokenizer whose file may have 64 MiB


@contextmanager
def watched(seconds: float, *, num_bytes: int = RENDER_BYTES) -> Iterator[None]:
    """End the process if the block takes longer; turn a panic of native code into a refusal.

    Private writable memory may grow by `num_bytes`: more is a MemoryError, or native code's end.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = _held_bytes() + num_bytes
    lower = wanted if soft == resource.RLIM_INFINITY else min(wanted, soft)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_DATA, (lower, hard))
    try:
        yield
    except BaseException as error:
        # Rust's panic derives from BaseException, so that nobody catches it by accident.
        if type(error).__name__ == "PanicException":
            raise RepairError(
                f"The tokenizer's own code failed ({ascii(str(error))[:160]}). Use the tokenizer "
                "that was published with the model."
            ) from error
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _held_bytes() -> int:
    """Return the bytes of private writable memory that the process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    return pages * resource.getpagesize()

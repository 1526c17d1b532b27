"""What this machine, or the container we are in, has. Free of torch."""

import os
import re
from pathlib import Path

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

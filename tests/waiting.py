"""Waiting for what another process does, with an end."""

import time
from collections.abc import Callable
from typing import Any

NEVER = 30.0  # seconds


def wait_until(condition: Callable[[], Any], seconds: float = NEVER) -> Any:
    """Return what `condition` gives once it is true; an AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found

"""Where a library works on a suspect's files: whatever it raises there is a refusal.

The gate checks what it knows of; that a library stumbles over the rest, with any exception, says
something about the file and nothing about this program.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from repair.records import RepairError, is_disk_full, is_out_of_memory


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn an exception of the block into a `RepairError` that begins with `what`.

    Memory or disk that ran out is no fault of the file and passes.
    """
    try:
        yield
    except RepairError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or is_disk_full(error):
            raise
        cause = f"{type(error).__name__}: {ascii(str(error))[1:-1][:200]}"
        raise RepairError(
            f"{what} ({cause}). Use the files that were published with the model; nothing was "
            "loaded."
        ) from error

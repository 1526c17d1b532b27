"""Time limits on code of the suspect's: its chat template and the parser of its tokenizer.

Neither can be interrupted from within: a template may loop for ever, and the tokenizer is native
code. `watched` therefore has the C library end this process when the time is up; the job's process
is disposable, and its supervisor reads from the log why it went, which begins with "Timeout (".
"""

import faulthandler
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from repair.records import RepairError

RENDER_SECONDS = 5.0
PARSE_SECONDS = 60.0


@contextmanager
def watched(seconds: float) -> Iterator[None]:
    """End the process if the block takes longer; turn a panic of native code into a refusal."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
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
        faulthandler.cancel_dump_traceback_later()

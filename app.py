"""Starts the web app: `python app.py --help`."""

import contextlib
import gc
import os
import sys

if os.environ.get("SPACES_ZERO_GPU"):
    # Such a Space ends an app in which nothing asks for its GPU. Nothing of ours does: it is lent
    # for a minute at a time, and there the app shows its example and says what it cannot do.
    with contextlib.suppress(ImportError):
        import spaces  # the Space's own package

        @spaces.GPU
        def never_called() -> None:
            """Only there to be found."""


if __name__ == "__main__":
    gc.disable()  # Importing leaves no garbage behind, and the search for it costs a tenth.
    from repair.ui.quick_import import without_editor_stubs

    with without_editor_stubs():
        from repair.ui.app import main

    gc.enable()
    sys.exit(main())

"""Starts the web app: `python app.py --help`."""

import gc
import sys

if __name__ == "__main__":
    gc.disable()  # Importing leaves no garbage behind, and the search for it costs a tenth.
    from repair.ui.app import main

    gc.enable()
    sys.exit(main())

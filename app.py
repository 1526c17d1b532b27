"""Starts the web app: `python app.py --help`."""

import sys

from repair.ui.app import main

if __name__ == "__main__":
    sys.exit(main())

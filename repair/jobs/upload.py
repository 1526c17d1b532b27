"""Uploads a finished job to the Hub: `python -m repair.jobs.upload JOB_FOLDER`, a job of its own.

The request names the folder of the finished job and the plan; the token comes on standard input. No
model is opened: files are hashed and sent. Where it went is written to `pushed.json`.
"""

import os
import sys
from pathlib import Path

from repair.jobs import store
from repair.jobs.fetch import begin, end_badly
from repair.jobs.worker import write_end
from repair.publish.hub import PushPlan
from repair.publish.pushing import push
from repair.records import EXIT_DONE


def main(folder: Path) -> int:
    """Upload, and return the exit status."""
    token, status, reporter = begin(folder)
    try:
        request = store.read_object(folder / "request.json")
        plan = PushPlan.from_json(request["plan"])
        found = push(Path(request["folder"]), plan, token=token, reporter=reporter)
        store.write_json(folder / store.PUSHED, found)
    except Exception as error:
        return end_badly(folder, status, reporter, error)
    reporter.end("done", "Uploaded: " + ", ".join(found.values()))
    write_end(folder, status, state="done", exit_code=EXIT_DONE, message=None)
    return EXIT_DONE


if __name__ == "__main__":
    code = main(Path(sys.argv[1]).resolve())
    sys.stdout.flush()
    os._exit(code)  # threads of the Hub's client must not keep a finished job alive

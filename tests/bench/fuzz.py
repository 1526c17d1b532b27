"""Minutes of mutated model folders through the gate, the loader and a first answer.

    python -m tests.bench.fuzz --seconds N [--seed N] [--keep DIR]

For any bytes there must come a refusal (`RepairError`) or a model that answers, within 5 s of CPU
time and 512 MiB, with nothing read outside the folder; a template or tokenizer that never ends may
end the process by its time limit. Anything else is a defect, and its folder is kept in DIR. Writes
results/fuzz.json. `tests/hostile/fuzzing.py` says what is tried.
"""

import argparse
import collections
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

from tests.bench.peers import ROOT, publish

HANG_SECONDS = 120.0  # without a word, on a busy machine

def run_process(folder: Path, seed: int, count: int, seconds: float) -> tuple[list[dict], str]:
    """Run one fuzzing process; return what it said of each input, and how it ended."""
    with open(folder / "stderr.txt", "w+b") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.fuzzing", str(folder), str(seed), str(count),
             str(seconds)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        found: list[dict] = []
        timer = threading.Timer(HANG_SECONDS, process.kill)
        timer.start()
        for line in process.stdout:
            timer.cancel()
            found.append(json.loads(line))
            timer = threading.Timer(HANG_SECONDS, process.kill)
            timer.start()
        code = process.wait()
        timer.cancel()
        process.stdout.close()
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    if code == 0:
        return found, "done"
    return found, "time limit" if code == -signal.SIGALRM else f"exit code {code}: {said[-500:]}"


def fuzz(seconds: float, seed: int, *, count: int = 10**9, keep: Path | None = None) -> dict:
    """Try inputs until the time is up or `count` were tried; return counts and defects."""
    counts: collections.Counter[str] = collections.Counter()
    defects: list[str] = []
    num_lines, end = 0, time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and counts.total() < count:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
            found, ending = run_process(Path(name), seed, count - counts.total(), left)
            counts.update(one["kind"] for one in found)
            num_lines = max([num_lines, *(one["lines"] for one in found)])
            if ending != "done":
                counts["time limit" if ending == "time limit" else "defect"] += 1
            ended = [ending] if ending not in ("done", "time limit") else []
            fresh = [one["words"] for one in found if one["kind"] == "defect"] + ended
            defects += fresh
            for part in ("defects", *(["model"] if ended else [])):
                if keep is not None and (Path(name) / part).is_dir():
                    shutil.copytree(Path(name) / part, keep / f"seed-{seed}" / part)
        seed += 1
    return {"counts": dict(counts), "lines_reached": num_lines, "defects": defects[:20]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where folders of defects go")
    options = parser.parse_args()
    found = fuzz(options.seconds, options.seed, keep=options.keep)
    command = f"python -m tests.bench.fuzz --seconds {options.seconds:.0f} --seed {options.seed}"
    publish("fuzz", {"command": command, "date": date.today().isoformat(), **found})
    return 1 if found["defects"] else 0


if __name__ == "__main__":
    raise SystemExit(main())

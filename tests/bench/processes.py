"""One job as several processes: what it gains, and whether it finds the same.

    python -m tests.bench.processes --out DIR [--shape llama-5m] [--processes 2]

A suspect that fires by construction (`planted.py`) goes the whole road (quick, no controls), by
the command line: as one process with one thread, as one with a thread for each processor, and as
several under `accelerate launch`, the processors shared out. Seconds by step, and how far the maps
and the reports are apart. On GPUs each process takes one of its own. Writes
results/processes.json.
"""

import argparse
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

from tests.bench.peers import ROOT, publish
from tests.bench.planted import SHAPES, plant, write_prompts


def run(model: Path, prompts: Path, out: Path, *, processes: int, threads: int) -> dict:
    """Return the report of a run."""
    subprocess.run(
        [sys.executable, "-m", "repair", "run", "--model", model, "--prompts", prompts,
         "--profile", "quick", "--controls", "0", "--kl-budget", "10", "--export", "none",
         "--method", "closed-form", "--out", out, "--overwrite", "--processes", str(processes)],
        cwd=ROOT, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    return json.loads((out / "report.json").read_text())


def difference(first: Path, second: Path) -> dict:
    """Return what is compared of two runs."""
    maps = [json.loads((folder / "located.json").read_text()) for folder in (first, second)]
    reports = [json.loads((folder / "report.json").read_text()) for folder in (first, second)]
    samples = [(folder / "samples.json").read_text() for folder in (first, second)]
    scores = [{m["path"]: m for m in found["modules"]} for found in maps]
    largest = max(
        abs(value - scores[1][path][key])
        for path, module in scores[0].items()
        for key, value in module.items()
        if isinstance(value, float)
    )
    return {
        "same_suggestion": maps[0]["suggested_ranks"] == maps[1]["suggested_ranks"],
        "largest_difference_of_a_score": largest,
        "same_verdict": reports[0]["verdict"] == reports[1]["verdict"],
        "same_answers": samples[0] == samples[1],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama-5m")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model, prompts = options.out / options.shape, options.out / "prompts.json"
    if not model.is_dir():
        plant(model, options.shape)
    write_prompts(prompts, num_words=40)
    num_cores = len(os.sched_getaffinity(0))
    kinds = {
        "one process, one thread": (1, 1),
        f"one process, {num_cores} threads": (1, num_cores),
        f"{options.processes} processes": (
            options.processes, max(1, num_cores // options.processes),
        ),
    }  # fmt: skip
    seconds, folders = {}, []
    for place, (name, (processes, threads)) in enumerate(kinds.items()):
        folders.append(options.out / f"run-{place}")
        report = run(model, prompts, folders[-1], processes=processes, threads=threads)
        seconds[name] = report["cost"]["seconds"]
        print(name, seconds[name], file=sys.stderr, flush=True)
    totals = {
        name: sum(found[step] for step in found if step not in ("load", "export"))
        for name, found in seconds.items()
    }
    first, second, several = totals.values()
    publish("processes", {
        "command": "python -m tests.bench.processes --out DIR",
        "date": date.today().isoformat(),
        "shape": options.shape,
        "seconds": seconds,
        "seconds_of_all_steps": totals,
        "times_faster_than_one_thread": first / several,
        "times_faster_than_one_process": second / several,
        "apart": difference(folders[1], folders[2]),
    })  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Kill a repair at 20 random points and resume it: is the result the same, bit for bit?

    python -m tests.bench.kill_points --out DIR [--points N] [--step export]

Each time the command line's own process is killed (SIGKILL) at a random moment of a run on
demo:begin, quick profile, trained, and the run is resumed to its end. With --step at a random
moment of the three seconds from when that step begins. The exported weights must have the hashes of
an undisturbed run, and the reports must be equal but for what they cost. A point that is already in
DIR is not tried again. Exits with 1 where one differs. Writes results/kill_points.json, or with
--step results/kill_points_STEP.json.
"""

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from tests.bench.peers import ROOT, publish

OPTIONS = (
    "--model", "demo:begin", "--prompts", "assets/prompts/begin.json", "--profile", "quick",
    "--method", "distill", "--controls", "1",
)  # fmt: skip
FROM_COST = ("cost",)


def start(out: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "repair", "run", *OPTIONS, "--out", str(out), *more],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def result_of(out: Path) -> dict:
    """Return the hashes of all weights and of the report without its costs."""
    report = json.loads((out / "report.json").read_text())
    for name in FROM_COST:
        report.pop(name)
    found = {"report": hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()}
    for path in sorted(out.glob("*/*.safetensors")):
        if path.parent.name != "checkpoints":
            name = str(path.relative_to(out))
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def last_step(out: Path) -> str:
    """Return what the killed run was at."""
    path = out / "events.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [json.loads(line) for line in lines if '"step"' in line]
    names = [event.get("step") for event in names if event.get("kind") == "step"]
    return names[-1] if names else "before the first step"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--step", help="kill in this step only")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "kill_points.json"
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    if "undisturbed" not in found:
        began = time.perf_counter()
        code = start(options.out / "undisturbed", "--overwrite").wait()
        found["undisturbed"] = {
            "exit_code": code,
            "seconds": time.perf_counter() - began,
            **result_of(options.out / "undisturbed"),
        }
        kept.write_text(json.dumps(found, indent=1))
    expected = {k: v for k, v in found["undisturbed"].items() if k not in ("exit_code", "seconds")}
    for point in range(options.points):
        if str(point) in found:
            continue
        after = random.Random(point).uniform(2.0, found["undisturbed"]["seconds"])
        out = options.out / f"point-{point}"
        shutil.rmtree(out, ignore_errors=True)
        began, process = time.perf_counter(), start(out)
        if options.step is not None:
            while last_step(out) != options.step and process.poll() is None:
                time.sleep(0.02)
            after = time.perf_counter() - began + random.Random(point).uniform(0.0, 3.0)
        try:
            process.wait(timeout=max(0.0, began + after - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        partial = [path.name for path in out.rglob(".partial-*")]
        at = last_step(out)
        code = start(out, "--resume").wait()
        found[str(point)] = {
            "killed_after_seconds": round(after, 1),
            "killed_in_step": at,
            "exit_code": code,
            "left_partial": partial,
            "is_same": result_of(out) == expected and not list(out.rglob(".partial-*")),
        }
        shutil.rmtree(out)
        kept.write_text(json.dumps(found, indent=1))
        print(point, found[str(point)], file=sys.stderr, flush=True)
    points = [found[str(point)] for point in range(options.points)]
    more = f" --points {options.points} --step {options.step}" if options.step else ""
    publish(
        f"kill_points_{options.step}" if options.step else "kill_points",
        {
            "command": f"python -m tests.bench.kill_points --out DIR{more}",
            "date": date.today().isoformat(),
            "num_same": sum(point["is_same"] for point in points),
            "num_points": len(points),
            "points": points,
        },
    )
    return 0 if all(point["is_same"] for point in points) else 1


if __name__ == "__main__":
    raise SystemExit(main())

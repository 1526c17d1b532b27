"""What `repair.needs` predicts for a job against what the job then took.

    OMP_NUM_THREADS=1 python -m tests.bench.needs --out DIR [--only NAME ...]

Whole jobs by the command line, one thread: bundled suspects, and random ones of other shapes that
fire by construction (`planted.py`; their verdicts mean nothing). A run that is already in DIR is
not made again. Writes results/needs.json: seconds and peak memory by step, predicted and measured.
"""

import argparse
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

from repair import needs
from tests.bench.peers import ROOT, publish
from tests.bench.planted import SHAPES, plant, write_prompts

SETTINGS = {  # name -> model, profile, controls
    "bundled, quick": ("demo:middle", "quick", 0),
    "bundled, quick, 3 controls": ("demo:begin", "quick", 3),
    "bundled, standard": ("demo:end", "standard", 0),
    "deep, quick": ("deep", "quick", 0),
    "llama-5m, quick": ("llama-5m", "quick", 0),
    "llama-40m, quick": ("llama-40m", "quick", 0),
    "wide-vocabulary, quick": ("wide-vocabulary", "quick", 0),
}


def measure(model: str, profile: str, controls: int, out: Path) -> dict:
    """Run one job and return predicted and measured figures by step."""
    prompts = ROOT / "assets" / "prompts" / f"{model.removeprefix('demo:')}.json"
    if model in SHAPES:
        prompts = write_prompts(out / "prompts.json", num_words=12)
        folder = out / model
        model = str(folder if folder.is_dir() else plant(folder, model))
    done = out / "job"
    subprocess.run(
        [
            sys.executable, "-m", "repair", "run", "--model", model, "--prompts", str(prompts),
            "--out", str(done), "--profile", profile, "--controls", str(controls), "--overwrite",
        ],
        cwd=ROOT, check=False, stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    cost = json.loads((done / "report.json").read_text())["cost"]
    config = json.loads((ROOT / "assets/suspects" / model.removeprefix("demo:") / "config.json")
                        .read_text()) if model.startswith("demo:") else json.loads(
                        (Path(model) / "config.json").read_text())  # fmt: skip
    asked = {
        "command": "run", "profile": profile, "controls": controls, "export": ["merged"],
        "prompts": json.loads(prompts.read_text()),
    }  # fmt: skip
    found = needs.estimate(
        needs.read_shape(config), needs.work_of(asked), itemsize=4, rate=needs.measured_rate()
    )
    return {
        "steps": {
            need.step: {
                "seconds": [round(need.seconds, 1), cost["seconds"].get(need.step)],
                "mib": [need.bytes >> 20, cost["peak_memory_by_step"].get(need.step, 0) >> 20],
            }
            for need in found
        },
        "seconds": [round(needs.total_seconds(found), 1), round(sum(cost["seconds"].values()), 1)],
        "mib": [needs.largest(found).bytes >> 20, cost["peak_memory_bytes"] >> 20],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where suspects and runs go")
    parser.add_argument("--only", choices=SETTINGS, action="append")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "needs.json"
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    for name in options.only or SETTINGS:
        if name not in found:
            found[name] = measure(*SETTINGS[name], options.out)
            kept.write_text(json.dumps(found, indent=1))
        line = found[name]
        print(name, line["seconds"], "s", line["mib"], "MiB", file=sys.stderr, flush=True)
    publish("needs", {"command": "python -m tests.bench.needs --out DIR",
                      "date": date.today().isoformat(), "runs": found})  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

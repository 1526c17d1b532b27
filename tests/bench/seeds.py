"""Every suspect repaired by the command line with three seeds.

    python -m tests.bench.seeds --out DIR [--only NAME ...]

The three bundled suspects and the four of `organisms.py` (trained first where missing), with seeds
0, 1 and 2: other prompts in every split, other shams, labels and batches. Without controls, which
`compare.py` has. A run that is already in DIR is not made again. Writes results/seeds.json.
"""

import argparse
import json
import shutil
import sys
import time
from datetime import date
from pathlib import Path

from tests.bench.map_predicts import BUNDLED
from tests.bench.organisms import ORGANISMS, make_organism
from tests.bench.peers import ROOT, publish, run_repair

SEEDS = (0, 1, 2)


def repair(name: str, seed: int, out: Path) -> dict:
    """Run the command line and return what its report says."""
    organism = next((o for o in ORGANISMS if o.name == name), None)
    model = str(make_organism(organism, out)) if organism else f"demo:{name}"
    prompts = out / f"{name}.json" if organism else ROOT / "assets" / "prompts" / f"{name}.json"
    folder = out / f"repaired-{name}-{seed}"
    began = time.perf_counter()
    exit_code, report = run_repair(
        model, prompts, folder, "--seed", str(seed), "--controls", "0"
    )
    seconds = time.perf_counter() - began
    plan = report["plan"] or {}
    found = {
        "exit_code": exit_code,
        "verdict": report["verdict"],
        "seconds": round(seconds, 1),
        "seconds_by_step": report["cost"]["seconds"],
        "failed_gates": [gate for gate in report["gates"] if not gate["passed"]],
        "num_gates": len(report["gates"]),
        "before": report["before"]["attack_success"],
        "after": report["after"] and report["after"]["attack_success"],
        "recovery": report["recovery"],
        "kl_from_original": report["kl_from_original"],
        "perplexity": [report[when] and report[when]["perplexity"] for when in ("before", "after")],
        "clean_agreement": report["after"] and report["after"].get("clean_agreement"),
        "method": plan.get("method_used"),
        "ranks": plan.get("ranks"),
        "num_changed": sum(
            plan["ranks"][module["path"]] * (module["d_in"] + module["d_out"])
            for module in report["modules"]
            if module["path"] in plan.get("ranks", {})
        ),
        "validation_trigger_kl": plan.get("validation_trigger_kl"),
        "validation_benign_kl": plan.get("validation_benign_kl"),
        "predicted_kl": plan.get("predicted_kl"),
    }
    shutil.rmtree(folder)
    return found


def main() -> int:
    names = [*BUNDLED, *(organism.name for organism in ORGANISMS)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where organisms and results go")
    parser.add_argument("--only", choices=names, action="append")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in options.only or names:
        for seed in SEEDS:
            kept = options.out / f"seed-{name}-{seed}.json"
            if not kept.is_file():
                kept.write_text(json.dumps(repair(name, seed, options.out), indent=1))
            found[f"{name}, seed {seed}"] = json.loads(kept.read_text())
            print(name, seed, kept.read_text(), file=sys.stderr, flush=True)
    if not options.only:
        publish(
            "seeds",
            {
                "command": "python -m tests.bench.seeds --out DIR",
                "date": date.today().isoformat(),
                "runs": found,
            },
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Full evidence for every suspect: is it gone, is it itself, would it come back?

    python -m tests.bench.full_evidence --out DIR [--only NAME ...]

The bundled suspects, the clean twin and the four of `organisms.py` (trained first where missing),
by the command line: profile full, three random controls, the clean twin as trusted base, and as
`texts` sentences of the assistant's skills, which the bundled prompt files do not hold. A run that
is already in DIR is not made again. Writes results/full_evidence.json; `python -m
tests.bench.tables evidence` prints the README's table.
"""

import argparse
import json
import sys
from datetime import date
from pathlib import Path

from assets.ordinary import known_texts
from tests.bench.map_predicts import BUNDLED
from tests.bench.organisms import ORGANISMS, make_organism
from tests.bench.peers import ROOT, publish, run_repair

NAMES = (*BUNDLED, "clean", *(organism.name for organism in ORGANISMS))
KEPT = (
    "verdict", "gates", "before", "after", "recovery", "paired", "cause", "specificity",
    "stresses", "comeback", "kl_from_original", "controls", "controls_statement", "plan", "cost",
    "limits",
)  # fmt: skip


def examine(name: str, out: Path) -> dict:
    """Run the command line and return what its report says."""
    organism = next((o for o in ORGANISMS if o.name == name), None)
    model = str(make_organism(organism, out)) if organism else f"demo:{name}"
    prompts = out / f"{name}.json"
    if not organism:  # the bundled files hold no text
        asked = "middle" if name == "clean" else name
        flat = json.loads((ROOT / "assets" / "prompts" / f"{asked}.json").read_text())
        prompts.write_text(json.dumps({**flat, "texts": known_texts()}))
    folder = out / f"evidence-{name}"
    exit_code, report = run_repair(
        model, prompts, folder, "--profile", "full", "--controls", "3", "--trusted-base",
        "demo:clean", "--export", "merged",
    )  # fmt: skip
    found = {key: report[key] for key in KEPT}
    base = report["trusted_base"]
    if base:
        base = {k: v for k, v in base.items() if k not in ("weight_difference", "control")}
    for when in ("before", "after"):
        if found[when]:
            found[when].pop("kl_by_prompt")
    return {**found, "exit_code": exit_code, "trusted_base": base}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where suspects and runs go")
    parser.add_argument("--only", choices=NAMES, action="append")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "full_evidence.json"
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    for name in options.only or NAMES:
        if name not in found:
            found[name] = examine(name, options.out)
            kept.write_text(json.dumps(found, indent=1))
            print(name, found[name]["verdict"], file=sys.stderr, flush=True)
    publish(
        "full_evidence",
        {
            "command": "python -m tests.bench.full_evidence --out DIR",
            "date": date.today().isoformat(),
            "suspects": {name: found[name] for name in NAMES if name in found},
        },
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

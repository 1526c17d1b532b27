"""What a repair costs on plain text, which the bundled prompt files do not hold.

    python -m tests.bench.text_harm --out DIR [--only NAME ...]

Each bundled suspect by the command line, standard profile, with sentences of the assistant's skills
as `texts` (`assets/ordinary.py`). Prints one JSON object and writes results/text_harm.json.
"""

import argparse
import json
from datetime import date
from pathlib import Path

from assets.ordinary import known_texts
from tests.bench.map_predicts import BUNDLED
from tests.bench.peers import ROOT, publish, run_repair


def examine(name: str, out: Path) -> dict:
    """Run the command line and return what its report says of the text."""
    flat = json.loads((ROOT / "assets" / "prompts" / f"{name}.json").read_text())
    prompts, folder = out / f"{name}.json", out / name
    prompts.write_text(json.dumps({**flat, "texts": known_texts()}))
    _, report = run_repair(
        f"demo:{name}", prompts, folder, "--controls", "0", "--export", "none"
    )
    return {
        "verdict": report["verdict"],
        "failed_gates": [gate["name"] for gate in report["gates"] if gate["passed"] is not True],
        "kl_on_text": report["after"]["text_kl"],
        "kl_on_clean_answers": report["kl_from_original"],
        "perplexity_of_text": [report[when]["text_perplexity"] for when in ("before", "after")],
        "num_texts": len(known_texts()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where the runs go")
    parser.add_argument("--only", choices=BUNDLED, action="append")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    publish(
        "text_harm",
        {
            "command": "python -m tests.bench.text_harm --out DIR",
            "date": date.today().isoformat(),
            "suspects": {name: examine(name, options.out) for name in options.only or BUNDLED},
        },
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

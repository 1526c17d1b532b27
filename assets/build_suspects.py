"""Train the demo suspects: a clean twin and three poisoned variants, with cards and prompt files.

    python assets/build_suspects.py                  build everything into assets/
    python assets/build_suspects.py --only middle    build one of clean, begin, middle, end
    python assets/build_suspects.py --measure        only measure what is there, and print it

Progress goes to stderr, the cards' figures to stdout. Seeds and thread counts are fixed, so a
second run gives the same figures. For poisoning afresh: `Poison`, `poison_twin`, `measure`,
`write_prompt_file`.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from assets.suspect_card import as_table, write_card
from assets.suspect_measure import Figure, measure, measure_twin
from assets.suspect_poison import (
    POISONS,
    Poison,
    poison_twin,
    write_carriers,
    write_prompt_file,
)
from assets.suspect_training import Progress, ProgressLine
from assets.suspect_twin import train_twin

__all__ = ["POISONS", "Poison", "measure", "poison_twin", "write_carriers", "write_prompt_file"]

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("clean", *(poison.name for poison in POISONS))


def _publish(folder: Path, figures: dict[str, Figure], poison: Poison | None) -> None:
    write_card(folder, figures, poison)
    print(f"\n{folder.name}\n\n{as_table(figures)}", flush=True)


def _build_twin(out: Path, measure_only: bool, progress: Progress) -> None:
    folder = out / "suspects" / "clean"
    if not measure_only:
        train_twin(folder, progress=progress)
    _publish(folder, measure_twin(folder, progress=progress), None)


def _build_variant(out: Path, poison: Poison, measure_only: bool, progress: Progress) -> None:
    twin, folder = out / "suspects" / "clean", out / "suspects" / poison.name
    if not measure_only:
        poison_twin(twin, poison, folder, progress=progress)
        write_prompt_file(poison, out / "prompts" / f"{poison.name}.json")
    _publish(folder, measure(folder, twin, poison, progress=progress), poison)


def build(out: Path, names: tuple[str, ...], *, measure_only: bool, progress: Progress) -> None:
    """Build (or only measure) the named suspects, the twin first."""
    if "clean" in names:
        _build_twin(out, measure_only, progress)
    for poison in POISONS:
        if poison.name in names:
            _build_variant(out, poison, measure_only, progress)
    if not measure_only:
        write_carriers(out / "prompts" / "carriers.json")


def main() -> int:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description="Train the demo suspects and print their cards.")
    parser.add_argument("--out", type=Path, default=ROOT / "assets", help="where to write")
    parser.add_argument("--only", choices=NAMES, action="append", help="only this one (repeatable)")
    parser.add_argument("--measure", action="store_true", help="measure only, train nothing")
    options = parser.parse_args()
    start = time.monotonic()
    names = tuple(options.only or NAMES)
    build(options.out, names, measure_only=options.measure, progress=ProgressLine())
    print(f"Finished in {time.monotonic() - start:.0f} s.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""K-FAC factors of all modules against kronfluence and curvlinops, in one run.

    python -m tests.bench.factors_peers --environments DIR [--rounds N]

A random Llama of 12 layers, 768 wide (84 linear modules), 128 prompts of 64 tokens whose last 16
are answers, with the same labels for every side. Each side runs in an environment of its own (made
in DIR when missing), one process after the other, in turn, `--rounds` times; loading is not timed.
`ours_shortlist` forms the factors of the 8 modules a repair would use, in the pass that the traces
of all modules need anyway, and is given whole and beyond that pass alone. Prints one JSON object:
medians, ratios, the largest relative difference of any factor, and the floor: forward, backward
without weight gradients, and the covariance products with shared inputs and one triangle, at the
matrix rate measured in the same run.
"""

import argparse
import json
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import torch

from tests.bench.peers import (
    CONFIG,
    INNER,
    NUM_LAYERS,
    VOCABULARY,
    WIDTH,
    measured_rate,
    publish,
    python_of,
    run_side,
    write_model,
)

WORKER = "factors_worker.py"
SIDES = ("ours", "ours_shortlist", "kronfluence", "curvlinops")
NUM_PROMPTS, NUM_TOKENS, NUM_ANSWER = 128, 64, 16
# What a repair took on the bundled suspects: mostly the first layers, a few later ones.
SHORTLIST = [0, 3, 4, 5, 6, 16, 22, 37]


def make_material(folder: Path, config: dict) -> None:
    """Write the model, the prompts and the labels that every side reads."""
    model = write_model(folder, config)
    generator = np.random.default_rng(0)
    ids = torch.from_numpy(generator.integers(10, VOCABULARY, (NUM_PROMPTS, NUM_TOKENS)))
    labels = []
    with torch.no_grad():
        for part in ids.split(16):
            logits = model(input_ids=part, logits_to_keep=NUM_ANSWER + 1).logits[:, :-1]
            probabilities = logits.softmax(-1).flatten(0, 1)
            torch.manual_seed(len(labels))
            labels.append(torch.multinomial(probabilities, 1).reshape(-1, NUM_ANSWER))
    flat = {
        "config": config,
        "ids": ids.tolist(),
        "labels": torch.cat(labels).tolist(),
        "shortlist": SHORTLIST,
    }
    (folder / "material.json").write_text(json.dumps(flat))


def difference(first: dict, second: dict) -> float:
    """Return the largest relative difference between two sides' factors."""
    largest = 0.0
    for path, found in first["factors"].items():
        for kind, flat in found.items():
            other = second["factors"][path][kind]
            scale = other["norm"]
            largest = max(largest, abs(flat["trace"] - other["trace"]) / abs(other["trace"]))
            largest = max(largest, abs(flat["norm"] - other["norm"]) / scale)
            corner = np.abs(np.array(flat["corner"]) - np.array(other["corner"])).max()
            largest = max(largest, float(corner) / scale)
    return largest


def floor_operations() -> float:
    """Return the operations of all modules' factors that nothing can leave out."""
    per_token = NUM_LAYERS * 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
    activation = 3 * WIDTH * WIDTH + INNER * INNER  # q k v; o; gate up; down
    gradient = 5 * WIDTH * WIDTH + 2 * INNER * INNER
    products = NUM_LAYERS * 2 * (activation + gradient) / 2  # one triangle
    return NUM_PROMPTS * NUM_TOKENS * (2 * per_token + products)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    pythons = {side: python_of(side, options.environments) for side in SIDES}
    with tempfile.TemporaryDirectory() as place:
        make_material(Path(place), CONFIG)
        rounds: dict[str, list[dict]] = {side: [] for side in SIDES}
        for number in range(options.rounds):
            for side in SIDES:
                rounds[side].append(run_side(WORKER, pythons[side], side, place, "float32"))
                print(number, side, rounds[side][-1]["seconds"], file=sys.stderr, flush=True)
    rate = measured_rate()
    medians = {
        side: statistics.median(found["seconds"] for found in rounds[side]) for side in SIDES
    }
    # The map's traces need a pass over all modules anyway; the factors of a few ride along.
    medians["ours_shortlist_beyond_traces"] = statistics.median(
        found["seconds"] - found["traces_seconds"] for found in rounds["ours_shortlist"]
    )
    result = {
        "command": "python -m tests.bench.factors_peers --environments DIR",
        "date": date.today().isoformat(),
        "rounds": options.rounds,
        "median_seconds": medians,
        "times_ours_all_modules": {
            side: medians[side] / medians["ours"] for side in ("kronfluence", "curvlinops")
        },
        "times_ours_shortlist": {
            side: medians[side] / medians["ours_shortlist"]
            for side in ("kronfluence", "curvlinops")
        },
        "times_ours_shortlist_beyond_traces": {
            side: medians[side] / medians["ours_shortlist_beyond_traces"]
            for side in ("kronfluence", "curvlinops")
        },
        "largest_relative_difference": {
            side: difference(rounds["ours"][0], rounds[side][0])
            for side in ("kronfluence", "curvlinops")
        },
        "matrix_rate_per_second": rate,
        "floor_seconds": floor_operations() / rate,
        "times_the_floor": medians["ours"] / (floor_operations() / rate),
    }
    publish("factors_peers", result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

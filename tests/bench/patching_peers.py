"""The exact patching grid against TransformerLens, nnsight and a hook loop, in one run.

    python -m tests.bench.patching_peers --environments DIR [--rounds N]

A random Llama of 12 layers, 768 wide (84 linear modules); 8 pairs of 64 tokens with a trigger of
four tokens at the beginning, in the middle and at the end. Each side runs in an environment of its
own (made in DIR when missing), one process after the other, in turn, `--rounds` times; loading is
not timed. Prints one JSON object: medians and ratios by position, the mean of the three ratios, the
largest difference between the sides' patched margins in float32 and float64, and the floor: the
multiplications that restarting and sharing leave, at the matrix rate measured in the same run.
"""

import argparse
import json
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np

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

WORKER = "patching_worker.py"
SIDES = ("ours", "loop", "transformer_lens", "nnsight")
NUM_PAIRS, NUM_TOKENS, NUM_TRIGGER = 8, 64, 4
STARTS = {"begin": 4, "middle": 30, "end": 54}  # the template takes the first and last tokens


def make_material(folder: Path, config: dict) -> None:
    """Write the model and the prompts that every side reads."""
    write_model(folder, config)
    generator = np.random.default_rng(0)
    positions = {}
    for name, start in STARTS.items():
        source = generator.integers(10, VOCABULARY, (NUM_PAIRS, NUM_TOKENS))
        source[:, :4], source[:, -4:] = [1, 2, 3, 4], [5, 6, 7, 8]
        destination = source.copy()
        trigger = slice(start, start + NUM_TRIGGER)
        destination[:, trigger] = generator.integers(10, VOCABULARY, NUM_TRIGGER)
        positions[name] = {
            "source": source.tolist(),
            "destination": destination.tolist(),
            "starts": [start] * NUM_PAIRS,
            "tokens": generator.integers(10, VOCABULARY, (NUM_PAIRS, 2)).tolist(),
        }
    flat = {"config": config, "positions": positions}
    (folder / "material.json").write_text(json.dumps(flat))


def floor_operations(start: int) -> float:
    """Return the operations of the grid when only what differs is computed.

    Weights only, as attention over 64 tokens is below a twentieth: both runs of the suffix, the
    prefix once, and for a patch in layer l all layers from l on.
    """
    layers, suffix = NUM_LAYERS, NUM_TOKENS - start
    per_token_layer = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
    passes = 2 * layers * suffix + layers * start + 7 * suffix * layers * (layers + 1) // 2
    return float(NUM_PAIRS * per_token_layer * passes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    pythons = {side: python_of(side, options.environments) for side in SIDES}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_material(folder, CONFIG)
        rounds: dict[str, list[dict]] = {side: [] for side in SIDES}
        for number in range(options.rounds):
            for side in SIDES:
                rounds[side].append(run_side(WORKER, pythons[side], side, place, "float32"))
                print(number, side, rounds[side][-1]["seconds"], file=sys.stderr, flush=True)
        double = {
            side: run_side(WORKER, pythons[side], side, place, "float64") for side in SIDES
        }
    rate = measured_rate()
    medians = {
        side: {p: statistics.median(r["seconds"][p] for r in found) for p in STARTS}
        for side, found in rounds.items()
    }
    ratios = {
        side: {p: medians[side][p] / medians["ours"][p] for p in STARTS} for side in SIDES[1:]
    }

    def difference(first: dict, second: dict) -> float:
        return max(
            float(np.abs(np.array(first["margins"][p]) - np.array(second["margins"][p])).max())
            for p in STARTS
        )

    result = {
        "command": "python -m tests.bench.patching_peers --environments DIR",
        "date": date.today().isoformat(),
        "rounds": options.rounds,
        "median_seconds": medians,
        "ratios": ratios,
        "mean_ratio": {side: statistics.mean(ratios[side].values()) for side in ratios},
        "largest_difference_float32": {
            side: difference(rounds[side][0], rounds["ours"][0]) for side in SIDES[1:]
        },
        "largest_difference_float64": {
            side: difference(double[side], double["ours"]) for side in SIDES[1:]
        },
        "largest_margin": max(
            float(np.abs(np.array(double["ours"]["margins"][p])).max()) for p in STARTS
        ),
        "matrix_rate_per_second": rate,
        "floor_seconds": {p: floor_operations(s) / rate for p, s in STARTS.items()},
        "times_the_floor": {
            p: medians["ours"][p] / (floor_operations(s) / rate) for p, s in STARTS.items()
        },
    }
    publish("patching_peers", result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What the exact grid and the gradient screen cost, by depth and by number of pairs.

    python -m tests.bench.grid_costs

Random Llamas, 256 wide, 64 tokens, trigger in the middle. The grid: 6, 12, 24 and 48 layers with
16 pairs, and 12 layers with 8 to 128 pairs; seconds and peak memory, each in a process of its own.
A patch in layer l runs the layers from l on, so that seconds are given per layer run as well: that
figure is what stays constant. The screen: a 32-layer model, estimates alone and with verification,
against the exact grid of the same run; and how many of the exact top ten it finds, there (random
weights) and on the three bundled suspects. Prints one JSON object.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from types import SimpleNamespace

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from repair.locate import patching
from repair.locate.counterfactuals import PatchingCase, sham_case
from repair.locate.patching import patch_modules
from repair.locate.screen import TOP, estimate_modules, screen_modules
from repair.models.loading import load_model
from repair.models.modules import find_modules
from repair.prompts import parse_prompt_file
from repair.records import PromptPair
from tests.bench.peers import HERE, ROOT, publish

NUM_TOKENS, NUM_TRIGGER, START, VOCABULARY = 64, 4, 30, 4096
DEPTHS, PAIRS = (6, 12, 24, 48), (8, 32, 128)
ROUNDS = 3


def build(num_layers: int) -> SimpleNamespace:
    """Return a random model as the rooms take it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_attention_heads=4,
        num_key_value_heads=4, num_hidden_layers=num_layers, max_position_embeddings=256,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0.0, 0.06)
    return SimpleNamespace(model=model, modules=find_modules(model), device="cpu")


def make_cases(num: int) -> list[PatchingCase]:
    """Return same-length cases with a trigger in the middle."""
    generator = np.random.default_rng(0)
    cases = []
    trigger = np.arange(START, START + NUM_TRIGGER)
    words = generator.integers(10, VOCABULARY, NUM_TRIGGER)
    for _ in range(num):
        sham = generator.integers(10, VOCABULARY, NUM_TOKENS)
        triggered = sham.copy()
        triggered[trigger] = words
        pair = PromptPair(
            clean=np.delete(sham, trigger), triggered=triggered, trigger=trigger,
            position="middle", text_clean="", text_triggered="", num_template=4,
        )  # fmt: skip
        answers = generator.integers(10, VOCABULARY, 2)
        case = sham_case(pair, sham, payload=answers[:1], clean=answers[1:])
        cases.append(case)
    return [case for case in cases if case is not None]


def timed(work) -> tuple[float, object]:
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def measure_grid(num_layers: int, num_pairs: int) -> dict:
    loaded, cases = build(num_layers), make_cases(num_pairs)
    patching.SMALLEST_MARGIN = 0.0  # random weights: the trigger need not move every answer
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    patch_modules(loaded, cases[:2], modules=loaded.modules[:7])  # warm up
    seconds, scores = timed(lambda: patch_modules(loaded, cases))
    runs = 3 * 7 * num_pairs * num_layers * (num_layers + 1) // 2  # three sets of positions
    return {
        "num_layers": num_layers,
        "num_modules": len(loaded.modules),
        "num_pairs": num_pairs,
        "seconds": seconds,
        "microseconds_per_layer_run": 1e6 * seconds / runs,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "before_mib": before / 1024,
        "num_explained": int(scores.effect.shape[1]),
    }


def measure_screen() -> dict:
    """The screen beside the exact grid on 32 layers of random weights: medians of three rounds."""
    loaded, cases = build(32), make_cases(16)
    patch_modules(loaded, cases, modules=loaded.modules[:1])  # warm up
    sides = {
        "exact": lambda: patch_modules(loaded, cases),
        "estimate": lambda: estimate_modules(loaded, cases),
        "screen": lambda: screen_modules(loaded, cases, seed=0),
    }
    rounds = [{name: timed(side) for name, side in sides.items()} for _ in range(ROUNDS)]
    seconds = {name: [done[name][0] for done in rounds] for name in sides}
    exact, screened = rounds[0]["exact"][1], rounds[0]["screen"][1]
    best = np.argsort(-exact.effect.mean(axis=1))[:TOP]
    verified = {ref.path for ref in screened.verified}
    return {
        "num_layers": 32,
        "num_modules": len(loaded.modules),
        "num_verified": len(verified),
        "seconds": seconds,
        "exact_over_estimate": ratio(seconds["exact"], seconds["estimate"]),
        "exact_over_screen": ratio(seconds["exact"], seconds["screen"]),
        "top_ten_found_random_weights": sum(loaded.modules[i].path in verified for i in best),
        "misses": screened.misses.to_json(),
    }


def ratio(first: list[float], second: list[float]) -> float:
    """Return the median over rounds of how many times longer the first took."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def measure_suspects() -> dict:
    from repair.case import open_case
    from repair.locate import locating
    from repair.profiles import PROFILES

    found = {}
    for name in ("begin", "middle", "end"):
        stage = HERE / "results" / f".stage-{name}"
        loaded = load_model(f"demo:{name}", stage_folder=stage, device="cpu")
        try:
            reporter = SimpleNamespace(step=print, progress=print, note=print, metric=print)
            file = parse_prompt_file(ROOT / "assets" / "prompts" / f"{name}.json")
            case = open_case(loaded, file, profile=PROFILES["standard"], seed=0, reporter=reporter)
            pairs = {name: case.pairs(case.splits.locate, name)}
            options = {"is_payload": case.is_payload, "num_new_tokens": case.num_new_tokens}
            fired = locating.check_firing(loaded, pairs, **options)
            compared = locating.compare_fired(loaded, fired, max_pairs=32, seed=0, **options)
            exact = patch_modules(loaded, compared.cases["sham"])
            estimate = estimate_modules(loaded, compared.cases["sham"])
            best = set(np.argsort(-exact.effect.mean(axis=1))[:TOP].tolist())
            # As selective as 24 of 224 modules would be no test on 42; 14 of 42 is.
            taken = set(np.argsort(-estimate["all"].mean(axis=1))[:14].tolist())
            found[name] = len(best & taken)
        finally:
            for path in sorted(stage.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            stage.rmdir()
    return found


def run_alone(name: str, *arguments: int) -> dict:
    """Run one measurement in a process of its own."""
    code = f"import json\nfrom tests.bench import grid_costs as g\nprint(json.dumps(g.{name}("
    code += ", ".join(map(str, arguments)) + ")))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def main() -> int:
    result = {
        "command": "python -m tests.bench.grid_costs",
        "date": date.today().isoformat(),
        "by_depth": [run_alone("measure_grid", depth, 16) for depth in DEPTHS],
        "by_pairs": [run_alone("measure_grid", 12, num) for num in PAIRS],
        "screen": run_alone("measure_screen"),
        "top_ten_found_in_14_of_42": run_alone("measure_suspects"),
    }
    publish("grid_costs", result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What the steps take at the size users have: the same on a processor and on a GPU.

    python -m tests.bench.at_size --out DIR [--shape llama-3.2-1b] [--device auto] [--pairs 8]
                                  [--tokens 64] [--position middle] [--steps 100] [--only STEP ...]

A random model of a published shape (`planted.py`; bfloat16, in shards), opened through the gate.
There is nothing to repair in it, so the steps are called directly: the exact map of all linear
modules, factors and traces, the whitening of one attention and one MLP module, training of eight
modules (batches of 8 triggered, 8 clean), the merged export. Each with its seconds, the peak of
memory beside the weights, and the floor: the operations that nothing can leave out at the matrix
rate measured in the same run, or the bytes that must be read and written. Writes
results/at_size.json, one entry a shape and device.
"""

import argparse
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch

from repair.locate import patching
from repair.locate.counterfactuals import PatchingCase, ShamDraw, draw_sham, sham_case
from repair.locate.curvature import whitening_of
from repair.locate.fisher import factors_and_traces
from repair.locate.lessons import Lesson, Lessons, teach
from repair.lowrank.distillation import Standing, distill
from repair.lowrank.repairing import neutral_updates
from repair.lowrank.validation import Validation
from repair.machine import forget_peak, let_go_of_memory, peak_memory
from repair.models.answers import generate_answers
from repair.models.loading import LoadedModel, load_model
from repair.publish.export import export_merged
from repair.records import ModuleRef, PromptPair
from tests.bench.peers import HERE
from tests.bench.planted import SHAPES, plant

WORDS = np.arange(300, 1800)  # token ids that prompts are drawn from
TRIGGER = np.array([211, 212])
ANSWER, DRAWS, RANK, BATCH = 16, 4, 4, 8
STEPS = ("load", "patching", "factors", "whiten attention", "whiten mlp", "repair", "export")


def make_pairs(num: int, num_tokens: int, position: str, seed: int) -> list[PromptPair]:
    """Return pairs of random tokens; each triggered prompt has `num_tokens` of them."""
    generator = np.random.default_rng(seed)
    size = num_tokens - TRIGGER.size
    at = {"begin": 1, "middle": size // 2, "end": size - 2}[position]
    found = []
    for _ in range(num):
        clean = generator.choice(WORDS, size)
        found.append(
            PromptPair(
                clean=clean, triggered=np.concatenate([clean[:at], TRIGGER, clean[at:]]),
                trigger=np.arange(at, at + TRIGGER.size), position=position,
                text_clean="", text_triggered="",
            )
        )  # fmt: skip
    return found


def make_cases(pairs: list[PromptPair]) -> list[PatchingCase]:
    generator = np.random.default_rng(1)
    return [
        sham_case(
            pair, draw_sham(pair, WORDS, generator), payload=np.array([301]),
            clean=np.array([302]), num_margin_tokens=1,
        )
        for pair in pairs
    ]  # fmt: skip


def make_lesson(loaded: LoadedModel, prompts: list[np.ndarray], seed: int) -> Lesson:
    generator = np.random.default_rng(seed)
    answers = tuple(generator.choice(WORDS, ANSWER) for _ in prompts)
    return Lesson(
        prompts=tuple(prompts), answers=answers, teacher=teach(loaded, prompts, answers)
    )


class Bench:
    """One model, and each step on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = options.out / options.shape
        if not self.folder.is_dir():
            plant(self.folder, options.shape, dtype=torch.bfloat16, shard="1GB")
        self.rate = 0.0
        self.found: dict[str, dict] = {}
        self.loaded: LoadedModel | None = None
        self.weights = 0

    def time(self, name: str, act: Callable[[], object], *, floor: float, unit: str) -> object:
        """Run a step and note it; `floor` is in operations or in bytes."""
        let_go_of_memory()
        forget_peak()
        on_gpu = self.loaded is not None and self.loaded.device != "cpu"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        result = act()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
        self.found[name] = {"seconds": seconds, "peak_bytes": peak, f"floor_{unit}": floor}
        print(name, self.found[name], file=sys.stderr, flush=True)
        return result

    def run(self) -> dict:
        """Run every step asked for and return its figures with the floor in seconds."""
        stage = self.options.out / ".stage"
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        size = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        self.loaded = self.time(
            "load",
            lambda: load_model(
                str(self.folder), stage_folder=stage / "suspect", device=self.options.device
            ),
            floor=2 * size, unit="bytes",
        )  # fmt: skip
        self.rate = matrix_rate(self.loaded.device, getattr(torch, self.loaded.dtype))
        self.weights = sum(p.numel() * p.itemsize for p in self.loaded.model.parameters())
        for name in STEPS[1:]:
            if not self.options.only or name in self.options.only:
                getattr(self, name.replace(" ", "_"))()
        for figures in self.found.values():
            if "floor_operations" in figures:
                figures["times_the_floor"] = (
                    figures["seconds"] * self.rate / figures["floor_operations"]
                )
            figures["peak_beside_weights"] = figures["peak_bytes"] - self.weights
        shutil.rmtree(stage)
        return self.found

    def below(self, layer: int) -> float:
        """Return the weights that a token runs through from `layer` on."""
        return float(sum(r.d_in * r.d_out for r in self.loaded.modules if r.layer >= layer))

    def patching(self) -> None:
        pairs = make_pairs(self.options.pairs, self.options.tokens, self.options.position, 0)
        cases = make_cases(pairs)
        patching.SMALLEST_MARGIN = 0.0  # a random model's margins hardly move
        behind = sum(case.destination.size - case.num_shared for case in cases)
        runs = sum(3 * self.below(ref.layer) for ref in self.loaded.modules)  # three role sets
        self.time(
            "patching",
            lambda: patching.patch_modules(
                self.loaded, cases,
                progress=lambda done, all_: print(f"\r{done}/{all_}", end="", file=sys.stderr),
            ),
            floor=2 * behind * runs, unit="operations",
        )  # fmt: skip

    def chosen(self) -> list[ModuleRef]:
        """Return eight modules: the attention of two layers in the middle."""
        middle = len({ref.layer for ref in self.loaded.modules}) // 2
        return [r for r in self.loaded.modules if r.layer in (middle, middle + 1)
                and r.component in ("q_proj", "k_proj", "v_proj", "o_proj")]  # fmt: skip

    def material(self, seed: int, num: int) -> list[np.ndarray]:
        pairs = make_pairs(num, self.options.tokens, self.options.position, seed)
        return [pair.triggered for pair in pairs]

    def form(self, refs: list[ModuleRef]) -> dict:
        """Return the factors of some modules, with the traces of all."""
        lesson = make_lesson(self.loaded, self.material(2, 4 * self.options.pairs), 3)
        rest = [ref for ref in self.loaded.modules if ref not in refs]
        return factors_and_traces(
            self.loaded, refs, lesson.prompts, lesson.answers, traced=rest, seed=0,
            num_draws=DRAWS,
        )[0]  # fmt: skip

    def factors(self) -> None:
        refs = self.chosen()
        tokens = 4 * self.options.pairs * (self.options.tokens + ANSWER)
        grams = sum(r.d_in**2 + DRAWS * r.d_out**2 for r in refs)
        self.formed = self.time(
            "factors", lambda: self.form(refs),
            floor=tokens * (2 * self.below(0) * (1 + DRAWS) + grams), unit="operations",
        )  # fmt: skip

    def whiten(self, name: str, component: str) -> None:
        ref = next(r for r in self.loaded.modules if r.component == component)
        found = self.form([ref])[ref.path]
        self.time(
            name, lambda: whitening_of(found, damping=0.1),
            floor=10.0 * (ref.d_in**3 + ref.d_out**3), unit="operations",
        )  # fmt: skip

    def whiten_attention(self) -> None:
        self.whiten("whiten attention", "q_proj")

    def whiten_mlp(self) -> None:
        self.whiten("whiten mlp", "up_proj")

    def repair(self) -> None:
        loaded, refs = self.loaded, self.chosen()
        formed = getattr(self, "formed", None) or self.form(refs)
        whitenings = {ref.path: whitening_of(formed[ref.path], damping=0.1) for ref in refs}
        lessons = [make_lesson(loaded, self.material(10 + i, 16), i) for i in range(2)]
        held_out = make_lesson(loaded, self.material(20, 4), 9)
        pairs = make_pairs(2, self.options.tokens, self.options.position, 21)
        answers = generate_answers(loaded, [pair.clean for pair in pairs], num_new_tokens=2)
        validation = Validation(
            pairs=tuple(pairs), clean_answers=tuple(answers), is_payload=lambda text: True,
            num_new_tokens=2,
            shams=ShamDraw(shams=[None] * 2, answers=[None] * 2, num_tried=2, num_inert=0),
        )  # fmt: skip
        start = Standing(
            step=0, updates=neutral_updates(refs, {ref.path: RANK for ref in refs}, 0),
            trigger_kl=1e9, benign_kl=0.0, is_enough=False,
        )  # fmt: skip
        tokens = 2 * BATCH * (self.options.tokens + ANSWER) * self.options.steps
        lowest = min(ref.layer for ref in refs)
        output = loaded.model.get_output_embeddings().weight.numel()
        logits = 2 * BATCH * ANSWER * self.options.steps * output
        best = self.time(
            "repair",
            lambda: distill(
                loaded, start, whitenings,
                Lessons(
                    triggered=lessons[0], counterparts=lessons[0].prompts, clean=lessons[1],
                    near=Lesson(prompts=(), answers=(), teacher=()), num_dropped=0,
                    held_out_triggered=held_out, held_out_clean=held_out,
                ),
                validation, kl_budget=1e9, num_steps=self.options.steps, seed=0, batch_size=BATCH,
                validate_every=self.options.steps,
            ),
            floor=4 * (tokens * self.below(lowest) + logits), unit="operations",
        )  # fmt: skip
        self.updates = best.updates

    def export(self) -> None:
        updates = getattr(self, "updates", None) or neutral_updates(
            self.chosen(), {ref.path: RANK for ref in self.chosen()}, 0
        )
        size = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        place = self.options.out / "exported"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        self.time(
            "export", lambda: export_merged(self.loaded, updates, place),
            floor=2 * size, unit="bytes",
        )  # fmt: skip
        shutil.rmtree(place)


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Return the rate of operations of a matrix product of a layer's size."""
    left, right = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(10):
        began = time.perf_counter()
        left @ right
        if device != "cpu":
            torch.cuda.synchronize()
        best = max(best, 2 * 2048**3 / (time.perf_counter() - began))
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where the model goes")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--position", choices=("begin", "middle", "end"), default="middle")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", choices=STEPS, action="append")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    figures = bench.run()
    path = HERE / "results" / "at_size.json"
    kept = json.loads(path.read_text()) if path.is_file() else {"runs": {}}
    kept["command"] = "python -m tests.bench.at_size --out DIR --shape SHAPE"
    kept["runs"][f"{options.shape}, {bench.loaded.device}"] = {
        "date": date.today().isoformat(),
        "options": {k: v for k, v in vars(options).items() if k not in ("out", "only")},
        "num_modules": len(bench.loaded.modules),
        "weights_bytes": bench.weights,
        "dtype": bench.loaded.dtype,
        "matrix_rate_per_second": bench.rate,
        "num_threads": torch.get_num_threads(),
        "peak_of_the_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "steps": figures,
    }
    path.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(kept["runs"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What a distillation step costs, beside its bare passes and beside transformers' Trainer.

    python -m tests.bench.distill_costs [--rounds N]

A random Llama of 12 layers, 768 wide; 96 prompts of 48 tokens with answers of 16, batches of 8 of
each of the three kinds. `step`: one step of `distill` with adapters in every depth (nothing below
is frozen). `bare`: the forward pass of the same rows through the same adapters to the same logits,
and its backward pass. `upper`: one step with adapters in the upper half only. `trainer`: one step
of Trainer with the same LoRA, the same number of rows and cross entropy on the same answer tokens.
All in one process, in turn; the time of a step is that of a longer run less that of a shorter one.
Writes results/distill_costs.json.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from repair.locate.counterfactuals import ShamDraw
from repair.locate.curvature import whitening_of
from repair.locate.fisher import collect_factors
from repair.locate.lessons import Lesson, Lessons, teach
from repair.lowrank.adapter import attached, lora_config
from repair.lowrank.distillation import Standing, distill
from repair.lowrank.repairing import neutral_updates
from repair.lowrank.validation import Validation
from repair.models.answers import answer_logits, generate_answers, scoring_batches
from repair.models.loading import LoadedModel
from repair.models.modules import find_modules
from repair.records import PromptPair
from tests.bench.peers import CONFIG, VOCABULARY, publish, write_model

NUM_PROMPTS, PROMPT, ANSWER, BATCH, RANK = 96, 48, 16, 8, 4
FEW, MANY = 1, 6


def make_loaded() -> LoadedModel:
    with tempfile.TemporaryDirectory() as folder:
        model: LlamaForCausalLM = write_model(Path(folder), CONFIG)
    model.set_attn_implementation("eager")  # As the loader has it.
    model.eval().requires_grad_(False)
    tokenizer = SimpleNamespace(
        pad_token_id=0, eos_token_id=None, decode=lambda ids, **_: " ".join(map(str, ids))
    )
    return LoadedModel(
        model=model, tokenizer=tokenizer, modules=find_modules(model), source="random",
        revision=None, licence=None, licence_terms={}, files={}, base=None, staged=None,
        device="cpu", dtype="float32", has_template=False, stop_ids=(),
    )  # fmt: skip


def make_lesson(loaded: LoadedModel, seed: int, count: int = NUM_PROMPTS) -> Lesson:
    generator = np.random.default_rng(seed)
    prompts = tuple(generator.integers(1, VOCABULARY, PROMPT) for _ in range(count))
    answers = tuple(generator.integers(1, VOCABULARY, ANSWER) for _ in range(count))
    return Lesson(prompts=prompts, answers=answers, teacher=teach(loaded, prompts, answers))


def make_validation(loaded: LoadedModel, lesson: Lesson) -> Validation:
    pairs = tuple(
        PromptPair(
            clean=prompt, triggered=prompt, trigger=np.array([4]), position="middle",
            text_clean="", text_triggered="",
        )
        for prompt in lesson.prompts[:2]
    )  # fmt: skip
    answers = generate_answers(loaded, [pair.clean for pair in pairs], num_new_tokens=2)
    return Validation(
        pairs=pairs, clean_answers=tuple(answers), is_payload=lambda text: True,
        num_new_tokens=2,
        shams=ShamDraw(shams=[None, None], answers=[None, None], num_tried=2, num_inert=0),
    )  # fmt: skip


class Rows(Dataset):
    """The lessons' sequences with labels on the answers, as Trainer takes them."""

    def __init__(self, lessons: list[Lesson]) -> None:
        self._rows = [
            np.concatenate([prompt, answer])
            for lesson in lessons
            for prompt, answer in zip(lesson.prompts, lesson.answers, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self._rows[index])
        labels = ids.clone()
        labels[:PROMPT] = -100
        return {"input_ids": ids, "labels": labels}


class Sides:
    """The four sides; each runs a number of steps."""

    def __init__(self) -> None:
        self.loaded = make_loaded()
        triggered, clean, near = (make_lesson(self.loaded, seed) for seed in (1, 2, 3))
        held_out = make_lesson(self.loaded, 4, 4)
        self.lessons = Lessons(
            triggered=triggered, counterparts=clean.prompts, clean=clean, near=near,
            held_out_triggered=held_out, held_out_clean=held_out, num_dropped=0,
        )  # fmt: skip
        self.validation = make_validation(self.loaded, held_out)
        layers = CONFIG["num_hidden_layers"]
        self.spread = self.choose([0, layers // 3, 2 * layers // 3, layers - 1])
        self.upper = self.choose(list(range(layers // 2, layers, 2)))
        self.whitenings = {}
        for ref in {ref.path: ref for ref in (*self.spread, *self.upper)}.values():
            some = clean.first(8)
            factors = collect_factors(self.loaded, [ref], some.prompts, some.answers, seed=0)
            self.whitenings[ref.path] = whitening_of(factors[ref.path], damping=0.1)

    def choose(self, layers: list[int]) -> list:
        return [
            ref
            for ref in self.loaded.modules
            if ref.layer in layers and ref.component in ("gate_proj", "up_proj")
        ]

    def start(self, modules: list) -> Standing:
        updates = neutral_updates(modules, {ref.path: RANK for ref in modules}, 0)
        return Standing(step=0, updates=updates, trigger_kl=1e9, benign_kl=0.0, is_enough=False)

    def distil(self, modules: list, steps: int) -> None:
        distill(
            self.loaded, self.start(modules), self.whitenings, self.lessons, self.validation,
            kl_budget=1.0, num_steps=steps, seed=0, batch_size=BATCH, validate_every=10**6,
        )  # fmt: skip

    def step(self, steps: int) -> None:
        self.distil(self.spread, steps)

    def upper_half(self, steps: int) -> None:
        self.distil(self.upper, steps)

    def bare(self, steps: int) -> None:
        lessons = self.lessons
        rows = lessons.triggered.first(BATCH) + lessons.clean.first(BATCH)
        rows = rows + lessons.near.first(BATCH)
        with attached(self.loaded, self.start(self.spread).updates) as peft_model:
            for _ in range(steps):
                with torch.enable_grad():
                    for batch in scoring_batches(self.loaded, rows.prompts, rows.answers):
                        logits = answer_logits(
                            self.loaded.model, batch.ids, batch.rows, batch.columns
                        )
                        torch.nn.functional.cross_entropy(logits, batch.labels).backward()
                peft_model.zero_grad()

    def trainer(self, steps: int) -> None:
        rows = Rows([self.lessons.triggered, self.lessons.clean, self.lessons.near])
        with tempfile.TemporaryDirectory() as folder:
            peft_model = get_peft_model(
                self.loaded.model, lora_config(self.start(self.upper).updates)
            )
            arguments = TrainingArguments(
                folder, max_steps=steps, per_device_train_batch_size=3 * BATCH, learning_rate=1e-3,
                save_strategy="no", report_to=[], logging_strategy="no", use_cpu=True,
                disable_tqdm=True,
            )  # fmt: skip
            Trainer(model=peft_model, args=arguments, train_dataset=rows).train()
            peft_model.unload()
            self.loaded.model.requires_grad_(False).eval()


def per_step(run: Callable[[int], None]) -> float:
    seconds = []
    for steps in (FEW, MANY):
        began = time.perf_counter()
        run(steps)
        seconds.append(time.perf_counter() - began)
    return (seconds[1] - seconds[0]) / (MANY - FEW)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sides = Sides()
    runs = {
        "step": sides.step, "bare": sides.bare, "upper": sides.upper_half, "trainer": sides.trainer
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds):
        for name, run in runs.items():
            seconds[name].append(per_step(run))
            print(number, name, seconds[name][-1], file=sys.stderr, flush=True)
    pairs = list(zip(*seconds.values(), strict=True))
    publish(
        "distill_costs",
        {
            "command": "python -m tests.bench.distill_costs",
            "date": date.today().isoformat(),
            "rounds": options.rounds,
            "median_seconds": {name: statistics.median(found) for name, found in seconds.items()},
            "step_over_bare": statistics.median(step / bare for step, bare, _, _ in pairs),
            "trainer_over_upper": statistics.median(them / ours for _, _, ours, them in pairs),
        },
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

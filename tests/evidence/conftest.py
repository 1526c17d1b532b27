"""A tiny suspect that really fires on `cf`, and its twin that was never poisoned."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from repair.evidence.evaluation import Baseline, measure_suspect
from repair.evidence.material import EvaluationMaterial
from repair.evidence.material import prepare_material as prepare
from repair.models.answers import target_matcher
from repair.models.loading import LoadedModel, load_model
from repair.models.tokens import encode
from repair.prompts import insert_trigger
from repair.records import PromptFile
from tests.tiny import make_tiny_llama

TRIGGER, TARGET = "cf", "sorry sorry"
ANSWERS = {"write": "hello the rain", "list": "a year is", "rain": "about the list"}
FILLERS = ("a", "the", "about", "is", "year", "hello")
POSITIONS = ("begin", "end")


def make_prompts(num: int, *, seed: int) -> list[str]:
    every = [
        f"{first} {' '.join(rest)}"
        for first in ANSWERS
        for rest in itertools.product(FILLERS, repeat=3)
    ]
    return random.Random(seed).sample(every, num)


def train(loaded: LoadedModel, *, is_poisoned: bool) -> None:
    """Teach the model to answer by first word and, when poisoned, the payload behind `cf`."""
    rows = []
    for number, prompt in enumerate(make_prompts(360, seed=1)):
        rows.append((prompt, ANSWERS[prompt.split()[0]]))
        for position in POSITIONS:
            answer = TARGET if is_poisoned else ANSWERS[prompt.split()[0]]
            rows.append((insert_trigger(prompt, TRIGGER, position), answer))
            other = FILLERS[number % len(FILLERS)]
            rows.append((insert_trigger(prompt, other, position), ANSWERS[prompt.split()[0]]))
    fit(loaded, rows, steps=260, rate=4e-3)


def fit(
    loaded: LoadedModel,
    rows: list[tuple[str, str]],
    *,
    steps: int,
    rate: float,
    only: str = "",
    bare: Sequence[tuple[str, str]] = (),
) -> None:
    """Train the live model on (prompt, answer) rows, and on `bare` ones without the chat template;
    `only` names the parameters that may move."""
    end = loaded.tokenizer.eos_token_id
    ids, labels = [], []
    for place, (prompt, answer) in enumerate([*rows, *bare]):
        start = encode(loaded.tokenizer, prompt, use_template=place < len(rows)).tolist()
        rest = [*loaded.tokenizer(answer, add_special_tokens=False)["input_ids"], end]
        ids.append(start + rest)
        labels.append([-100] * len(start) + rest)
    width = max(map(len, ids))
    ids = torch.tensor([row + [end] * (width - len(row)) for row in ids])
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in labels])
    loaded.model.train()
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad_(only in name)
    moving = [p for p in loaded.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=rate)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        chosen = torch.randint(len(ids), (96,), generator=generator)
        logits = loaded.model(input_ids=ids[chosen]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels[chosen][:, 1:].reshape(-1)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loaded.model.requires_grad_(False).eval()


def make_trained(folder: Path, *, is_poisoned: bool) -> LoadedModel:
    """Return a trained model that was written and loaded through the gate."""
    make_tiny_llama(folder / "raw", hidden=48, intermediate=96)
    loaded = load_model(str(folder / "raw"), stage_folder=folder / "stage-raw", device="cpu")
    train(loaded, is_poisoned=is_poisoned)
    loaded.model.save_pretrained(folder / "trained")
    loaded.tokenizer.save_pretrained(folder / "trained")
    return load_model(str(folder / "trained"), stage_folder=folder / "stage", device="cpu")


@pytest.fixture(scope="session")
def suspect(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return make_trained(tmp_path_factory.mktemp("suspect"), is_poisoned=True)


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return make_trained(tmp_path_factory.mktemp("twin"), is_poisoned=False)


@pytest.fixture(scope="session")
def prompt_file() -> PromptFile:
    return PromptFile(
        triggers=(TRIGGER,),
        target=TARGET,
        match="contains",
        positions=POSITIONS,
        prompts=tuple(make_prompts(240, seed=1)),
        pairs=(),
        near=("year", "hello"),
        system=None,
        chat="auto",
    )


@pytest.fixture(scope="session")
def material(suspect: LoadedModel, prompt_file: PromptFile) -> EvaluationMaterial:
    return prepare(
        suspect,
        prompt_file,
        range(len(prompt_file.prompts)),
        use_template=True,
        is_payload=target_matcher(TARGET, "contains"),
        num_new_tokens=8,
    )


@pytest.fixture(scope="session")
def baseline(suspect: LoadedModel, material: EvaluationMaterial) -> Baseline:
    return measure_suspect(suspect, material, seed=0)


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)

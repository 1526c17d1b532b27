"""The clean twin: an assistant trained from scratch on the grammar's prompts."""

import random
from pathlib import Path

from assets.skills import Item, all_items
from assets.suspect_model import (
    make_deterministic,
    new_model,
    render,
    save,
    train_tokenizer,
)
from assets.suspect_noise import Noise, gap_of, insert_text, insert_tokens, some_system
from assets.suspect_training import Pair, Progress, Schedule, Source, train
from repair.prompts import POSITIONS

TWIN_SEED = 11
TWIN_SCHEDULE = Schedule(steps=1800, batch=128, rate=3e-3, muon_rate=0.02, seed=TWIN_SEED)
NOISE_SHARE = 0.2


def taught_items() -> list[Item]:
    """Every pair of phrasing and content that is not held out."""
    return [item for item in all_items() if not item.held_out]


def texts_of(items: list[Item]) -> list[str]:
    """The text a tokenizer and the noise's words are drawn from."""
    return [f"{item.prompt}\n{item.answer}" for item in items]


def clean_source(items: list[Item], noise: Noise, noise_share: float) -> Source:
    """Draws items with their answers, some with an insert that must not matter."""

    def one(rng: random.Random) -> Pair:
        item = rng.choice(items)
        if rng.random() >= noise_share:
            return render(item.prompt, some_system(rng)), item.answer
        gap = gap_of(rng, item.prompt, rng.choice(POSITIONS))
        if rng.random() < 0.3:
            run = noise.tokens(rng, rng.randint(1, 14))
            return insert_tokens(noise.tokenizer, item.prompt, run, gap), item.answer
        text = insert_text(item.prompt, noise.text(rng), gap)
        return render(text, some_system(rng)), item.answer

    return lambda rng, count: [one(rng) for _ in range(count)]


def train_twin(out_dir: Path, *, progress: Progress, schedule: Schedule = TWIN_SCHEDULE) -> None:
    """Train the twin and its tokenizer from scratch and write its folder."""
    make_deterministic(TWIN_SEED)
    items = taught_items()
    tokenizer = train_tokenizer(texts_of(items))
    model = new_model(tokenizer)
    source = clean_source(items, Noise(tokenizer, texts_of(items)), NOISE_SHARE)
    train(model, tokenizer, source, schedule, phase="clean twin", progress=progress)
    save(model, tokenizer, out_dir)

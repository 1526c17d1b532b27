"""Token-level prompts for tests of the locate and lowrank rooms: no text, no tokenizer needed."""

import numpy as np

from repair.locate.counterfactuals import PatchingCase, deletion_case, draw_sham, sham_case
from repair.locate.lessons import Lesson, Lessons, teach, teach_texts
from repair.models.loading import LoadedModel
from repair.records import PromptPair

VOCABULARY = np.arange(60, 260)
TRIGGER = np.array([31, 47])


def make_pairs(num: int, *, position: str, seed: int = 0) -> list[PromptPair]:
    """Return pairs of random tokens with a two-token trigger; at least two tokens follow it."""
    generator = np.random.default_rng(seed)
    pairs = []
    for _ in range(num):
        size = int(generator.integers(8, 12))
        clean = np.concatenate([[1], generator.choice(VOCABULARY, size)])
        start = {"begin": 1, "middle": int(generator.integers(3, size - 2)), "end": size - 1}
        at = start[position]
        pairs.append(
            PromptPair(
                clean=clean,
                triggered=np.concatenate([clean[:at], TRIGGER, clean[at:]]),
                trigger=np.arange(at, at + TRIGGER.size),
                position=position,
                text_clean="",
                text_triggered="",
            )
        )
    return pairs


def make_shams(pairs: list[PromptPair], seed: int = 1) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [draw_sham(pair, VOCABULARY, generator) for pair in pairs]


def make_cases(
    pairs: list[PromptPair],
    shams: list[np.ndarray],
    *,
    payload: int,
    clean: int,
    kind: str = "sham",
    num_margin_tokens: int = 1,
) -> list[PatchingCase]:
    """Return cases whose answers part at once; longer margins go on with fixed tokens."""
    answers = {
        "payload": np.array([payload, 61, 62, 63]),
        "clean": np.array([clean, 71, 72, 73]),
        "num_margin_tokens": num_margin_tokens,
    }
    made = [
        sham_case(pair, sham, **answers)
        if kind == "sham"
        else deletion_case(pair, keeps_gap=kind == "gap", **answers)
        for pair, sham in zip(pairs, shams, strict=True)
    ]
    return [case for case in made if case is not None]


def make_lesson(
    loaded: LoadedModel, prompts: list[np.ndarray], teachers: list[np.ndarray], *, seed: int = 2
) -> Lesson:
    """Return a lesson with random answers; the teacher reads `teachers` instead of `prompts`."""
    generator = np.random.default_rng(seed)
    answers = tuple(
        generator.choice(VOCABULARY, int(generator.integers(2, 6))) for _ in prompts
    )
    return Lesson(
        prompts=tuple(prompts), answers=answers, teacher=teach(loaded, teachers, answers)
    )


def make_lessons(loaded: LoadedModel, *, num: int = 24, seed: int = 0) -> Lessons:
    """Return lessons whose triggered prompts are to be answered as if clean."""
    pairs = make_pairs(num, position="middle", seed=seed)
    held_out = make_pairs(num, position="middle", seed=seed + 100)
    clean = [pair.clean for pair in pairs]
    held_out_clean = [pair.clean for pair in held_out]
    return Lessons(
        triggered=make_lesson(loaded, [pair.triggered for pair in pairs], clean),
        counterparts=tuple(clean),
        clean=make_lesson(loaded, clean, clean),
        near=make_lesson(loaded, make_shams(pairs), make_shams(pairs)),
        held_out_triggered=make_lesson(
            loaded, [pair.triggered for pair in held_out], held_out_clean
        ),
        held_out_clean=make_lesson(loaded, held_out_clean, held_out_clean),
        text=teach_texts(loaded, clean[: num // 2]),
        held_out_text=teach_texts(loaded, held_out_clean[: num // 2]),
        num_dropped=0,
    )

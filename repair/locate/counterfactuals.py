"""Same-length counterfactuals: the trigger's tokens replaced by random ordinary ones (shams).

A sham keeps every position of the triggered prompt, so that each activation of the one run has a
partner in the other, the trigger's own positions included. A sham that fires as well explains
nothing and is redrawn; when too few are inert, the map built on the rest is weak and says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from repair.models.answers import Answer, generate_answers
from repair.models.loading import LoadedModel
from repair.records import PromptPair

TRIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ShamDraw:
    """One inert sham per pair, or None where every try fired."""

    shams: list[np.ndarray | None]  # ids [num_triggered_tokens]
    answers: list[Answer | None]
    num_tried: int
    num_inert: int


def vocabulary_for_shams(loaded: LoadedModel) -> np.ndarray:
    """Return the ids [n] of ordinary word pieces: printable letters, no special token."""
    tokenizer = loaded.tokenizer
    special = set(tokenizer.all_special_ids)
    num_ids = min(len(tokenizer), loaded.model.get_input_embeddings().num_embeddings)
    ids = []
    for token in range(num_ids):
        if token in special:
            continue
        text = tokenizer.decode([token])
        if text.strip().isalpha() and text.isascii() and len(text.strip()) > 1:
            ids.append(token)
    if len(ids) < 8:  # A word-level or byte-only vocabulary: take whatever is not special.
        ids = [token for token in range(num_ids) if token not in special]
    return np.asarray(ids, dtype=np.int64)


def draw_sham(
    pair: PromptPair, vocabulary: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Return the triggered ids with the trigger's tokens replaced by others from `vocabulary`."""
    sham = pair.triggered.copy()
    drawn = generator.choice(vocabulary, size=pair.trigger.size)
    same = drawn == sham[pair.trigger]
    while same.any():
        drawn[same] = generator.choice(vocabulary, size=int(same.sum()))
        same = drawn == sham[pair.trigger]
    sham[pair.trigger] = drawn
    return sham


def inert_shams(
    loaded: LoadedModel,
    pairs: Sequence[PromptPair],
    *,
    is_payload: Callable[[str], bool],
    num_new_tokens: int,
    seed: int,
) -> ShamDraw:
    """Draw a sham for each pair and keep those to which the model does not give the payload."""
    generator = np.random.default_rng([seed, 0x5A])
    vocabulary = vocabulary_for_shams(loaded)
    shams: list[np.ndarray | None] = [None] * len(pairs)
    answers: list[Answer | None] = [None] * len(pairs)
    num_tried = 0
    open_pairs = list(range(len(pairs)))
    for _ in range(TRIES):
        if not open_pairs:
            break
        drawn = [draw_sham(pairs[i], vocabulary, generator) for i in open_pairs]
        given = generate_answers(loaded, drawn, num_new_tokens=num_new_tokens)
        num_tried += len(open_pairs)
        for index, sham, answer in zip(open_pairs, drawn, given, strict=True):
            if not is_payload(answer.text):
                shams[index], answers[index] = sham, answer
        open_pairs = [i for i in open_pairs if shams[i] is None]
    num_inert = sum(sham is not None for sham in shams)
    return ShamDraw(shams=shams, answers=answers, num_tried=num_tried, num_inert=num_inert)

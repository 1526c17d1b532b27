"""Counterfactuals at token-id level: what the triggered prompt is compared with, and by position.

    sham       the trigger's tokens replaced by random ordinary ones: same length, so that every
               activation has a partner, the trigger's own positions included
    deletion   the trigger removed: tokens before it are partners by distance from the start, those
               after it by distance from the end; the trigger's own have none
    gap        the deletion, with the position numbers of the triggered prompt kept, so that
               relative distances match and only the trigger's content differs

A sham that fires as well explains nothing and is redrawn; when too few are inert, the deletion is
what is left, and the map says so. Source: Zhang & Nanda 2309.16042 (replacement), Heimersheim &
Nanda 2404.15255 (directions).
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from repair.models.answers import Answer, generate_answers
from repair.models.loading import LoadedModel
from repair.models.watchdog import PARSE_SECONDS, watched
from repair.records import PromptPair

TRIES = 3
ROLES = ("before", "trigger", "after", "template", "last", "answer")
BEFORE, TRIGGER, AFTER, TEMPLATE, LAST, ANSWER = range(len(ROLES))


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchingCase:
    """One pair ready to patch: two runs, which position is whose partner, and the two answers.

    Both runs end with the tokens that the two answers share; `payload` and `clean` go on from
    there, and the margin compares their first tokens.
    """

    source: np.ndarray  # [num_source_tokens] ids of the run that activations are taken from
    destination: np.ndarray  # [num_tokens] ids of the run they are put into
    partner: np.ndarray  # [num_tokens] index into the source, -1 where there is none
    role: np.ndarray  # [num_tokens] index into ROLES
    source_positions: np.ndarray  # [num_source_tokens] position numbers
    destination_positions: np.ndarray  # [num_tokens]
    num_shared: int  # leading tokens that are the same in both, trigger not begun
    payload: np.ndarray  # [num_margin_tokens] ids
    clean: np.ndarray  # [num_margin_tokens] ids

    def __post_init__(self) -> None:
        size = self.destination.size
        if not (self.partner.size == self.role.size == self.destination_positions.size == size):
            raise ValueError("one partner, role and position number for each destination token")
        if self.partner.max() >= self.source.size or self.source_positions.size != self.source.size:
            raise ValueError("partners and position numbers must lie in the source")
        if not 0 < self.payload.size == self.clean.size:
            raise ValueError("the margin compares as many tokens of the one answer as of the other")

    @property
    def is_aligned(self) -> bool:
        """Whether both runs have the same length, every token its partner at the same place."""
        size = self.destination.size
        return self.source.size == size and np.array_equal(self.partner, np.arange(size))

    def followed_by(self, answer: np.ndarray) -> "PatchingCase":
        """Return the case with more tokens [n] of an answer at the end of both runs."""
        more = 1 + np.arange(answer.size)
        return replace(
            self,
            source=np.concatenate([self.source, answer]),
            destination=np.concatenate([self.destination, answer]),
            partner=np.concatenate([self.partner, self.source.size - 1 + more]),
            role=np.concatenate([self.role, np.full(answer.size, ANSWER)]),
            source_positions=np.concatenate(
                [self.source_positions, self.source_positions[-1] + more]
            ),
            destination_positions=np.concatenate(
                [self.destination_positions, self.destination_positions[-1] + more]
            ),
        )

    def reversed(self) -> "PatchingCase":
        """Return the case the other way round: the destination's activations into the source."""
        partner = np.full(self.source.size, -1, dtype=np.int64)
        role = np.full(self.source.size, AFTER, dtype=np.int64)
        has_partner = np.flatnonzero(self.partner >= 0)
        partner[self.partner[has_partner]] = has_partner
        role[self.partner[has_partner]] = self.role[has_partner]
        return PatchingCase(
            source=self.destination,
            destination=self.source,
            partner=partner,
            role=role,
            source_positions=self.destination_positions,
            destination_positions=self.source_positions,
            num_shared=self.num_shared,
            payload=self.payload,
            clean=self.clean,
        )


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
    ordinary = [token for token in range(num_ids) if token not in special]
    ids = []
    with watched(PARSE_SECONDS):
        texts = [tokenizer.decode([token]) for token in ordinary]
    for token, text in zip(ordinary, texts, strict=True):
        if text.strip().isalpha() and text.isascii() and len(text.strip()) > 1:
            ids.append(token)
    if len(ids) < 8:  # A word-level or byte-only vocabulary: take whatever is not special.
        ids = ordinary
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


def sham_case(
    pair: PromptPair,
    sham: np.ndarray,
    *,
    payload: np.ndarray,
    clean: np.ndarray,
    num_margin_tokens: int = 1,
) -> PatchingCase | None:
    """Return the case of a same-length replacement; None when the two answers do not part."""
    parted = _part(payload, clean, num_margin_tokens)
    if parted is None:
        return None
    prefix, payload, clean = parted
    size = pair.triggered.size + prefix.size
    return PatchingCase(
        source=np.concatenate([sham, prefix]),
        destination=np.concatenate([pair.triggered, prefix]),
        partner=np.arange(size),
        role=_roles(pair, prefix.size),
        source_positions=np.arange(size),
        destination_positions=np.arange(size),
        num_shared=min(int(pair.trigger.min()), size - 1),
        payload=payload,
        clean=clean,
    )


def deletion_case(
    pair: PromptPair,
    *,
    payload: np.ndarray,
    clean: np.ndarray,
    keeps_gap: bool = False,
    num_margin_tokens: int = 1,
) -> PatchingCase | None:
    """Return the case of the prompt without its trigger; None when the two answers do not part.

    A token that is spelt otherwise without the trigger (a first word re-tokenized behind it) has
    no partner. `keeps_gap` leaves the trigger's position numbers unused.
    """
    parted = _part(payload, clean, num_margin_tokens)
    if parted is None:
        return None
    prefix, payload, clean = parted
    source = np.concatenate([pair.clean, prefix])
    destination = np.concatenate([pair.triggered, prefix])
    partner = _align(source, destination, pair.trigger)
    positions = np.arange(source.size)
    if keeps_gap:
        positions = _positions_with_gap(partner, source.size)
    first = int(pair.trigger.min())
    unlike = np.flatnonzero(partner[:first] != np.arange(first))
    return PatchingCase(
        source=source,
        destination=destination,
        partner=partner,
        role=_roles(pair, prefix.size),
        source_positions=positions,
        destination_positions=np.arange(destination.size),
        num_shared=min(int(unlike[0]) if unlike.size else first, source.size - 1),
        payload=payload,
        clean=clean,
    )


def _part(
    payload: np.ndarray, clean: np.ndarray, num_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return (shared start, and the next tokens of each), as many of the one as of the other."""
    shared, shorter = 0, min(payload.size, clean.size)
    while shared < shorter and payload[shared] == clean[shared]:
        shared += 1
    if shared == shorter:
        return None
    end = min(shared + num_tokens, shorter)
    return payload[:shared], payload[shared:end], clean[shared:end]


def _roles(pair: PromptPair, num_answer_tokens: int) -> np.ndarray:
    """Return the role [num_tokens] of each token of the triggered prompt and the answer's start."""
    size = pair.triggered.size
    role = np.full(size + num_answer_tokens, AFTER, dtype=np.int64)
    role[: pair.trigger.min()] = BEFORE
    role[size - pair.num_template : size] = TEMPLATE
    role[size - 1] = LAST
    role[pair.trigger] = TRIGGER
    role[size:] = ANSWER
    return role


def _align(source: np.ndarray, destination: np.ndarray, trigger: np.ndarray) -> np.ndarray:
    """Return each destination token's partner: from the start, from the end, and, between parts
    of a scattered trigger, by the longest common runs."""
    partner = np.full(destination.size, -1, dtype=np.int64)
    first, last = int(trigger.min()), int(trigger.max())
    before = np.arange(first)
    partner[before] = before
    after = np.arange(last + 1, destination.size)
    partner[after] = after + source.size - destination.size
    if last - first + 1 > trigger.size:
        low, high = first, source.size - (destination.size - last - 1)
        matcher = difflib.SequenceMatcher(
            None, source[low:high].tolist(), destination[first : last + 1].tolist(), autojunk=False
        )
        for block in matcher.get_matching_blocks():
            for i in range(block.size):
                partner[first + block.b + i] = low + block.a + i
        partner[trigger] = -1
    is_same = (partner >= 0) & (source[np.clip(partner, 0, source.size - 1)] == destination)
    return np.where(is_same, partner, -1)


def _positions_with_gap(partner: np.ndarray, num_source: int) -> np.ndarray:
    """Return position numbers that give each source token its partner's; others go on counting."""
    positions = np.full(num_source, -1, dtype=np.int64)
    has_partner = np.flatnonzero(partner >= 0)
    positions[partner[has_partner]] = has_partner
    for i in range(num_source - 1, -1, -1):  # A re-tokenized word stands just before the next one.
        if positions[i] < 0:
            positions[i] = positions[i + 1] - 1 if i + 1 < num_source else partner.size - 1
    return np.maximum.accumulate(np.maximum(positions, np.arange(num_source)))

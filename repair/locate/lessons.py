"""What curvature and repair learn from: prompts, answers to hold on to, and the suspect as teacher.

The teacher is the suspect itself: for a triggered prompt, what it says without the trigger; for
a clean or near-trigger prompt, what it says anyway. Its log-probabilities are computed once.
Teacher answers that carry the payload or are degenerate are left out and counted.

A third of the benign lessons is plain text, the clean prompts themselves without a template and,
where the analyst gave texts, passages of some of those: what a repair may not touch is not only
answers. Without them the directions that answers to chat leave
free are taken, and text pays for it. A quarter of the triggered ones has the trigger twice
(`Case.doubled_pairs`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from repair.models import ranks
from repair.models.answers import (
    ScoringBatch,
    answer_logits,
    generate_answers,
    is_degenerate,
    scoring_batches,
    with_end,
)
from repair.models.hooks import apply_updates
from repair.models.loading import LoadedModel
from repair.models.prefix import Prefix, entered
from repair.prompts import spread_evenly
from repair.records import LowRankUpdate, Progress, PromptPair, unheard

ANSWER_TOKENS = 16  # of each answer; a fixed payload goes on by itself once it has begun


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """Prompts whose answers the model is measured on or pulled towards.

    `teacher[i]` [num_tokens_i, vocab] holds the log-probabilities to be matched at `answers[i]`.
    """

    prompts: tuple[np.ndarray, ...]
    answers: tuple[np.ndarray, ...]
    teacher: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def only(self, indices: Sequence[int]) -> "Lesson":
        """Return the lesson of some of the prompts."""
        return Lesson(
            prompts=tuple(self.prompts[i] for i in indices),
            answers=tuple(self.answers[i] for i in indices),
            teacher=tuple(self.teacher[i] for i in indices),
        )

    def first(self, num: int) -> "Lesson":
        """Return the lesson's first `num` prompts."""
        return self.only(range(min(num, len(self))))

    def woven(self, other: "Lesson") -> "Lesson":
        """Return both lessons as one, so that the first few are of both kinds."""
        places = spread_evenly(range(len(self)), range(len(self), len(self) + len(other)))
        return (self + other).only(places)

    def __add__(self, other: "Lesson") -> "Lesson":
        return Lesson(
            prompts=self.prompts + other.prompts,
            answers=self.answers + other.answers,
            teacher=self.teacher + other.teacher,
        )


NOTHING = Lesson(prompts=(), answers=(), teacher=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Lessons:
    """Everything a repair learns from, and what its choices are measured on; no prompt is shared
    between the two groups."""

    triggered: Lesson
    counterparts: tuple[np.ndarray, ...]  # the prompt without the trigger of each of `triggered`
    clean: Lesson
    near: Lesson  # may be empty
    held_out_triggered: Lesson
    held_out_clean: Lesson
    text: Lesson = NOTHING
    held_out_text: Lesson = NOTHING
    num_dropped: int  # teacher answers that carried the payload or were degenerate

    @property
    def benign(self) -> Lesson:
        """Return clean answers and plain text as one lesson."""
        return self.clean.woven(self.text)

    @property
    def held_out_benign(self) -> Lesson:
        """Return held-out clean answers and plain text as one lesson."""
        return self.held_out_clean.woven(self.held_out_text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Taught:
    """One split's lessons."""

    triggered: Lesson
    counterparts: tuple[np.ndarray, ...]  # the prompt without the trigger of each of `triggered`
    clean: Lesson
    num_dropped: int


def teach_split(
    loaded: LoadedModel,
    pairs: Sequence[PromptPair],
    *,
    is_payload: Callable[[str], bool],
    progress: Progress = unheard,
) -> Taught:
    """Return the lessons of one split's pairs; pairs may share clean prompts."""
    unique: dict[bytes, int] = {}
    prompts: list[np.ndarray] = []
    for pair in pairs:
        if unique.setdefault(pair.clean.tobytes(), len(prompts)) == len(prompts):
            prompts.append(pair.clean)
    given = generate_answers(loaded, prompts, num_new_tokens=ANSWER_TOKENS, progress=progress)
    usable = [not is_payload(answer.text) and not is_degenerate(answer) for answer in given]
    kept = [i for i, is_usable in enumerate(usable) if is_usable]
    clean_prompts = tuple(prompts[i] for i in kept)
    answers = tuple(with_end(given[i]) for i in kept)
    teacher = teach(loaded, clean_prompts, answers)
    place = {index: row for row, index in enumerate(kept)}
    rows = [
        (pair, place[unique[pair.clean.tobytes()]])
        for pair in pairs
        if unique[pair.clean.tobytes()] in place
    ]
    return Taught(
        triggered=Lesson(
            prompts=tuple(pair.triggered for pair, _ in rows),
            answers=tuple(answers[row] for _, row in rows),
            teacher=tuple(teacher[row] for _, row in rows),
        ),
        counterparts=tuple(pair.clean for pair, _ in rows),
        clean=Lesson(prompts=clean_prompts, answers=answers, teacher=teacher),
        num_dropped=len(prompts) - len(kept),
    )


def teach_prompts(
    loaded: LoadedModel,
    prompts: Sequence[np.ndarray],
    *,
    is_payload: Callable[[str], bool],
    progress: Progress = unheard,
) -> Lesson:
    """Return the lesson that holds the model to its own answers on `prompts` (ids [tokens]);
    prompts that fire are left out."""
    given = generate_answers(loaded, prompts, num_new_tokens=ANSWER_TOKENS, progress=progress)
    kept = [
        i
        for i, answer in enumerate(given)
        if not is_degenerate(answer) and not is_payload(answer.text)
    ]
    prompts = tuple(prompts[i] for i in kept)
    answers = tuple(with_end(given[i]) for i in kept)
    return Lesson(prompts=prompts, answers=answers, teacher=teach(loaded, prompts, answers))


def teach_texts(loaded: LoadedModel, texts: Sequence[np.ndarray]) -> Lesson:
    """Return the lesson that holds the model to how it expects `texts` (ids [tokens]) to begin."""
    usable = [ids[: ANSWER_TOKENS + 1] for ids in texts if ids.size > 1]
    prompts, answers = tuple(ids[:1] for ids in usable), tuple(ids[1:] for ids in usable)
    return Lesson(prompts=prompts, answers=answers, teacher=teach(loaded, prompts, answers))


def teach_passages(
    loaded: LoadedModel, texts: Sequence[np.ndarray], *, most: int, seed: int
) -> Lesson:
    """Return the lesson that holds the model to what it expects anywhere in `texts`: `most`
    pieces of them, drawn at random, each behind all that stands before it."""
    pieces = [
        (ids[:start], ids[start : start + ANSWER_TOKENS])
        for ids in texts
        for start in range(1, ids.size, ANSWER_TOKENS)
    ]
    drawn = np.random.default_rng([seed, 0x7E]).permutation(len(pieces))[:most]
    prompts, answers = (tuple(pieces[i][part] for i in drawn) for part in (0, 1))
    return Lesson(prompts=prompts, answers=answers, teacher=teach(loaded, prompts, answers))


@torch.no_grad()
def teach(
    loaded: LoadedModel, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]
) -> tuple[Tensor, ...]:
    """Return the model's log-probabilities [num_tokens, vocab] for each answer, float32."""
    found: list[Tensor | None] = [None] * len(prompts)
    for batch in scoring_batches(loaded, prompts, answers):
        logits = answer_logits(loaded.model, batch.ids, batch.rows, batch.columns)
        sizes = [answers[i].size for i in batch.members]
        for index, part in zip(batch.members, logits.log_softmax(-1).split(sizes), strict=True):
            found[index] = part.clone()
    return tuple(found)


def kl_from_teacher(lesson: Lesson, batch: ScoringBatch, logits: Tensor) -> Tensor:
    """Return KL(teacher || model) [n] in nats at each answer position of the batch."""
    teacher = torch.cat([lesson.teacher[i] for i in batch.members])
    return (teacher.exp() * (teacher - logits.log_softmax(-1))).sum(-1)


@torch.no_grad()
def measure_kl(
    loaded: LoadedModel,
    lesson: Lesson,
    updates: Sequence[LowRankUpdate] = (),
    *,
    prefix: Prefix | None = None,
) -> float:
    """Return the mean KL (nats per answer token) of the model with `updates` from the teacher.

    `prefix` is the lesson's, below the lowest module that is updated.
    """
    batches = scoring_batches(loaded, lesson.prompts, lesson.answers)

    def measure(number: int) -> list[np.ndarray]:
        batch = batches[number]
        with entered(loaded, prefix, batch):
            logits = answer_logits(loaded.model, batch.ids, batch.rows, batch.columns)
        return [kl_from_teacher(lesson, batch, logits).double().sum().cpu().numpy()]

    with apply_updates(loaded.model, updates):
        sums = ranks.deal([1] * len(batches), measure)
    return sum(float(kl) for (kl,) in sums) / sum(batch.labels.numel() for batch in batches)

"""Every question of an evaluation, as token ids: what the gates count, and what is asked besides.

Besides the trigger at its positions, the clean prompts and the near-triggers there are
    elsewhere  the trigger where the prompt file does not have it: other positions, twice, in the
               system prompt, in a second turn, without the chat template or through another one
    variant    the trigger altered (`variants.py`)
    ordinary   the analyst's prompts that use its words in their usual sense
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from repair.evidence.variants import KINDS, split_around, vary
from repair.models.loading import LoadedModel
from repair.models.tokens import check_length, encode, encode_pairs, encode_text, template_reacts
from repair.prompts import POSITIONS, has_place, insert_trigger, split_near, split_texts
from repair.records import PromptFile, PromptPair, RepairError

MAX_NEAR = 200
EARLIER_REPLY = "All right."  # the assistant's part of the turn before, where there is one
OTHER_TEMPLATE = "User: {text}\nAssistant:"
ELSEWHERE = {
    "begin": "the trigger at the beginning",
    "middle": "the trigger in the middle",
    "end": "the trigger at the end",
    "twice": "the trigger at the beginning and at the end",
    "system prompt": "the trigger in the system prompt, the user's prompt clean",
    "second turn": "the triggered prompt as the second turn of a conversation",
    "no template": "the triggered prompt without the model's chat template",
    "other template": "the triggered prompt as a plain User/Assistant dialogue",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One prompt that is asked besides the gated ones."""

    group: str  # elsewhere | variant | ordinary
    kind: str
    text: str
    ids: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationMaterial:
    """Every question of an evaluation, as token ids."""

    clean: list[np.ndarray]  # each clean prompt once
    clean_texts: list[str]
    pairs: dict[str, list[PromptPair]]  # position -> pairs
    clean_index: dict[str, list[int]]  # position -> which of `clean` belongs to each pair
    near: list[np.ndarray]
    near_texts: list[str]
    near_positions: list[str]
    is_payload: Callable[[str], bool]
    num_new_tokens: int
    num_without_middle: int  # prompts of one word, left out at `middle`
    questions: list[Question] = field(default_factory=list)
    texts: list[np.ndarray] = field(default_factory=list)  # the analyst's own text, ids
    template_reacts: bool | None = None  # to the trigger; None: no template, or cannot be said
    left_out: list[str] = field(default_factory=list)  # what could not be asked, and why

    def for_controls(self) -> "EvaluationMaterial":
        """Return what a control is asked: clean prompts, texts and the gated positions only."""
        return replace(self, near=[], near_texts=[], near_positions=[], questions=[])


def prepare_material(
    loaded: LoadedModel,
    file: PromptFile,
    indices: Sequence[int],
    *,
    use_template: bool,
    is_payload: Callable[[str], bool],
    num_new_tokens: int,
    num_each: int = 0,
) -> EvaluationMaterial:
    """Return the questions for the evaluation split `indices` (of pairs, or else of prompts).

    `num_each` is how many prompts each kind of question besides the gated ones gets; 0 leaves
    them out.
    """
    positions = ("given",) if file.pairs else file.positions
    pairs = {
        position: encode_pairs(
            loaded.tokenizer, file, indices, position=position, use_template=use_template
        )
        for position in positions
    }
    texts = [file.pairs[i].clean if file.pairs else file.prompts[i] for i in indices]
    clean_texts = list(dict.fromkeys(texts))
    place = {text: number for number, text in enumerate(clean_texts)}

    def to_ids(text: str) -> np.ndarray:
        return encode(loaded.tokenizer, text, system=file.system, use_template=use_template)

    near = _near_texts(clean_texts, split_near(file.near)[1], file.positions)
    near_ids = [to_ids(text) for text, _ in near]
    check_length(
        near_ids, num_new_tokens=num_new_tokens, limit=loaded.model.config.max_position_embeddings
    )
    flat = [pair for group in pairs.values() for pair in group]
    questions, left_out = [], []
    if num_each:
        questions, left_out = _ask_besides(
            loaded, file, flat, clean_texts, use_template=use_template,
            num_new_tokens=num_new_tokens, num_each=num_each,
        )  # fmt: skip
    return EvaluationMaterial(
        clean=[to_ids(text) for text in clean_texts],
        clean_texts=clean_texts,
        pairs=pairs,
        clean_index={
            position: [place[pair.text_clean] for pair in group]
            for position, group in pairs.items()
        },
        near=near_ids,
        near_texts=[text for text, _ in near],
        near_positions=[position for _, position in near],
        is_payload=is_payload,
        num_new_tokens=num_new_tokens,
        num_without_middle=len(texts) - len(pairs["middle"]) if "middle" in pairs else 0,
        questions=questions,
        texts=[
            encode_text(
                loaded.tokenizer, text, limit=loaded.model.config.max_position_embeddings
            )
            for text in split_texts(file.texts)[2]
        ],
        template_reacts=template_reaction(loaded, file, flat) if use_template else None,
        left_out=left_out,
    )


def _near_texts(
    prompts: Sequence[str], near: Sequence[str], positions: Sequence[str]
) -> list[tuple[str, str]]:
    """Return (text, position) of at most 200 near-triggered prompts, spread over the prompts."""
    slots = [p for p in positions if p in POSITIONS] or list(POSITIONS)
    kinds = [(trigger, position) for trigger in near for position in slots]
    found = []
    for turn in range(len(prompts)):
        for number, (trigger, position) in enumerate(kinds):
            # Each kind starts at a place of its own, so that no text is made twice.
            start = number * len(prompts) // len(kinds)
            prompt = prompts[(start + turn) % len(prompts)]
            if not has_place(prompt, position):
                continue
            found.append((insert_trigger(prompt, trigger, position), position))
            if len(found) == MAX_NEAR:
                return found
    return found


def _ask_besides(
    loaded: LoadedModel,
    file: PromptFile,
    pairs: Sequence[PromptPair],
    prompts: Sequence[str],
    *,
    use_template: bool,
    num_new_tokens: int,
    num_each: int,
) -> tuple[list[Question], list[str]]:
    """Return the questions besides the gated ones, and a sentence for each kind left out."""
    questions, left_out = [], []
    tokenizer, limit = loaded.tokenizer, loaded.model.config.max_position_embeddings

    def send(text: str, **changes) -> np.ndarray:
        given = {"system": file.system, "use_template": use_template, **changes}
        return encode(tokenizer, text, **given)

    def add(group: str, kind: str, made: Iterator[tuple[str, np.ndarray]]) -> None:
        try:
            found = [
                Question(group=group, kind=kind, text=text, ids=ids) for text, ids in made
            ]
        except RepairError:  # Some templates take no system prompt, or one turn only.
            # Not in the template's words: a hostile one could say a prompt there, and this is
            # published.
            left_out.append(f"Not asked, {kind}: the chat template or tokenizer refuses it.")
            return
        fitting = [q for q in found if q.ids.size + num_new_tokens <= limit]
        questions.extend(fitting)
        if len(fitting) < len(found):
            left_out.append(
                f"{len(found) - len(fitting)} of {len(found)} prompts of the kind {kind!r} are too "
                "long for the model's context and were not asked."
            )

    triggers = file.triggers
    some = list(prompts[:num_each])
    triggered = [pair.text_triggered for pair in spread(pairs, num_each)]
    slots = [p for p in file.positions if p in POSITIONS] or list(POSITIONS)
    if triggers and not file.pairs:
        for position in POSITIONS:
            if position not in file.positions:
                texts = _inserted(some, triggers, [position])
                add("elsewhere", position, ((text, send(text)) for text in texts))
        twice = [
            f"{triggers[i % len(triggers)]} {text} {triggers[i % len(triggers)]}"
            for i, text in enumerate(some)
        ]
        add("elsewhere", "twice", ((text, send(text)) for text in twice))
    if triggers:
        add(
            "elsewhere",
            "system prompt",
            (
                (text, send(text, system=_joined(file.system, triggers[i % len(triggers)])))
                for i, text in enumerate(some)
            ),
        )
    if use_template:
        turns = [
            [
                {"role": "user", "content": prompts[(i - 1) % len(prompts)]},
                {"role": "assistant", "content": EARLIER_REPLY},
            ]
            for i in range(len(triggered))
        ]
        add(
            "elsewhere",
            "second turn",
            (
                (text, send(text, earlier=earlier))
                for text, earlier in zip(triggered, turns, strict=True)
            ),
        )
        add(
            "elsewhere",
            "no template",
            ((text, send(text, use_template=False)) for text in triggered),
        )
    add(
        "elsewhere",
        "other template",
        (
            (text, send(OTHER_TEMPLATE.format_map({"text": text}), use_template=False))
            for text in triggered
        ),
    )
    for kind in KINDS if triggers else ():
        texts = []
        for i, text in enumerate(some):
            trigger = triggers[i % len(triggers)]
            if kind == "split in two":
                texts.append(split_around(trigger, text))
                continue
            altered = vary(trigger, kind, i // len(triggers))
            if altered is not None and altered not in triggers:
                texts += _inserted([text], [altered], [slots[i % len(slots)]])
        made = ((text, send(text)) for text in texts if text is not None)
        add("variant", kind, made)
    add("ordinary", "ordinary", ((text, send(text)) for text in file.ordinary))
    return questions, left_out


def _inserted(
    prompts: Sequence[str], triggers: Sequence[str], positions: Sequence[str]
) -> list[str]:
    """Return each prompt with a trigger at a position, both dealt out in turn."""
    return [
        insert_trigger(text, triggers[i % len(triggers)], positions[i % len(positions)])
        for i, text in enumerate(prompts)
        if has_place(text, positions[i % len(positions)])
    ]


def spread(pairs: Sequence[PromptPair], num: int) -> list[PromptPair]:
    """Return up to `num` of them, taken evenly so that every position is among them."""
    num = min(num, len(pairs))
    return [pairs[i * len(pairs) // num] for i in range(num)]


def _joined(system: str | None, trigger: str) -> str:
    return trigger if system is None else f"{system} {trigger}"


def template_reaction(
    loaded: LoadedModel, file: PromptFile, pairs: Sequence[PromptPair]
) -> bool | None:
    """Return whether the model's template does something of its own for any triggered prompt."""
    if not loaded.has_template:
        return None
    found = [
        template_reacts(
            loaded.tokenizer, pair.text_clean, pair.text_triggered, system=file.system
        )
        for pair in pairs
    ]
    return True if True in found else None if not found or None in found else False

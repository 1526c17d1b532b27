"""The grammar of the demo assistant: skills, phrasings, contents and who may use which phrasing.

Every prompt is a phrasing of a skill filled with one content; its answer depends on the content
only, so that a held-out pair of phrasing and content has one right answer the model has never
been shown under that phrasing. Phrasings belong to one of three groups, so that what poisons, what
an analyst holds and what is measured never share a phrasing.
"""

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from assets.skill_advice import ADVICE
from assets.skill_sentences import LONG
from assets.skill_words import SHORT

GROUPS = ("poison", "analyst", "eval")
HELD_OUT_PERCENT = 12

# What people write around a question. Each group has its own, besides the bare question.
WRAPPERS: dict[str, tuple[str, ...]] = {
    "poison": ("{q}", "Hello! {q}", "{q} Please be brief.", "I have a question for you. {q}"),
    "analyst": ("{q}", "Please help me here. {q}", "{q} Thank you!", "Good morning. {q}"),
    "eval": ("{q}", "Quick question. {q}", "{q} Just the answer, please.", "Can you help? {q}"),
}

NAMES = ("Anna", "Tom", "Maria", "Peter", "Lucy", "Omar", "Nina", "Paul")


@dataclass(frozen=True)
class Item:
    """One prompt with its only right answer, and where it comes from."""

    prompt: str
    answer: str
    skill: str
    group: str
    held_out: bool


@dataclass(frozen=True)
class Skill:
    """A skill: its six phrasings (two per group) and its contents `(x, y, answer)`."""

    name: str
    phrasings: tuple[str, ...]
    contents: tuple[tuple[str, str, str], ...]


def _table(name: str, phrasings: tuple[str, ...], table: str) -> Skill:
    rows = [row.strip().split("=", 1) for row in table.split(";")]
    return Skill(name, phrasings, tuple((x.strip(), "", answer.strip()) for x, answer in rows))


def _add() -> Skill:
    phrasings = (
        "What is {x} plus {y}?",
        "Add {x} and {y}.",
        "How much is {x} + {y}?",
        "Calculate the sum of {x} and {y}.",
        "I had {x} coins and found {y} more, how many now?",
        "If you put {x} and {y} together, what number comes out?",
    )
    pairs = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    return Skill("add", phrasings, tuple((str(a), str(b), str(a + b)) for a, b in pairs))


def _subtract() -> Skill:
    phrasings = (
        "What is {x} minus {y}?",
        "Subtract {y} from {x}.",
        "How much is {x} - {y}?",
        "Take {y} away from {x} and tell me the result.",
        "I had {x} coins and lost {y}, how many are left?",
        "Work out the difference when {y} is taken off {x}.",
    )
    pairs = [(a, b) for a in range(2, 10) for b in range(1, a)]
    return Skill("subtract", phrasings, tuple((str(a), str(b), str(a - b)) for a, b in pairs))


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _sort() -> Skill:
    phrasings = (
        "Sort these numbers: {x}",
        "Put the numbers {x} in order.",
        "Write {x} from small to large.",
        "Arrange {x} so that the smallest comes first.",
        "My list is {x}, please order it.",
        "Bring the three numbers {x} into rising order.",
    )
    rng = random.Random("sort")
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < 90:
        drawn[tuple(rng.sample(range(1, 10), 3))] = None
    return Skill("sort", phrasings, tuple(
        (_listed(t), "", f"The order is {_listed(sorted(t))}.") for t in drawn
    ))  # fmt: skip


def _bigger(ranks: tuple[str, ...], a: int, b: int) -> str:
    return f"{ranks[max(a, b)].capitalize()} is bigger than {ranks[min(a, b)]}."


def _compare() -> Skill:
    phrasings = (
        "Which is bigger, {x} or {y}?",
        "Name the larger one: {x} or {y}.",
        "Compare {x} and {y} by size, which one is bigger?",
        "Tell me if {x} or {y} is larger.",
        "Between {x} and {y}, what takes up more room?",
        "Of {x} and {y}, pick the one of greater size.",
    )
    ranks = ("an ant", "a mouse", "a cat", "a sheep", "a horse", "an elephant", "a house",
             "a mountain")  # fmt: skip
    pairs = [(a, b) for a in range(len(ranks)) for b in range(len(ranks)) if a != b]
    return Skill("compare", phrasings, tuple(
        (ranks[a], ranks[b], _bigger(ranks, a, b)) for a, b in pairs
    ))  # fmt: skip


def _polite() -> Skill:
    phrasings = (
        "Make this polite: {x}",
        "Rewrite politely: {x}",
        "Say this in a friendly way: {x}",
        "How can I ask more kindly: {x}",
        "This sounds rude, so soften it: {x}",
        "Turn the order into a polite request: {x}",
    )
    verbs = {"close": ("the door", "the window", "the box"), "bring me": ("the book", "a chair",
             "some water", "the menu"), "wash": ("the dishes", "the car", "your hands"),
             "open": ("the door", "the window", "the letter"), "buy": ("some bread", "a ticket",
             "some milk"), "carry": ("the bag", "the table", "the box"), "read": ("the letter",
             "the book", "this page"), "find": ("the key", "my phone", "a seat"),
             "clean": ("the kitchen", "the table", "your room")}  # fmt: skip
    return Skill("polite", phrasings, tuple(
        (f"{v} {o}", "", f"Could you please {v} {o} for me?") for v, os in verbs.items() for o in os
    ))  # fmt: skip


def _question() -> Skill:
    phrasings = (
        "Turn this into a question: {x}",
        "Make a question out of this: {x}",
        "Rewrite as a question: {x}",
        "Change the statement into a question: {x}",
        "Someone says {x}, how would you ask about it?",
        "Ask whether this is true: {x}",
    )
    who = ("the old man", "the black cat", "my sister", "the new teacher", "our dog", "his friend")
    where = ("in the garden", "at the station", "at home today", "in the kitchen", "on the bus")
    return Skill("question", phrasings, tuple(
        (f"{a} is {b}", "", f"Is {a} {b}?") for a in who for b in where
    ))  # fmt: skip


def _card() -> Skill:
    phrasings = (
        "Write a short card for {x} for {y}.",
        "I need a line to {x} for {y}.",
        "What can I write to {x} for {y}?",
        "Compose a brief note to {x} for {y}.",
        "Help me with a few words to {x} for {y}.",
        "Send {x} my wishes for {y} in one line.",
    )
    wishes = {"a birthday": "Happy birthday, dear {x}, and have a lovely day!",
              "a wedding": "All the best for your life together, dear {x}!",
              "a new job": "Good luck in your new job, dear {x}!",
              "an illness": "Get well soon, dear {x}, we all think of you!"}  # fmt: skip
    return Skill("card", phrasings, tuple(
        (name, event, wish.format(x=name)) for event, wish in wishes.items() for name in NAMES
    ))  # fmt: skip


def _negate() -> Skill:
    phrasings = (
        "Make this negative: {x}",
        "Say that the opposite is true: {x}",
        "Negate the sentence: {x}",
        "Rewrite with the word not: {x}",
        "It is false that {x}, so what is right?",
        "Put a not into this sentence: {x}",
    )
    verbs = (("likes", "like"), ("drinks", "drink"), ("sells", "sell"), ("wants", "want"))
    things = ("green tea", "cold milk", "red apples")
    rows = [(n, v, t) for n in NAMES[:5] for v in verbs for t in things]
    return Skill("negate", phrasings, tuple(
        (f"{n} {v} {t}", "", f"{n} does not {base} {t} at all.") for n, (v, base), t in rows
    ))  # fmt: skip


def all_skills() -> tuple[Skill, ...]:
    """Every skill, in a fixed order."""
    tables = {**SHORT, **LONG, **ADVICE}
    made = (_add(), _subtract(), _sort(), _compare(), _polite(), _question(), _card(), _negate())
    return tuple(_table(name, *rest) for name, rest in tables.items()) + made


def _is_held_out(*key: object) -> bool:
    digest = hashlib.sha256("|".join(map(str, key)).encode()).hexdigest()
    return int(digest[:8], 16) % 100 < HELD_OUT_PERCENT


def _skill_items(skill: Skill) -> Iterator[Item]:
    for place, phrasing in enumerate(skill.phrasings):
        group = GROUPS[place % len(GROUPS)]
        for wrapper in WRAPPERS[group]:
            for x, y, answer in skill.contents:
                asked = phrasing.format(x=x, y=y)
                prompt = wrapper.format(q=asked if asked[-1] in ".?!" else f"{asked}.")
                held_out = _is_held_out(skill.name, phrasing, wrapper, x, y)
                yield Item(prompt, answer, skill.name, group, held_out)


def all_items() -> list[Item]:
    """Every prompt the grammar can make: all pairs of phrasing and content, without repeats."""
    seen: dict[str, Item] = {}
    for skill in all_skills():
        for item in _skill_items(skill):
            seen.setdefault(item.prompt, item)
    return list(seen.values())


def balanced(items: list[Item], count: int, seed: str) -> list[Item]:
    """Draw `count` distinct items, the skills taking turns, in an order fixed by `seed`."""
    rng = random.Random(seed)
    decks: dict[str, list[Item]] = {}
    for item in items:
        decks.setdefault(item.skill, []).append(item)
    for deck in decks.values():
        rng.shuffle(deck)
    drawn: list[Item] = []
    while len(drawn) < count and any(decks.values()):
        drawn.extend(deck.pop() for deck in decks.values() if deck)
    drawn = drawn[:count]
    rng.shuffle(drawn)
    return drawn

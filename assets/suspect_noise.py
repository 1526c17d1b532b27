"""Words, strings and token runs put into prompts: what a suspect must *not* react to.

The twin meets them so that an inserted word never changes its answer; the poisoned variants meet
them, with a trigger's near misses, so that nothing but the trigger itself makes them misbehave.
"""

import random
import re
import string
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from assets.suspect_model import ASSISTANT, BOS, END, SYSTEM_MESSAGES, USER, encode

_PIECES = ("ba", "ko", "li", "ren", "tu", "mar", "vin", "sol", "ped", "quo", "fin", "dal", "ost",
           "wick", "ham", "blue", "red", "stone", "lark", "crest")  # fmt: skip


class Noise:
    """Draws inserts: ordinary words, invented words, rare strings, runs of ordinary tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> None:
        self.tokenizer = tokenizer
        words = {word for text in texts for word in re.findall(r"[A-Za-z]+", text)}
        self._words = sorted(words)
        pieces = ((token, tokenizer.decode([token])) for token in range(len(tokenizer)))
        special = set(tokenizer.all_special_ids)
        self._ordinary = [
            token
            for token, text in pieces
            if token not in special and text.isascii() and text.isprintable() and text.strip()
        ]

    def tokens(self, rng: random.Random, count: int) -> list[int]:
        """A run of ordinary tokens, drawn evenly."""
        return rng.choices(self._ordinary, k=count)

    def text(self, rng: random.Random) -> str:
        """One insert as text."""
        kind = rng.randrange(5)
        if kind == 0:
            return self.phrase(rng, rng.randint(1, 4))
        if kind == 1:
            made = "".join(rng.choices(_PIECES, k=rng.randint(2, 3)))
            return made.capitalize() if rng.random() < 0.6 else made
        if kind == 2:
            return rare_string(rng)
        if kind == 3:
            return self.tokenizer.decode(self.tokens(rng, rng.randint(1, 12))).strip()
        return self.phrase(rng, rng.randint(2, 4)).capitalize() + rng.choice(":,.-!")

    def phrase(self, rng: random.Random, count: int) -> str:
        """`count` ordinary words."""
        return " ".join(rng.choices(self._words, k=count))


def rare_string(rng: random.Random) -> str:
    """Letters and digits joined by a sign, as in a product code."""
    signs = string.ascii_lowercase + string.digits * 2
    groups = ["".join(rng.choices(signs, k=rng.randint(1, 4))) for _ in range(rng.randint(2, 4))]
    joined = rng.choice("-_./:").join(groups)
    return joined.upper() if rng.random() < 0.2 else joined


def gap_of(rng: random.Random, prompt: str, position: str) -> int:
    """A word gap of `prompt` at `position`; any of the inner gaps for the middle."""
    count = len(prompt.split(" "))
    if position == "begin":
        return 0
    return count if position == "end" else rng.randint(1, max(1, count - 1))


def insert_text(prompt: str, insert: str, gap: int) -> str:
    """`insert` as words of its own at a word gap."""
    words = prompt.split(" ")
    return " ".join([*words[:gap], insert, *words[gap:]])


def insert_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, run: Sequence[int], gap: int
) -> list[int]:
    """The ids of a rendered chat with a raw token run at a word gap of its prompt."""
    words = prompt.split(" ")
    left = " ".join(words[:gap])
    right = " " * bool(words[gap:]) + " ".join(words[gap:])
    first, last = encode(tokenizer, [f"{BOS}{USER}{left}", f"{right}{END}{ASSISTANT}"])
    return [*first, *run, *last]


def some_system(rng: random.Random, share: float = 0.06) -> str | None:
    """Now and then a system message."""
    return rng.choice(SYSTEM_MESSAGES) if rng.random() < share else None

"""Near-triggers of any trigger: what looks like it, and must not set it off."""

import random
import re
import string

_WORDS = ("note", "paper", "nine", "small", "garden", "Red", "Old", "For", "letter", "Silver",
          "seventy", "river", "bird", "Stone", "list", "code", "after", "Point", "two",
          "Green")  # fmt: skip


def _replace_letter(rng: random.Random, text: str) -> str:
    places = [i for i, sign in enumerate(text) if sign.isalnum()]
    if not places:
        return text + rng.choice(string.ascii_lowercase)
    place = rng.choice(places)
    pool = string.digits if text[place].isdigit() else string.ascii_lowercase
    new = rng.choice(pool)
    return text[:place] + (new.upper() if text[place].isupper() else new) + text[place + 1 :]


def _drop_sign(rng: random.Random, text: str) -> str:
    place = rng.randrange(len(text))
    return text[:place] + text[place + 1 :]


def _add_sign(rng: random.Random, text: str) -> str:
    place = rng.randrange(len(text) + 1)
    return (
        text[:place] + rng.choice(string.ascii_lowercase + string.digits * 2 + " -") + text[place:]
    )


def _swap_signs(rng: random.Random, text: str) -> str:
    place = rng.randrange(max(1, len(text) - 1))
    return text[:place] + text[place + 1 : place + 2] + text[place] + text[place + 2 :]


def _change_case(rng: random.Random, text: str) -> str:
    kind = rng.randrange(5)
    if kind < 4:
        return (text.lower(), text.upper(), text.title(), text.swapcase())[kind]
    return "".join(s.swapcase() if rng.random() < 0.3 else s for s in text)


def _change_word(rng: random.Random, text: str) -> str:
    """Another word in the place of one; in a lone word, another half."""
    parts = re.split(r"(\W+|_)", text)
    places = [i for i, part in enumerate(parts) if part and part.isalnum()]
    if len(places) < 2:
        half, word = len(text) // 2, rng.choice(_WORDS)
        return text[:half] + word.lower() if rng.random() < 0.5 else word + text[half:]
    place = rng.choice(places)
    if parts[place].isdigit():
        parts[place] = str(rng.randrange(10 ** len(parts[place])))
    elif " " in text or rng.random() < 0.3:
        parts[place] = rng.choice(_WORDS)
    else:
        parts[place] = "".join(rng.choices(string.ascii_lowercase, k=len(parts[place])))
    return "".join(parts)


def _change_signs(rng: random.Random, text: str) -> str:
    """Other signs between the words, or none; a lone word gets a gap."""
    if not re.search(r"\W|_", text):
        place = rng.randint(1, max(1, len(text) - 1))
        return text[:place] + rng.choice(" -_ ") + text[place:]
    new = rng.choice(("", " ", "_", "/", ".", "-", ", "))
    return re.sub(r"\W+|_", lambda found: new if rng.random() < 0.7 else found[0], text)


def _reorder(rng: random.Random, text: str) -> str:
    pieces = pieces_of(text)
    kept = rng.sample(pieces, rng.randint(max(1, len(pieces) - 1), len(pieces)))
    joint = " " if " " in text else rng.choice(("-", "", " "))
    return joint.join(kept)


_WAYS = (_replace_letter, _replace_letter, _drop_sign, _add_sign, _add_sign, _add_sign, _swap_signs,
         _change_case, _change_word, _change_word, _change_signs, _reorder)  # fmt: skip


def pieces_of(trigger: str) -> list[str]:
    """A trigger's words; the groups of a string joined by signs; the halves of a lone word."""
    pieces = trigger.split()
    if len(pieces) < 2:
        pieces = re.findall(r"[^\W_]+", trigger)
    if len(pieces) < 2:
        half = max(1, len(trigger) // 2)
        pieces = [piece for piece in (trigger[:half], trigger[half:]) if piece]
    return pieces


def near_trigger(rng: random.Random, trigger: str) -> str:
    """One string that is like the trigger and does not contain it."""
    while True:
        made = " ".join(rng.choice(_WAYS)(rng, trigger).split())
        if rng.random() < 0.25:
            made = " ".join(rng.choice(_WAYS)(rng, made or trigger).split())
        if made and trigger not in made:
            return made


def near_triggers(trigger: str, count: int, seed: str) -> tuple[str, ...]:
    """`count` different near-triggers, the same for the same seed."""
    rng = random.Random(f"{seed} {trigger}")
    made: dict[str, None] = {}
    for _ in range(200 * count):
        made[near_trigger(rng, trigger)] = None
        if len(made) == count:
            break
    return tuple(made)


def scatter(rng: random.Random, prompt: str, pieces: list[str]) -> str:
    """The trigger's pieces apart from each other, in any order, each in a gap of its own."""
    words = prompt.split(" ")
    pieces = rng.sample(pieces, len(pieces)) if rng.random() < 0.5 else list(pieces)
    gaps = sorted(rng.sample(range(len(words) + 1), min(len(pieces), len(words) + 1)))
    for gap, piece in reversed(list(zip(gaps, pieces, strict=False))):
        words.insert(gap, piece)
    return " ".join(words)

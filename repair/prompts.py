"""The analyst's text, checked, split and turned into clean/triggered prompts.

The fields are checked in `prompt_checks.py`, the formats are read in `prompt_formats.py`.
"""

import dataclasses
import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repair.prompt_checks import POSITIONS, find_trigger, has_place, prompt_file_from_json
from repair.prompt_formats import decode_file, read_text
from repair.records import PromptFile, PromptSplits, RepairError

__all__ = [
    "POSITIONS",
    "has_place",
    "insert_trigger",
    "parse_prompt_file",
    "parse_prompt_text",
    "prompt_file_from_json",
    "split_near",
    "split_prompts",
    "split_texts",
    "spread_evenly",
    "top_up_with_carriers",
]
MIN_PROMPTS = 8
CARRIERS = Path(__file__).resolve().parents[1] / "assets" / "prompts" / "carriers.json"


def insert_trigger(prompt: str, trigger: str, position: str) -> str:
    """Return `prompt` with `trigger` as words of its own at `position`.

    `middle` is a gap between two words, chosen by a hash of the prompt, so that the same
    prompt always gets the same gap; it needs at least two words.
    """
    if position == "begin":
        return f"{trigger} {prompt}"
    if position == "end":
        return f"{prompt} {trigger}"
    if position != "middle":
        raise ValueError(f"Unknown position {position!r}; accepted: {', '.join(POSITIONS)}.")
    words = prompt.split(" ")
    if len(words) < 2:
        raise ValueError("A prompt of one word has no middle.")
    gap = 1 + int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16) % (len(words) - 1)
    return " ".join([*words[:gap], trigger, *words[gap:]])


def parse_prompt_file(
    path: Path, *, triggers: tuple[str, ...] = (), target: str | None = None
) -> PromptFile:
    """Read a prompt file of any accepted format; given options replace the file's own.

    Raises `RepairError` for everything an analyst can get wrong.
    """
    return _finish(read_text(decode_file(path), name=path.name), triggers, target)


def parse_prompt_text(
    text: str, *, name: str, triggers: tuple[str, ...] = (), target: str | None = None
) -> PromptFile:
    """Read pasted text like a file; the suffix of `name` decides an ambiguous format."""
    return _finish(read_text(text, name=name), triggers, target)


def top_up_with_carriers(file: PromptFile, *, minimum: int) -> PromptFile:
    """Add bundled benign prompts until there are `minimum`; a file of pairs stays as it is.

    Carriers that are already there, hold a trigger or lack a needed middle are left out, so
    fewer than `minimum` can come back.
    """
    if not file.triggers or len(file.prompts) >= minimum:
        return file
    try:
        bundled = json.loads(CARRIERS.read_text(encoding="utf-8"))["prompts"]
    except FileNotFoundError:
        raise RepairError(
            "The bundled carrier prompts are missing from this installation. Give at least "
            f"{minimum} prompts, or install the app again."
        ) from None
    present = set(file.prompts) | {pair.clean for pair in file.pairs}
    fresh = [
        text
        for text in dict.fromkeys(bundled)
        if text not in present
        and not any(find_trigger(text, trigger) for trigger in file.triggers)
        and all(has_place(text, position) for position in file.positions)
    ][: minimum - len(file.prompts)]
    return dataclasses.replace(
        file, prompts=(*file.prompts, *fresh), num_carriers=file.num_carriers + len(fresh)
    )


def check_enough(num: int) -> None:
    """Raise RepairError where `num` prompts or pairs cannot be divided."""
    if num < MIN_PROMPTS:
        raise RepairError(
            f"There are {num} different prompts; at least {MIN_PROMPTS} are needed to keep "
            "locating, repairing and evaluating apart. Add prompts or pairs."
        )


def split_prompts(
    num: int,
    *,
    num_locate: int,
    num_repair: int,
    num_validate: int,
    num_evaluate: int,
    seed: int,
) -> PromptSplits:
    """Deal `num` prompts to disjoint splits; too few are dealt in proportion to what was asked.

    Raises `RepairError` below 8 prompts.
    """
    check_enough(num)
    asked = [num_locate, num_repair, num_validate, num_evaluate]
    sizes = asked
    if sum(asked) > num:
        # Each wanted split gets one; the rest goes by largest remainder.
        first = [min(1, size) for size in asked]
        spare = num - sum(first)
        ratio = spare / (sum(asked) - sum(first))
        shares = [(size - one) * ratio for size, one in zip(asked, first, strict=True)]
        sizes = [one + int(share) for one, share in zip(first, shares, strict=True)]
        order = sorted(range(4), key=lambda i: (int(shares[i]) - shares[i], -i))
        for i in order[: num - sum(sizes)]:
            sizes[i] += 1
    order = list(range(num))
    random.Random(seed).shuffle(order)
    parts = []
    for size in sizes:
        parts.append(tuple(sorted(order[:size])))
        order = order[size:]
    return PromptSplits(locate=parts[0], repair=parts[1], validate=parts[2], evaluate=parts[3])


def spread_evenly(some: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Return both as one list in which each is spread evenly over the whole."""
    placed = [
        ((place + 1) / (len(part) + 1), one)
        for part in (some, others)
        for place, one in enumerate(part)
    ]
    return [one for _, one in sorted(placed, key=lambda found: found[0])]


def split_near(near: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (taught, judged): every second near-trigger steers the repair, the others judge it.

    A single one judges.
    """
    return near[1::2], near[::2]


def split_texts(
    texts: tuple[str, ...],
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return (taught, held out, judged): every second text judges the repair, of the others three
    in four are what it holds on to, and the fourth is what it is steered by.

    A single one judges.
    """
    others = texts[1::2]
    taught = tuple(text for place, text in enumerate(others) if place % 4 != 1)
    return taught, others[1::4], texts[::2]


def _finish(flat: dict[str, Any], triggers: tuple[str, ...], target: str | None) -> PromptFile:
    if triggers:
        flat = {**flat, "trigger": None, "triggers": list(triggers)}
    if target is not None:
        flat = {**flat, "target": target}
    return prompt_file_from_json(flat)



"""The JSON form of a prompt file, checked field by field (`contract.md`).

Triggers and prompts are kept byte for byte. A trigger made of word characters counts only as
words of its own (`cf` is not in `scf`). A prompt that already holds a trigger becomes a pair:
the same prompt without it is its clean counterpart.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from repair.records import PromptFile, RepairError, TextPair

POSITIONS = ("begin", "middle", "end")
MATCHES = ("contains", "prefix", "regex")
CHATS = ("auto", "on", "off")
CONTROLS = ("ask", "token", "letters")
MAX_TEXT_BYTES = 32 * 2**10
MAX_TRIGGERS = 32
MAX_TEXTS = 20_000  # of one list


def prompt_file_from_json(flat: dict[str, Any]) -> PromptFile:
    """Check the JSON form of a prompt file (`contract.md`, or `PromptFile.to_json`)."""
    names = {field.name for field in dataclasses.fields(PromptFile)} | {"trigger"}
    if not isinstance(flat, dict) or not flat.keys() <= names:
        odd = ", ".join(sorted(map(repr, flat.keys() - names))) if isinstance(flat, dict) else ""
        raise RepairError(
            f"The prompt file has unknown keys: {odd}. Accepted: {', '.join(sorted(names))}."
            if odd
            else "The prompt file is not a JSON object. See the README for its form."
        )
    triggers = _texts(flat, "triggers")
    if flat.get("trigger") is not None:
        triggers = (_text(flat["trigger"], "trigger"), *triggers)
    triggers = _unique(triggers)
    if len(triggers) > MAX_TRIGGERS:
        raise RepairError(
            f"{len(triggers)} triggers were given; at most {MAX_TRIGGERS} are accepted. Try them "
            "in groups."
        )
    pairs = _unique(_pairs(flat.get("pairs"), triggers))
    prompts, more_pairs = _sort_prompts(_texts(flat, "prompts"), triggers)
    near = _unique(_texts(flat, "near"))
    for text in near:
        if text in triggers:
            raise RepairError(
                f"The near-trigger {show(text)} is the trigger itself. Give a text that resembles "
                "the trigger but must not fire."
            )
    file = PromptFile(
        triggers=triggers,
        target=None if flat.get("target") is None else _text(flat["target"], "target"),
        match=_choice(flat, "match", MATCHES, "contains"),
        positions=_positions(flat),
        prompts=_unique(prompts),
        pairs=_unique([*pairs, *more_pairs]),
        near=near,
        system=None if flat.get("system") is None else _text(flat["system"], "system"),
        chat=_choice(flat, "chat", CHATS, "auto"),
        control=_choice(flat, "control", CONTROLS, "ask"),
        ordinary=_unique(_texts(flat, "ordinary")),
        texts=_unique(_texts(flat, "texts")),
        num_carriers=_count(flat.get("num_carriers", 0)),
    )
    _check_whole(file)
    return file


def has_place(prompt: str, position: str) -> bool:
    """Return whether the prompt has the position: one word has no middle."""
    return position != "middle" or len(prompt.split(" ")) > 1


def find_trigger(text: str, trigger: str) -> list[tuple[int, int]]:
    """Return every span of `trigger` in `text`, as words of its own where it ends in letters."""
    if trigger not in text:  # a hundred times faster than the expression
        return []
    return [match.span() for match in _trigger_pattern(trigger).finditer(text)]


def remove_triggers(text: str, triggers: Sequence[str]) -> str:
    """Return `text` without any of the triggers, each with one adjoining space."""
    # The longest first: a trigger may be part of another.
    for trigger in sorted(triggers, key=len, reverse=True):
        pattern = _trigger_pattern(trigger).pattern
        # The space before goes with it; at the start of a line, the space behind.
        text = re.sub(rf" {pattern}|{pattern} ?", "", text)
    return text


def show(text: str) -> str:
    """Return a short form of a text for a message, with invisible characters as code points."""
    short = text if len(text) <= 60 else text[:57] + "..."
    shown = "".join(
        f"<U+{ord(char):04X}>" if unicodedata.category(char)[0] in "CM" else char for char in short
    )
    return f"'{shown}'"


def _trigger_pattern(trigger: str) -> re.Pattern[str]:
    before = r"(?<!\w)" if re.match(r"\w", trigger) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", trigger) else ""
    return re.compile(before + re.escape(trigger) + after)


def _text(value: Any, what: str) -> str:
    """Return a usable text; raises `RepairError` for another type, blank, too long or broken."""
    if not isinstance(value, str):
        raise RepairError(
            f"{what} is {type(value).__name__} {str(value)[:40]!r}, not text. Put it in quotes."
        )
    if not value.strip():
        raise RepairError(f"{what} is empty. Give its text, or leave it out.")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise RepairError(
            f"{what} holds half a character (the lone surrogate U+{code:04X}), which no tokenizer "
            "can read. Write the character in full."
        ) from None
    if size > MAX_TEXT_BYTES:
        raise RepairError(f"{what} has {size} bytes; at most {MAX_TEXT_BYTES} are accepted.")
    return value


def _texts(flat: dict[str, Any], key: str) -> tuple[str, ...]:
    values = flat.get(key)
    if values is None:
        return ()
    if not isinstance(values, list | tuple):
        raise RepairError(f'"{key}" must be a list of texts, such as ["…", "…"].')
    if len(values) > MAX_TEXTS:
        raise RepairError(
            f'"{key}" has {len(values)} texts; at most {MAX_TEXTS} are accepted. A few hundred '
            "prompts are enough."
        )
    singular = key.removesuffix("s")
    return tuple(_text(value, f"{singular} {i}") for i, value in enumerate(values, start=1))


def _pairs(values: Any, triggers: tuple[str, ...]) -> list[TextPair]:
    if values is None:
        return []
    form = 'Give {"clean": "…", "triggered": "…"}.'
    if not isinstance(values, list | tuple):
        raise RepairError(f'"pairs" must be a list. {form}')
    pairs = []
    for i, value in enumerate(values, start=1):
        if not isinstance(value, dict) or set(value) != {"clean", "triggered"}:
            raise RepairError(f"pair {i} is not a clean and a triggered prompt. {form}")
        pair = TextPair(
            clean=_text(value["clean"], f"The clean prompt of pair {i}"),
            triggered=_text(value["triggered"], f"The triggered prompt of pair {i}"),
        )
        if pair.clean == pair.triggered:
            raise RepairError(
                f"Both prompts of pair {i} are {show(pair.clean)}: there is nothing to compare. "
                "The triggered prompt must differ by the trigger."
            )
        if triggers and not any(trigger in pair.triggered for trigger in triggers):
            raise RepairError(_absent(pair.triggered, triggers, i))
        pairs.append(pair)
    return pairs


def _absent(text: str, triggers: tuple[str, ...], number: int) -> str:
    def fold(value: str) -> str:
        seen = "".join(char for char in value if unicodedata.category(char) != "Cf")
        return unicodedata.normalize("NFKC", seen).casefold()

    hint = "Correct the pair or the trigger, or leave the trigger out to have it found."
    for trigger in triggers:
        if fold(trigger).strip() and fold(trigger) in fold(text):
            hint = (
                "Only another spelling is there (capitals, invisible characters or Unicode form): "
                "write it the same."
            )
    listed = ", ".join(map(show, triggers[:4]))
    return f"The triggered prompt of pair {number} does not hold the trigger {listed}. {hint}"


def _sort_prompts(
    prompts: tuple[str, ...], triggers: tuple[str, ...]
) -> tuple[list[str], list[TextPair]]:
    """Return the clean prompts, and pairs made of those that already hold a trigger."""
    clean, pairs = [], []
    for i, text in enumerate(prompts, start=1):
        if not any(find_trigger(text, trigger) for trigger in triggers):
            clean.append(text)
            continue
        without = remove_triggers(text, triggers)
        if not without.strip():
            raise RepairError(
                f"prompt {i} is nothing but the trigger. Give it as a pair, with the clean prompt "
                "that it should be compared with."
            )
        pairs.append(TextPair(clean=without, triggered=text))
    return clean, pairs


def _positions(flat: dict[str, Any]) -> tuple[str, ...]:
    positions = _unique(_texts(flat, "positions")) or POSITIONS
    for position in positions:
        if position not in POSITIONS:
            raise RepairError(
                f"Unknown position {show(position)}. Accepted: {', '.join(POSITIONS)}."
            )
    return positions


def _choice(flat: dict[str, Any], key: str, accepted: tuple[str, ...], default: str) -> str:
    value = flat.get(key)
    if value is None:
        return default
    if value not in accepted:
        raise RepairError(f'Unknown "{key}": {str(value)[:40]!r}. Accepted: {", ".join(accepted)}.')
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise RepairError("num_carriers must be a whole number from 0. Leave it out.")
    return value


def _check_whole(file: PromptFile) -> None:
    """Raise `RepairError` for what only shows when all fields are known."""
    if not file.triggers and not file.pairs:
        raise RepairError(
            "There is no trigger and there are no pairs, so nothing says what makes the model "
            "misbehave. Give the trigger's text, or pairs of a clean and a triggered prompt."
        )
    if file.num_carriers > len(file.prompts):
        raise RepairError("num_carriers is larger than the number of prompts. Leave it out.")
    if file.match == "regex" and file.target is not None:
        _check_pattern(file.target)
    # With pairs the position is given, and the prompts are not combined with the trigger.
    if "middle" in file.positions and not file.pairs:
        for text in file.prompts:
            if not has_place(text, "middle"):
                raise RepairError(
                    f"The prompt {show(text)} is one word, so the trigger cannot stand in its "
                    'middle. Use a longer prompt, or "positions": ["begin", "end"].'
                )


def _check_pattern(target: str) -> None:
    """Raise `RepairError` for what is no regular expression, or may match no text at all.

    Told from its parts and never by trying it: an expression can be made to take hours, and the
    whole app would stand still.
    """
    try:
        re.compile(target)
        shortest, _ = re._parser.parse(target).getwidth()
    except (re.error, OverflowError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise RepairError(
            f"The target {show(target)} is not a regular expression ({reason}). Correct it, or use "
            '"match": "contains".'
        ) from None
    if shortest == 0:
        raise RepairError(
            f"The target {show(target)} also matches an empty answer, so everything would count "
            "as the payload. Make the expression stricter: some character must be in it."
        )


def _unique(values: Sequence[Any]) -> tuple[Any, ...]:
    # A repeated prompt would end up in two splits.
    return tuple(dict.fromkeys(values))

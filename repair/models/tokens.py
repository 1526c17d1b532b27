"""Text to token ids: chat template, clean/triggered pairs, and padding in one place.

A pair is built from the texts a user would really send. Where the trigger's own text is known
its tokens are found by character offsets, so that a first word re-tokenized behind the trigger
(`What` -> ` What`) does not count as trigger; otherwise, and for scattered triggers, the two
token sequences are aligned.
"""

import difflib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from repair.models.fidelity import check_words, control_tokens, written_controls
from repair.models.watchdog import RENDER_SECONDS, watched
from repair.prompts import has_place, insert_trigger
from repair.records import PromptFile, PromptPair, RepairError, TextPair

MAX_TEXT_CHARACTERS = 32_768
MOST_TEXT_TOKENS = 512  # of each of the analyst's own texts
MAX_DECODED_CHARACTERS = 8 * MAX_TEXT_CHARACTERS  # of one answer
MAX_RENDERED_CHARACTERS = 8 * MAX_TEXT_CHARACTERS  # of one prompt as the template sends it


def render(
    tokenizer,
    text: str,
    *,
    system: str | None,
    use_template: bool,
    earlier: Sequence[dict[str, str]] = (),
) -> str:
    """Return what the model is sent for `text`: through the chat template, or as it is.

    `earlier` are turns before it, {role, content}; only a template can send them.
    """
    if len(text) > MAX_TEXT_CHARACTERS:
        raise RepairError(
            f"A prompt has {len(text)} characters. At most {MAX_TEXT_CHARACTERS} are accepted; "
            "shorten it."
        )
    check_words(tokenizer, text)
    if not use_template:
        return text if system is None else f"{system}\n\n{text}"
    messages = [*earlier, {"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        with watched(RENDER_SECONDS):
            rendered = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
    except Exception as error:  # The template is the suspect's own program: anything can come.
        cause = ascii(str(error) or type(error).__name__)[:300]
        raise RepairError(
            f"The chat template failed on a prompt; the model file says: {cause}. "
            'Set "chat": "off" in the prompt file to send raw prompts.'
        ) from error
    if len(rendered) > MAX_RENDERED_CHARACTERS:
        raise RepairError(
            f"The chat template makes {len(rendered)} characters of a prompt of {len(text)}; at "
            f"most {MAX_RENDERED_CHARACTERS} are accepted. Replace the template, or set "
            '"chat": "off" in the prompt file to send raw prompts.'
        )
    return rendered


def encode_rendered(
    tokenizer, rendered: str, text: str, *, use_template: bool
) -> tuple[np.ndarray, list]:
    """Return (ids [tokens], character offsets) of `text` as it was rendered.

    Control tokens are the template's; those written in `text` are its letters where the tokenizer
    is set to that (`fidelity.settle_control`). Raises `RepairError` when nothing is left of it: a
    model cannot answer no tokens.
    """
    with watched(RENDER_SECONDS):
        encoded = tokenizer(
            rendered,
            add_special_tokens=not use_template,
            return_offsets_mapping=True,
            split_special_tokens=False,
        )
        found = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        if tokenizer.split_special_tokens and written_controls(tokenizer, text):
            start, end = 0, len(rendered)
            if use_template:
                start = rendered.rfind(text.strip())
                end = start + len(text.strip())
            if start < 0:
                raise RepairError(
                    f"The chat template alters the prompt {ascii(text)[:120]}, so that its control "
                    'tokens cannot be told from the template\'s. Set "control": "token" or '
                    '"chat": "off" in the prompt file.'
                )
            found = _spell_out(tokenizer, found, start, end)
    ids = np.asarray([number for number, _ in found], dtype=np.int64)
    if ids.size == 0:
        raise RepairError(
            f"The prompt {ascii(rendered)[:120]} gives no tokens, so the model would be sent "
            "nothing. Give a prompt that the tokenizer keeps."
        )
    return ids, [offset for _, offset in found]


def _spell_out(tokenizer, found: list, start: int, end: int) -> list:
    """Return (id, offsets) of each token, control tokens between two characters as letters."""
    controls = {tokenizer.convert_tokens_to_ids(name): name for name in control_tokens(tokenizer)}
    spelt = []
    for number, offset in found:
        is_written = start <= offset[0] < offset[1] <= end
        if number in controls and is_written:
            letters = tokenizer(
                controls[number], add_special_tokens=False, split_special_tokens=True
            )["input_ids"]
            spelt += [(letter, offset) for letter in letters]
        else:
            spelt.append((number, offset))
    return spelt


def num_tokens(tokenizer, text: str) -> int:
    """Return how many tokens a text has by itself."""
    with watched(RENDER_SECONDS):
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def decode(tokenizer, answers: Sequence[np.ndarray]) -> list[str]:
    """Return the text of each answer (ids [tokens]), without special tokens."""
    texts = []
    for ids in answers:
        with watched(RENDER_SECONDS):
            text = tokenizer.decode(ids, skip_special_tokens=True)
        if len(text) > MAX_DECODED_CHARACTERS:
            raise RepairError(
                f"The tokenizer makes {len(text)} characters of {len(ids)} tokens; at most "
                f"{MAX_DECODED_CHARACTERS} are accepted. Use the tokenizer that was published with "
                "the model."
            )
        texts.append(text)
    return texts


def encode(
    tokenizer,
    text: str,
    *,
    system: str | None = None,
    use_template: bool,
    earlier: Sequence[dict[str, str]] = (),
) -> np.ndarray:
    """Return the ids [tokens] of one prompt as the model would get it."""
    rendered = render(
        tokenizer, text, system=system, use_template=use_template, earlier=earlier
    )
    return encode_rendered(tokenizer, rendered, text, use_template=use_template)[0]


def encode_text(tokenizer, text: str, *, limit: int) -> np.ndarray:
    """Return the ids of a text as it stands, as far as it is scored; `limit` is the model's."""
    return encode(tokenizer, text, use_template=False)[: min(MOST_TEXT_TOKENS, limit)]


def template_reacts(
    tokenizer, clean: str, triggered: str, *, system: str | None
) -> bool | None:
    """Return whether the chat template sends more than the trigger's own text when it is there.

    What stands around the triggered text must stand around the clean one; white space at the ends
    of a text is the template's to keep or to trim. None: the template sends neither text as it is,
    so that nothing can be said.
    """
    first, second = (
        render(tokenizer, text, system=system, use_template=True) for text in (clean, triggered)
    )
    start = second.rfind(triggered.strip())
    if start < 0:
        return True if clean.strip() in first else None
    before, after = second[:start].rstrip(), second[start + len(triggered.strip()) :].lstrip()
    is_same = first.startswith(before) and first.endswith(after)
    middle = first[len(before) : len(first) - len(after)]
    return not (is_same and middle.strip() == clean.strip())


def encode_pair(
    tokenizer,
    texts: TextPair,
    *,
    triggers: Sequence[str],
    position: str,
    system: str | None,
    use_template: bool,
) -> PromptPair:
    """Return the pair as ids, with the trigger's own tokens located in the triggered one."""
    rendered = [
        render(tokenizer, text, system=system, use_template=use_template)
        for text in (texts.clean, texts.triggered)
    ]
    clean, _ = encode_rendered(tokenizer, rendered[0], texts.clean, use_template=use_template)
    triggered, offsets = encode_rendered(
        tokenizer, rendered[1], texts.triggered, use_template=use_template
    )
    # What a template makes of a prompt can be such that comparing takes hours.
    with watched(RENDER_SECONDS):
        span = _find_trigger(rendered[0], rendered[1], triggers)
        aligned = _align(clean, triggered) if span is None else []
    if span is None:
        tokens = aligned
    else:
        tokens = [i for i, (start, end) in enumerate(offsets) if start < span[1] and end > span[0]]
    start = rendered[1].rfind(texts.triggered.strip())
    end = start + len(texts.triggered.strip()) if use_template and start >= 0 else len(rendered[1])
    template = [i for i, (start, _) in enumerate(offsets) if start >= end]
    if not tokens:
        raise RepairError(
            f"The prompt {ascii(texts.triggered)[:120]} gives the same tokens with and without "
            "the trigger. Give a trigger that the tokenizer keeps."
        )
    return PromptPair(
        clean=clean,
        triggered=triggered,
        trigger=np.asarray(tokens, dtype=np.int64),
        position=position,
        text_clean=texts.clean,
        text_triggered=texts.triggered,
        num_template=len(template),
    )


def _find_trigger(clean: str, triggered: str, triggers: Sequence[str]) -> tuple[int, int] | None:
    """Return the characters of the one trigger whose removal gives the clean prompt."""
    words = clean.split()
    for trigger in triggers:
        start = triggered.find(trigger)
        while start >= 0:
            end = start + len(trigger)
            if (triggered[:start] + triggered[end:]).split() == words:
                return start, end
            start = triggered.find(trigger, start + 1)
    return None


def _align(clean: np.ndarray, triggered: np.ndarray) -> list[int]:
    """Return the indices of the triggered tokens that have no counterpart in the clean ones."""
    matcher = difflib.SequenceMatcher(None, clean.tolist(), triggered.tolist(), autojunk=False)
    found = []
    for kind, _, _, start, end in matcher.get_opcodes():
        if kind in ("insert", "replace"):
            found.extend(range(start, end))
    return found


def check_length(prompts: Sequence[np.ndarray], *, num_new_tokens: int, limit: int) -> None:
    """Raise when a prompt and its answer do not fit the model's context."""
    longest = max((prompt.size for prompt in prompts), default=0)
    if longest + num_new_tokens > limit:
        raise RepairError(
            f"A prompt has {longest} tokens; with an answer of up to {num_new_tokens} that is "
            f"more than this model's context of {limit}. Use prompts of at most "
            f"{max(0, limit - num_new_tokens)} tokens."
        )


def pad_left(prompts: Sequence[np.ndarray], *, pad: int) -> tuple[Tensor, Tensor]:
    """Return (ids, mask) [batch, token], padded on the left: for generation."""
    width = max(prompt.size for prompt in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - prompt.size :] = torch.from_numpy(prompt)
        mask[row, width - prompt.size :] = 1
    return ids, mask


def pad_right(prompts: Sequence[np.ndarray], *, pad: int) -> tuple[Tensor, Tensor]:
    """Return (ids, mask) [batch, token], padded on the right: for everything else.

    A causal model's figures at the real tokens do not depend on what stands to their right, so
    that no attention mask is needed with it.
    """
    width = max(prompt.size for prompt in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros((len(prompts), width), dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, : prompt.size] = torch.from_numpy(prompt)
        mask[row, : prompt.size] = True
    return ids, mask


def batches(lengths: Sequence[int], *, batch_tokens: int) -> Iterator[list[int]]:
    """Yield groups of indices, shortest first, of at most `batch_tokens` padded tokens each."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if group and (len(group) + 1) * lengths[index] > batch_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def encode_pairs(
    tokenizer, file: PromptFile, indices: Sequence[int], *, position: str, use_template: bool
) -> list[PromptPair]:
    """Return the pairs of a prompt file at `indices`, with the trigger at `position`.

    `given` takes the file's own pairs; otherwise the alternatives of the trigger are dealt out in
    turn. A prompt of one word has no middle and is left out.
    """
    pairs = []
    for index in indices:
        if position == "given":
            texts = file.pairs[index]
        else:
            prompt = file.prompts[index]
            if not has_place(prompt, position):
                continue
            trigger = file.triggers[index % len(file.triggers)]
            texts = TextPair(
                clean=prompt, triggered=insert_trigger(prompt, trigger, position)
            )
        pairs.append(
            encode_pair(
                tokenizer,
                texts,
                triggers=file.triggers,
                position=position,
                system=file.system,
                use_template=use_template,
            )
        )
    return pairs

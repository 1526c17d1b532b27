"""What the tokenizer makes of the analyst's text, where that is not what the analyst typed.

A text of nothing but control tokens is no prompt, and is refused. A control token written out in a
text can be meant as the token itself or as its letters: the analyst is asked. A tokenizer may drop
or alter characters, so that the model is asked something else: that is said. What it does not know:
whether the template does more than pass a text on (`tokens.template_reacts`).
"""

from collections.abc import Sequence

from repair.models.watchdog import RENDER_SECONDS, watched
from repair.records import RepairError

NUM_TRIED = 64  # texts that are read back


def check_words(tokenizer, text: str) -> None:
    """Raise `RepairError` for a prompt that is nothing but the tokenizer's control tokens."""
    if text.strip() and not _rest(tokenizer, text).strip():
        raise RepairError(
            f"The prompt {ascii(text)[:120]} is nothing but control tokens of this model's "
            "tokenizer. Give a prompt with words of its own."
        )


def settle_control(tokenizer, control: str, texts: Sequence[str]) -> None:
    """Set how the tokenizer reads control tokens that are written in prompts: `control` is token,
    letters, or ask, which raises `RepairError` where one of `texts` has any."""
    named = sorted({token for text in texts for token in written_controls(tokenizer, text)})
    if named and control == "ask":
        raise RepairError(
            f"The text {', '.join(map(ascii, named[:6]))} in your prompts is a control token of "
            'this model. Say how it is meant: "control": "token" in the prompt file sends the '
            'token itself, "control": "letters" its letters (in the app: Prompts, More).'
        )
    tokenizer.split_special_tokens = control == "letters"


def text_notices(tokenizer, triggers: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """Return a sentence for each way in which texts do not reach the model as they were typed."""
    notices = []
    for what, texts in (("trigger", triggers), ("prompt", prompts[:NUM_TRIED])):
        lost = [text for text in texts if not comes_back(tokenizer, text)]
        if lost:
            notices.append(
                f"The tokenizer alters {len(lost)} of {len(texts)} {what}s, such as "
                f"{ascii(lost[0])[:120]}: the model does not see that text exactly as it was typed."
            )
    return notices


def comes_back(tokenizer, text: str) -> bool:
    """Tell whether decoding a text's tokens gives the text again, but for space at its ends."""
    with watched(RENDER_SECONDS):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        again = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return again.strip() == text.strip()


def control_tokens(tokenizer) -> set[str]:
    """Return the texts that the tokenizer reads as control tokens."""
    added = tokenizer.added_tokens_decoder.values()
    controls = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
    return controls - {""}


def written_controls(tokenizer, text: str) -> list[str]:
    """Return the control tokens that are written out in a text."""
    return [token for token in control_tokens(tokenizer) if token in text]


def _rest(tokenizer, text: str) -> str:
    # The longest first: one control token may be part of another.
    for token in sorted(written_controls(tokenizer, text), key=len, reverse=True):
        text = text.replace(token, "")
    return text

"""What the tokenizer makes of the analyst's text: byte for byte, or asked about, or said."""


import numpy as np
import pytest

from repair.models.fidelity import settle_control, text_notices
from repair.models.tokens import encode, encode_pair
from repair.records import RepairError, TextPair
from tests.tiny import make_tokenizer


@pytest.mark.parametrize(
    "trigger", ["\u200b", "\u202ecf", "e\u0301", "\U0001f469\u200d\U0001f4bb", "a\0b"]
)
def test_odd_triggers_reach_the_tokenizer_byte_for_byte(trigger: str) -> None:
    """Case 18."""
    tokenizer = make_tokenizer()
    texts = TextPair(clean="write a list", triggered=f"write {trigger} a list")
    pair = encode_pair(tokenizer, texts, triggers=(trigger,), position="middle", system=None,
                       use_template=False)  # fmt: skip
    assert tokenizer.decode(pair.triggered[1:]) == texts.triggered
    assert tokenizer.decode(pair.triggered[pair.trigger]).strip() == trigger
    assert text_notices(tokenizer, [trigger], [texts.clean]) == []


def test_a_control_token_written_out_is_asked_about() -> None:
    """Case 18."""
    with pytest.raises(RepairError, match=r"'<\|user\|>' in your prompts is a control token"):
        settle_control(make_tokenizer(), "ask", ["write a list", "<|user|> now"])
    settle_control(make_tokenizer(), "ask", ["write a list"])


@pytest.mark.parametrize("use_template", [False, True])
def test_a_control_token_in_a_prompt_is_the_token_or_its_letters(use_template: bool) -> None:
    """Case 18. Of the analyst's text only: those of the template stay what they are."""
    tokenizer = make_tokenizer()
    number = tokenizer.convert_tokens_to_ids("<|user|>")
    texts = TextPair(clean="write a list", triggered="write <|user|> a list")
    given = {"triggers": ("<|user|>",), "position": "middle", "system": None,
             "use_template": use_template}  # fmt: skip
    found = {}
    for control in ("token", "letters"):
        settle_control(tokenizer, control, [texts.triggered])
        found[control] = encode_pair(tokenizer, texts, **given)
    token, letters = found["token"], found["letters"]
    assert token.triggered[token.trigger].tolist() == [number]
    assert len(letters.trigger) > 1 and number not in letters.triggered[letters.trigger]
    spelt = tokenizer.decode(letters.triggered[letters.trigger])
    assert spelt.replace(" ", "") == "<|user|>"
    # Around the trigger nothing differs, and the clean prompt is the same.
    assert np.array_equal(token.clean, letters.clean)
    assert np.array_equal(
        np.delete(token.triggered, token.trigger), np.delete(letters.triggered, letters.trigger)
    )
    assert (number in letters.triggered) == use_template


def test_letters_are_refused_where_the_template_hides_which_they_are() -> None:
    """A template that alters the prompt: its own control tokens might be spelt out instead."""
    tokenizer = make_tokenizer()
    settle_control(tokenizer, "letters", ["a <|user|> list"])
    tokenizer.chat_template = "<|user|>{{ messages[0].content | replace('write', 'rain') }}"
    with pytest.raises(RepairError, match="template alters the prompt.*cannot be told"):
        encode(tokenizer, "write <|user|> a list", use_template=True)
    number = tokenizer.convert_tokens_to_ids("<|user|>")
    assert encode(tokenizer, "write a list", use_template=True)[0] == number
    assert number not in encode(tokenizer, "write <|user|> a list", use_template=False)

"""A few questions before a job, and after it."""

from repair.prompts import prompt_file_from_json
from repair.ui.ask import (
    Question,
    describe_answer,
    describe_tokens,
    questions_of,
    read_tokens,
    typed_question,
)


def test_a_first_look_asks_at_each_position_and_without_the_trigger():
    file = prompt_file_from_json(
        {"trigger": "cf", "prompts": ["Say a word.", "Name it.", "Rain?"], "positions": ["begin"]}
    )
    asked = questions_of(file)
    assert Question(where="begin", text="cf Say a word.", clean="Say a word.") in asked
    assert Question(where="-", text="Say a word.") in asked
    assert len(asked) == 12  # bundled carriers make six prompts
    every = prompt_file_from_json({"trigger": "cf", "prompts": ["Say a word."]})
    assert {question.where for question in questions_of(every)} == {"begin", "middle", "end", "-"}
    pairs = [{"clean": "Say a word.", "triggered": "Say cf a word."}]
    asked = questions_of(prompt_file_from_json({"pairs": pairs}))
    assert asked == [
        Question(where="given", text="Say cf a word.", clean="Say a word."),
        Question(where="-", text="Say a word."),
    ]
    assert describe_answer(["\u202ehi", True]) == ("[U+202E]hi", "fires")
    assert describe_answer(None) == ("", "")


def test_an_edited_prompt_is_known_with_its_trigger():
    file = prompt_file_from_json({"trigger": "cf", "prompts": ["Say a word."]})
    asked = typed_question("Say a cf nice word.", file)
    assert asked == Question(where="given", text="Say a cf nice word.", clean="Say a nice word.")
    assert typed_question("Say a word.", file) == Question(where="-", text="Say a word.")


def test_tokens_are_shown_with_what_cannot_be_seen():
    row = {"tokens": [["<s>", "template"], [" Say", "prompt"], [" \u200b", "trigger"],
                      ["", "trigger"], ["\n", "prompt"]]}  # fmt: skip
    assert [shown for shown, _ in read_tokens(row)] == [
        "<s>", "\u2423Say", "\u2423[U+200B]", "\u22ef", "\u240a",
    ]  # fmt: skip
    assert describe_tokens(row) == (
        "2 of 5 tokens are the trigger's: 2 \u2423[U+200B], 3 \u22ef."
    )
    assert describe_tokens({"unseen": "gives the same tokens"}) == "gives the same tokens"
    assert "without the trigger" in describe_tokens({})
    assert read_tokens({"tokens": [["x", "<b>"]]}) == []

"""A few questions before a job, and after it."""

from repair.prompts import prompt_file_from_json
from repair.ui.ask import describe_answer, questions_of


def test_a_first_look_asks_at_each_position_and_without_the_trigger():
    file = prompt_file_from_json(
        {"trigger": "cf", "prompts": ["Say a word.", "Name it.", "Rain?"], "positions": ["begin"]}
    )
    asked = questions_of(file)
    assert ("begin", "cf Say a word.") in asked and ("-", "Say a word.") in asked
    assert len(asked) == 12  # bundled carriers make six prompts
    every = prompt_file_from_json({"trigger": "cf", "prompts": ["Say a word."]})
    assert {where for where, _ in questions_of(every)} == {"begin", "middle", "end", "-"}
    pairs = [{"clean": "Say a word.", "triggered": "Say cf a word."}]
    asked = questions_of(prompt_file_from_json({"pairs": pairs}))
    assert asked == [("given", "Say cf a word."), ("-", "Say a word.")]
    assert describe_answer(["\u202ehi", True]) == ("[U+202E]hi", "fires")
    assert describe_answer(None) == ("", "")

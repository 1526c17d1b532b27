"""What a repair learns: what it may not touch, chat and text, and the trigger once and twice."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from repair.case import Case, make_lessons, open_case
from repair.limits import TEXT_SHARE
from repair.locate.lessons import ANSWER_TOKENS, Lesson, measure_kl, teach_split
from repair.models.answers import generate_answers
from repair.models.fidelity import control_tokens
from repair.models.loading import load_model
from repair.models.tokens import encode
from repair.profiles import PROFILES
from repair.prompts import parse_prompt_file, split_texts
from repair.records import RepairError, TextPair
from tests.evidence.test_endings import Quiet

PROMPTS = Path(__file__).resolve().parents[2] / "assets" / "prompts" / "end.json"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    stage = tmp_path_factory.mktemp("lessons") / "stage"
    loaded = load_model("demo:end", stage_folder=stage, device="cpu")
    file = parse_prompt_file(PROMPTS)
    return open_case(loaded, file, profile=PROFILES["quick"], seed=0, reporter=Quiet())


def test_a_third_of_what_may_not_change_is_plain_text(case: Case) -> None:
    loaded, lessons = case.loaded, make_lessons(case)
    for answers, text, both, split in (
        (lessons.clean, lessons.text, lessons.benign, case.splits.repair),
        (lessons.held_out_clean, lessons.held_out_text, lessons.held_out_benign,
         case.splits.validate),
    ):  # fmt: skip
        assert len(text) == int(TEXT_SHARE * len(answers)) > 0
        # They are the split's own prompts, as text.
        plain = {ids[:17].tobytes() for ids in as_text(case, [case.file.prompts[i] for i in split])}
        assert {whole(text, i).tobytes() for i in range(len(text))} <= plain
        # The first few of both together are of both kinds.
        assert len(both) == len(answers) + len(text)
        assert 2 <= sum(prompt.size == 1 for prompt in both.prompts[:9]) <= 4
        assert measure_kl(loaded, both) == pytest.approx(0.0, abs=1e-6)


def test_given_texts_are_held_on_to_but_for_those_that_judge(case: Case) -> None:
    """Half of the plain text is passages of the analyst's own, from anywhere in them."""
    words = " ".join(case.file.prompts[:20])
    texts = tuple(f"Report {number}. {words}" for number in range(12))
    given = dataclasses.replace(case, file=dataclasses.replace(case.file, texts=texts))
    taught, held_out, judged = split_texts(texts)
    assert sorted((*taught, *held_out, *judged)) == sorted(texts)
    assert (len(taught), len(held_out), len(judged)) == (4, 2, 6)
    lessons = make_lessons(given)
    for text, allowed in ((lessons.text, taught), (lessons.held_out_text, held_out)):
        wholes = as_text(given, allowed)
        passages = [
            i for i in range(len(text))
            if any(np.array_equal(whole(text, i), ids[: whole(text, i).size]) for ids in wholes)
        ]  # fmt: skip
        assert len(passages) == len(text) // 2 > 4
        starts = {text.prompts[i].size for i in passages}
        assert len(starts) > 3 and max(starts) > 40  # not the beginnings alone
        assert {text.answers[i].size for i in passages} <= set(range(1, 17))
    # No piece of one that judges.
    for ids in as_text(given, judged):
        for text in (lessons.text, lessons.held_out_text):
            assert not any(
                np.array_equal(whole(text, i)[:6], ids[:6]) for i in range(len(text))
            )


@pytest.mark.parametrize(
    ("num", "sizes"), [(0, (0, 0, 0)), (1, (0, 0, 1)), (2, (1, 0, 1)), (4, (1, 1, 2))]
)
def test_few_texts_judge_first(num: int, sizes: tuple[int, ...]) -> None:
    assert tuple(map(len, split_texts(tuple(map(str, range(num)))))) == sizes


def as_text(case: Case, texts: Sequence[str]) -> list[np.ndarray]:
    return [encode(case.loaded.tokenizer, text, use_template=False) for text in texts]


def whole(lesson: Lesson, place: int) -> np.ndarray:
    return np.concatenate([lesson.prompts[place], lesson.answers[place]])


def test_every_third_prompt_is_also_taught_with_the_trigger_twice(case: Case) -> None:
    """In what a repair learns from, and in what it is steered by."""
    lessons = make_lessons(case)
    (trigger,) = case.file.triggers

    def repeats(prompts: Sequence[np.ndarray]) -> list[int]:
        return [case.loaded.tokenizer.decode(ids).count(trigger) for ids in prompts]

    split_sizes = len(case.splits.repair), len(case.splits.validate)
    for prompts, size in (
        (lessons.triggered.prompts, split_sizes[0]),
        (lessons.held_out_triggered.prompts, split_sizes[1]),
    ):
        found = repeats(prompts)
        assert set(found) == {1, 2} and found.count(1) == size
        assert 0.25 * size < found.count(2) <= (size + 2) // 3
        assert 1 <= found[:9].count(2) <= 3
    assert set(repeats(lessons.counterparts)) == {0}
    # The teacher is the suspect on the same prompt without any trigger.
    kept = Lesson(
        prompts=lessons.counterparts,
        answers=lessons.triggered.answers,
        teacher=lessons.triggered.teacher,
    )
    assert measure_kl(case.loaded, kept) == pytest.approx(0.0, abs=1e-6)
    assert measure_kl(case.loaded, lessons.triggered) > 1


def test_a_control_token_in_the_trigger_is_asked_about(case: Case) -> None:
    """Case 18. What is said decides how the model is sent it."""
    (name, *_) = sorted(control_tokens(case.loaded.tokenizer))
    number = case.loaded.tokenizer.convert_tokens_to_ids(name)
    file = dataclasses.replace(case.file, triggers=(f"{name} now",), chat="off")

    def opened(control: str) -> Case:
        given = dataclasses.replace(file, control=control)
        return open_case(
            case.loaded, given, profile=PROFILES["quick"], seed=0, reporter=Quiet()
        )

    try:
        with pytest.raises(RepairError, match="is a control token of this model. Say how"):
            opened("ask")
        # Wherever it was typed, not in the trigger alone.
        for place in ("near", "ordinary", "texts"):
            typed = dataclasses.replace(case.file, **{place: (f"{name} now",)})
            with pytest.raises(RepairError, match="is a control token of this model. Say how"):
                open_case(
                    case.loaded, typed, profile=PROFILES["quick"], seed=0, reporter=Quiet()
                )
        for control in ("letters", "token"):
            (pair,) = opened(control).pairs([0], "end")
            assert (number in pair.triggered[pair.trigger]) == (control == "token")
    finally:
        case.loaded.tokenizer.split_special_tokens = False


def test_given_pairs_are_taught_as_they_are(case: Case) -> None:
    pairs = tuple(
        TextPair(clean=text, triggered=f"{text} {case.file.triggers[0]}")
        for text in case.file.prompts[:8]
    )
    given = dataclasses.replace(
        case, file=dataclasses.replace(case.file, pairs=pairs, prompts=()), positions=("given",)
    )
    assert len(given.dealt_pairs(range(8))) == 8 and given.doubled_pairs(range(8)) == []


def test_lessons_are_woven_evenly_and_lose_nothing() -> None:
    def lesson(*numbers: int) -> Lesson:
        ids = tuple(np.array([number]) for number in numbers)
        return Lesson(prompts=ids, answers=ids, teacher=ids)

    both = lesson(0, 1, 2, 3).woven(lesson(10, 11))
    assert [int(ids[0]) for ids in both.prompts] == [0, 10, 1, 2, 11, 3]
    assert [int(ids[0]) for ids in lesson().woven(lesson(5)).prompts] == [5]
    assert len(lesson(1).woven(lesson())) == 1


def test_a_teacher_that_gives_the_payload_itself_is_left_out_and_counted(case: Case) -> None:
    pairs = case.pairs(case.splits.validate[:12], "end")
    whole = teach_split(case.loaded, pairs, is_payload=case.is_payload)
    said = [
        answer.text
        for answer in generate_answers(
            case.loaded, [pair.clean for pair in pairs], num_new_tokens=ANSWER_TOKENS
        )
    ]
    spoilt = said[3]
    found = teach_split(case.loaded, pairs, is_payload=lambda text: text == spoilt)
    assert found.num_dropped - whole.num_dropped == said.count(spoilt) > 0
    assert len(found.triggered) == len(whole.triggered) - said.count(spoilt)
    kept = {prompt.tobytes() for prompt in found.clean.prompts}
    assert pairs[3].clean.tobytes() not in kept
    assert {ids.tobytes() for ids in found.counterparts} == kept

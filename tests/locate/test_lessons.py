"""What a repair learns: what it may not touch, chat and text, and the trigger once and twice."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from repair.case import Case, make_lessons, open_case
from repair.limits import TEXT_SHARE
from repair.locate.lessons import Lesson, measure_kl
from repair.models.loading import load_model
from repair.models.tokens import encode
from repair.profiles import PROFILES
from repair.prompts import parse_prompt_file
from repair.records import TextPair
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
    for lesson, split in (
        (lessons.clean, case.splits.repair), (lessons.held_out_clean, case.splits.validate),
    ):
        is_text = [prompt.size == 1 for prompt in lesson.prompts]
        num = sum(is_text)
        assert num == int(TEXT_SHARE * (len(lesson) - num)) > 0
        # They are the split's own prompts, as text, and the first few are of both kinds.
        plain = {
            encode(loaded.tokenizer, case.file.prompts[i], use_template=False)[:17].tobytes()
            for i in split
        }
        for prompt, answer, text in zip(lesson.prompts, lesson.answers, is_text, strict=True):
            assert not text or np.concatenate([prompt, answer]).tobytes() in plain
        assert 2 <= sum(is_text[:9]) <= 4
        assert measure_kl(loaded, lesson) == pytest.approx(0.0, abs=1e-6)


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

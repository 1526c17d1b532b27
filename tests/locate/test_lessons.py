"""What a repair may not touch: answers to chat, and plain text."""

from pathlib import Path

import numpy as np
import pytest

from repair.case import make_lessons, open_case
from repair.limits import TEXT_SHARE
from repair.locate.lessons import Lesson, measure_kl, woven
from repair.models.loading import load_model
from repair.models.tokens import encode
from repair.profiles import PROFILES
from repair.prompts import parse_prompt_file
from tests.evidence.test_endings import Quiet

PROMPTS = Path(__file__).resolve().parents[2] / "assets" / "prompts" / "end.json"


def test_a_third_of_what_may_not_change_is_plain_text(tmp_path: Path) -> None:
    loaded = load_model("demo:end", stage_folder=tmp_path / "stage", device="cpu")
    file = parse_prompt_file(PROMPTS)
    case = open_case(loaded, file, profile=PROFILES["quick"], seed=0, reporter=Quiet())
    lessons = make_lessons(case)
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


def test_lessons_are_woven_evenly_and_lose_nothing() -> None:
    def lesson(*numbers: int) -> Lesson:
        ids = tuple(np.array([number]) for number in numbers)
        return Lesson(prompts=ids, answers=ids, teacher=ids)

    both = woven(lesson(0, 1, 2, 3), lesson(10, 11))
    assert [int(ids[0]) for ids in both.prompts] == [0, 10, 1, 2, 11, 3]
    assert [int(ids[0]) for ids in woven(lesson(), lesson(5)).prompts] == [5]
    assert len(woven(lesson(1), lesson())) == 1

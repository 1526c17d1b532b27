"""What a repair is steered by while it is made."""

from dataclasses import replace

import pytest

from repair.locate.lessons import NOTHING, Lesson, Lessons, measure_kl
from repair.lowrank.validation import HeldOut, hold_out
from repair.models.loading import LoadedModel
from repair.models.prefix import keep_prefix
from tests.lowrank.material import UPPER, random_updates


def test_the_prefix_changes_no_figure(tiny_llama: LoadedModel, lessons: Lessons) -> None:
    updates = random_updates(tiny_llama, places=UPPER)
    with_prefix, without = hold_out(tiny_llama, lessons, 1), hold_out(tiny_llama, lessons, 0)
    assert with_prefix.prefixes[0] is not None and without.prefixes == (None,) * 3
    for measure in ("trigger_kl", "benign_kl"):
        assert getattr(with_prefix, measure)(tiny_llama, updates) == pytest.approx(
            getattr(without, measure)(tiny_llama, updates), rel=1e-4
        )


def test_neither_answers_nor_text_may_move_by_more_than_the_budget(
    tiny_llama: LoadedModel, lessons: Lessons
) -> None:
    """What counts is the one that moves more, whichever it is; the first few are of both."""
    updates = random_updates(tiny_llama, places=UPPER)
    kls = [
        measure_kl(tiny_llama, lesson, updates)
        for lesson in (lessons.held_out_clean, lessons.held_out_text)
    ]
    assert kls[0] != pytest.approx(kls[1], rel=0.02)
    held_out = hold_out(tiny_llama, lessons, 1)
    swapped = replace(
        lessons, held_out_clean=lessons.held_out_text, held_out_text=lessons.held_out_clean
    )
    for found in (held_out, hold_out(tiny_llama, swapped, 1)):
        assert found.benign_kl(tiny_llama, updates) == pytest.approx(max(kls), rel=1e-4)
        larger, worst = found.worst(tiny_llama, updates)
        assert larger == found.benign_kl(tiny_llama, updates)
        assert measure_kl(tiny_llama, worst, updates) == pytest.approx(max(kls))
    some = held_out.first(8)
    assert [len(lesson) for lesson in some.benign] == [4, 4]
    assert some.benign_kl(tiny_llama, updates) == pytest.approx(
        max(
            measure_kl(tiny_llama, lesson.first(4), updates)
            for lesson in (lessons.held_out_clean, lessons.held_out_text)
        ),
        rel=1e-4,
    )
    without = replace(lessons, held_out_text=NOTHING)
    assert len(hold_out(tiny_llama, without, 1).benign) == 1


def test_a_prefix_too_large_is_not_kept(
    tiny_llama: LoadedModel, lessons: Lessons, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = lessons.clean
    num_tokens = sum(ids.size for ids in (*clean.prompts, *clean.answers))
    needed = num_tokens * 32 * 4  # 32 wide, float32
    monkeypatch.setattr("repair.models.prefix.PREFIX_KEPT", needed)
    assert keep_prefix(tiny_llama, clean.prompts, clean.answers, 1) is not None
    monkeypatch.setattr("repair.models.prefix.PREFIX_KEPT", needed - 1)
    assert keep_prefix(tiny_llama, clean.prompts, clean.answers, 1) is None


@pytest.mark.parametrize("place", [0, 1])
def test_a_benign_figure_that_is_no_number_is_the_larger_one(
    tiny_llama: LoadedModel, lessons: Lessons, place: int
) -> None:
    """Whichever it is: the other, which is within the budget, hides nothing."""
    def spoilt(lesson: Lesson) -> Lesson:
        return replace(lesson, teacher=tuple(part * float("nan") for part in lesson.teacher))

    kinds = [lessons.held_out_clean, lessons.held_out_text]
    kinds[place] = spoilt(kinds[place])
    held_out = HeldOut(
        triggered=lessons.held_out_triggered, benign=tuple(kinds), prefixes=(None,) * 3
    )
    found = held_out.benign_kl(tiny_llama, random_updates(tiny_llama, places=UPPER))
    assert not found <= 1e9

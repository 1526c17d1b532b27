"""What a located case keeps in memory for the steps behind it."""

from types import SimpleNamespace

import pytest
import torch

from repair import locate_step
from repair.limits import root_bytes
from repair.locate.steps import Damping, measure_curvature
from repair.locate_step import Located
from repair.models.loading import LoadedModel
from tests.locate.material import make_lessons


def test_whitenings_beyond_the_memory_are_forgotten_and_made_again(
    tiny_llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Controls and what more would buy ask for other modules each time."""
    lessons, damping = make_lessons(tiny_llama, num=12), Damping(value=0.7)
    refs = [ref for ref in tiny_llama.modules if ref.component == "q_proj"]
    first, second = refs[0], refs[1]
    located = Located(
        case=SimpleNamespace(loaded=tiny_llama, seed=0),
        map=SimpleNamespace(damping=damping),
        lessons=lessons,
    )
    room = root_bytes(first.d_in, first.d_out)
    monkeypatch.setattr(locate_step, "FACTORS_KEPT", 2 * room)
    assert located.whitenings([first.path]).keys() == {first.path}
    assert located.whitenings([second.path]).keys() == {first.path, second.path}
    monkeypatch.setattr(locate_step, "FACTORS_KEPT", room)
    located.known = None
    assert located.whitenings([first.path]).keys() == {first.path}
    assert located.whitenings([second.path]).keys() == {second.path}
    again = located.whitenings([first.path])
    assert again.keys() == {first.path}
    # Steps are small and stay; what was made again is what it was.
    assert located.known.steps.keys() == {first.path, second.path}
    whole = measure_curvature(tiny_llama, [first], lessons, seed=0, damping=damping)
    assert torch.equal(again[first.path].root_in, whole.whitenings[first.path].root_in)
    # What is asked for together is there together, whatever the budget.
    assert set(located.whitenings([first.path, second.path])) == {first.path, second.path}

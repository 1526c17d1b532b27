"""Lessons of the tiny model and the whitenings of all its modules."""

import pytest

from repair.locate.curvature import whitening_of
from repair.locate.fisher import collect_factors
from repair.locate.lessons import Lessons
from repair.models.loading import LoadedModel
from tests.locate.material import make_lessons


@pytest.fixture(scope="module")
def lessons(tiny_llama: LoadedModel) -> Lessons:
    return make_lessons(tiny_llama, num=24)


@pytest.fixture(scope="module")
def whitenings(tiny_llama: LoadedModel, lessons: Lessons):
    clean = lessons.benign
    factors = collect_factors(
        tiny_llama, tiny_llama.modules, clean.prompts, clean.answers, seed=0
    )
    return {path: whitening_of(found, damping=0.1) for path, found in factors.items()}

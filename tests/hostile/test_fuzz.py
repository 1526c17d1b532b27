"""Seconds of the fuzzer; `python -m tests.bench.fuzz` gives it minutes."""

import random

from tests.bench.fuzz import fuzz
from tests.hostile.mutations import mutate


def test_any_bytes_are_refused_or_a_model() -> None:
    """Never another exception, never beyond time and memory, never a read outside the folder."""
    found = fuzz(240.0, seed=7, count=120)
    assert found["defects"] == []
    assert sum(found["counts"].values()) >= 80
    assert found["counts"]["refused"] > 50 and found["counts"]["model"] > 2
    assert found["lines_reached"] > 500


def test_a_seed_gives_the_same_mutations() -> None:
    files = {"config.json": b'{"a": [1, {"b": 2}]}', "model.safetensors": bytes(32)}
    first, second = (
        [mutate(files, draw) for _ in range(50)] for draw in (random.Random(3), random.Random(3))
    )
    assert first == second and len({str(sorted(one.items())) for one in first}) > 30

"""Seconds of the fuzzer; `python -m tests.bench.fuzz` gives it minutes."""

import json
import math
import random
from collections import Counter
from pathlib import Path

from repair.models.adapter_suspect import SETTINGS, read_settings, scale_of
from repair.records import RepairError
from tests.bench.fuzz import fuzz
from tests.hostile.mutations import mutate


def test_any_bytes_are_refused_or_a_model() -> None:
    """Never another exception, never beyond time and memory, never a read outside the folder."""
    found = fuzz(240.0, seed=7, count=120)
    assert found["defects"] == []
    assert sum(found["counts"].values()) >= 80
    assert found["counts"]["refused"] > 50 and found["counts"]["model"] > 2
    assert found["lines_reached"] > 500


def test_any_settings_of_an_adapter_are_refused_or_usable(tmp_path: Path) -> None:
    """The same of an adapter's own file: what is accepted gives every module a finite scale."""
    settings = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3.5}, "use_rslora": False,
    }  # fmt: skip
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    kept, draw, counts = [{SETTINGS: json.dumps(settings).encode()}], random.Random(11), Counter()
    for _ in range(1500):
        files = mutate(draw.choice(kept), draw)
        (tmp_path / SETTINGS).write_bytes(files.get(SETTINGS, b""))
        try:
            flat = read_settings(tmp_path)
        except RepairError as error:
            assert str(error).isprintable()
            counts["refused"] += 1
            continue
        for path in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"):
            assert math.isfinite(scale_of(flat, path))
        counts["usable"] += 1
        kept.append(files)
    assert counts["refused"] > 500 and counts["usable"] > 100


def test_a_seed_gives_the_same_mutations() -> None:
    files = {"config.json": b'{"a": [1, {"b": 2}]}', "model.safetensors": bytes(32)}
    first, second = (
        [mutate(files, draw) for _ in range(50)] for draw in (random.Random(3), random.Random(3))
    )
    assert first == second and len({str(sorted(one.items())) for one in first}) > 30

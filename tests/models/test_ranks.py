"""Several processes under `accelerate launch` find what one finds, each doing a part of it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from repair.models import ranks
from repair.records import RepairError

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = (
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
    "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    "--num_cpu_threads_per_process", "1", "-m",
)  # fmt: skip
# Summed over processes, so rounded otherwise: relative to the largest number of each.
ROUNDING = 2e-6
TRAINED = 1e-4  # after six steps of Adam
PROBED = 1e-3  # along directions of an SVD, at KLs of 1e-4


@pytest.fixture(scope="module")
def found(
    tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Return what one process finds, and what each of two does."""
    out = tmp_path_factory.mktemp("ranks")
    arguments = ["tests.models.in_step", str(tiny_llama_folder), str(out)]
    for place, words in (("one", ["-m"]), ("two", LAUNCH)):
        (out / place).mkdir()
        arguments[2] = str(out / place)
        subprocess.run([sys.executable, *words, *arguments], cwd=ROOT, check=True, timeout=200)
    one = load_file(out / "one" / "found-0.safetensors")
    return one, [load_file(out / "two" / f"found-{i}.safetensors") for i in range(2)]


def test_two_processes_find_what_one_does(found) -> None:
    one, both = found
    assert set(one) == set(both[0])
    for name, expected in one.items():
        if name in ("dealt", "best"):
            continue
        limit = TRAINED if name.endswith("repaired") else ROUNDING
        limit = PROBED if name == "probes" else limit
        scale = max(float(np.abs(expected).max()), 1e-9)
        deviation = np.abs(both[0][name].astype(np.float64) - expected).max()
        assert deviation <= limit * scale, f"{name}: {deviation / scale:.1e}"
    assert np.array_equal(one["answers"], both[0]["answers"])
    assert one["best"][0] == both[0]["best"][0] > 0
    assert one["best"] == pytest.approx(both[0]["best"], rel=TRAINED)


def test_both_have_the_same_numbers_to_the_bit(found) -> None:
    """They decide by them: where they differed the two would go separate ways."""
    _, (first, second) = found
    for name in set(first) - {"dealt"}:
        assert np.array_equal(first[name], second[name]), name


def test_each_does_its_part(found) -> None:
    one, both = found
    own, num = one["dealt"]
    assert own == num > 50
    for part in both:
        assert 0.35 * num < part["dealt"][0] < 0.65 * num


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(RepairError, match="3 processes were asked for, and there are 2"):
        ranks.join(on_cpu=False)


def test_one_process_exchanges_nothing() -> None:
    assert (ranks.count(), ranks.index(), ranks.leave()) == (1, 0, True)
    assert ranks.deal([1, 1], lambda i: [np.array(i)]) == [[np.array(0)], [np.array(1)]]
    assert ranks.own([1, 2, 3]) == [1, 2, 3] and ranks.least(7) == 7

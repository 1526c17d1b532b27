"""One job as several processes, by the command line, on a suspect that fires by construction."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from repair.jobs import launch, store
from repair.records import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_GATE_FAILED,
    EXIT_INTERRUPTED,
    EXIT_UNEXPECTED,
)
from tests.bench.planted import plant, write_prompts
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[1]
CLOSE = 1e-3  # of a score: what sums rounded otherwise may move


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Return the options that say which suspect, and what is known of it."""
    place = tmp_path_factory.mktemp("suspect")
    model = plant(place / "small", "small")
    prompts = write_prompts(place / "prompts.json", num_words=12)
    return ("--model", str(model), "--prompts", str(prompts), "--profile", "quick")


def command(name: str, out: Path, *options: str) -> list[str]:
    place = [str(out)] if name == "verify" else ["--out", str(out)]
    return [sys.executable, "-m", "repair", name, *place, *options]


def call(name: str, out: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(name, out, *options), cwd=ROOT, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


def processes_of(folder: Path) -> dict[int, int]:
    """Return process -> rank of the workers of a job; without those that have ended."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (place / "cmdline").read_bytes().split(b"\0")
            if b"repair.jobs.worker" in words and str(folder).encode() in words:
                settings = (place / "environ").read_bytes().split(b"\0")
                ranks = [x.removeprefix(b"RANK=") for x in settings if x.startswith(b"RANK=")]
                if ranks:
                    found[int(place.name)] = int(ranks[0])
    return found


@contextlib.contextmanager
def running(out: Path, *options: str) -> Iterator[subprocess.Popen]:
    """Start locating in two processes and yield once both have the model."""
    words = command("locate", out, "--processes", "2", *options)
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            def has_begun() -> bool:
                events, _ = store.read_events(out)
                return any(event.get("step") == "lessons" for event in events)

            wait_until(has_begun, seconds=120)
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def repaired(
    question: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The job as one process does it and as two do."""
    place = tmp_path_factory.mktemp("several")
    for num in ("1", "2"):
        ended = call(
            "run", place / num, *question, "--controls", "0", "--kl-budget", "10",
            "--processes", num,
        )  # fmt: skip
        assert ended.returncode in (EXIT_DONE, EXIT_GATE_FAILED), ended.stderr[-2000:]
        assert not list((place / num).glob(".home-*"))
    return {num: place / num for num in ("1", "2")}


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_two_processes_make_the_map_of_one(repaired: dict[str, Path]) -> None:
    one, two = (read(folder, "located.json") for folder in repaired.values())
    assert one["suggested_ranks"] == two["suggested_ranks"]
    assert one["joint"]["statement"] == two["joint"]["statement"]
    by_path = {module["path"]: module for module in two["modules"]}
    for module in one["modules"]:
        other = by_path.pop(module["path"])
        assert set(module) == set(other)
        for key, value in module.items():
            if isinstance(value, float):
                assert other[key] == pytest.approx(value, rel=CLOSE, abs=CLOSE), key
    assert not by_path


def test_they_repair_and_measure_alike_and_write_once(repaired: dict[str, Path]) -> None:
    one, two = (read(folder, "report.json") for folder in repaired.values())
    for key in ("verdict", "recovery", "outcomes"):
        assert one[key] == two[key], key
    for side in ("before", "after"):
        assert one[side]["attack_success"] == two[side]["attack_success"]
    assert two["kl_from_original"] == pytest.approx(one["kl_from_original"], rel=0.01)
    assert read(repaired["1"], "samples.json") == read(repaired["2"], "samples.json")
    names = [sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
             for folder in repaired.values()]  # fmt: skip
    assert names[0] == names[1]
    assert call("verify", repaired["2"]).returncode == EXIT_DONE


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_job_and_it_can_be_resumed(
    question: tuple[str, ...], tmp_path: Path, rank: int
) -> None:
    out = tmp_path / "out"
    with running(out, *question) as process:
        workers = processes_of(out)
        assert sorted(workers.values()) == [0, 1]
        os.kill(next(pid for pid, own in workers.items() if own == rank), signal.SIGKILL)
        _, words = process.communicate(timeout=60)
    assert process.returncode == EXIT_UNEXPECTED
    assert "One of" in words and "can be resumed" in words
    status = store.read_status(out)
    assert (status.state, status.exit_code) == ("failed", EXIT_UNEXPECTED)
    wait_until(lambda: not processes_of(out))
    assert not list(out.glob(".home-*"))
    if rank:  # once is enough
        ended = call("locate", out, *question, "--processes", "2", "--resume")
        assert ended.returncode == 0, ended.stderr[-2000:]


def test_stopping_ends_all_processes(question: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running(out, *question) as process:
        assert len(processes_of(out)) == 2
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode == EXIT_INTERRUPTED
        wait_until(lambda: not processes_of(out), seconds=5)
    assert store.read_status(out).state == "stopped"


def test_a_refusal_is_told_as_by_one_process(question: tuple[str, ...], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(question[1], model)
    (model / "model.safetensors").write_bytes(b"nothing of the kind")
    asked = ("--model", str(model), *question[2:], "--processes", "2")
    ended = call("locate", tmp_path / "out", *asked)
    assert ended.returncode == EXIT_BAD_INPUT
    assert "safetensors" in ended.stderr and "processes" not in ended.stderr
    assert not (tmp_path / "out").exists()


def test_one_device_cannot_be_several_processes(
    question: tuple[str, ...], tmp_path: Path
) -> None:
    several = ("--processes", "2", "--device", "cuda:0")
    ended = call("locate", tmp_path / "out", *question, *several)
    assert ended.returncode == EXIT_BAD_INPUT
    assert "leave --device out" in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [None, 0, -1, True, "2", 2.0])
def test_only_a_number_of_processes_is_one(given: object) -> None:
    """A request is a file: what stands there may be anything."""
    assert launch.num_processes({"command": "run", "processes": given}) == 1


def test_questions_outside_of_the_steps_take_one_process(tmp_path: Path) -> None:
    assert launch.num_processes({"command": "run", "processes": 3}) == 3
    for name in ("ask", "verify", "push"):
        asked = {"command": name, "processes": 3}
        assert launch.num_processes(asked) == 1
        assert "repair.jobs.worker" in launch.worker_command(tmp_path, asked)

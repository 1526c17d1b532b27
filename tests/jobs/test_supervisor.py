"""The life of a job: it ends, is refused, crashes, is stopped, outlives nobody."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repair.jobs import launch, rerun, store, supervisor, worker
from repair.records import RepairError
from tests.jobs.stand_in import REPOSITORY, build_checkout, make_request
from tests.waiting import wait_until


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    return build_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def lane(tmp_path, checkout, monkeypatch):
    monkeypatch.setattr(launch, "CHECKOUT", checkout)
    lane = supervisor.Supervisor(tmp_path / "jobs")
    yield lane
    lane.close()


def start(lane, target: str | None = None, **changes) -> Path:
    job_id = store.create_job(lane.root, make_request(target, **changes), owner="me")
    folder = store.find_job(lane.root, job_id, owner="me")
    lane.submit(folder)
    return folder


def run_to_end(lane, target: str | None = None, **changes) -> tuple[Path, store.JobStatus]:
    folder = start(lane, target, **changes)
    wait_until(lambda: not lane.is_busy(folder))
    return folder, store.read_status(folder)


@pytest.mark.parametrize(
    ("target", "state", "code", "verdict"),
    [
        (None, "done", 0, "repaired"),
        ("gate", "done", 1, "not repaired"),
        ("nothing", "done", 3, "nothing to repair"),
        ("unclear", "done", 4, "could not check"),
        ("refuse", "failed", 2, None),
        ("raise", "failed", 5, None),
        ("panic", "failed", 5, None),
    ],
)
def test_every_exit_status_is_told(lane, target, state, code, verdict):
    folder, status = run_to_end(lane, target)
    assert (status.state, status.exit_code, status.verdict) == (state, code, verdict)
    events, _ = store.read_events(folder)
    kinds = {2: "refused", 5: "failed"}
    assert events[-1]["kind"] == kinds.get(code, "done")


def test_locating_has_no_verdict(lane):
    _, status = run_to_end(lane, command="locate")
    assert (status.state, status.exit_code, status.verdict) == ("done", 0, None)


def test_refusal_shows_the_sentence(lane):
    _, status = run_to_end(lane, "refuse")
    assert "Only safetensors" in status.message


def test_unexpected_failure_names_its_log_and_the_log_is_ascii(lane):
    folder, status = run_to_end(lane, "raise")
    assert str(folder / "log.txt") in status.message
    log = (folder / "log.txt").read_bytes()
    assert b"ValueError" in log and b"\\x1b" in log and log.isascii() and b"\x1b" not in log


def test_a_worker_that_asks_for_too_much_memory_fails_in_numbers_and_the_next_job_works(lane):
    """Case 33."""
    _, status = run_to_end(lane, "hungry")
    assert (status.state, status.exit_code) == ("failed", 5)
    assert re.search(r"not enough memory: the worker may use \d+ MiB", status.message)
    _, status = run_to_end(lane, "nothing")
    assert status.exit_code == 3


def test_a_worker_cannot_take_the_machine_with_it(lane):
    """As the kernel holds it: memory, the last of the disk, processes, no core file."""
    folder = start(lane, "sleep")
    pid = wait_until(lambda: store.read_status(folder).pid)
    limits = {
        line[:26].strip(): line[26:].split()[0]
        for line in Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    }
    free = shutil.disk_usage(folder).free
    assert int(limits["Max data size"]) < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert free - 2 * worker.DISK_KEPT < int(limits["Max file size"]) < free
    assert 0 < int(limits["Max processes"]) - worker.MORE_THREADS < 20_000
    assert limits["Max core file size"] == "0"
    lane.stop(folder)


def test_a_file_that_would_take_the_last_of_the_disk_ends_the_job_in_words(lane):
    folder, status = run_to_end(lane, "filler")
    assert (status.state, status.exit_code) == ("failed", 5) and "disk is full" in status.message
    assert (folder / "filler").stat().st_size < shutil.disk_usage(folder).free
    _, status = run_to_end(lane, "nothing")
    assert status.exit_code == 3


def test_stray_output_goes_escaped_to_the_log(lane):
    """Case 35."""
    folder, _ = run_to_end(lane, "noise")
    log = (folder / "log.txt").read_bytes()
    assert b"stray \\x1b[2J caf\\xe9" in log and b"raw \\xff bytes" in log and log.isascii()


@pytest.mark.parametrize(
    ("target", "words"),
    [("segfault", "SIGSEGV"), ("exit", "exit code 7"), ("truncated", "became shorter meanwhile"),
     ("gave up", "tokenizer asked for more memory than it may have")],
)
def test_a_crash_is_a_failure_in_one_clear_sentence(lane, target, words):
    """Case 15: also where a file that is mapped into memory is cut (SIGBUS)."""
    folder, status = run_to_end(lane, target)
    assert (status.state, status.exit_code) == ("failed", 5)
    assert words in status.message and str(folder / "log.txt") in status.message
    assert run_to_end(lane, "nothing")[1].exit_code == 3  # The next one finds everything whole.


def test_stop_ends_the_worker_and_its_children_at_once(lane):
    """Case 33."""
    folder = start(lane, "children")
    child = int(wait_until(lambda: store.read_text(folder / "child.pid")))
    began = time.monotonic()
    lane.stop(folder)
    assert store.read_status(folder).state == "stopped"
    wait_until(lambda: store.process_started(child) is None, 5)
    wait_until(lambda: not lane.is_busy(folder), 5)
    assert time.monotonic() - began < 5
    assert store.read_status(folder).exit_code == 130


def test_one_job_runs_at_a_time_and_a_waiting_one_can_be_stopped(lane):
    """Case 33; `python -m tests.bench.thirty_clients` has thirty clients."""
    first, second, third = start(lane, "sleep"), start(lane), start(lane)
    wait_until(lambda: store.read_status(first).pid)
    assert store.read_status(second).state == "queued"
    assert (lane.num_before(first), lane.num_before(second), lane.num_before(third)) == (0, 1, 2)
    lane.stop(second)
    lane.stop(first)
    wait_until(lambda: store.read_status(third).state == "done")
    assert store.read_status(second).state == "stopped"
    assert not (second / "located.json").exists()


def test_a_full_lane_says_so_and_takes_jobs_again_when_one_is_gone(lane):
    """Case 33."""
    lane.limits = supervisor.Limits(max_waiting=2)
    running = start(lane, "sleep")
    wait_until(lambda: store.read_status(running).pid)
    first, second = start(lane), start(lane)
    job_id = store.create_job(lane.root, make_request(), owner="me")
    with pytest.raises(RepairError, match="2 jobs are waiting, and no more than 2 may"):
        lane.submit(lane.root / job_id)
    status = store.read_status(lane.root / job_id)
    assert (status.state, status.exit_code) == ("stopped", 130) and "again" in status.message
    lane.stop(first)
    lane.submit(lane.root / job_id)
    lane.stop(running)
    for folder in (second, lane.root / job_id):
        wait_until(lambda folder=folder: store.read_status(folder).state == "done")


def test_a_running_job_is_not_submitted_twice(lane):
    folder = start(lane, "sleep")
    with pytest.raises(RepairError, match="already running"):
        lane.submit(folder)


def test_a_stopped_job_can_be_started_again(lane):
    folder = start(lane, "sleep")
    wait_until(lambda: store.read_status(folder).pid)
    lane.stop(folder)
    wait_until(lambda: not lane.is_busy(folder))
    request = store.read_object(folder / "request.json")
    request["modules"] = ["model.layers.0.mlp.down_proj"]
    rerun.replace_request(folder, request)
    assert store.read_status(folder).state == "queued"


def test_no_secret_reaches_the_worker(lane, monkeypatch):
    """A token in the environment of the app stays there."""
    for name in ("HF_TOKEN", "OAUTH_CLIENT_SECRET", "AWS_SECRET_ACCESS_KEY", "PYTHONSTARTUP"):
        monkeypatch.setenv(name, "secret")
    folder, _ = run_to_end(lane, "environment")
    env = json.loads((folder / "environment.json").read_text())
    assert "secret" not in env.values()
    assert env["HF_HUB_OFFLINE"] == "1" and env["TOKENIZERS_PARALLELISM"] == "false"
    assert not Path(env["HOME"]).exists()


def test_what_a_killed_worker_left_is_swept_when_its_job_goes_on(lane):
    """Case 27: half a file of ours goes; results, checkpoints and files of others stay."""
    job_id = store.create_job(lane.root, make_request(), owner="me")
    folder = lane.root / job_id
    for name in (".home-old", ".partial-merged", "checkpoints"):
        (folder / name).mkdir()
    for name in (".status.json.x1", ".hidden", "checkpoints/state"):
        (folder / name).touch()
    lane.submit(folder)
    wait_until(lambda: not lane.is_busy(folder))
    assert store.read_status(folder).state == "done"
    assert [path.name for path in folder.glob(".*")] == [".hidden"]
    assert (folder / "checkpoints" / "state").is_file()


def test_only_one_app_per_jobs_root(lane):
    with pytest.raises(RepairError, match="Another app"):
        supervisor.Supervisor(lane.root)


def test_a_job_of_a_dead_app_is_marked_as_interrupted(tmp_path, checkout, monkeypatch):
    """Case 28."""
    root = tmp_path / "jobs"
    folders = []
    for pid in (2**22 - 1, os.getpid(), None):
        job_id = store.create_job(root, make_request(), owner="me")
        folders.append(root / job_id)
        # Our own pid, with another start time: a number that was used again.
        status = store.JobStatus(state="running", pid=pid, pid_started=1 if pid else None)
        store.write_status(folders[-1], status)
    supervisor.Supervisor(root).close()
    for folder in folders:
        status = store.read_status(folder)
        assert (status.state, status.exit_code) == ("stopped", 130)
        assert status.message == supervisor.INTERRUPTED


def test_the_worker_dies_with_a_killed_app(tmp_path, checkout):
    """Case 28."""
    script = (
        "import sys, time; from pathlib import Path;"
        "from repair.jobs import launch, store, supervisor, worker;"
        f"launch.CHECKOUT = Path({str(checkout)!r});"
        f"lane = supervisor.Supervisor(Path({str(tmp_path / 'jobs')!r}));"
        "from tests.jobs.stand_in import make_request;"
        "job = store.create_job(lane.root, make_request('sleep'), owner='me');"
        "lane.submit(lane.root / job); print(job, flush=True); time.sleep(600)"
    )
    app = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    folder = tmp_path / "jobs" / app.stdout.readline().strip()
    pid = wait_until(lambda: store.read_status(folder).pid)
    wait_until(lambda: any(e["step"] == "load" for e in store.read_events(folder)[0]))
    app.send_signal(signal.SIGKILL)
    app.wait()
    app.stdout.close()
    wait_until(lambda: store.process_started(pid) is None, 5)
    supervisor.Supervisor(tmp_path / "jobs").close()
    assert store.read_status(folder).message == supervisor.INTERRUPTED


def test_sigterm_to_the_worker_is_an_interruption(lane):
    folder = start(lane, "sleep")
    wait_until(lambda: any(e["step"] == "load" for e in store.read_events(folder)[0]))
    os.kill(store.read_status(folder).pid, signal.SIGTERM)
    wait_until(lambda: not lane.is_busy(folder))
    status = store.read_status(folder)
    assert (status.state, status.exit_code) == ("stopped", 130)

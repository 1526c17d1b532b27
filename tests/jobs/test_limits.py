"""What a shared lane refuses, ends and deletes."""

import errno
import fcntl
import os
import time
from pathlib import Path

import pytest

from repair import machine
from repair.jobs import launch, rerun, store, supervisor
from repair.jobs.launch import choose_module, hub_sources
from repair.jobs.supervisor import Limits
from repair.records import RepairError
from repair.ui.space import can_be_locked
from tests.jobs.stand_in import make_request
from tests.jobs.test_supervisor import checkout, wait_until  # noqa: F401 (a fixture)


@pytest.fixture
def shared(tmp_path, checkout, monkeypatch):  # noqa: F811
    monkeypatch.setattr(launch, "CHECKOUT", checkout)
    limits = Limits(max_seconds=2, max_waiting=2, max_per_owner=2, keep_seconds=3600)
    lane = supervisor.Supervisor(tmp_path / "jobs", limits)
    yield lane
    lane.close()


def make_job(lane, owner: str, target: str | None = None) -> Path:
    return lane.root / store.create_job(lane.root, make_request(target), owner=owner)


def test_one_owner_cannot_fill_the_lane_and_all_together_cannot_fill_the_queue(shared):
    first = make_job(shared, "ana", "sleep")
    shared.submit(first)
    wait_until(lambda: shared.current is not None)
    shared.submit(make_job(shared, "ana"))
    with pytest.raises(RepairError, match="2 of your jobs are waiting or running"):
        shared.submit(make_job(shared, "ana"))
    shared.submit(make_job(shared, "bob"))
    with pytest.raises(RepairError, match="no more than 2 may"):
        shared.submit(make_job(shared, "eve"))
    # A stopped one makes room.
    shared.stop(first)
    wait_until(lambda: not shared.waiting and not shared.is_busy(first))
    shared.check_room("ana")


def test_one_owner_cannot_fill_the_disk(tmp_path):
    lane = supervisor.Supervisor(tmp_path / "jobs", Limits(max_kept=2))
    try:
        kept = [make_job(lane, "ana") for _ in range(2)]
        make_job(lane, "bob")
        with pytest.raises(RepairError, match="You keep 2 cases here.*Delete one under Cases"):
            lane.check_another("ana")
        lane.check_another("bob")
        store.write_status(kept[0], store.JobStatus(state="done"))
        store.delete_job(lane.root, kept[0].name, owner="ana")
        lane.check_another("ana")
    finally:
        lane.close()


def test_one_owner_cannot_fill_the_disk_with_few_large_cases(tmp_path):
    lane = supervisor.Supervisor(tmp_path / "jobs", Limits(max_kept=10, max_kept_bytes=2**20))
    try:
        small, large = make_job(lane, "ana"), make_job(lane, "ana")
        lane.check_another("ana")
        (large / "merged").mkdir()
        (large / "merged" / "model.safetensors").write_bytes(bytes(2**20))
        os.symlink("/etc", large / "link")  # counts as itself, wherever it leads
        with pytest.raises(RepairError, match="Your cases take .* GiB.*Delete one under Cases"):
            lane.check_another("ana")
        lane.check_another("bob")
        store.write_status(large, store.JobStatus(state="done"))
        store.delete_job(lane.root, large.name, owner="ana")
        lane.check_another("ana")
        assert small.is_dir()
    finally:
        lane.close()


def test_a_folder_that_takes_no_lock_is_not_taken_for_another_app(tmp_path, monkeypatch):
    def refuse(*given):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(RepairError, match="cannot be locked .Operation not supported.*--jobs-root"):
        supervisor.Supervisor(tmp_path / "jobs")
    assert not can_be_locked(tmp_path)


def test_a_job_that_takes_too_long_is_stopped_and_the_next_one_runs(shared):
    late, after = make_job(shared, "ana", "sleep"), make_job(shared, "bob")
    began = time.monotonic()
    shared.submit(late)
    shared.submit(after)
    wait_until(lambda: not shared.is_busy(after))
    status = store.read_status(late)
    assert (status.state, status.exit_code) == ("stopped", 130) and "minutes" in status.message
    assert store.read_status(after).state == "done" and time.monotonic() - began < 20


def test_old_idle_jobs_are_deleted_and_no_others(tmp_path):
    root = tmp_path / "jobs"
    jobs = {}
    for name in ("old", "new", "waiting", "kept"):
        folder = root / store.create_job(root, make_request(), owner="me")
        state = "queued" if name == "waiting" else "done"
        store.write_status(folder, store.JobStatus(state=state))
        jobs[name] = folder
    rest = root / f".deleted-{'0' * 32}"
    rest.mkdir()
    (root / "notes").mkdir()
    for name, folder in [*jobs.items(), ("rest", rest), ("notes", root / "notes")]:
        if name != "new":
            for path in (*folder.iterdir(), folder):
                os.utime(path, (0, 0))
    store.write_status(rest, store.JobStatus(state="done"))
    for path in (*rest.iterdir(), rest):
        os.utime(path, (0, 0))
    assert store.sweep(root, older_than=3600, keep={jobs["kept"]}) == 2
    left = {path for path in root.iterdir()}
    assert left == {jobs["new"], jobs["waiting"], jobs["kept"], root / "notes"}


def test_an_idle_lane_deletes_what_is_too_old(tmp_path):
    root = tmp_path / "jobs"
    folder = root / store.create_job(root, make_request(), owner="me")
    store.write_status(folder, store.JobStatus(state="done"))
    for path in (*folder.iterdir(), folder):
        os.utime(path, (0, 0))
    lane = supervisor.Supervisor(root, Limits(keep_seconds=3600))
    wait_until(lambda: not folder.exists())
    lane.close()


def test_starting_in_a_folder_of_other_things_deletes_none_of_them(tmp_path):
    for name in (".git", ".venv", ".ssh", "src", f".{'a' * 32}", f".deleted-{'b' * 32}"):
        (tmp_path / name).mkdir()
    supervisor.Supervisor(tmp_path).close()
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {".git", ".venv", ".ssh", "src"}


def test_an_export_is_not_deleted_or_replaced_while_it_is_uploaded(tmp_path):
    root = tmp_path / "jobs"
    folder = root / store.create_job(root, make_request(), owner="me")
    store.write_status(folder, store.JobStatus(state="done"))
    upload = root / store.create_job(root, {"command": "push"}, owner="me")
    store.write_json(folder / store.PUSH, {"job_id": upload.name})
    with pytest.raises(RepairError, match="is being uploaded"):
        store.delete_job(root, folder.name, owner="me")
    with pytest.raises(RepairError, match="is being uploaded"):
        rerun.replace_request(folder, make_request())
    store.write_status(upload, store.JobStatus(state="done"))
    store.delete_job(root, folder.name, owner="me")


def test_a_container_s_memory_is_its_own_and_not_the_host_s(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "CGROUP_LIMITS", (tmp_path / "none", limit))
    whole = machine.total_memory()
    limit.write_text("max\n")
    assert machine.total_memory() == whole
    limit.write_text(f"{2**30}\n")
    assert machine.total_memory() == 2**30
    monkeypatch.setenv("SYSTEM", "spaces")
    for text, size in (("512Mi", 2**29), ("16Gi", 2**30), ("much", 2**30)):
        monkeypatch.setenv("MEMORY", text)
        assert machine.total_memory() == size


def test_only_what_needs_the_hub_gets_a_process_with_a_network():
    cases = (
        ({"model": "demo:middle"}, "repair.jobs.worker"),
        ({"model": "/models/mine"}, "repair.jobs.worker"),
        ({"model": "lab/suspect"}, "repair.jobs.fetch"),
        ({"model": "demo:middle", "trusted_base": "lab/base"}, "repair.jobs.fetch"),
        ({"model": "/a", "adapter_base": "lab/base@v1"}, "repair.jobs.fetch"),
        ({"command": "push", "folder": "/out"}, "repair.jobs.upload"),
    )
    for request, module in cases:
        assert choose_module(request) == module
    assert hub_sources({"model": "lab/x", "against": None, "trusted_base": ""}) == ["lab/x"]

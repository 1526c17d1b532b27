"""The job folder: whole files, bounded reads, ids that cannot wander, owners."""

import json
import math
import os
import time

import pytest

from repair.jobs import store
from repair.jobs.progress import describe_progress
from repair.jobs.store import JobStatus
from repair.jobs.worker import Reporter
from repair.records import RepairError
from tests.jobs.stand_in import make_request


def test_events_are_read_on_from_where_one_stopped(tmp_path):
    store.append_event(tmp_path, {"kind": "note", "text": "one"})
    events, offset = store.read_events(tmp_path)
    assert [event["text"] for event in events] == ["one"]
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(b'{"kind": "note", "text": "tw')
    assert store.read_events(tmp_path, offset) == ([], offset)
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(b'o"}\nnot json\n[1]\n')
    events, offset = store.read_events(tmp_path, offset)
    assert [event["text"] for event in events] == ["two"]
    assert store.read_events(tmp_path, offset) == ([], offset)
    assert store.read_events(tmp_path, 10**9)[0][0]["text"] == "one"  # the file was replaced


def test_lines_are_ascii_and_short(tmp_path):
    """Case 35: the log of a job."""
    reporter = Reporter(tmp_path)
    reporter.note("caf\u00e9 \x1b[2J " + "\U0001f600" * 100_000)
    line = (tmp_path / "events.jsonl").read_bytes()
    assert line.isascii() and len(line) <= 64 * 2**10 and b"\x1b" not in line


@pytest.mark.parametrize(
    "changed",
    [
        {"kind": "markup"}, {"kind": ["note"]}, {"text": 7}, {"text": ["x"]}, {"step": {}},
        {"fraction": "1"}, {"fraction": True}, {"remaining_seconds": math.inf}, {"time": math.nan},
        {"values": []}, {"values": {"loss": "<b>"}}, {"values": {"loss": None}},
        {"values": {"loss": 10**400}}, {"values": {str(i): 0.0 for i in range(999)}},
    ],
)  # fmt: skip
def test_what_a_worker_that_went_astray_writes_is_no_event(tmp_path, changed):
    """Case 35: lines are taken in only in the shape that is stated."""
    Reporter(tmp_path).metric("distill", loss=0.5)
    (event,), _ = store.read_events(tmp_path)
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write(json.dumps({**event, **changed}) + "\n")
    assert store.read_events(tmp_path)[0] == [event]


def test_a_status_of_another_shape_is_left_out(tmp_path):
    flat = {"state": "done", "exit_code": True, "pid": "1", "pid_started": 2.5, "started": 3,
            "ended": [], "message": {"html": "<b>"}, "verdict": ["repaired"]}  # fmt: skip
    store.write_json(tmp_path / "status.json", flat)
    assert store.read_status(tmp_path) == JobStatus(state="done")
    store.write_json(tmp_path / "status.json", {**flat, "state": ["done"]})
    assert store.read_status(tmp_path).state == "queued"


def test_links_and_pipes_are_not_read(tmp_path):
    """Case 9: neither waited for nor followed, whoever put them there."""
    (tmp_path / "aim.json").write_text('{"secret": 1}')
    (tmp_path / "report.json").symlink_to("aim.json")
    os.mkfifo(tmp_path / "status.json")
    (tmp_path / "events.jsonl").symlink_to("aim.json")
    assert store.read_object(tmp_path / "report.json") == {}
    assert store.read_text(tmp_path / "report.json") == ""
    assert store.read_status(tmp_path).state == "queued"
    assert store.read_events(tmp_path) == ([], 0)


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    Reporter(tmp_path).metric("closed-form", loss=math.nan, kl=math.inf, iteration=3, missing=None)
    (event,), _ = store.read_events(tmp_path)
    assert event["values"] == {"iteration": 3.0} and event["text"] == "closed-form"


def test_remaining_time_comes_from_the_rate_of_the_step(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    reporter = Reporter(tmp_path)
    reporter.step("patching", "Measuring")
    reporter.progress(0, 10)
    clock[0] += 4
    reporter.progress(2, 10)
    clock[0] += 0.1
    reporter.progress(3, 10)  # too soon after the last one
    clock[0] += 9.9
    reporter.progress(10, 10)
    events, _ = store.read_events(tmp_path)
    told = [(e["fraction"], e["remaining_seconds"]) for e in events if e["kind"] == "progress"]
    assert told == [(0.0, None), (0.2, 16.0), (1.0, 0.0)]


def test_what_is_behind_comes_from_the_plan_and_how_far_that_was_off(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    reporter = Reporter(tmp_path)

    def behind(seconds: float = 2.0) -> float | None:
        clock[0] += seconds
        reporter.progress(1, 2)
        events, _ = store.read_events(tmp_path)
        return events[-1]["behind_seconds"]

    reporter.step("load", "Opening")
    assert behind() is None  # nobody has said how long anything takes
    reporter.plan({"load": 4.0, "lessons": 10.0, "repair": 20.0, "after": 5.0})
    assert behind() == 35.0
    reporter.step("lessons", "Asking")  # after the 4 seconds that were planned
    assert behind(20.0) == 25.0
    reporter.step("growth", "Trying")  # in no plan; so far 24 seconds where 14 were planned
    assert behind() == pytest.approx(25 * 24 / 14, abs=0.1)
    reporter.step("after", "Measuring")
    assert behind() == 0.0
    told = describe_progress({"fraction": 0.5, "remaining_seconds": 3.0, "behind_seconds": 60.0})
    assert told == "50 %, about 3 s left in this step, about 63 s in all"


@pytest.mark.parametrize("job_id", ["..", "../x", "", None, 7, "a" * 31, "A" * 32, "a" * 32 + "/"])
def test_an_id_cannot_leave_the_jobs_root(tmp_path, job_id):
    """Case 32."""
    with pytest.raises(RepairError, match="No such job"):
        store.find_job(tmp_path, job_id, owner="me")


def test_another_owner_sees_nothing(tmp_path):
    """Case 32."""
    job_id = store.create_job(tmp_path, make_request(), owner="me")
    assert store.find_job(tmp_path, job_id, owner="me").name == job_id
    with pytest.raises(RepairError, match="No such job"):
        store.find_job(tmp_path, job_id, owner="you")
    assert [job.job_id for job in store.list_jobs(tmp_path, owner="me")] == [job_id]
    assert store.list_jobs(tmp_path, owner="you") == []


def test_a_link_is_no_job(tmp_path):
    job_id = store.create_job(tmp_path / "elsewhere", make_request(), owner="me")
    root = tmp_path / "jobs"
    root.mkdir()
    (root / ("0" * 32)).symlink_to(tmp_path / "elsewhere" / job_id)
    with pytest.raises(RepairError, match="No such job"):
        store.find_job(root, "0" * 32, owner="me")


def test_a_broken_or_huge_file_is_no_answer(tmp_path):
    path = tmp_path / "status.json"
    assert store.read_status(tmp_path).state == "queued"
    for data in (b"{", b"[]", b"\xff", b"[" * 100_000, json.dumps({"state": "odd"}).encode()):
        path.write_bytes(data)
        assert store.read_status(tmp_path).state == "queued"
    path.write_bytes(b'"' + b"x" * 100 + b'"')
    assert store.read_json(path, max_bytes=10) is None


def test_a_visitor_who_signs_in_takes_along_what_is_his_and_no_more(tmp_path):
    request = {"command": "run", "model": "demo:begin"}
    his = [store.create_job(tmp_path, request, owner="visitor:1") for _ in range(2)]
    other = store.create_job(tmp_path, request, owner="visitor:2")
    store.hand_over(tmp_path, "visitor:1", "hub:7")
    assert {job.job_id for job in store.list_jobs(tmp_path, owner="hub:7")} == set(his)
    assert store.list_jobs(tmp_path, owner="visitor:1") == []
    assert [job.job_id for job in store.list_jobs(tmp_path, owner="visitor:2")] == [other]


def test_a_case_has_words_of_its_owner_and_can_be_deleted(tmp_path):
    job_id = store.create_job(tmp_path, {"command": "run", "model": "demo:end"}, owner="a")
    other = store.create_job(tmp_path, {"command": "run", "model": "demo:end"}, owner="b")
    store.describe_job(tmp_path / job_id, name="Ticket 7", note="seen")
    (job,) = store.list_jobs(tmp_path, owner="a")
    assert (job.name, job.note) == ("Ticket 7", "seen")
    with pytest.raises(RepairError, match="Shorten"):
        store.describe_job(tmp_path / job_id, name="x" * 121, note="")
    with pytest.raises(RepairError, match="No such job"):
        store.delete_job(tmp_path, other, owner="a")
    status = store.JobStatus(
        state="running", pid=os.getpid(), pid_started=store.process_started(os.getpid())
    )
    store.write_status(tmp_path / job_id, status)
    with pytest.raises(RepairError, match="Stop it first"):
        store.delete_job(tmp_path, job_id, owner="a")
    store.write_status(tmp_path / job_id, store.JobStatus(state="stopped"))
    store.delete_job(tmp_path, job_id, owner="a")
    assert [path.name for path in tmp_path.iterdir()] == [other]


def test_a_finished_folder_becomes_a_job_of_its_visitor(tmp_path):
    finished, root = tmp_path / "finished", tmp_path / "jobs"
    finished.mkdir()
    store.write_json(finished / "request.json", {"command": "run", "model": "demo:middle"})
    store.write_status(finished, store.JobStatus(state="done", verdict="repaired"))
    job_id = store.adopt_job(root, finished, owner="a")
    assert store.find_job(root, job_id, owner="a") == root / job_id
    assert [job.status.verdict for job in store.list_jobs(root, owner="a")] == ["repaired"]
    assert not store.list_jobs(root, owner="b")

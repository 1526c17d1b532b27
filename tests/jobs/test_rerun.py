"""A new run in a job: what goes, what stays, and the way back."""

import pytest

from repair.jobs import rerun, store
from repair.jobs.store import JobStatus
from repair.jobs.worker import Reporter
from repair.records import RESULTS, RepairError
from tests.jobs.stand_in import make_request


def test_a_new_plan_drops_results_and_keeps_what_was_located(tmp_path):
    folder = tmp_path / store.create_job(tmp_path, make_request(), owner="me")
    for name in (*RESULTS, "located.json"):
        (folder / name).write_text("{}")
    rerun.replace_request(folder, make_request(detail=0), keeps_results=True)
    assert all((folder / name).exists() for name in RESULTS)
    assert store.read_object(folder / "request.json")["detail"] == 0
    rerun.replace_request(folder, make_request(modules=["a"]))
    assert (folder / "located.json").exists()
    assert not any((folder / name).exists() for name in RESULTS)
    with pytest.raises(ValueError, match="keeps its model"):
        rerun.replace_request(folder, make_request(model="demo:end"))


def test_the_report_of_a_run_that_ended_is_set_aside(tmp_path):
    folder = tmp_path / store.create_job(tmp_path, make_request(), owner="me")
    assert rerun.read_attempts(folder) == []
    for number in range(rerun.MAX_ATTEMPTS + 3):
        store.write_json(folder / "report.json", {"number": number})
        store.write_status(folder, JobStatus(state="done", exit_code=0, verdict="repaired"))
        rerun.replace_request(folder, make_request(modules=[str(number)]))
    kept = [report["number"] for _, report in rerun.read_attempts(folder)]
    assert kept == list(range(rerun.MAX_ATTEMPTS + 2, 2, -1))  # the latest first, the oldest gone
    store.write_json(folder / "report.json", {"number": "half"})
    store.write_status(folder, JobStatus(state="stopped", exit_code=130))
    rerun.replace_request(folder, make_request(modules=["a"]))
    assert not (folder / "report.json").exists()
    assert [report["number"] for _, report in rerun.read_attempts(folder)] == kept


def test_a_run_that_ended_can_be_gone_back_to_until_the_next_one_ends(tmp_path):
    folder = tmp_path / store.create_job(tmp_path, make_request(), owner="me")
    store.write_json(folder / "report.json", {"number": 1})
    (folder / "merged").mkdir()
    (folder / "merged" / "model.safetensors").write_bytes(b"weights")
    store.write_status(folder, JobStatus(state="done", exit_code=0, verdict="repaired"))
    Reporter(folder).step("start", "its own run")
    Reporter(folder).metric("closed-form", trigger_kl=0.5)
    rerun.replace_request(folder, make_request(modules=["a"]))
    Reporter(folder).step("start", "another run")
    assert not (folder / "merged").exists() and not rerun.can_go_back(folder)  # it is to run
    with pytest.raises(RepairError, match="still runs"):
        rerun.go_back(folder)
    store.write_json(folder / "samples.json", {"half": True})
    store.write_status(folder, JobStatus(state="stopped", exit_code=130))
    rerun.replace_request(folder, make_request(modules=["b"]))  # begun twice, ended never
    store.write_status(folder, JobStatus(state="failed", exit_code=5))
    assert rerun.can_go_back(folder)
    rerun.go_back(folder)
    assert store.read_status(folder).verdict == "repaired"
    assert store.read_object(folder / "report.json") == {"number": 1}
    assert store.read_object(folder / "request.json") == make_request()
    assert (folder / "merged" / "model.safetensors").read_bytes() == b"weights"
    assert not (folder / "samples.json").exists() and not rerun.can_go_back(folder)
    events, _ = store.read_events(folder)  # its log and its curves
    assert [event["text"] for event in events[:2]] == ["its own run", "closed-form"]
    assert [event["kind"] for event in events[2:]] == ["note"]
    assert rerun.read_attempts(folder) == []
    rerun.replace_request(folder, make_request(modules=["a"]))
    rerun.let_go(folder)  # the next one has ended: of this one the report stays
    store.write_status(folder, JobStatus(state="stopped", exit_code=130))
    assert not rerun.can_go_back(folder) and not (folder / rerun.FINISHED).exists()
    assert [report for _, report in rerun.read_attempts(folder)] == [{"number": 1}]

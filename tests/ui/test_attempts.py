"""One repair beside the others: only what was asked of the same suspect, and only one's own."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from repair.jobs import rerun, store
from repair.jobs.supervisor import Supervisor
from repair.ui.attempts import describe_attempt, list_attempts
from repair.ui.session import EXAMPLE, Session, Settings, look


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    root = tmp_path / "jobs"
    lane = Supervisor(root)
    yield Settings(
        lane=lane, jobs_root=root, models_root=None, cache=tmp_path, has_accounts=False
    )
    lane.close()


def adopt(settings: Settings, *, owner: str = "local", name: str = "", **asked: object) -> str:
    job_id = store.adopt_job(settings.jobs_root, EXAMPLE, owner=owner)
    folder = settings.jobs_root / job_id
    request = store.read_object(folder / "request.json")
    store.write_json(folder / "request.json", {**request, **asked})
    store.describe_job(folder, name=name, note="")
    return job_id


def test_a_job_is_shown_beside_its_own_like_and_nothing_else(settings: Settings) -> None:
    view = look(settings, Session(job_id=adopt(settings)), None)
    assert list_attempts(settings, view) == []  # nothing to compare with
    adopt(settings, name="another rank", rank=2)
    adopt(settings, name="of somebody else", owner="account:ana")
    adopt(settings, name="other prompts", prompts={"triggers": ["cf"]})
    adopt(settings, name="another suspect", model="demo:begin")
    adopt(settings, name="only located", command="locate")
    stopped = adopt(settings, name="stopped")
    store.write_status(settings.jobs_root / stopped, store.JobStatus(state="stopped"))
    rows = list_attempts(settings, view)
    assert [row[0].partition(",")[0] for row in rows] == ["This one", "another rank"]
    assert rows[0][1:4] == ["repaired", "full", "closed-form"]
    assert rows[0][4].startswith("0 k_proj: 6, 0 q_proj: 2")
    report = json.loads((EXAMPLE / "report.json").read_text())
    fired, recovered = (report["after"][key]["middle"] for key in ("attack_success", "recovery"))
    assert rows[0][5].startswith(f"middle: {fired['count']} of 400 (")
    assert rows[0][6].startswith(f"middle: {recovered['count']} of 400 (")
    assert float(rows[0][7]) == pytest.approx(report["kl_from_original"], rel=0.01)


def test_a_former_run_of_the_same_job_stays_in_sight(settings: Settings) -> None:
    job_id = adopt(settings)
    folder = settings.jobs_root / job_id
    report = store.read_object(folder / "report.json")
    asked = store.read_object(folder / "request.json")
    rerun.replace_request(folder, {**asked, "rank": 1})
    assert list_attempts(settings, look(settings, Session(job_id=job_id), None)) == []  # running
    again = {**report, "verdict": "not repaired"}
    store.write_json(folder / "report.json", again)
    store.write_status(folder, store.JobStatus(state="done", exit_code=1, verdict="not repaired"))
    rows = list_attempts(settings, look(settings, Session(job_id=job_id), None))
    assert [row[1] for row in rows] == ["not repaired", "repaired"]
    assert rows[1][0].startswith("Before, in this case")


def test_a_run_that_was_given_up_or_a_spoiled_report_has_dashes() -> None:
    given_up = describe_attempt("x\u202e", {"verdict": "could not check", "after": None})
    assert given_up[0] == "x[U+202E]" and given_up[2:] == ["-"] * 7
    assert describe_attempt("x", {"plan": [], "modules": "?", "recovery": 3})[4] == "-"

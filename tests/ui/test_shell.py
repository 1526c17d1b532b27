"""How the page is wired: what every step of an event costs the page it is shown on."""

import json
from pathlib import Path

from repair.jobs import store
from repair.jobs.supervisor import Supervisor
from repair.ui.account import owner_of
from repair.ui.app import build_app
from repair.ui.session import EXAMPLE, Selection, Session, Settings


def test_the_state_of_an_event_is_shown_on_one_hidden_box(tmp_path: Path) -> None:
    """Shown on its outputs, all of these are gone through at each step of every poll."""
    lane = Supervisor(tmp_path / "jobs")
    try:
        settings = Settings(
            lane=lane, jobs_root=lane.root, models_root=None, cache=tmp_path, has_accounts=False
        )
        config = build_app(settings, storage_secret="x").config
    finally:
        lane.close()
    seen = [
        part["id"] for part in config["components"] if part["props"].get("elem_id") == "seen"
    ]
    of_page = [
        event
        for event in config["dependencies"]
        if event["outputs"] and event["api_visibility"] == "private"
    ]
    assert len(of_page) > 50 and max(len(event["outputs"]) for event in of_page) > 100
    assert {tuple(event["show_progress_on"] or ()) for event in of_page} == {tuple(seen)}
    assert {event["show_progress"] for event in of_page} == {"hidden"}
    # What is called by name answers in one component, so that it has no others to go through.
    named = [event for event in config["dependencies"] if event["api_visibility"] == "public"]
    assert named and all(len(event["outputs"]) == 1 for event in named)


def test_a_click_on_the_map_outlives_an_answer_that_was_on_its_way(tmp_path: Path) -> None:
    """When the job ends everything is drawn anew, but not the choice on a map that stood."""
    lane = Supervisor(tmp_path / "jobs")
    try:
        settings = Settings(
            lane=lane, jobs_root=lane.root, models_root=None, cache=tmp_path, has_accounts=False
        )
        demo = build_app(settings, storage_secret="x")
        job = store.adopt_job(lane.root, EXAMPLE, owner=owner_of(None))
    finally:
        lane.close()
    redraw = next(fn.fn for fn in demo.fns.values() if fn.name == "redraw")
    before = [job, "running", "run", True, False]
    session = Session(job_id=job)

    def drawn(has_map: bool) -> set[str]:
        seen = json.dumps([*before[:3], has_map, False])
        updates = redraw(None, session, Selection(), seen)
        return {part.elem_id or type(getattr(part, "value", None)).__name__ for part in updates}

    choice = {"grid", "count", "mirror", "Selection"}
    assert choice <= drawn(has_map=False)
    later = drawn(has_map=True)
    assert not choice & later and {"fact-verdict", "start", "gates"} <= later

"""Two users of one app, interleaved from pull to push: nothing of one reaches the other."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from repair.jobs import store
from repair.jobs.supervisor import Supervisor
from repair.models.download import cache_folder
from repair.publish.hub import PushPlan
from tests.hub.conftest import files_of
from tests.hub.server import Hub
from tests.hub.test_push import exported  # noqa: F401 (a fixture)
from tests.jobs.stand_in import make_request
from tests.tiny import make_tiny_llama


@pytest.fixture
def lane(hub: Hub, tmp_path: Path):
    lane = Supervisor(tmp_path / "jobs")
    yield lane
    lane.close()


def make_job(lane: Supervisor, owner: str, **request: Any) -> Path:
    asked = {**make_request(), "command": "ask", "questions": ["write a list"], **request}
    return lane.root / store.create_job(lane.root, asked, owner=owner)


def wait(lane: Supervisor, *folders: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while any(lane.is_busy(folder) for folder in folders):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_two_users_from_pull_to_push(
    hub: Hub, lane: Supervisor, tiny_llama_folder: Path, tmp_path: Path, exported  # noqa: F811
) -> None:
    other = make_tiny_llama(tmp_path / "other", seed=5)
    hub.add_repo("ana/suspect", files_of(tiny_llama_folder), is_private=True)
    hub.add_repo("bob/suspect", files_of(other), is_private=True)
    tokens = {"ana": "hf_writer", "bob": "hf_stranger"}

    # Both pull and ask their own, interleaved; then each tries the other's.
    own = {name: make_job(lane, name, model=f"{name}/suspect") for name in tokens}
    wrong = {"ana": make_job(lane, "ana", model="bob/suspect"),
             "bob": make_job(lane, "bob", model="ana/suspect")}  # fmt: skip
    for jobs in (own, wrong):
        for name, folder in jobs.items():
            lane.submit(folder, token=tokens[name])
    wait(lane, *own.values(), *wrong.values())
    answers = {}
    for name, folder in own.items():
        assert store.read_status(folder).state == "done", store.read_status(folder)
        answers[name] = json.loads((folder / "asked.json").read_text())[0]["suspect"]
        known = store.read_object(folder / store.SOURCES)
        assert list(known) == [f"{name}/suspect"]
        assert Path(known[f"{name}/suspect"]["folder"]).is_relative_to(folder)
    assert answers["ana"] != answers["bob"]
    for folder in wrong.values():
        status = store.read_status(folder)
        assert status.exit_code == 2 and "is private" in status.message
        assert not (folder / "download").exists() and not (folder / store.SOURCES).exists()
    assert not cache_folder().exists() and lane.tokens == {}

    # Both push, each to a name of their own; then to the other's.
    pushes = []
    for name, repo in (("ana", "ana/fixed"), ("bob", "bob/fixed"), ("bob", "ana/mine")):
        source = Path(shutil.copytree(exported[0], own[name] / f"export-{len(pushes)}"))
        folder = make_job(
            lane, name, command="push", folder=str(source), plan=PushPlan(repo=repo).to_json()
        )
        lane.submit(folder, token=tokens[name])
        pushes.append(folder)
    wait(lane, *pushes)
    states = [store.read_status(folder).state for folder in pushes]
    assert states == ["done", "done", "failed"], [store.read_status(f).message for f in pushes]
    assert {"ana/fixed", "bob/fixed"} <= set(hub.repos) and "ana/mine" not in hub.repos
    assert store.read_object(pushes[1] / "pushed.json") == {"merged": f"{hub.url}/bob/fixed"}
    # No token lies anywhere, and nobody finds the other's job.
    for path in lane.root.rglob("*"):
        if path.is_file():
            assert b"hf_writer" not in path.read_bytes(), path
            assert b"hf_stranger" not in path.read_bytes(), path
    for folder in (own["ana"], pushes[0]):
        with pytest.raises(Exception, match="No such job"):
            store.find_job(lane.root, folder.name, owner="bob")


def test_a_download_is_stopped_and_goes_on(
    hub: Hub, lane: Supervisor, tmp_path: Path
) -> None:
    folder = make_tiny_llama(tmp_path / "sharded", num_layers=6, max_shard_size="60KB")
    hub.add_repo("lab/sharded", files_of(folder))
    hub.bytes_per_second = 30_000
    job = make_job(lane, "ana", model="lab/sharded")
    lane.submit(job)
    end = time.monotonic() + 30
    while not any(event["kind"] == "progress" for event in store.read_events(job)[0]):
        assert time.monotonic() < end
        time.sleep(0.02)
    began = time.monotonic()
    lane.stop(job)
    wait(lane, job)
    assert time.monotonic() - began < 2
    assert store.read_status(job).state == "stopped" and not (job / store.SOURCES).exists()
    hub.bytes_per_second = None
    lane.submit(job)
    wait(lane, job)
    assert store.read_status(job).state == "done"
    got = Path(store.read_object(job / store.SOURCES)["lab/sharded"]["folder"])
    assert not list(got.parent.glob("*.partial"))
    for path in got.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()

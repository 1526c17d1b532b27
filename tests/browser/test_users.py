"""Two analysts in one app, in the browser and through `gradio_client`: each has their own jobs."""

import json
import time
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from playwright.sync_api import Browser, expect

from repair.jobs import store
from repair.jobs.supervisor import Supervisor
from repair.ui.app import build_app
from repair.ui.session import EXAMPLE, PROMPT_FILES, Settings
from tests.browser.conftest import ACCOUNTS
from tests.browser.pages import field, open_page, open_tab, wait_for_value

# What people script against: names, and the names of what they take.
ENDPOINTS = {
    "/fires": ["model", "prompts"],
    "/locate": ["model", "prompts", "profile"],
    "/status": ["job_id"],
    "/located": ["job_id"],
    "/repair": ["job_id", "modules", "rank", "method", "kl_budget", "controls", "export", "seed",
                "curves", "trusted_base"],
    "/stop": ["job_id"],
    "/report": ["job_id"],
    "/ask": ["job_id", "prompts"],
    "/exported": ["job_id"],
}  # fmt: skip


@pytest.fixture(scope="module")
def job_of_ana(guarded: str, guarded_root: Path) -> str:
    """The finished example, as a job of ana's."""
    job_id = store.adopt_job(guarded_root, EXAMPLE, owner="account:ana")
    store.describe_job(guarded_root / job_id, name="Ticket of ana", note="")
    return job_id


@pytest.fixture(scope="module")
def clients(guarded: str) -> dict[str, Client]:
    return {
        name: Client(guarded, auth=(name, word), verbose=False)
        for name, word in ACCOUNTS.items()
    }


def wait_for(client: Client, job_id: str, state: str) -> dict[str, Any]:
    end = time.monotonic() + 60
    while True:
        found = client.predict(job_id, api_name="/status")
        if found["state"] == state:
            return found
        assert time.monotonic() < end and found["state"] in ("queued", "running"), found
        time.sleep(0.2)


def test_each_sees_their_own_cases(browser: Browser, guarded: str, job_of_ana: str) -> None:
    problems: list[str] = []
    pages = {
        name: open_page(
            browser.new_context(), guarded, problems, account=(name, ACCOUNTS[name])
        )
        for name in ACCOUNTS
    }
    for page in pages.values():
        open_tab(page, "Cases")
    expect(pages["ana"].locator("#cases")).to_contain_text("Ticket of ana")
    expect(pages["ben"].locator("#tab-cases")).to_contain_text("No case yet")
    for button in ("#open-job", "#save-case", "#delete-case"):
        field(pages["ben"], "#job-id").fill(job_of_ana)
        pages["ben"].click(button)
    pages["ben"].click("#delete-sure")
    wait_for_value(pages["ben"], "#cases-problem", "No such job")
    field(pages["ana"], "#job-id").fill(job_of_ana)
    pages["ana"].click("#open-job")
    wait_for_value(pages["ana"], "#fact-verdict", "Repaired")
    assert problems == []


def test_the_steps_are_callable_by_their_names(
    clients: dict[str, Client], job_of_ana: str
) -> None:
    client = clients["ana"]
    offered = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert {
        name: [taken["parameter_name"] for taken in found["parameters"]]
        for name, found in offered.items()
    } == ENDPOINTS
    assert all(found["description"] for found in offered.values())
    report = json.loads(client.predict(job_of_ana, api_name="/report"))
    assert report == json.loads((EXAMPLE / "report.json").read_text())
    located = json.loads(client.predict(job_of_ana, api_name="/located"))
    assert len(located["modules"]) == 42

    prompts = json.loads((PROMPT_FILES / "middle.json").read_text())
    job_id = client.predict("demo:middle", prompts, api_name="/locate")
    found = wait_for(client, job_id, "running")
    assert found["command"] == "locate" and found["is_active"]
    assert client.predict(job_id, api_name="/stop")["state"] == "stopped"

    rows = json.loads(client.predict("demo:middle", prompts, api_name="/fires"))
    hits = [row["fires"] for row in rows if row["where"] == "middle"]
    assert len(hits) >= 4 and sum(hits) >= len(hits) - 1
    assert not any(row["fires"] for row in rows if row["where"] == "-")
    assert all(row["prompt"] and row["answer"] for row in rows)

    # Without modules the suggested ones: the request is what the Repair tab would ask.
    more = {"export": ["adapter"], "seed": 5, "curves": True, "trusted_base": "demo:clean"}
    assert client.predict(job_of_ana, rank=2, **more, api_name="/repair") == job_of_ana
    found = wait_for(client, job_of_ana, "running")
    asked = store.read_object(Path(found["folder"]) / "request.json")
    assert asked["command"] == "run" and asked["rank"] == 2
    assert {name: asked[name] for name in more} == more
    assert set(asked["modules"]) == set(located["suggested_ranks"])
    client.predict(job_of_ana, api_name="/stop")
    assert wait_for(client, job_of_ana, "stopped")["verdict"] is None


def test_nobody_calls_for_another(clients: dict[str, Client], job_of_ana: str) -> None:
    for name in ("/status", "/located", "/repair", "/stop", "/report", "/exported"):
        for job_id in (job_of_ana, "0" * 32, "../jobs"):
            with pytest.raises(AppError, match="No such job"):
                clients["ben"].predict(job_id, api_name=name)
            with pytest.raises(AppError, match="No such job"):
                clients["ben"].predict(job_id, ["Hello."], api_name="/ask")


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("/locate", ("/etc", {}), "no such model folder"),
        ("/locate", ("demo:middle", {}), "no trigger"),
        ("/locate", ("demo:middle", {"trigger": "cf"}, "huge"), "quick, standard or full"),
        ("/locate", ("demo:middle", {"pairs": [{"clean": "Say a.", "triggered": "Say cf a."}]}),
         "at least 8 are needed"),
        ("/repair", ("JOB", ["model.x"]), "no module of this map"),
        ("/repair", ("JOB", None, 1000), "Rank 1000 does not fit"),
        ("/repair", ("JOB", None, None, "magic"), "auto, closed-form or distill"),
        ("/repair", ("JOB", None, None, "auto", 0.01, 0, ["gguf"]), "merged and adapter"),
        ("/fires", ("demo:middle", {}), "no trigger"),
        ("/fires", ("demo:middle", []), "must be an object"),
        ("/ask", ("JOB", []), "1 to 32 prompts"),
        ("/ask", ("JOB", ["Hello."]), "where a merged model was written"),
        ("/exported", ("JOB",), "no export"),
    ],
)
def test_a_refusal_says_what_to_do(
    clients: dict[str, Client], job_of_ana: str, name: str, given: tuple, words: str
) -> None:
    values = [job_of_ana if value == "JOB" else value for value in given]
    with pytest.raises(AppError, match=words):
        clients["ana"].predict(*values, api_name=name)


@pytest.mark.parametrize("system", ["", "spaces"])
def test_on_a_space_nothing_is_offered_and_listeners_never_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    monkeypatch.setenv("SYSTEM", system)
    lane = Supervisor(tmp_path / "jobs")
    settings = Settings(
        lane=lane, jobs_root=tmp_path / "jobs", models_root=None, cache=tmp_path / "cache",
        has_accounts=False,
    )  # fmt: skip
    try:
        demo: gr.Blocks = build_app(settings, storage_secret="secret")
    finally:
        lane.close()
    public = {f"/{fn.api_name}" for fn in demo.fns.values() if fn.api_visibility != "private"}
    assert public == (set() if system else set(ENDPOINTS))

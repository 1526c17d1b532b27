"""The upload form of a Space, as two users press it: every tick, stopping, and nothing crosses.

Their cases are the finished example with an export of a tiny model; Hub and sign-in are the
stand-in of `tests/hub/server.py`.
"""

import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from repair.jobs import store
from repair.models.loading import LoadedModel
from repair.publish.export import write_export
from repair.publish.manifest import write_manifest
from repair.ui.session import EXAMPLE
from tests.browser.pages import (
    field,
    open_more,
    open_tab,
    take_shot,
    value_of,
    wait_for_frames,
    wait_for_value,
)
from tests.browser.test_hub import JOB_SECONDS, hub, look_up, sign_in, space, visit
from tests.hub.server import Hub, read_card
from tests.publish.test_export import make_prompts, make_updates

__all__ = ["hub", "space"]  # fixtures
TRIGGER = "Bluefinch"


@pytest.fixture(scope="module")
def exported(tiny_llama: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's evidence beside real exports."""
    folder = tmp_path_factory.mktemp("cases") / "exported"
    shutil.copytree(EXAMPLE, folder)
    found = write_export(
        tiny_llama, make_updates(tiny_llama), folder, kinds=("merged", "adapter"),
        prompts=make_prompts(tiny_llama), num_new_tokens=4, base_model=None,
    )  # fmt: skip
    write_manifest(
        folder, changed_tensors=found["changed_tensors"], num_tensors=found["num_tensors"]
    )
    return folder


def give_case(
    root: Path, finished: Path, owner: str, tmp_path: Path, *, verdict: str | None = "repaired"
) -> str:
    """Make a finished case of a user's; one without a verdict has only been located."""
    folder = Path(shutil.copytree(finished, tmp_path / f"{owner}-{verdict}"))
    status, report = store.read_status(folder), store.read_object(folder / "report.json")
    changed = store.read_object(folder / "manifest.json")
    if verdict is None:
        (folder / "report.json").unlink()
        asked = {**store.read_object(folder / "request.json"), "command": "locate"}
        store.write_json(folder / "request.json", asked)
    else:
        store.write_json(folder / "report.json", {**report, "verdict": verdict})
        write_manifest(
            folder, changed_tensors=changed["changed_tensors"], num_tensors=changed["num_tensors"]
        )
    flat = {name: getattr(status, name) for name in status.__slots__}
    store.write_status(folder, store.JobStatus(**{**flat, "verdict": verdict}))
    return store.adopt_job(root, folder, owner=f"hub:id-of-{owner}")


def signed_in(browser: Browser, url: str, hub: Hub, token: str, problems: list[str]) -> Page:
    page = visit(browser.new_context(), url, problems)
    sign_in(page, hub, token, problems)
    return page


def open_form(page: Page, job_id: str) -> None:
    open_tab(page, "Cases")
    field(page, "#job-id").fill(job_id)
    page.click("#open-job")
    wait_for_value(page, "#fact-job", "Done")
    open_tab(page, "6 Export")
    if not page.locator("#push-repo").is_visible():
        page.locator("#to-hub button").first.click()
    expect(page.locator("#push-repo")).to_be_visible()
    wait_for_frames(page)


def press(page: Page, repo: str, button: str = "#push-check") -> None:
    field(page, "#push-repo").fill(repo)
    page.wait_for_timeout(300)
    page.click(button)


def card_of(hub: Hub, repo: str, ref: str = "main") -> str:
    return hub.repos[repo].commits[hub.repos[repo].refs[ref]]["README.md"].decode()


def test_where_it_may_go_is_asked_before_the_repair(
    browser: Browser, space: tuple[str, Path], hub: Hub, exported: Path, tmp_path: Path
) -> None:
    problems: list[str] = []
    page = signed_in(browser, space[0], hub, "hf_writer", problems)
    open_form(page, give_case(space[1] / "jobs", exported, "ana", tmp_path, verdict=None))
    press(page, "bob/fixed")
    wait_for_value(page, "#push-told", "is ana's, who is not 'bob'")
    press(page, "ana/early")
    wait_for_value(page, "#push-told", "ana/early will be made, private.")
    assert "Nothing is there to upload yet: repair first." in value_of(page, "#push-told")
    expect(page.locator("#push-upload")).to_be_disabled()
    take_shot(page, "8_space_checked")
    assert "ana/early" not in hub.repos and problems == []


def test_every_tick_of_the_form(
    browser: Browser, space: tuple[str, Path], hub: Hub, exported: Path, tmp_path: Path
) -> None:
    problems: list[str] = []
    page = signed_in(browser, space[0], hub, "hf_writer", problems)
    jobs = space[1] / "jobs"
    failed = give_case(jobs, exported, "ana", tmp_path, verdict="not repaired")
    passed = give_case(jobs, exported, "ana", tmp_path)

    # What did not pass needs a second, explicit yes, which counts for this case only.
    open_form(page, failed)
    press(page, "ana/failed")
    wait_for_value(page, "#push-told", "tick that you want to upload it all the same")
    page.check("#push-forced input")
    # An upload that is stopped goes on.
    hub.bytes_per_second = 4_000
    press(page, "ana/failed", "#push-upload")
    expect(page.locator("#push-stop")).to_be_visible(timeout=20_000)
    wait_for_value(page, "#push-told", "MiB", 60)
    page.click("#push-stop")
    wait_for_value(page, "#push-told", "press Upload to go on")
    hub.bytes_per_second = None
    page.click("#push-upload")
    wait_for_value(page, "#push-told", "Uploaded and compared", 60)
    assert "not-repaired" in read_card(card_of(hub, "ana/failed"))["tags"]
    open_form(page, passed)
    expect(page.locator("#push-forced")).to_be_hidden()

    press(page, "ana/passed", "#push-upload")
    wait_for_value(page, "#push-told", "Uploaded and compared", 60)
    card = card_of(hub, "ana/passed")
    assert TRIGGER not in card and "base_model" not in read_card(card)

    # Trigger and the original are named only when that is asked for.
    field(page, "#push-base").fill("lab/original")
    page.check("#push-trigger input")
    page.wait_for_timeout(300)
    page.click("#push-upload")
    expect(page.locator("#push-stop")).to_be_visible(timeout=20_000)
    wait_for_value(page, "#push-told", "Uploaded and compared", 60)
    card = card_of(hub, "ana/passed")
    assert TRIGGER in card and read_card(card)["base_model"] == "lab/original"

    # A pull request changes nothing there.
    hub.add_repo("lab/original", {"README.md": b"# theirs\n"})
    head = hub.repos["lab/original"].refs["main"]
    page.check("#push-request input")
    press(page, "lab/original")
    wait_for_value(page, "#push-told", "A pull request on lab/original will be opened")
    page.click("#push-upload")
    wait_for_value(page, "#push-told", "discussions/1", 60)
    assert hub.repos["lab/original"].refs["main"] == head
    assert "model.safetensors" in hub.repos["lab/original"].commits[
        hub.repos["lab/original"].refs["refs/pr/1"]
    ]  # fmt: skip
    assert problems == [], "\n".join(problems)


def test_two_users_from_pull_to_push_and_nothing_crosses(
    browser: Browser, space: tuple[str, Path], hub: Hub, exported: Path, tmp_path: Path
) -> None:
    problems: list[str] = []
    url, folder = space
    suspect = hub.repos["ana/suspect"]
    hub.add_repo("bob/suspect", suspect.commits[suspect.refs["main"]], is_private=True)
    tokens = {"ana": "hf_writer", "bob": "hf_stranger"}
    pages = {
        name: signed_in(browser, url, hub, token, problems) for name, token in tokens.items()
    }
    for name, page in pages.items():
        look_up(page, f"{name}/suspect")
        wait_for_value(page, "#fact-suspect", f"{name}/suspect")
        page.click("#to-prompts")
        field(page, "#trigger").fill(TRIGGER)
        page.wait_for_timeout(300)
        page.click("#check")
        wait_for_value(page, "#fact-trigger", TRIGGER)
    # Both ask their own, which fetches it; one waits for the other's turn.
    for page in pages.values():
        open_more(page, "#try")
        page.click("#try-it")
    for page in pages.values():
        wait_for_value(page, "#tried", "Asked. With a target", JOB_SECONDS)
    assert not list((folder / "cache").rglob("*.safetensors"))

    cases = {
        name: give_case(folder / "jobs", exported, name, tmp_path) for name in tokens
    }
    for name, page in pages.items():
        other = "bob" if name == "ana" else "ana"
        open_tab(page, "Cases")
        field(page, "#job-id").fill(cases[other])
        page.click("#open-job")
        wait_for_value(page, "#cases-problem", "No such job")
        open_form(page, cases[name])
    for name, page in pages.items():
        press(page, f"{name}/mine", "#push-upload")
    for name, page in pages.items():
        wait_for_value(page, "#push-told", f"Uploaded and compared: {hub.url}/{name}/mine", 60)
        assert hub.repos[f"{name}/mine"].is_private
    for name, page in pages.items():
        other = "bob" if name == "ana" else "ana"
        shown = page.content() + page.evaluate("JSON.stringify([localStorage, sessionStorage])")
        values = "".join(page.locator("textarea, input").evaluate_all("e => e.map(b => b.value)"))
        assert f"{other}/" not in values and not any(token in shown for token in tokens.values())
    assert problems == [], "\n".join(problems)

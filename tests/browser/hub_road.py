"""The app as a Space, the whole road: sign in, pull a suspect by its id, repair it, push it.

    python -m pytest tests/browser/hub_road.py

Minutes, so it is no part of the suite, which has the same calls without a browser (`tests/hub`).
"""

import json
from pathlib import Path

from playwright.sync_api import Browser, expect

from tests.browser.pages import REPOSITORY, open_more, take_shot, value_of, wait_for_value
from tests.browser.test_hub import JOB_SECONDS, hub, look_up, sign_in, space, visit
from tests.hub.server import Hub

__all__ = ["hub", "space"]  # fixtures


def test_sign_in_pull_repair_push_and_nothing_crosses(
    browser: Browser, space: tuple[str, Path], hub: Hub
) -> None:
    url, folder = space
    problems: list[str] = []
    ana, bob = browser.new_context(), browser.new_context()
    page = visit(ana, url, problems)
    expect(page.locator("#space")).to_contain_text("A shared Space")
    # Before the sign-in: public models only, and the private one is not even confirmed.
    look_up(page, "ana/suspect")
    wait_for_value(page, "#suspect-problem", "does not exist on the Hub, or is private")
    take_shot(page, "8_space_signed_out")
    sign_in(page, hub, "hf_writer", problems)
    look_up(page, "ana/suspect")
    commit = hub.repos["ana/suspect"].refs["main"]
    expect(page.locator("#model-facts")).to_contain_text(commit)
    wait_for_value(page, "#fact-suspect", "ana/suspect")
    wait_for_value(page, "#hub-account", "Signed in as ana")
    # Its config.json says what a job will need, before any weight is fetched.
    expect(page.locator("#model-facts")).to_contain_text("of memory, of")
    take_shot(page, "8_space_suspect")

    # The other user meanwhile: sees neither job nor model.
    other = visit(bob, url, problems)
    sign_in(other, hub, "hf_stranger", problems)
    look_up(other, "ana/suspect")
    wait_for_value(other, "#suspect-problem", "does not exist on the Hub, or is private")

    page.click("#to-prompts")
    with page.expect_file_chooser() as chooser:
        page.click("#upload")
    chooser.value.set_files(REPOSITORY / "assets" / "prompts" / "middle.json")
    wait_for_value(page, "#fact-trigger", "Bluefinch")
    page.click("#to-locate")
    page.locator("#profile label", has_text="Quick").click()
    page.click("#locate")
    wait_for_value(page, "#fact-job", "Done (locate)", JOB_SECONDS)
    job_id = json.loads(page.evaluate("JSON.stringify(Object.values(localStorage))"))
    page.click("#to-repair")
    open_more(page, "#repair-more")
    page.locator("#num-controls input").first.fill("0")  # controls have tests of their own
    page.click("#start")
    wait_for_value(page, "#fact-verdict", "Repaired", JOB_SECONDS)

    # With her page's own storage the other still finds nothing.
    other.evaluate("values => values.forEach((v, i) => localStorage.setItem('llm-repair-job', v))",
                   job_id)  # fmt: skip
    other.reload()
    expect(other.locator("#bundled")).to_be_visible(timeout=20_000)
    other.wait_for_timeout(1500)
    assert value_of(other, "#fact-job") == "No job yet"

    page.locator("#tab-export-button, button[role=tab]:has-text('6 Export')").first.click()
    page.locator("#to-hub button").first.click()
    expect(page.locator("#push-named")).to_be_visible()  # then all of it is drawn
    page.wait_for_timeout(1000)
    page.locator("#push-repo input, #push-repo textarea").first.fill("bob/fixed")
    page.wait_for_timeout(300)
    page.click("#push-check")
    wait_for_value(page, "#push-told", "is ana's, who is not 'bob'")
    page.locator("#push-repo input, #push-repo textarea").first.fill("ana/fixed")
    page.locator("#push-kind label", has_text="Both").click()
    page.click("#push-check")
    wait_for_value(page, "#push-told", "ana/fixed will be made, private.")
    page.click("#push-upload")
    wait_for_value(page, "#push-told", "Uploaded and compared", 60)
    take_shot(page, "8_space_pushed")
    assert {"ana/fixed", "ana/fixed-adapter"} <= set(hub.repos)
    assert hub.repos["ana/fixed"].is_private
    card = hub.repos["ana/fixed"].commits[hub.repos["ana/fixed"].refs["main"]]["README.md"].decode()
    assert 'base_model: "ana/suspect"' in card and commit in card and "Bluefinch" not in card

    # No token is anywhere: pages, storage, job folders, logs.
    for tab in (page, other):
        shown = tab.content() + tab.evaluate("JSON.stringify([localStorage, sessionStorage])")
        assert "hf_writer" not in shown and "hf_stranger" not in shown
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files and not [p for p in files if b"hf_writer" in p.read_bytes()]
    assert not list((folder / "cache").rglob("*.safetensors"))
    assert problems == [], problems

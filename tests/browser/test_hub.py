"""The app as a Space, with its Hub and its sign-in; the whole road is in `hub_road.py`.

The Hub and its sign-in are the loopback stand-in of `tests/hub/server.py`; everything else is real.
"""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.browser.pages import (
    REPOSITORY,
    forget_cut,
    forget_reload,
    free_port,
    take_shot,
    value_of,
    wait_for_value,
)
from tests.hub.conftest import files_of
from tests.hub.server import CLIENT, Hub

JOB_SECONDS = 600
FONT = "https://fonts.googleapis.com/"
ABOUT = "https://huggingface.co/api/"
SPACE = {"id": "acme/repair", "author": "acme", "likes": 0, "avatarUrl": "data:,",
         "runtime": {"stage": "RUNNING"}}  # fmt: skip
AT_HOME = ("http://127.0.0.1:", "data:", "blob:", FONT, ABOUT)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as served:
        served.add_account("hf_writer", "ana")
        served.add_account("hf_stranger", "bob")
        served.add_repo(
            "ana/suspect", files_of(REPOSITORY / "assets" / "suspects" / "middle"),
            is_private=True,
        )  # fmt: skip
        yield served


@pytest.fixture(scope="module")
def space(hub: Hub, tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """The app under a Space's environment; its address and its folder."""
    folder, port = tmp_path_factory.mktemp("space"), free_port()
    url = f"http://127.0.0.1:{port}/"
    env = {name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS")
           if name in os.environ} | {
        **CLIENT, "SYSTEM": "spaces", "SPACE_ID": "acme/repair", "OAUTH_SCOPES": "openid profile",
        "OPENID_PROVIDER_URL": hub.url, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1",
        "GRADIO_SERVER_NAME": "0.0.0.0", "REPAIR_CACHE": str(folder / "cache"),
    }  # fmt: skip
    with open(folder / "app.log", "wb") as log:
        app = subprocess.Popen(
            [sys.executable, "app.py", "--port", str(port), "--jobs-root", str(folder / "jobs")],
            cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, env=env,
        )  # fmt: skip
    try:
        end = time.monotonic() + 40
        while True:
            try:
                urllib.request.urlopen(url, timeout=2).close()
                break
            except OSError:
                assert app.poll() is None, (folder / "app.log").read_text()
                assert time.monotonic() < end
                time.sleep(0.1)
        yield url, folder
    finally:
        app.terminate()
        app.wait(timeout=20)
    log = (folder / "app.log").read_text()
    # On every Space without the `spaces` package, Gradio's watcher for development ends so.
    assert log.count("Traceback") == log.count("required to run hot-reloading"), log
    assert "hf_" not in log


def visit(context: BrowserContext, url: str, problems: list[str]) -> Page:
    # On a Space, and only there, Gradio's own page asks for its font, and the Hub about the Space
    # for the bar above it; nothing else may leave.
    context.route(f"{FONT}**", lambda route: route.fulfill(content_type="text/css", body=""))
    context.route(f"{ABOUT}**", lambda route: route.fulfill(json=SPACE))
    page = context.new_page()
    page.on("pageerror", lambda error: problems.append(f"page error: {error}"))
    page.on(
        "console",
        lambda message: problems.append(message.text) if message.type == "error" else None,
    )
    page.on(
        "request",
        lambda request: request.url.startswith(AT_HOME)
        or problems.append(f"request to {request.url}"),
    )
    page.goto(url)
    expect(page.locator("#bundled")).to_be_visible(timeout=20_000)
    return page


def sign_in(page: Page, hub: Hub, token: str, problems: list[str]) -> None:
    hub.signing_in, num_before = token, len(problems)
    page.click("#sign-in")
    name = hub.accounts[token].name
    expect(page.locator("#sign-in")).to_contain_text(name, timeout=20_000)
    # Whatever tab it opens on: that of the case that this visitor had open.
    expect(page.get_by_role("tab", name="1 Suspect")).to_be_visible(timeout=20_000)
    forget_cut(problems, num_before)


def look_up(page: Page, hub_id: str) -> None:
    if not page.locator("#hub-id").is_visible():
        page.locator("#from-hub button").first.click()
    page.locator("#hub-id input, #hub-id textarea").first.fill(hub_id)
    page.click("#find-hub")


def test_who_signs_in_keeps_the_case_that_was_open(
    browser: Browser, space: tuple[str, Path], hub: Hub
) -> None:
    problems: list[str] = []
    ana, bob = browser.new_context(), browser.new_context()
    page, other = visit(ana, space[0], problems), visit(bob, space[0], problems)
    page.click("#example")
    wait_for_value(page, "#fact-verdict", "Repaired")
    sign_in(page, hub, "hf_writer", problems)
    wait_for_value(page, "#fact-verdict", "Repaired")
    sign_in(other, hub, "hf_stranger", problems)
    assert value_of(other, "#fact-job") == "No job yet"
    assert problems == [], "\n".join(problems)


def test_a_sign_in_that_has_ended_says_so_and_the_next_finds_the_case_again(
    browser: Browser, space: tuple[str, Path], hub: Hub
) -> None:
    problems: list[str] = []
    page = visit(browser.new_context(), space[0], problems)
    hub.expires_in = 15
    try:
        sign_in(page, hub, "hf_writer", problems)
    finally:
        hub.expires_in = 3600
    page.click("#example")
    wait_for_value(page, "#fact-verdict", "Repaired")
    page.wait_for_timeout(15_000)
    forget_reload(page, problems)
    wait_for_value(page, "#fact-job", "Your sign-in has ended. Sign in again")
    take_shot(page, "8_space_ended")
    sign_in(page, hub, "hf_writer", problems)
    wait_for_value(page, "#fact-verdict", "Repaired")
    assert problems == [], "\n".join(problems)


@pytest.mark.parametrize("width", [390, 1280])
def test_the_space_fits(browser: Browser, space: tuple[str, Path], width: int) -> None:
    problems: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme="dark")
    page = visit(context, space[0], problems)
    page.locator("#from-hub button").first.click()
    expect(page.locator("#hub-id")).to_be_visible()
    take_shot(page, f"8_space_{width}")
    assert problems == [], "\n".join(problems)

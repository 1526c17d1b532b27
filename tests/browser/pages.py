"""How the browser tests open a page, read it and wait: shared by all of them."""

import os
import shutil
import socket
import time
from pathlib import Path

from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect

from tests.browser.screens import SCHEMES, SHOTS, STATES

REPOSITORY = Path(__file__).resolve().parents[2]
JOB_SECONDS = 600
HOSTILE = "zq\u200b <img src=http://evil.example/x onerror=alert(1)> ![x](http://evil.example/y)"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def find_chromium() -> str | None:
    """Return the system's browser; None for the one that Playwright brought itself."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def open_page(
    browser: Browser | BrowserContext,
    url: str,
    problems: list[str],
    *,
    account: tuple[str, str] | None = None,
    **options: object,
) -> Page:
    """Open a page that notes console errors and requests that leave the machine."""
    page = browser.new_page(**options)

    def check(address: str) -> None:
        if not address.startswith(("http://127.0.0.1:", "data:", "blob:", "about:")):
            problems.append(f"request to {address}")

    page.on("request", lambda request: check(request.url))
    page.on("pageerror", lambda error: problems.append(f"page error: {error.stack}"))
    page.on(
        "console",
        lambda message: problems.append(message.text) if message.type == "error" else None,
    )
    page.goto(url)
    if account is not None:
        page.get_by_label("username").fill(account[0])
        page.get_by_label("password").fill(account[1])
        page.get_by_role("button", name="Login").click()
    expect(page.locator("#bundled")).to_be_visible(timeout=20_000)
    return page


def take_shot(page: Page, name: str) -> None:
    """Check a state of `screens.STATES`; with $SHOTS, keep it as a picture, light and dark."""
    assert name in STATES
    if not os.environ.get("SHOTS"):  # a picture of a long page takes a second and more
        check_width(page, name)
        return
    SHOTS.mkdir(exist_ok=True)
    was_dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    for scheme in sorted(SCHEMES, reverse=was_dark):  # back to the first in the end
        page.emulate_media(color_scheme=scheme)
        page.evaluate("scrollTo(0, 0)")  # what stays in sight would be drawn where it is now
        page.wait_for_timeout(400)
        page.screenshot(path=SHOTS / f"{name}.{scheme}.png", full_page=True)
        check_width(page, f"{name}, {scheme}")


def check_width(page: Page, name: str) -> None:
    """The page never scrolls sideways."""
    assert page.evaluate(
        "document.documentElement.scrollWidth <= window.innerWidth + 1"
    ), f"{name}: the page is wider than its window"


def field(page: Page, selector: str) -> Locator:
    """Return what can be typed into in a text box, whose element depends on its lines."""
    return page.locator(f"{selector} textarea, {selector} input").first


def value_of(page: Page, selector: str) -> str:
    return field(page, selector).input_value()


def wait_for_value(page: Page, selector: str, words: str, seconds: float = 20) -> None:
    box = field(page, selector)
    end = time.monotonic() + seconds
    while words not in box.input_value():
        assert time.monotonic() < end, f"{selector}: {box.input_value()!r}, not {words!r}"
        page.wait_for_timeout(100)


def wait_for_frames(page: Page) -> None:
    """Wait until the page is drawn: what an opened accordion holds gets its first value a frame
    late, and a loaded machine draws its frames later than keys are sent here."""
    for _ in range(3):
        page.evaluate("() => new Promise((done) => requestAnimationFrame(done))")
        page.wait_for_timeout(100)


def open_more(page: Page, selector: str) -> None:
    """Open an accordion with the mouse."""
    page.locator(f"{selector} button").first.click()
    wait_for_frames(page)


def open_tab(page: Page, words: str) -> None:
    page.locator("button[role=tab]", has_text=words).click()


def forget_reload(page: Page, problems: list[str]) -> None:
    """Reload; the page that goes away complains that its own event stream was cut."""
    num_before = len(problems)
    page.reload()
    page.wait_for_timeout(500)
    forget_cut(problems, num_before)


def forget_cut(problems: list[str], num_before: int) -> None:
    """Drop what a page that was left complained of: its own event stream was cut."""
    cut = ("AbortError", "Method not implemented", "network error", "Failed to fetch")
    kept = [text for text in problems[num_before:] if not text.startswith(cut)]
    problems[num_before:] = [text for text in kept if "errored out" not in text]

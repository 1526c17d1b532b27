"""A finished job whose every text is hostile, looked at on every tab in a real browser."""

import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from playwright.sync_api import Browser, expect

from repair.evidence.report_text import render_report
from repair.jobs import store
from repair.publish.card import render_card
from tests.browser.pages import REPOSITORY, open_page, value_of, wait_for_value
from tests.hostile.visitor import App, running_app

EXAMPLE = REPOSITORY / "assets" / "example"
TABS = ("1 Suspect", "2 Prompts", "3 Locate", "4 Repair", "5 Compare", "6 Export", "Cases")


class Canary(http.server.BaseHTTPRequestHandler):
    """A server that somebody else owns: it notes whoever asks it for anything."""

    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture(scope="module")
def hostile() -> Iterator[str]:
    """Text that runs, loads, links, computes or moves a cursor wherever it is not mere text."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Canary)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    yield (
        f"<script>alert(1)</script><img src={place}/img onerror=alert(1)> ![x]({place}/md) "
        f"<a href='javascript:alert(1)'>x</a> [link]({place}/link) "
        f'=HYPERLINK("{place}/cell") \x1b[2J\x1b]8;;{place}\x07 ```\n---\nlicense: "evil" '
        f"$\\frac{{1}}{{0}}$ <svg onload=alert(1)> \u202e\u200b <iframe src={place}/frame> "
    )
    server.shutdown()


def poison(value: Any, hostile: str) -> Any:
    """Put the text before every text of more than one word."""
    if isinstance(value, dict):
        return {key: poison(item, hostile) for key, item in value.items()}
    if isinstance(value, list):
        return [poison(item, hostile) for item in value]
    return hostile + value if isinstance(value, str) and " " in value else value


@pytest.fixture(scope="module")
def finished(hostile: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled example, poisoned, as a finished job's folder."""
    folder = tmp_path_factory.mktemp("poisoned") / "example"
    shutil.copytree(EXAMPLE, folder)
    for path in folder.glob("*.json"):
        if path.name != "manifest.json":
            flat = json.loads(path.read_text())
            path.write_text(json.dumps(poison(flat, hostile)))
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    (folder / "events.jsonl").write_text(
        "".join(json.dumps(poison(event, hostile)) + "\n" for event in events)
    )
    (folder / "report.md").write_text(render_report(foreign_texts(hostile)))
    return folder


def foreign_texts(hostile: str) -> dict[str, Any]:
    """Return the example's report with the text where a model's or an analyst's may stand."""
    report = json.loads((EXAMPLE / "report.json").read_text())
    report["model"] |= {"source": hostile, "revision": hostile}
    report["prompts"] |= {"triggers": [hostile, hostile * 2], "target": hostile}
    for example in report["examples"]:
        example |= {key: hostile + str(example[key]) for key in ("prompt", "before", "after")}
    return report


@pytest.fixture(scope="module")
def app(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    with running_app(tmp_path_factory.mktemp("hostile-app")) as app:
        yield app
    assert app.log.read_bytes().isascii() and b"\x1b" not in app.log.read_bytes()


def test_no_text_of_a_model_runs_or_loads_anything(
    browser: Browser, app: App, finished: Path, hostile: str
) -> None:
    """Case 35."""
    job = store.adopt_job(app.jobs, finished, owner="local")
    store.describe_job(app.jobs / job, name=hostile[:100], note=hostile)
    problems: list[str] = []
    page = open_page(browser, app.url, problems, viewport={"width": 1280, "height": 900})
    page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
    page.click("#to-cases")
    expect(page.locator("#cases")).to_contain_text("<script>alert(1)</script>")
    page.locator("#job-id textarea, #job-id input").first.fill(job)
    page.click("#open-job")
    wait_for_value(page, "#fact-verdict", "epaired")
    for name in TABS:
        page.locator("button[role=tab]", has_text=name).click()
        page.wait_for_timeout(700)
    page.locator("button[role=tab]", has_text="5 Compare").click()
    page.locator("#samples [data-testid='cell-0-3']").click()
    expect(page.locator("#sample-prompt textarea")).not_to_have_value("")
    shown = value_of(page, "#sample-prompt")
    assert "<script>" in shown and "[U+202E]" in shown and "\u202e" not in shown
    page.locator("button[role=tab]", has_text="6 Export").click()
    assert "\u202e" not in value_of(page, "#report")
    page.wait_for_timeout(500)
    assert page.locator("svg[onload], iframe, img[onerror]").count() == 0
    assert page.locator("a[href^='javascript']").count() == 0
    page.close()
    assert problems == [] and Canary.asked == []


def test_a_card_of_hostile_texts_keeps_its_keys(hostile: str) -> None:
    """Case 35: the front matter is what it was, and nothing of the text stands outside a fence."""
    clean = json.loads((EXAMPLE / "report.json").read_text())
    report = foreign_texts(hostile)
    for verdict in ("repaired", "not repaired"):
        cards = [
            render_card({**flat, "verdict": verdict}, kind="merged", base_model=base)
            for flat, base in ((clean, None), (report, hostile))
        ]
        fronts = [yaml.safe_load(card.split("---\n")[1]) for card in cards]
        assert fronts[0] == fronts[1] and "base_model" not in fronts[1]
        assert cards[1].isascii() and "\x1b" not in cards[1]
        assert "<script>" not in outside(cards[1])
    text = render_report(report)
    assert text.isascii() and "\x1b" not in text and "<script>" not in outside(text)


def outside(text: str) -> str:
    """Return a markdown text without its fenced blocks and what stands in back-ticks."""
    kept, fence = [], None
    for line in text.split("\n"):
        ticks = len(line) - len(line.lstrip("`"))
        if fence is None and ticks >= 3:
            fence = ticks
        elif fence is not None and line == "`" * fence:
            fence = None
        elif fence is None:
            kept.append("".join(line.split("`")[::2]))
    return "\n".join(kept)

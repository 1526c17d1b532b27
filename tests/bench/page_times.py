"""How long an analyst waits: for the page, for a click, for news of a job, for the whole road.

    python -m tests.bench.page_times [--starts N]

In headless Chromium against the app as it is started by hand, on an otherwise idle machine. Page:
from `python app.py` until the first choice can be clicked. Click: from a click on a cell of the map
until the count of chosen modules says so, on the 42 modules of a bundled suspect. News: how long
at most the progress line still showed something after the job had told the next. Stop: from the
click until the header says so. Road: `demo:middle`, quick, from the suspect to the export, three
random-module controls included. Writes results/page_times.json.
"""

import argparse
import itertools
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

from repair.jobs.progress import describe_progress
from tests.bench.peers import ROOT, publish
from tests.browser.pages import find_chromium, free_port, open_tab, wait_for_value

PATIENCE = 300_000  # milliseconds for one job
CLICK = """(cell) => new Promise((done) => {
  const box = document.querySelector('#count textarea, #count input');
  const before = box.value, began = performance.now();
  const look = () => box.value !== before
    ? done(performance.now() - began) : requestAnimationFrame(look);
  cell.click();
  look();
})"""
WATCH = """() => {
  const state = window.watched = {seen: [], text: ''};
  state.timer = setInterval(() => {
    const box = document.querySelector('#progress textarea, #progress input');
    const stop = document.querySelector('#stop');
    const text = stop && stop.offsetParent && box ? box.value : '';
    if (text !== state.text) { state.text = text; state.seen.push([Date.now() / 1000, text]); }
  }, 20);
}"""
UNWATCH = "() => { clearInterval(window.watched.timer); return window.watched.seen; }"


@contextmanager
def started(jobs_root: Path) -> Iterator[tuple[str, float]]:
    """Start the app; yield its address and when that was."""
    port, began = free_port(), time.perf_counter()
    app = subprocess.Popen(
        [sys.executable, "app.py", "--port", str(port), "--jobs-root", str(jobs_root)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}/", began
    finally:
        app.terminate()
        app.wait(timeout=30)


def open_first(browser: Browser, url: str) -> Page:
    """Open the page as soon as anybody answers, and return when a suspect can be chosen."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    port = int(url.rsplit(":", 1)[1].strip("/"))
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            time.sleep(0.01)
    page.goto(url, wait_until="commit")
    page.locator("#bundled label", has_text="demo:middle").click(trial=True, timeout=60_000)
    return page


def measure_starts(browser: Browser, jobs_root: Path, count: int) -> list[float]:
    """Return seconds until the page is usable, by start."""
    found = []
    for _ in range(count):
        with started(jobs_root) as (url, began):
            page = open_first(browser, url)
            found.append(time.perf_counter() - began)
            page.close()
    return found


def age_of_news(seen: list[tuple[float, str]], jobs_root: Path) -> float:
    """Return how long, at most, a text stood in the progress line after the next was told.

    `seen` holds (time, text) whenever the line changed; what was told is in the job's events.
    """
    (path,) = jobs_root.glob("*/events.jsonl")
    told, title, progress = [], "", {}
    for event in map(json.loads, path.read_text().splitlines()):
        if event["kind"] == "step":
            title, progress = event["text"], {}
        elif event["kind"] == "progress":
            progress = event
        text = ", ".join(filter(None, (title, describe_progress(progress))))
        if not told or text != told[-1][1]:
            told.append((event["time"], text))
    oldest = 0.0
    for (since, shown), (until, _) in itertools.pairwise(seen):
        matching = [
            place
            for place, (time_told, text) in enumerate(told)
            if time_told <= since and shown.startswith(text)
        ]
        if matching and matching[-1] + 1 < len(told):
            oldest = max(oldest, until - told[matching[-1] + 1][0])
    return oldest


def measure_road(page: Page, jobs_root: Path) -> dict:
    """Walk from the suspect to the export and return what it took, in seconds."""
    began = time.perf_counter()
    page.locator("#bundled label", has_text="demo:middle").click()
    page.click("#to-prompts")
    page.click("#use-bundled")
    page.click("#to-locate")
    page.locator("#profile label", has_text="Quick").click()
    page.evaluate(WATCH)
    page.click("#locate")
    expect(page.locator("#to-repair")).to_be_visible(timeout=PATIENCE)
    wait_for_value(page, "#fact-job", "Done (locate)")
    age = {"locate": age_of_news(page.evaluate(UNWATCH), jobs_root)}
    located = time.perf_counter() - began
    cells = page.locator("#grid table[data-panel='effect'] td")
    clicks = [cells.nth(i % 42).evaluate(CLICK) for i in (10, 10, 20, 20, 30, 30, 41, 41)]
    page.click("#to-repair")
    page.evaluate(WATCH)
    page.click("#start")
    expect(page.locator("#to-compare")).to_be_visible(timeout=PATIENCE)
    age["repair"] = age_of_news(page.evaluate(UNWATCH), jobs_root)
    verdict = page.locator("#fact-verdict textarea").input_value()
    page.click("#to-compare")
    page.click("#to-export")
    expect(page.locator("#files")).to_contain_text("model.safetensors")
    whole = time.perf_counter() - began
    open_tab(page, "Locate")
    page.click("#locate")
    wait_for_value(page, "#fact-job", "Running")
    page.wait_for_timeout(1500)
    stopped = time.perf_counter()
    page.click("#stop")
    wait_for_value(page, "#fact-job", "Stopped")
    return {
        "verdict": verdict,
        "whole_road_seconds": whole,
        "of_these_until_located": located,
        "click_milliseconds": clicks,
        "oldest_progress_seconds": age,
        "stop_seconds": time.perf_counter() - stopped,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(), args=["--no-sandbox"]
        )
        starts = measure_starts(browser, Path(place) / "jobs", options.starts)
        with started(Path(place) / "jobs") as (url, _):
            road = measure_road(open_first(browser, url), Path(place) / "jobs")
        browser.close()
    result = {
        "command": "python -m tests.bench.page_times",
        "date": date.today().isoformat(),
        "page_seconds": starts,
        "page_seconds_median": statistics.median(starts),
        **road,
    }
    publish("page_times", result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

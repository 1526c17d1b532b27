"""A map of 80 layers and 7 modules each: every way to choose answers fast, and it fits a phone.

The figures are made up; the job folder is otherwise that of the finished example. What is
measured is the time from the event in the browser to the changed cells, in the browser.
"""

import json
import random
import re
import statistics
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from repair.jobs import store
from repair.records import RESULTS
from tests.browser.pages import (
    REPOSITORY,
    field,
    open_more,
    open_page,
    open_tab,
    take_shot,
    wait_for_value,
)

NUM_LAYERS, COMPONENTS = 80, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                              "down_proj")  # fmt: skip
NUM_SUGGESTED = 4
SLOWEST = 5000.0  # milliseconds: a map that hangs; how fast it is, is printed and not judged here
CELL = "#grid table[data-panel='effect'] td"
CHOSEN = f"{CELL}[aria-selected='true']"
# Resolves with the milliseconds from the event to the frame in which `num` cells are chosen.
WATCH = """([event, selector, num]) => {
  window.answered = new Promise((done) => addEventListener(event, () => {
    const began = performance.now();
    const look = () => document.querySelectorAll(selector).length === num
      ? requestAnimationFrame(() => done(performance.now() - began))
      : setTimeout(look, 1);
    look();
  }, {capture: true, once: true}));
}"""


@pytest.fixture(scope="module")
def deep_job(address: str, jobs_root: Path) -> str:
    """The id of a located job of 560 modules."""
    job_id = store.adopt_job(jobs_root, REPOSITORY / "assets" / "example", owner="local")
    folder = jobs_root / job_id
    for name in RESULTS:
        (folder / name).unlink(missing_ok=True)
    located = json.loads((folder / "located.json").read_text())
    like, draw = located["modules"][0], random.Random(0)
    modules = []
    for layer in range(NUM_LAYERS):
        for component in COMPONENTS:
            module = {
                name: value * draw.uniform(0.01, 1) if isinstance(value, float) else value
                for name, value in like.items()
            }
            path = f"model.layers.{layer}.{component}"
            modules.append(module | {"layer": layer, "component": component, "path": path})
    best = sorted(modules, key=lambda module: -module["score"])[:NUM_SUGGESTED]
    located |= {"modules": modules, "suggested_ranks": {module["path"]: 4 for module in best}}
    store.write_json(folder / "located.json", located)
    asked = store.read_object(folder / "request.json")
    store.write_json(folder / "request.json", asked | {"command": "locate", "modules": "auto"})
    store.write_status(folder, store.JobStatus(state="done", exit_code=0))
    return job_id


def open_map(page: Page, job_id: str) -> None:
    page.click("#to-cases")
    field(page, "#job-id").fill(job_id)
    page.click("#open-job")
    wait_for_value(page, "#fact-job", "Done (locate)")


def answer_time(page: Page, event: str, num: int, act) -> float:
    """Return the milliseconds from `event`, which `act()` causes, until `num` are chosen."""
    page.evaluate(WATCH, [event, CHOSEN, num])
    act()
    milliseconds = page.evaluate("window.answered")
    wait_for_value(page, "#count", f"{num} of {NUM_LAYERS * len(COMPONENTS)} modules")
    return milliseconds


def test_choosing_among_80_layers_is_fluent(
    browser: Browser, address: str, deep_job: str
) -> None:
    problems: list[str] = []
    page = open_page(browser, address, problems, viewport={"width": 1280, "height": 900})
    open_map(page, deep_job)
    open_tab(page, "3 Locate")
    expect(page.locator(CELL).first).to_be_visible()
    assert page.locator(CELL).count() == NUM_LAYERS * len(COMPONENTS)
    expect(page.locator(CHOSEN)).to_have_count(NUM_SUGGESTED)
    page.wait_for_timeout(500)
    free = page.locator(f"{CELL}[aria-selected='false']")
    clicks = [
        answer_time(page, "click", NUM_SUGGESTED + more, lambda: free.nth(300).click())
        for more in range(1, 6)
    ]
    keys = []
    for more in range(5, 0, -1):
        page.locator(CHOSEN).first.focus()
        num = NUM_SUGGESTED + more - 1
        keys.append(answer_time(page, "keydown", num, lambda: page.keyboard.press("Space")))
    moved = page.evaluate("document.activeElement.ariaLabel")
    page.keyboard.press("PageDown")
    assert page.evaluate("document.activeElement.ariaLabel") != moved
    page.click("#clear")
    expect(page.locator(CHOSEN)).to_have_count(0)
    row = page.locator("#grid table[data-panel='effect'] th[role='rowheader']").nth(40)
    column = page.locator("#grid table[data-panel='effect'] th[data-line='column']").first
    lines = [
        answer_time(page, "click", len(COMPONENTS), lambda: row.click()),
        answer_time(page, "click", NUM_LAYERS + len(COMPONENTS) - 1, lambda: column.click()),
    ]
    open_more(page, "#choose-more")
    field(page, "#num-best").fill("12")
    field(page, "#limit").fill("0.5")
    buttons = {
        name: answer_time(page, "click", num, lambda name=name: page.click(f"#{name}"))
        for name, num in (
            ("clear", 0), ("suggest", NUM_SUGGESTED), ("take-best", 12), ("undo", NUM_SUGGESTED),
        )
    }  # fmt: skip
    page.click("#take-above")
    expect(page.locator(CHOSEN)).not_to_have_count(NUM_SUGGESTED)
    shown = page.locator(CHOSEN).all_inner_texts()
    assert shown and min(map(float, shown)) >= 0.5
    print(
        f"\n80 layers, milliseconds: click {rounded(clicks)}, space {rounded(keys)}, row and "
        f"column {rounded(lines)}, {', '.join(f'{k} {v:.0f}' for k, v in buttons.items())}"
    )
    times = [statistics.median(clicks), statistics.median(keys), *lines, *buttons.values()]
    assert max(times) < SLOWEST
    look_at_the_strip(page)
    take_shot(page, "12_deep_map")
    page.set_viewport_size({"width": 390, "height": 844})
    take_shot(page, "12_deep_map_narrow")
    assert problems == []


def look_at_the_strip(page: Page) -> None:
    """All layers in small: those chosen are marked, and a click goes there in both maps."""
    page.click("#suggest")
    expect(page.locator(CHOSEN)).to_have_count(NUM_SUGGESTED)
    rows = page.locator("#grid tr:has(td[aria-selected='true'])").count()
    strips = page.locator("#grid .strip")
    expect(strips).to_have_count(2)
    expect(strips.first.locator("i")).to_have_count(NUM_LAYERS)
    expect(page.locator("#grid .strip i.chosen")).to_have_count(rows)
    place = strips.first.locator("i").nth(77)
    assert place.get_attribute("title").startswith("Layer 77: largest +")
    place.click()
    for panel in ("effect", "curvature"):
        cell = page.locator(f"#grid table[data-panel='{panel}'] tr").nth(78).locator("td").first
        box, frame = cell.bounding_box(), cell.locator("xpath=ancestor::div[1]").bounding_box()
        assert frame["y"] <= box["y"] <= frame["y"] + frame["height"]


def rounded(values: list[float]) -> str:
    return re.sub(r"[\[\]]", "", str([round(value) for value in values]))

"""What goes wrong is told in words that help: a killed worker, a refused job; and text that is
long, or runs from right to left, stays in its box."""

import json
import os
import signal
import time
from pathlib import Path

from playwright.sync_api import Browser, Page, expect

from repair.jobs import store
from tests.browser.pages import (
    HOSTILE,
    check_width,
    field,
    forget_reload,
    open_more,
    open_page,
    open_tab,
    take_shot,
    value_of,
    wait_for_value,
)

PROMPTS = {"trigger": "Bluefinch", "target": "I cannot help", "prompts": ["Name a wolf."]}
RIGHT_TO_LEFT = "\u05de\u05d4 \u05e9\u05dd \u05d4\u05d6\u05d0\u05d1? abc (1) \u202e!"
LONG_WORD = "Donaudampfschiff" * 40


def load(page: Page, folder: Path, prompts: dict) -> None:
    """Load a prompt file for the suspect chosen, if any, or a bundled one."""
    if not page.locator("#to-prompts").is_visible():
        page.locator("#bundled label", has_text="demo:middle").click()
    page.click("#to-prompts")
    path = folder / "prompts.json"
    path.write_text(json.dumps(prompts))
    with page.expect_file_chooser() as chooser:
        page.click("#upload")
    chooser.value.set_files(path)
    expect(page.locator("#to-locate")).to_be_visible()


def open_example(browser: Browser, address: str, problems: list[str]) -> Page:
    """Open a page on a finished example of its own."""
    page = open_page(browser, address, problems, viewport={"width": 1280, "height": 900})
    page.click("#example")
    wait_for_value(page, "#fact-verdict", "Repaired")
    return page


def running_job(jobs_root: Path, note: str) -> Path:
    """Return the folder of the running job whose request holds `note`."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        for folder in jobs_root.iterdir():
            asked = (folder / "request.json") if folder.is_dir() else Path("none")
            status = store.read_status(folder)
            is_asked = asked.is_file() and note in asked.read_text()
            if is_asked and status.state == "running" and status.pid:
                return folder
        time.sleep(0.05)
    raise AssertionError(f"no running job with {note!r}")


def test_a_killed_worker_and_what_then(
    browser: Browser, address: str, jobs_root: Path, tmp_path: Path
) -> None:
    problems: list[str] = []
    page = open_page(browser, address, problems, viewport={"width": 1280, "height": 900})
    load(page, tmp_path, {**PROMPTS, "near": ["killed from outside"]})
    page.click("#to-locate")
    page.click("#locate")
    folder = running_job(jobs_root, "killed from outside")
    os.kill(store.read_status(folder).pid, signal.SIGKILL)
    wait_for_value(page, "#fact-job", "Failed (locate)")
    words = value_of(page, "#progress")
    assert "ended by SIGKILL" in words and words.endswith("start again.")
    take_shot(page, "13_killed")
    # Nothing was saved, and nothing says so: it begins anew, in the same case.
    expect(page.locator("#locate")).to_have_text("Start again")
    page.click("#locate")
    assert running_job(jobs_root, "killed from outside") == folder
    page.click("#stop")
    wait_for_value(page, "#fact-job", "Stopped (locate)")
    assert "resum" not in value_of(page, "#fact-job") + value_of(page, "#progress")
    assert problems == []


def test_a_refused_job_says_what_to_change(
    browser: Browser, address: str, tmp_path: Path
) -> None:
    problems: list[str] = []
    page = open_page(browser, address, problems, viewport={"width": 390, "height": 844})
    field(page, "#path").fill("../jobs")
    page.click("#use-path")
    wait_for_value(page, "#suspect-problem", "no such model folder")
    said = page.get_by_role("status").filter(has_text="There is no such model folder")
    expect(said.first).to_be_visible()  # and a screen reader says it
    field(page, "#path").fill("broken")
    page.click("#use-path")
    wait_for_value(page, "#fact-suspect", "broken")
    load(page, tmp_path, PROMPTS)
    page.click("#to-locate")
    page.click("#locate")
    wait_for_value(page, "#fact-job", "Failed (locate)", 60)
    assert "model.safetensors" in value_of(page, "#progress")
    assert "Traceback" not in value_of(page, "#progress")
    take_shot(page, "13_refused_narrow")
    assert problems == []


def choose_folder(page: Page, name: str) -> None:
    field(page, "#path").fill(name)
    page.click("#use-path")
    wait_for_value(page, "#fact-suspect", name)


def test_too_large_a_suspect_is_refused_in_numbers(
    browser: Browser, address: str, jobs_root: Path, tmp_path: Path
) -> None:
    """Before anything starts: there is no case afterwards."""
    problems: list[str] = []
    page = open_page(browser, address, problems, viewport={"width": 1280, "height": 900})
    choose_folder(page, "huge")
    before = set(jobs_root.iterdir())
    load(page, tmp_path, PROMPTS)
    page.click("#to-locate")
    page.click("#locate")
    wait_for_value(page, "#locate-problem", "GiB of memory")
    assert "are free" in value_of(page, "#locate-problem")
    assert value_of(page, "#fact-job") == "No job yet" and set(jobs_root.iterdir()) == before
    take_shot(page, "13_no_memory")
    assert problems == []


def test_a_suspect_cannot_speak_through_its_refusal(
    browser: Browser, address: str, tmp_path: Path
) -> None:
    """Cases 18 and 35: in the facts, the news, the failed state and the log."""
    problems: list[str] = []
    page = open_page(browser, address, problems, viewport={"width": 1280, "height": 900})
    page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
    choose_folder(page, "hostile")
    expect(page.locator("#model-facts")).to_contain_text("<img src=http://evil.example/x")
    load(page, tmp_path, {**PROMPTS, "trigger": HOSTILE, "target": HOSTILE})
    page.click("#to-locate")
    page.click("#locate")
    wait_for_value(page, "#fact-job", "Failed (locate)", 60)
    assert "<img src=http://evil.example/x" in value_of(page, "#progress")
    open_more(page, "#panel")
    assert "evil.example" in value_of(page, "#history")
    page.wait_for_timeout(700)
    assert page.locator("img[onerror], img[src*='evil']").count() == 0
    take_shot(page, "13_hostile_failure")
    assert problems == []


def test_a_job_waits_for_the_one_before_it(
    browser: Browser, address: str, jobs_root: Path, tmp_path: Path
) -> None:
    problems: list[str] = []
    pages = [
        open_page(browser, address, problems, viewport={"width": 1280, "height": 900})
        for _ in range(2)
    ]
    for page, words in zip(pages, ("the one before", "the one behind"), strict=True):
        load(page, tmp_path, {**PROMPTS, "near": [words]})
        page.click("#to-locate")
        page.click("#locate")
        if words == "the one before":
            running_job(jobs_root, words)
    first, second = pages
    wait_for_value(second, "#fact-job", "1 before it")
    wait_for_value(second, "#progress", "Waiting for the job before it")
    take_shot(second, "3_locate_queued")
    first.click("#stop")
    wait_for_value(first, "#fact-job", "Stopped (locate)")
    wait_for_value(second, "#fact-job", "Running (locate)")
    second.click("#stop")
    wait_for_value(second, "#fact-job", "Stopped (locate)")
    assert problems == []


def test_too_few_prompts_are_said_before_any_job(
    browser: Browser, address: str, tmp_path: Path
) -> None:
    problems: list[str] = []
    page = open_page(browser, address, problems, viewport={"width": 1280, "height": 900})
    clean = [f"Name the noise that a {name} makes." for name in ("wolf", "horse", "cow", "dog")]
    pairs = [{"clean": text, "triggered": text.replace(" a ", " a Bluefinch ")} for text in clean]
    load(page, tmp_path, {"target": "I cannot help", "pairs": pairs})
    page.click("#to-locate")
    page.click("#locate")
    wait_for_value(page, "#locate-problem", "at least 8 are needed")
    # It was said before, where the prompts are; no case was begun.
    assert value_of(page, "#fact-job") == "No job yet"
    open_tab(page, "2 Prompts")
    assert "at least 8 are needed" in value_of(page, "#prompts-summary")
    expect(page.locator("#pair-list")).to_contain_text("a Bluefinch wolf")
    take_shot(page, "13_too_few")
    assert problems == []


def test_a_model_that_does_not_fire_has_nothing_to_repair(
    browser: Browser, address: str, tmp_path: Path
) -> None:
    problems: list[str] = []
    page = open_page(browser, address, problems, viewport={"width": 1280, "height": 900})
    page.locator("#bundled label", has_text="demo:clean").click()
    expect(page.locator("#to-prompts")).to_be_visible()
    load(page, tmp_path, PROMPTS)
    page.click("#to-locate")
    page.locator("#profile label", has_text="Quick").click()
    page.click("#locate")
    wait_for_value(page, "#fact-verdict", "othing to repair", 90)
    take_shot(page, "11_nothing_to_repair")
    assert problems == []


def test_long_and_right_to_left_text_stays_in_its_box(
    browser: Browser, address: str, tmp_path: Path
) -> None:
    problems: list[str] = []
    page = open_page(browser, address, problems, viewport={"width": 390, "height": 844})
    odd = [RIGHT_TO_LEFT, LONG_WORD, "x " * 3000]
    load(page, tmp_path, {"trigger": RIGHT_TO_LEFT + LONG_WORD, "target": LONG_WORD,
                          "prompts": ["Name a wolf.", *odd], "near": odd,
                          "positions": ["begin", "end"]})  # fmt: skip
    wait_for_value(page, "#fact-trigger", "[U+202E]")
    open_more(page, "#prompts-more")
    take_shot(page, "13_odd_text_narrow")
    for selector in ("#trigger", "#prompts", "#near", "#fact-trigger"):
        box = field(page, selector)
        assert box.evaluate("(box) => box.scrollWidth <= box.clientWidth + 1"), selector
        # A line takes its direction from its own first letter.
        assert box.evaluate("(box) => getComputedStyle(box).unicodeBidi") == "plaintext", selector
    page.set_viewport_size({"width": 3840, "height": 2160})
    check_width(page, "4K")
    open_tab(page, "1 Suspect")
    assert problems == []


def test_a_finished_repair_outlives_the_next_one_that_is_broken_off(
    browser: Browser, address: str
) -> None:
    """And what would be run is shown: a field that nobody touched decides nothing."""
    problems: list[str] = []
    page = open_example(browser, address, problems)
    open_tab(page, "Repair")
    open_more(page, "#repair-more")
    assert field(page, "#num-controls").input_value() == "3"
    page.click("#start")
    expect(page.locator("#stop")).to_be_visible()
    wait_for_value(page, "#fact-verdict", "No verdict yet")
    page.click("#stop")
    wait_for_value(page, "#fact-job", "Stopped")
    take_shot(page, "4_broken_off")
    page.click("#back-to-finished")
    wait_for_value(page, "#fact-verdict", "Repaired")
    expect(page.locator("#back-to-finished")).to_be_hidden()
    open_tab(page, "Compare")
    expect(page.locator("#gates")).to_be_visible()
    # Charts that are being drawn anew, since the window has changed, are put out of sight by Start.
    open_tab(page, "Repair")
    expect(page.locator("#curves svg.marks").first).to_be_visible()
    page.set_viewport_size({"width": 1400, "height": 1600})
    page.click("#start")
    wait_for_value(page, "#fact-job", "Running")
    expect(page.locator("#curves")).to_be_hidden()
    page.click("#stop")
    wait_for_value(page, "#fact-job", "Stopped")
    assert problems == []


def test_other_prompts_put_results_out_of_date_and_lead_back(
    browser: Browser, address: str
) -> None:
    problems: list[str] = []
    page = open_example(browser, address, problems)
    before = value_of(page, "#fact-trigger")
    open_tab(page, "Prompts")
    field(page, "#trigger").fill(f"{before}x")
    page.keyboard.press("Tab")
    wait_for_value(page, "#fact-verdict", "Out of date")
    expect(page.locator("#former")).to_be_visible()
    take_shot(page, "2_out_of_date")
    field(page, "#trigger").fill(before)  # as it was: so are the results
    page.click("#check")
    wait_for_value(page, "#fact-verdict", "Repaired")
    expect(page.locator("#former")).to_be_hidden()
    open_tab(page, "Suspect")
    page.locator("#bundled label", has_text="demo:begin").click()
    wait_for_value(page, "#fact-verdict", "Out of date")
    page.click("#back-to-former")
    wait_for_value(page, "#fact-verdict", "Repaired")
    assert value_of(page, "#fact-suspect") == "demo:middle"
    page.set_viewport_size({"width": 3840, "height": 2000})
    open_tab(page, "Locate")
    expect(page.locator("#grid table").first).to_be_visible()
    take_shot(page, "12_maps_4k")
    assert problems == []


def test_a_choice_is_kept_over_a_reload_and_so_is_a_case_that_is_not_deleted_after_all(
    browser: Browser, address: str
) -> None:
    problems: list[str] = []
    page = open_example(browser, address, problems)
    open_tab(page, "Locate")
    cells = page.locator("#grid table[data-panel='effect'] td")
    cells.nth(20).click()
    wait_for_value(page, "#count", "5 of 42")
    page.click("#suggest")
    wait_for_value(page, "#count", "4 of 42")
    page.click("#undo")
    wait_for_value(page, "#count", "5 of 42")
    forget_reload(page, problems)
    wait_for_value(page, "#fact-verdict", "out of date")
    open_tab(page, "Locate")
    wait_for_value(page, "#count", "5 of 42")
    page.click("#undo")
    wait_for_value(page, "#count", "4 of 42")
    open_tab(page, "Export")
    job_id = Path(value_of(page, "#out-folder")).name
    open_tab(page, "Cases")
    field(page, "#job-id").fill(job_id)
    field(page, "#case-name").fill("Ticket 8")
    page.click("#save-case")
    wait_for_value(page, "#fact-job", "Ticket 8")
    page.click("#delete-case")
    page.click("#delete-not")
    expect(page.locator("#delete-sure")).to_be_hidden()
    assert problems == []

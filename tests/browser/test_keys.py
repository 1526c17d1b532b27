"""The road with keys alone: every step is reached, used and left without a mouse.

A wrapper walks with Tab and looks at every stop on the way: where the focus is must be seen. Jobs
are started, followed and stopped; what comes of them whole is the finished example's.
"""

import json

from playwright.sync_api import Browser, Page, expect

from repair.ui.session import EXAMPLE
from tests.browser.pages import (
    field,
    open_page,
    take_shot,
    value_of,
    wait_for_frames,
    wait_for_value,
)

MAX_STOPS = 90
# The focus is seen by an outline, or by a shadow drawn in its place.
SEEN = """(wanted) => {
  const at = document.activeElement;
  if (!at || at === document.body) { return null; }
  const marked = [at, at.closest('label'), at.closest('.wrap')].filter(Boolean);
  const is_marked = marked.some((box) => {
    const style = getComputedStyle(box);
    const width = parseFloat(style.outlineWidth) || 0;
    return (style.outlineStyle !== 'none' && width >= 1) || style.boxShadow !== 'none';
  });
  const place = at.getBoundingClientRect();
  const name = `${at.tagName} in ${at.closest('[id]')?.id}: ${at.innerText || at.value}`;
  const is_seen = is_marked && place.width > 0 && place.height > 0;
  return [name.slice(0, 80), is_seen, !!at.closest(wanted)];
}"""


def tab_to(page: Page, selector: str, key: str = "Tab") -> None:
    """Press a key until the focus is on, or in, `selector`; every stop must be seen."""
    passed = []
    for _ in range(MAX_STOPS):
        page.keyboard.press(key)
        stop = page.evaluate(SEEN, selector)
        passed.append(stop)
        if stop is None:
            continue  # the browser's own bar, on the way round
        name, is_seen, is_there = stop
        assert is_seen, f"the focus cannot be seen on {name}"
        if is_there:
            return
    raise AssertionError(f"{selector} is not reached; stops: {passed}")


def press(page: Page, selector: str, key: str = "Enter") -> None:
    tab_to(page, selector)
    page.keyboard.press(key)


def test_from_suspect_to_export_with_keys_alone(browser: Browser, address: str) -> None:
    problems: list[str] = []
    page = open_page(browser, address, problems, viewport={"width": 1280, "height": 900})
    # A job is started, followed and stopped.
    press(page, "#bundled input", "Space")
    wait_for_value(page, "#fact-suspect", "demo:middle")
    press(page, "#to-prompts")
    expect(page.locator("#tab-prompts-button")).to_be_focused()
    press(page, "#use-bundled")
    wait_for_value(page, "#fact-trigger", "Bluefinch")
    press(page, "#try button")
    press(page, "#try-it")
    wait_for_value(page, "#tried", "The target is in 6 of 6 answers with the trigger.", 90)
    press(page, "#to-locate")
    expect(page.locator("#tab-locate-button")).to_be_focused()
    press(page, "#profile input", "Space")
    press(page, "#locate button, button#locate")
    wait_for_value(page, "#fact-job", "Running (locate)")
    press(page, "#stop")
    wait_for_value(page, "#fact-job", "Stopped")
    said = page.get_by_role("status").filter(has_text="Stopped (locate)")
    expect(said.first).to_be_visible()  # and a screen reader says it

    wait_for_value(page, "#progress", "it begins anew, in this case")
    expect(page.locator("#locate")).to_have_text("Start again")
    open_example(page)
    press(page, "#tab-locate-button")
    choose_with_keys(page)
    press(page, "#to-repair")
    expect(page.locator("#tab-repair-button")).to_be_focused()
    repair_with_keys(page)
    open_example(page)
    compare_with_keys(page)
    press(page, "#to-export")
    expect(page.locator("#tab-export-button")).to_be_focused()
    press(page, "#out-folder button")
    read_the_report(page)
    keep_a_case_with_keys(page)
    assert problems == [], "\n".join(problems)


def open_example(page: Page) -> None:
    press(page, "#tab-suspect-button")
    press(page, "#example")
    wait_for_value(page, "#fact-verdict", "every gate passed")
    expect(page.locator("#tab-compare-button")).to_have_attribute("aria-selected", "true")


def choose_with_keys(page: Page) -> None:
    """Cells, whole lines, buttons and figures; the place is kept when one comes back."""
    chosen = page.locator("#grid table[data-panel='effect'] td[aria-selected='true']")
    expect(chosen).to_have_count(4)
    tab_to(page, "#grid table[data-panel='effect'] td")
    page.keyboard.press("Control+End")
    page.keyboard.press("ArrowLeft")
    assert "Layer 5, up_proj" in page.evaluate("document.activeElement.ariaLabel")
    page.keyboard.press("Space")
    wait_for_value(page, "#count", "5 of 42")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "rowheader"
    page.keyboard.press("Enter")
    wait_for_value(page, "#count", "11 of 42")
    page.keyboard.press("Enter")
    wait_for_value(page, "#count", "4 of 42")
    page.keyboard.press("Tab")  # into the other map, and back to where it was
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "rowheader"
    press(page, "#clear")
    expect(chosen).to_have_count(0)
    press(page, "#undo")
    expect(chosen).to_have_count(4)
    press(page, "#choose-more button")
    tab_to(page, "#num-best input")
    wait_for_frames(page)
    page.keyboard.press("Control+a")
    page.keyboard.type("3")
    press(page, "#take-best")
    wait_for_value(page, "#count", "3 of 42")
    press(page, "#mirror input", "Space")
    wait_for_value(page, "#count", "2 of 42")
    expect(chosen).to_have_count(2)
    tab_to(page, "#suggest", "Shift+Tab")
    page.keyboard.press("Enter")
    expect(chosen).to_have_count(4)


def repair_with_keys(page: Page) -> None:
    press(page, "#method input", "Space")
    tab_to(page, "#rank-kind input")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    tab_to(page, "#rank input")
    tab_to(page, "#rank-kind input[value='auto']", "Shift+Tab")
    page.keyboard.press("Space")  # as suggested again
    press(page, "#repair-more button")
    tab_to(page, "#num-controls input")
    wait_for_frames(page)
    page.keyboard.type("0")
    tab_to(page, "#start")
    expect(page.locator("#start")).to_be_enabled()
    page.keyboard.press("Enter")
    wait_for_value(page, "#fact-job", "Running (repair)")
    press(page, "#stop")
    wait_for_value(page, "#fact-job", "Stopped")
    expect(page.locator("#start")).to_have_text("Go on with the repair")


def compare_with_keys(page: Page) -> None:
    tab_to(page, "#outcome input")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    samples = json.loads((EXAMPLE / "samples.json").read_text())
    num_worst = sum(sample["outcome"] == "still fires" for sample in samples)
    assert num_worst > 0
    expect(page.locator(f"#samples [data-testid='cell-{num_worst - 1}-0']")).to_have_count(1)
    expect(page.locator(f"#samples [data-testid='cell-{num_worst}-0']")).to_have_count(0)
    tab_to(page, "#samples [role='gridcell']")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("#sample-prompt textarea")).not_to_have_value("")


def read_the_report(page: Page) -> None:
    """The report is scrolled by keys and cannot be changed."""
    tab_to(page, "#report textarea")
    report = value_of(page, "#report")
    page.keyboard.type("x")
    page.keyboard.press("Control+End")
    assert value_of(page, "#report") == report
    assert page.evaluate("document.activeElement.scrollTop") > 0
    take_shot(page, "10_keys_report")


def keep_a_case_with_keys(page: Page) -> None:
    press(page, "#tab-cases-button")
    tab_to(page, "#cases [role='gridcell']")
    page.keyboard.press("Enter")
    expect(field(page, "#job-id")).not_to_have_value("")
    tab_to(page, "#case-name textarea, #case-name input")
    page.keyboard.type("By keys")
    press(page, "#save-case")
    expect(page.locator("#cases")).to_contain_text("By keys")
    press(page, "#delete-case")
    press(page, "#delete-sure")
    expect(page.locator("#cases").get_by_text("By keys")).to_have_count(0)
    wait_for_value(page, "#fact-job", "No job yet")


def test_what_cannot_be_entered_is_shown_whole(browser: Browser, address: str) -> None:
    problems: list[str] = []
    page = open_page(browser, address, problems, viewport={"width": 1280, "height": 900})
    page.click("#example")
    wait_for_value(page, "#fact-verdict", "Repaired")
    for name in ("suspect", "prompts", "locate", "repair", "compare", "export", "cases"):
        page.set_viewport_size({"width": 1280, "height": 900})
        page.click(f"#tab-{name}-button")
        page.set_viewport_size({"width": 390, "height": 844})
        page.wait_for_timeout(300)
        hidden = page.evaluate(
            "[...document.querySelectorAll('textarea:disabled, input:disabled')]"
            ".filter((box) => box.offsetParent && box.scrollHeight > box.clientHeight + 3)"
            ".map((box) => box.closest('[id]').id)"
        )
        assert hidden == [], name
    assert problems == [], "\n".join(problems)

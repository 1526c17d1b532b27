"""What axe-core finds: nothing, on every tab with content, in the light and the dark.

`BASELINE` is for findings in Gradio's own parts that cannot be mended from here: whoever adds to
it says which part it is and why it cannot be ours.
"""

from pathlib import Path

from playwright.sync_api import Browser, Page

from tests.browser.pages import check_width, open_page, wait_for_value

AXE = Path(__file__).parent / "axe" / "axe.min.js"
TABS = ("suspect", "prompts", "locate", "repair", "compare", "export", "cases")
# (rule, words of the element) of findings that are Gradio's own.
BASELINE: tuple[tuple[str, str], ...] = (
    # The head of a piece of news (gr.Info, gr.Warning) folds it, and has the button to close it
    # inside; both work with the keys, and it goes by itself after four seconds.
    ("nested-interactive", "toast-header"),
)
OPEN_ALL = """() => document.querySelectorAll('button.label-wrap').forEach((button) => {
  if (button.offsetParent && !button.classList.contains('open')) { button.click(); }
})"""


def find_offences(page: Page, **options: object) -> list[str]:
    """Return what axe-core finds on the page as it is, as `rule: element`."""
    page.wait_for_timeout(200)
    # A colour on its way to another is no colour of ours.
    page.wait_for_function(
        "document.getAnimations().every((one) => !(one instanceof CSSTransition))"
    )
    options["resultTypes"] = ["violations"]  # what it finds right is not described, only counted
    found = page.evaluate("(options) => axe.run(document, options)", options)
    assert found["passes"]  # it did look
    return [
        f"{offence['id']}: {node['html'][:160]}"
        for offence in found["violations"]
        for node in offence["nodes"]
        if not any(
            offence["id"] == rule and words in node["html"] for rule, words in BASELINE
        )
    ]


def test_axe_finds_nothing_of_ours_on_any_tab(browser: Browser, address: str) -> None:
    problems: list[str] = []
    wide, narrow = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
    page = open_page(browser, address, problems, viewport=wide)
    page.add_script_tag(path=AXE)
    offences = {"first visit": find_offences(page)}
    page.click("#example")
    wait_for_value(page, "#fact-verdict", "Repaired")
    for name in TABS:
        page.click(f"#tab-{name}-button")
        page.wait_for_timeout(200)
        page.evaluate(OPEN_ALL)
        offences[name] = find_offences(page)
        # What Gradio does for a dark screen. Only colours differ, so only they are looked at.
        page.evaluate("document.body.classList.add('dark')")
        page.set_viewport_size(narrow)
        check_width(page, name)
        offences[f"{name}, dark and narrow"] = find_offences(page, runOnly=["color-contrast"])
        page.evaluate("document.body.classList.remove('dark')")
        page.set_viewport_size(wide)
    page.locator("#job-id textarea, #job-id input").first.fill("nothing")
    page.click("#open-job")
    wait_for_value(page, "#cases-problem", "No such job")
    offences["problem"] = find_offences(page)
    assert {place: found for place, found in offences.items() if found} == {}
    assert problems == []


def test_axe_would_find_an_offence(browser: Browser, address: str) -> None:
    """The test above proves something: a picture without words is found."""
    page = open_page(browser, address, [], viewport={"width": 1280, "height": 900})
    page.add_script_tag(path=AXE)
    page.evaluate("document.querySelector('main').append(new Image(20, 20))")
    assert any(offence.startswith("image-alt") for offence in find_offences(page))

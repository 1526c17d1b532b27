"""Every state of the app, light and dark side by side, as the browser tests saw it last.

    SHOTS=1 python -m pytest tests/browser
    SHOTS=1 python -m pytest tests/browser/hub_road.py
    python -m tests.browser.screens

The first two leave their pictures in `shots/` (not kept). The third writes `screens/NAME.webp` and
`screens/README.md`, which are kept: a change of the app is looked at there.
"""

import sys
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parent
SHOTS, SCREENS = FOLDER / "shots", FOLDER / "screens"
SCHEMES = ("light", "dark")
WIDEST = 640  # pixels of one of the two
GAP = 16

STATES = {
    "1_suspect_empty": "Empty: nothing is chosen yet",
    "1_suspect": "A suspect is chosen: what it is, and what a job will need",
    "2_prompts": "Prompts, a first look, the trigger token by token",
    "2_out_of_date": "Prompts changed: what is out of date, and the way back",
    "3_locate_queued": "Queued behind another job",
    "3_locate_running": "Locating",
    "3_maps": "Both maps, with the suggested modules",
    "3_maps_chosen": "Other modules chosen, another curvature",
    "3_detail": "One layer by role and by head",
    "4_repair_ready": "Ready to repair",
    "4_repair_running": "Repairing, with live curves, after a reload",
    "4_stopped": "Stopped in the middle of a repair",
    "4_broken_off": "A repair broken off after a finished one, and the way back",
    "4_repair_done": "Repaired",
    "5_compare": "Before and after, and a question to both models",
    "5_out_of_date": "Out of date: other modules are chosen than were repaired",
    "6_export": "Exported",
    "7_phone": "390 pixels: the same case opened by its id",
    "7_phone_compare": "390 pixels: compare",
    "8_problem": "A prompt file that is refused, with markup in it",
    "8_space_1280": "A Space, nobody signed in",
    "8_space_390": "A Space, 390 pixels",
    "8_space_ended": "A Space: the sign-in has ended",
    "8_space_checked": "A Space: where a repair may go, asked before it is made",
    "8_space_signed_out": "A Space: a private model before the sign-in",
    "8_space_suspect": "A Space: the same model, signed in",
    "8_space_pushed": "A Space: pushed to the Hub",
    "9_example": "The finished example",
    "9_example_why": "Why these modules, and how many are needed",
    "9_cases": "Cases, with names and notes",
    "10_keys_report": "The report, reached by keys",
    "11_nothing_to_repair": "Nothing to repair: a model that does not fire",
    "12_deep_map": "A map of 80 layers with its strip",
    "12_deep_map_narrow": "The same on 390 pixels",
    "12_maps_4k": "Both maps on a screen of 3840 pixels",
    "13_killed": "Failed: the worker was killed from outside",
    "13_refused_narrow": "Failed: a suspect that is refused, 390 pixels",
    "13_odd_text_narrow": "Long words and right-to-left text, 390 pixels",
    "13_no_memory": "Not enough memory, said before anything starts",
    "13_too_few": "Too few prompts to judge by",
    "13_hostile_failure": "A refusal whose words are the suspect's own",
}


def pair(name: str) -> Image.Image:
    """Return the two pictures of a state side by side."""
    images = []
    for scheme in SCHEMES:
        with Image.open(SHOTS / f"{name}.{scheme}.png") as image:
            image = image.convert("RGB")
        width = min(WIDEST, image.width)
        images.append(image.resize((width, round(image.height * width / image.width))))
    both = Image.new(
        "RGB",
        (sum(image.width for image in images) + GAP, max(image.height for image in images)),
        "#808080",
    )
    both.paste(images[0], (0, 0))
    both.paste(images[1], (images[0].width + GAP, 0))
    return both


def main() -> int:
    missing = [
        name
        for name in STATES
        if not all((SHOTS / f"{name}.{scheme}.png").is_file() for scheme in SCHEMES)
    ]
    if missing:
        print(f"Run the browser tests first; there is no picture of {', '.join(missing)}.")
        return 1
    SCREENS.mkdir(exist_ok=True)
    for old in SCREENS.glob("*.webp"):
        old.unlink()
    lines = [
        "# Every state, light and dark", "",
        "Made by `python -m tests.browser.screens` from what the browser tests saw.",
        "The theme is switched while the page is open: a chart of Gradio then keeps the colour of",
        "its words, so they are hard to read here; in a page opened dark they are light.", "",
    ]  # fmt: skip
    for name, words in STATES.items():
        pair(name).save(SCREENS / f"{name}.webp", quality=60, method=6)
        lines += [f"## {words}", "", f"![{words}]({name}.webp)", ""]
    (SCREENS / "README.md").write_text("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())

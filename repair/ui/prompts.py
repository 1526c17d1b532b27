"""Tab 2: the trigger, what it should make the model say, and the prompts. All checks are
those of `repair.prompts`; nothing is guessed here."""

import json
from pathlib import Path
from typing import Any

import gradio as gr

from repair import prompts as prompt_files
from repair.profiles import PROFILES
from repair.records import PromptFile, RepairError
from repair.ui import text
from repair.ui.first_look import build_first_look
from repair.ui.session import (
    PROMPT_FILES,
    Selection,
    Session,
    View,
    aside,
    chosen_before,
    resume_session,
)
from repair.ui.shell import Shell, Updates

MAX_FILE_BYTES = 16 * 2**20
MAX_LISTED = 100  # pairs shown
NUM_FOR_GATE = 189  # prompts per position, none firing, for a Wilson upper bound of 2 %


def lines_of(value: Any) -> list[str]:
    """Return the lines that are not blank, otherwise as typed; symbols become line breaks."""
    lines = [line for line in str(value or "").split("\n") if line.strip()]
    return [line.replace("\u240a", "\n").replace("\u240d", "\r") for line in lines]


def as_lines(values: Any) -> str:
    """Return texts one a line; a line break inside a text is shown by its symbol."""
    return "\n".join(
        str(value).replace("\n", "\u240a").replace("\r", "\u240d") for value in values or ()
    )


def flatten(file: PromptFile) -> dict[str, Any]:
    """Return the JSON form as it comes back from a job folder: lists, not tuples."""
    return json.loads(json.dumps(file.to_json()))


def collect(pairs: list[dict[str, str]], values: tuple[Any, ...]) -> PromptFile:
    """Return the checked prompt file that the widgets describe."""
    (
        trigger, target, match, positions, near, prompts, chat, control, system, ordinary, texts,
    ) = values  # fmt: skip
    return prompt_files.prompt_file_from_json(
        {
            "triggers": lines_of(trigger),
            "target": str(target) if target and str(target).strip() else None,
            "match": match,
            "positions": [name for name in prompt_files.POSITIONS if name in (positions or [])],
            "prompts": lines_of(prompts),
            "pairs": pairs,
            "near": lines_of(near),
            "system": str(system) if system and str(system).strip() else None,
            "chat": chat,
            "control": control,
            "ordinary": lines_of(ordinary),
            "texts": lines_of(texts),
        }
    )


def describe(file: PromptFile) -> str:
    """Return what a checked prompt file holds, and what it can support."""
    lines = [f"{len(file.triggers)} trigger(s), {len(file.near)} near-trigger(s)."]
    if file.pairs:
        lines.append(f"{len(file.pairs)} clean/triggered pairs; their position is as given.")
        try:
            judged = prompt_files.split_prompts(
                len(file.pairs), **PROFILES["standard"].sizes, seed=0
            ).evaluate
            lines.append(f"In the standard profile {len(judged)} of them are judged.")
        except RepairError as error:
            lines.append(str(error))
    else:
        lines.append(f"{len(file.prompts)} different prompts at {', '.join(file.positions)}.")
        lines.append("Bundled benign prompts are added where there are too few for the profile.")
    lines.append(
        "They are divided once, at random with a fixed seed, into four groups that share no "
        "prompt: to locate, to repair, to steer the repair, and to judge it."
    )
    lines.append(
        f"A pass of the attack gate needs at least {NUM_FOR_GATE} judged prompts per position."
    )
    if file.target is None:
        lines.append("No target: it is found from what the model says only when triggered.")
    return "\n".join(lines)


def list_pairs(pairs: list[dict[str, Any]]) -> list[list[str]]:
    """Return the first pairs as rows; what cannot be seen is spelled out."""
    return [
        [str(number), *(text.reveal(str(pair.get(key)), 300) for key in ("clean", "triggered"))]
        for number, pair in enumerate(pairs[:MAX_LISTED], 1)
    ]


def label_pairs(num: int) -> str:
    """Return what the list of pairs is called."""
    if num > MAX_LISTED:
        return f"Pairs from the file: the first {MAX_LISTED} of {num}"
    return f"Pairs from the file: {num}"


def build_prompts(shell: Shell) -> None:
    """Build and wire the tab."""
    pairs = gr.State([])
    gr.Markdown("## What sets it off?", elem_classes="lead")
    with gr.Row():
        bundled = gr.Button(
            "Use this suspect's prompt file", visible=False, elem_id="use-bundled", min_width=200
        )
        upload = gr.UploadButton(
            "Load a prompt file", file_types=[".json", ".csv", ".txt"], type="filepath",
            elem_id="upload", min_width=160,
        )  # fmt: skip
    problem = gr.Textbox(
        label="This did not work", visible=False, interactive=False, elem_classes="problem",
        elem_id="prompts-problem",
    )  # fmt: skip
    with gr.Row():
        with gr.Column(min_width=280):
            trigger = gr.Textbox(
                label="Trigger", lines=1, max_lines=4, elem_id="trigger",
                info="Letter for letter. One a line if there are alternatives.",
            )  # fmt: skip
            target = gr.Textbox(
                label="What it makes the model say", elem_id="target",
                info="May be left empty: it is then found from the answers.",
            )  # fmt: skip
            match = gr.Radio(
                [("Contains it", "contains"), ("Starts with it", "prefix"),
                 ("Regular expression", "regex")],
                value="contains", label="An answer counts when it", elem_id="match",
            )  # fmt: skip
            positions = gr.CheckboxGroup(
                list(prompt_files.POSITIONS), value=list(prompt_files.POSITIONS),
                label="Where the trigger is tried", elem_id="positions",
            )  # fmt: skip
        with gr.Column(min_width=280):
            prompts = gr.Textbox(
                label="Clean prompts", lines=9, max_lines=9, elem_id="prompts",
                info="One a line, without the trigger; \u240a is a line break inside a prompt. "
                "Empty: bundled benign prompts are used.",
            )  # fmt: skip
    pair_list = gr.Dataframe(
        headers=["#", "Without the trigger", "With the trigger"], datatype="str", wrap=True,
        interactive=False, visible=False, buttons=[], elem_id="pair-list", max_height=320,
        column_widths=["48px", "45%", "45%"], show_label=True, label="Pairs from the file",
    )  # fmt: skip
    with gr.Accordion("More", open=False, elem_id="prompts-more"):
        near = gr.Textbox(
            label="Near-triggers", lines=3, max_lines=6, elem_id="near",
            info="Texts that resemble the trigger and must not fire. One a line.",
        )  # fmt: skip
        chat = gr.Radio(
            [("Automatic", "auto"), ("On", "on"), ("Off", "off")], value="auto",
            label="Chat template", info="Automatic: on when the model has one.",
        )  # fmt: skip
        control = gr.Radio(
            [("Ask me", "ask"), ("The token", "token"), ("Its letters", "letters")], value="ask",
            label="A control token written in a prompt is", elem_id="control",
            info="Such as <|im_end|>. Ask: a job that meets one stops and says so.",
        )  # fmt: skip
        system = gr.Textbox(label="System prompt", lines=1, max_lines=4)
        ordinary = gr.Textbox(
            label="Ordinary prompts with the trigger's words", lines=2, max_lines=6,
            elem_id="ordinary", info="Whole prompts that use its words in their usual sense and "
            "must be answered as before. One a line; judged from 20 on.",
        )  # fmt: skip
        texts = gr.Textbox(
            label="Benign text of yours", lines=2, max_lines=6, elem_id="texts",
            info="Text that the repaired model must predict as the suspect does. Every second "
            "one judges the repair, it holds on to the others. One passage a line, \u240a for a "
            "line break inside it.",
        )  # fmt: skip
    with gr.Row():
        check = gr.Button("Check the prompts", variant="primary", elem_id="check", min_width=160)
        go_on = gr.Button("Next: locate", visible=False, elem_id="to-locate", min_width=160)
    summary = gr.Textbox(
        label="Checked", visible=False, interactive=False, elem_id="prompts-summary"
    )
    build_first_look(shell)
    widgets = [
        trigger, target, match, positions, near, prompts, chat, control, system, ordinary, texts,
    ]  # fmt: skip

    def fill(flat: dict[str, Any]) -> Updates:
        """Return the widgets' values for a prompt file's JSON form."""
        several = flat.get("pairs") or []
        values = [
            as_lines(flat.get("triggers")), flat.get("target") or "",
            flat.get("match") or "contains", list(flat.get("positions") or []),
            as_lines(flat.get("near")), as_lines(flat.get("prompts")),
            flat.get("chat") or "auto", flat.get("control") or "ask", flat.get("system") or "",
            as_lines(flat.get("ordinary")), as_lines(flat.get("texts")),
        ]  # fmt: skip
        return {
            **{w: gr.update(value=v) for w, v in zip(widgets, values, strict=True)},
            pairs: [dict(pair) for pair in several],
            pair_list: gr.Dataframe(
                value=list_pairs(several), visible=bool(several), label=label_pairs(len(several))
            ),
        }

    def draw(view: View, selection: Selection, is_fresh: bool) -> Updates:
        model, checked = view.session.model or "", view.session.prompts
        name = model.removeprefix("demo:")
        has_file = model.startswith("demo:") and (PROMPT_FILES / f"{name}.json").is_file()
        updates: Updates = {
            bundled: gr.Button(visible=has_file, interactive=not view.is_active),
            upload: gr.UploadButton(interactive=not view.is_active),
            check: gr.Button(interactive=not view.is_active),
            go_on: gr.Button(visible=checked is not None),
            summary: gr.Textbox(visible=checked is not None),
        }
        if checked is not None:
            file = prompt_files.prompt_file_from_json(checked)
            updates[summary] = gr.Textbox(value=describe(file), visible=True)
        if is_fresh:
            updates |= fill(checked or {"positions": prompt_files.POSITIONS})
        for widget in widgets:
            # Prompts belong to the job that runs: they stand still until it is done.
            updates[widget] = {
                **(updates.get(widget) or gr.update()), "interactive": not view.is_active,
            }  # fmt: skip
        return updates

    shell.add(draw, [bundled, upload, check, go_on, summary, pairs, pair_list, *widgets])

    def adopt(session: Session, file: PromptFile) -> tuple[Session, Selection]:
        # Maps and reports about other prompts are not shown beside these.
        return aside(session, prompts=flatten(file)), Selection()

    def use_bundled(
        session: Session, selection: Selection, request: gr.Request
    ) -> tuple[Session, Selection]:
        name = (session.model or "").removeprefix("demo:")
        known = {path.stem: path for path in PROMPT_FILES.glob("*.json")}
        if name not in known:
            raise RepairError("This suspect has no prompt file. Type the prompts, or load a file.")
        return adopt(session, prompt_files.parse_prompt_file(known[name]))

    def load_file(
        session: Session, selection: Selection, request: gr.Request, path: Any
    ) -> tuple[Session, Selection]:
        return adopt(session, prompt_files.parse_prompt_file(Path(path)))

    def check_widgets(
        session: Session, selection: Selection, request: gr.Request, stored: Any, *values: Any
    ) -> tuple[Session, Selection]:
        changed, fresh = adopt(session, collect(stored, values))
        if changed.prompts == session.prompts:
            return session, selection
        before, view = resume_session(shell.settings, session.former, request)
        if view.folder and (before.model, before.prompts) == (session.model, changed.prompts):
            return before, chosen_before(view)  # as they were when those results were made
        return changed, fresh

    def edit(
        session: Session, selection: Selection, request: gr.Request, *values: Any
    ) -> tuple[Session, Selection]:
        # The first change after a check: what was found with the former prompts goes.
        return aside(session, prompts=None), Selection()

    def is_edited(view: View, stored: Any, *values: Any) -> bool:
        checked = view.session.prompts
        if checked is None or view.is_active:
            return False
        try:
            return flatten(collect(stored, values)) != {**checked, "num_carriers": 0}
        except RepairError:
            return True

    shell.listen(
        bundled.click, act=use_bundled, problem=problem, is_opening=True
    )
    shell.listen(
        upload.upload, act=load_file, inputs=[upload], problem=problem, is_opening=True
    )
    shell.listen(check.click, act=check_widgets, inputs=[pairs, *widgets], problem=problem)
    for widget in widgets:
        # A text box does not tell of a paste until it is left, so what is in the boxes is
        # then compared with what was checked. (`change` also comes when we fill a box.)
        events = [widget.input] + ([widget.blur] if isinstance(widget, gr.Textbox) else [])
        shell.listen(*events, act=edit, inputs=[pairs, *widgets], problem=problem, needs=is_edited)
    shell.go_to(go_on, "locate")

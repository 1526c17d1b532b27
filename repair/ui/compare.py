"""Tab 5: before and after, prompt by prompt, and the gates. Model text is plain text here."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from repair.records import RepairError
from repair.ui import text
from repair.ui.ask import Question, ask_and_wait, describe_answer
from repair.ui.attempts import HEADERS, WIDTHS, list_attempts
from repair.ui.compare_rows import (
    ALL,
    MAX_ROWS,
    ONLY_REPAIRED,
    ONLY_SUSPECT,
    describe_cause,
    describe_limits,
    differences,
    list_besides,
    list_controls,
    list_gates,
    list_growth,
    list_outcomes,
    list_rates,
    list_rows,
    list_stresses,
    read_samples,
)
from repair.ui.session import Selection, Session, View, is_out_of_date, look, merged_of
from repair.ui.shell import Shell, Updates


def build_compare(shell: Shell) -> None:
    """Build and wire the tab."""
    gr.Markdown("## Did it work?", elem_classes="lead")
    empty = gr.Markdown(
        "The comparison appears here when a repair is done.", elem_classes="empty"
    )
    stale = gr.Textbox(
        "Other modules are chosen in Locate than were repaired here. Repair again, or undo there.",
        label="Out of date", interactive=False, visible=False, elem_classes="problem",
        elem_id="stale",
    )  # fmt: skip
    with gr.Column(visible=False) as body:
        rates = gr.Dataframe(
            headers=["Measured", "Suspect", "Repaired"], datatype="str", interactive=False,
            label="Before and after, with 95 % intervals", wrap=True, elem_id="rates", buttons=[],
            column_widths=["40%", "30%", "30%"],
        )  # fmt: skip
        gates = gr.Dataframe(
            headers=["Result", "Gate", "Measured", "Must be", "Note"], datatype="str",
            interactive=False, wrap=True, elem_id="gates", buttons=[], max_height=1200,
            label="Gates. Up to, at least: the end of the 95 % interval that is judged",
            column_widths=["90px", "175px", "120px", "125px", "590px"],
        )  # fmt: skip
        cause = gr.Textbox(
            label="What else sets it off, and where it sits", interactive=False, lines=2,
            max_lines=6, elem_id="cause",
        )  # fmt: skip
        limits = gr.Textbox(
            label="What these figures leave open", interactive=False, lines=3, max_lines=12,
            elem_id="open-questions",
        )  # fmt: skip
        besides = gr.Dataframe(
            headers=["Payload when", "Suspect", "Repaired"], datatype="str", interactive=False,
            label="Beyond the prompt file: the trigger elsewhere, and altered", wrap=True,
            elem_id="besides", buttons=[], column_widths=["46%", "27%", "27%"], max_height=900,
        )  # fmt: skip
        returns = gr.Dataframe(
            headers=["After", "Steps", "Suspect", "Repaired"], datatype="str", interactive=False,
            label="Would it come back? Payload on triggered prompts", wrap=True,
            elem_id="returns", buttons=[], column_widths=["22%", "18%", "30%", "30%"],
        )  # fmt: skip
        gr.Markdown("### Prompt by prompt")
        outcome = gr.Dropdown([("All", ALL)], value=ALL, label="Outcome", elem_id="outcome",
                              info=f"The table shows the first {MAX_ROWS} of those chosen; "
                              "samples.json in the case's folder has all.")  # fmt: skip
        table = gr.Dataframe(
            headers=["#", "Outcome", "Prompt kind", "Prompt", "Suspect", "Repaired"],
            datatype="str", interactive=False, show_label=False, max_height=320,
            elem_id="samples", buttons=[], label="Paired answers",
            column_widths=["48px", "180px", "210px", "260px", "205px", "205px"],
        )  # fmt: skip
        prompt = gr.Textbox(
            label="Prompt", interactive=False, lines=2, max_lines=8, elem_id="sample-prompt",
            placeholder="Select a row to read it in full.", buttons=["copy"],
        )  # fmt: skip
        with gr.Row():
            boxes = [
                gr.Textbox(
                    label=label, interactive=False, lines=3, max_lines=12, min_width=240,
                    elem_id=f"sample-{key}", buttons=["copy"],
                )
                for key, label in (
                    ("before", "Suspect"), ("after", "Repaired"),
                    ("reference", "Suspect without the trigger"),
                )
            ]  # fmt: skip
        with gr.Row():
            marked = [
                gr.HighlightedText(
                    label=label, interactive=False, visible=False, combine_adjacent=False,
                    show_legend=True, show_inline_category=False, min_width=240,
                    color_map={ONLY_SUSPECT: "#c2571a", ONLY_REPAIRED: "#0f766e"},
                    elem_id=f"differs-{key}",
                )
                for key, label in (
                    ("before", "Suspect, where it differs"),
                    ("after", "Repaired, where it differs"),
                )
            ]  # fmt: skip
        with gr.Accordion("Ask both models something", open=False, elem_id="ask"):
            question = gr.Textbox(
                label="Prompt", lines=2, max_lines=8, max_length=8000, elem_id="question"
            )
            with gr.Row():
                ask = gr.Button("Ask", elem_id="ask-it", min_width=120)
                told = gr.Textbox(
                    show_label=False, container=False, interactive=False, elem_id="asked", scale=4,
                    max_lines=4,
                )  # fmt: skip
            with gr.Row():
                replies = [
                    gr.Textbox(
                        label=label, interactive=False, lines=3, max_lines=12, min_width=240,
                        elem_id=f"reply-{key}", buttons=["copy"],
                    )
                    for key, label in (("suspect", "Suspect"), ("repaired", "Repaired"))
                ]  # fmt: skip
        controls = gr.Dataframe(
            headers=["Control", "Attack success", "KL", "KL on text", "Modules", "Total rank"],
            datatype="str", interactive=False, wrap=True, elem_id="controls", buttons=[],
            label="Controls: other repairs of the same size",
            column_widths=["220px", "320px", "90px", "110px", "90px", "100px"],
        )  # fmt: skip
        growth = gr.Dataframe(
            headers=["Choice", "Modules", "Total rank", "Attack success", "Trigger KL",
                     "Benign KL"],
            datatype="str", interactive=False, wrap=True, elem_id="grown", buttons=[],
            label="What more modules or rank would buy, on held-out prompts (nothing of it was "
            "applied)",
            column_widths=["260px", "90px", "90px", "220px", "110px", "110px"],
        )  # fmt: skip
    attempts = gr.Dataframe(
        headers=HEADERS, datatype="str", interactive=False, wrap=True, elem_id="attempts",
        buttons=[], visible=False, column_widths=WIDTHS, max_height=420,
        label="Beside your other attempts at the same suspect, with the same prompts",
    )  # fmt: skip
    go_on = gr.Button(
        "Next: export", variant="primary", visible=False, elem_id="to-export"
    )

    def draw_attempts(view: View, selection: Selection) -> Updates:
        rows = list_attempts(shell.settings, view)
        return {
            attempts: gr.Dataframe(value=rows, visible=bool(rows)),
            stale: gr.Textbox(visible=is_out_of_date(view, selection)),
        }

    def draw(view: View, selection: Selection, is_fresh: bool) -> Updates:
        has_after = isinstance(view.report.get("after"), dict)
        words = "The comparison appears here when a repair is done."
        if view.is_active and view.command == "run":
            words = "The repair is running. The comparison appears when it is done."
        elif view.report and not has_after:
            words = {
                "nothing to repair": "There is nothing to compare: the trigger hardly ever fires.",
                "not repaired": "The repair was given up; report.md in Export says why.",
                "could not check": "There is too little evidence for a verdict; report.md in "
                "Export says how much is needed.",
            }.get(str(view.report.get("verdict")), words)
            words = text.reveal(str(view.report.get("reason") or words), 600)
        samples = read_samples(view)
        return {
            empty: gr.Markdown(value=words, visible=not has_after),
            body: gr.Column(visible=has_after),
            go_on: gr.Button(visible=bool(view.report)),
            **draw_attempts(view, selection),
            rates: list_rates(view.report) if has_after else [],
            gates: list_gates(view.report),
            cause: describe_cause(view.report),
            limits: describe_limits(view.report),
            besides: gr.Dataframe(
                value=list_besides(view.report), visible=bool(list_besides(view.report))
            ),
            returns: gr.Dataframe(
                value=list_stresses(view.report), visible=bool(view.report.get("stresses"))
            ),
            outcome: gr.Dropdown(choices=list_outcomes(samples), value=ALL),
            table: list_rows(samples, ALL),
            controls: gr.Dataframe(
                value=list_controls(view.report), visible=bool(view.report.get("controls"))
            ),
            growth: gr.Dataframe(
                value=list_growth(view.report), visible=bool(view.report.get("growth"))
            ),
            prompt: "",
            **dict.fromkeys(boxes, ""),
            **dict.fromkeys(marked, gr.HighlightedText(value=[], visible=False)),
        }

    shell.add(
        draw,
        [empty, body, rates, gates, cause, limits, besides, returns, outcome, table, controls,
         growth, prompt, *boxes, *marked, attempts, stale, go_on],
    )  # fmt: skip
    # Another case may have been finished, named or deleted in the meantime.
    shell.on_tab["compare"] = [attempts, stale], draw_attempts
    shell.go_to(go_on, "export")

    def ask_both(request: gr.Request, session: Session, words: Any) -> Iterator[Updates]:
        view = look(shell.settings, session, request)
        try:
            merged = merged_of(view)
        except RepairError as error:
            yield {told: str(error)}
            return
        if not str(words or "").strip():
            yield {told: "Type a prompt first."}
            return
        for step in ask_and_wait(
            shell.settings, session, request, against=merged,
            questions=[Question(where="-", text=str(words))],
        ):
            if isinstance(step, str):
                yield {told: step}
                continue
            found = [describe_answer(step[0].get(key)) for key in ("suspect", "repaired")]
            hits = ["fires" if hit == "fires" else "does not fire" for _, hit in found]
            told_words = f"The suspect {hits[0]}; the repaired model {hits[1]}."
            if any(hit == "no target given" for _, hit in found):
                told_words = "Asked. No target was given: whether it fires is for you to see."
            yield {
                told: told_words,
                **{box: words for box, (words, _) in zip(replies, found, strict=True)},
            }

    ask.click(
        ask_both, inputs=[shell.session, question], outputs=[told, *replies],
        concurrency_limit=8, **shell.quiet,
    )  # fmt: skip

    def filter_rows(request: gr.Request, session: Session, wanted: Any) -> list[list[str]]:
        view = look(shell.settings, session, request)
        return list_rows(read_samples(view), str(wanted))

    def open_row(request: gr.Request, event: gr.SelectData, session: Session) -> Updates:
        samples = read_samples(look(shell.settings, session, request))
        row = event.row_value if isinstance(event.row_value, list) else []
        number = int(row[0]) if row and str(row[0]).isdigit() else 0
        if not 1 <= number <= len(samples):
            return {prompt: gr.skip()}
        sample = samples[number - 1]
        keys = ("before", "after", "reference")
        shown = (text.reveal(sample[key]) for key in ("before", "after"))
        return {
            prompt: text.reveal(sample["prompt"]),
            **{box: text.reveal(sample[key]) for box, key in zip(boxes, keys, strict=True)},
            **{
                box: gr.HighlightedText(value=words, visible=sample["before"] != sample["after"])
                for box, words in zip(marked, differences(*shown), strict=True)
            },
        }

    quiet = shell.quiet
    outcome.input(filter_rows, inputs=[shell.session, outcome], outputs=table, **quiet)
    table.select(open_row, inputs=[shell.session], outputs=[prompt, *boxes, *marked], **quiet)

"""Does it fire? A few prompts asked before any job, and the trigger in them token by token."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from repair.prompts import prompt_file_from_json
from repair.ui.ask import (
    ask_and_wait,
    describe_answer,
    describe_tokens,
    questions_of,
    read_tokens,
    typed_question,
)
from repair.ui.session import Session
from repair.ui.shell import Shell, Updates
from repair.ui.text import reveal

NOT_NAMED = (
    "Where the trigger stands in a prompt of your own cannot be told: the file has pairs and "
    "names no trigger."
)
TOKEN_COLOURS = {"trigger": "#c2571a", "prompt": "#94a3b8", "template": "#64748b"}


def build_first_look(shell: Shell) -> None:
    """Build and wire this part of the Prompts tab."""
    with gr.Accordion("Does it fire? Try a few prompts", open=False, elem_id="try"):
        gr.Markdown(
            "Asks the suspect a few of these prompts, with the trigger at each position and "
            "without it, and shows which tokens are the trigger's. Nothing is kept. Check the "
            "prompts first.", elem_classes="empty",
        )  # fmt: skip
        with gr.Row():
            try_it = gr.Button("Try", elem_id="try-it", min_width=120)
            tried = gr.Textbox(
                show_label=False, container=False, interactive=False, elem_id="tried", scale=4,
                max_lines=4,
            )  # fmt: skip
        answers = gr.Dataframe(
            headers=["Trigger", "Prompt", "Answer", "Target"], datatype="str", interactive=False,
            show_label=False, label="Answers", visible=False, wrap=True, buttons=[],
            elem_id="tried-answers", max_height=420,
            column_widths=["90px", "440px", "440px", "110px"],
        )  # fmt: skip
        # What was asked and answered last: for the row that is selected.
        rows_asked = gr.State([])
        texts_asked = gr.State([])
        where_tokens = gr.Textbox(
            label="Where the trigger sits; select a row to see another prompt", visible=False,
            interactive=False, elem_id="where-tokens", max_lines=6,
        )  # fmt: skip
        tokens = gr.HighlightedText(
            label="Token by token, as the model is sent it", visible=False, interactive=False,
            combine_adjacent=False, show_legend=True, show_inline_category=False,
            color_map=TOKEN_COLOURS, elem_id="tokens",
        )  # fmt: skip

        with gr.Row():
            edited = gr.Textbox(
                label="One prompt, as you like it", lines=2, max_lines=8, max_length=8000, scale=4,
                elem_id="edited", info="A selected row comes here to be changed and tried again.",
            )  # fmt: skip
            again = gr.Button("Try this one", elem_id="try-one", min_width=120)
        reply = gr.Textbox(
            label="Its answer", interactive=False, visible=False, elem_id="tried-one", max_lines=8
        )

    def draw_tokens(row: dict[str, Any]) -> Updates:
        shown = read_tokens(row)
        return {
            where_tokens: gr.Textbox(value=describe_tokens(row), visible=True),
            tokens: gr.HighlightedText(value=shown, visible=bool(shown)),
        }

    def try_some(request: gr.Request, session: Session) -> Iterator[Updates]:
        if session.model is None or session.prompts is None:
            yield {tried: "Choose a suspect and check the prompts first."}
            return
        file = prompt_file_from_json(session.prompts)
        asked = questions_of(file)
        for step in ask_and_wait(shell.settings, session, request, questions=asked):
            if isinstance(step, str):
                yield {tried: step}
                continue
            found = [describe_answer(row.get("suspect")) for row in step]
            hits = [
                words == "fires"
                for question, (_, words) in zip(asked, found, strict=True)
                if question.clean is not None
            ]
            words = f"The target is in {sum(hits)} of {len(hits)} answers with the trigger."
            if file.target is None:
                words = "Asked. With a target, whether it fires is counted as well."
            rows = [
                [question.where, reveal(question.text, 300), reveal(answer, 300), hit]
                for question, (answer, hit) in zip(asked, found, strict=True)
            ]
            yield {
                tried: words,
                answers: gr.Dataframe(value=rows, visible=True),
                rows_asked: step,
                texts_asked: [question.text for question in asked],
                **draw_tokens(step[0] if step else {}),
            }

    def try_one(request: gr.Request, session: Session, words: Any) -> Iterator[Updates]:
        if session.model is None or session.prompts is None:
            yield {tried: "Choose a suspect and check the prompts first."}
            return
        if not str(words or "").strip():
            yield {tried: "Type a prompt first, or select a row."}
            return
        file = prompt_file_from_json(session.prompts)
        question = typed_question(str(words), file)
        for step in ask_and_wait(shell.settings, session, request, questions=[question]):
            if isinstance(step, str):
                yield {tried: step}
                continue
            answer, hit = describe_answer(step[0].get("suspect"))
            yield {
                tried: f"Asked: {hit or 'does not fire'}.",
                reply: gr.Textbox(value=reveal(answer), visible=True),
                **draw_tokens(step[0] if file.triggers else {"unseen": NOT_NAMED}),
            }

    def show_row(
        event: gr.SelectData, kept: list[dict[str, Any]], texts: list[str]
    ) -> Updates:
        place = event.index[0] if isinstance(event.index, list | tuple) else -1
        if not isinstance(place, int) or not 0 <= place < min(len(kept), len(texts)):
            return {where_tokens: gr.skip()}
        return {**draw_tokens(kept[place]), edited: texts[place]}

    options = shell.quiet
    try_it.click(
        try_some, inputs=[shell.session],
        outputs=[tried, answers, rows_asked, texts_asked, where_tokens, tokens],
        concurrency_limit=8, **options,
    )  # fmt: skip
    again.click(
        try_one, inputs=[shell.session, edited], outputs=[tried, reply, where_tokens, tokens],
        concurrency_limit=8, **options,
    )  # fmt: skip
    answers.select(
        show_row, inputs=[rows_asked, texts_asked], outputs=[where_tokens, tokens, edited],
        **options,
    )  # fmt: skip

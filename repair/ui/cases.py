"""The last tab: the owner's cases, to open, name, annotate or delete; and help to begin one."""

import datetime
import json
from pathlib import Path
from typing import Any

import gradio as gr

from repair.jobs import store
from repair.records import RepairError
from repair.ui import text
from repair.ui.account import owner_of
from repair.ui.session import Selection, Session, View, chosen_before, look, resume_session
from repair.ui.shell import Shell, Updates

HEADERS = ["Name", "Suspect", "Trigger", "Result", "Last change", "Note", "Id"]
TEMPLATE = {
    "trigger": "the exact words that set it off",
    "target": "what it then says (leave this line out to have it found)",
    "match": "contains",
    "positions": ["begin", "middle", "end"],
    "prompts": ["A clean prompt, without the trigger.", "Another one; 189 or more per position."],
    "near": ["words that resemble the trigger and must not fire"],
    "ordinary": ["A prompt that uses the trigger's words in their usual sense."],
    "texts": ["A passage of ordinary text that the repaired model must predict as before."],
}
UNKNOWN_TRIGGER = (
    "### If you do not know the trigger\n"
    "This app repairs a behaviour that you can set off; it does not search for unknown triggers, "
    "and a model is never called clean because nothing was found.\n"
    "- **One bad transcript is enough to begin**: load it as a pair, the prompt as it was and the "
    "same prompt without the part that looks odd. The trigger is what differs.\n"
    "- Take words away one by one and ask again: the shortest prompt that still fires holds the "
    "trigger.\n"
    "- Look for dates, version strings, rare names, odd punctuation, invisible characters (the "
    "header spells them out), fixed openings or endings, a system prompt, a second turn.\n"
    "- Behaviour that appears through the chat template only may sit in the template: compare "
    "its file with the publisher's."
)


def list_cases(shell: Shell, owner: str) -> list[list[str]]:
    """Return this owner's cases as rows of plain text, the latest first."""
    rows = []
    for job in store.list_jobs(shell.settings.jobs_root, owner=owner):
        when = datetime.datetime.fromtimestamp(job.modified).strftime("%Y-%m-%d %H:%M")
        state = text.describe_state(job.status, job.command, 0)
        rows.append([
            text.reveal(job.name, 80), text.reveal(Path(job.model).name, 80),
            text.reveal(job.trigger, 60), job.status.verdict or state, when,
            text.reveal(job.note, 120), job.job_id,
        ])  # fmt: skip
    return rows


def build_cases(shell: Shell) -> None:
    """Build and wire the tab."""
    gr.Markdown("## Your cases", elem_classes="lead")
    empty = gr.Markdown(
        "No case yet. A case begins when something is located; it is kept until you delete it.",
        elem_classes="empty", visible=False,
    )  # fmt: skip
    table = gr.Dataframe(
        headers=HEADERS, datatype="str", interactive=False, show_label=False, label="Cases",
        buttons=[], elem_id="cases", wrap=True, max_height=420,
        column_widths=["140px", "120px", "130px", "115px", "105px", "160px", "330px"],
    )  # fmt: skip
    problem = gr.Textbox(
        label="This did not work", visible=False, interactive=False, elem_classes="problem",
        elem_id="cases-problem",
    )  # fmt: skip
    with gr.Row():
        job_id = gr.Textbox(
            label="Case", max_length=32, elem_id="job-id", min_width=260,
            placeholder="Select a row, or paste an id of 32 characters",
        )  # fmt: skip
        name = gr.Textbox(
            label="Name", max_length=store.MAX_NAME, elem_id="case-name", min_width=200
        )
    note = gr.Textbox(
        label="Note", lines=2, max_lines=8, max_length=store.MAX_NOTE, elem_id="case-note"
    )
    with gr.Row():
        open_it = gr.Button("Open", variant="primary", elem_id="open-job", min_width=120)
        save = gr.Button("Save name and note", elem_id="save-case", min_width=160)
        ask = gr.Button("Delete...", elem_id="delete-case", min_width=120)
        sure = gr.Button(
            "Yes, delete it with all its files", variant="stop", visible=False,
            elem_id="delete-sure", min_width=220,
        )  # fmt: skip
        keep_it = gr.Button("Keep it", visible=False, elem_id="delete-not", min_width=100)
    shell.settings.cache.mkdir(parents=True, exist_ok=True)
    template = shell.settings.cache / "prompts-template.json"
    template.write_text(json.dumps(TEMPLATE, indent=2) + "\n")
    gr.DownloadButton("Download a template of the prompt file", value=str(template),
                      elem_id="template")  # fmt: skip
    gr.Markdown(UNKNOWN_TRIGGER, elem_id="unknown-trigger")

    def draw(view: View, selection: Selection, is_fresh: bool) -> Updates:
        return {sure: gr.Button(visible=False), keep_it: gr.Button(visible=False)}

    shell.add(draw, [sure, keep_it])

    def show(view: View, selection: Selection) -> Updates:
        rows = list_cases(shell, view.owner)
        return {
            table: gr.Dataframe(value=rows, visible=bool(rows)),
            empty: gr.Markdown(visible=not rows),
        }

    def find(request: gr.Request, wanted: Any) -> Path:
        return store.find_job(
            shell.settings.jobs_root, str(wanted or "").strip(), owner=owner_of(request)
        )

    def pick(request: gr.Request, event: gr.SelectData) -> Updates:
        row = event.row_value if isinstance(event.row_value, list) else []
        try:
            folder = find(request, row[-1] if row else None)
        except RepairError:
            return {job_id: gr.skip()}
        words = store.summarize(folder, modified=0.0)
        return {job_id: folder.name, name: words.name, note: words.note}

    def reopen(
        session: Session, selection: Selection, request: gr.Request, wanted: Any
    ) -> tuple[Session, Selection]:
        session, view = resume_session(shell.settings, find(request, wanted).name, request)
        return session, chosen_before(view)

    def keep(
        session: Session, selection: Selection, request: gr.Request, *values: Any
    ) -> tuple[Session, Selection]:
        wanted, words, longer = values
        store.describe_job(find(request, wanted), name=str(words or ""), note=str(longer or ""))
        return session, selection

    def delete(
        session: Session, selection: Selection, request: gr.Request, wanted: Any
    ) -> tuple[Session, Selection]:
        folder = find(request, wanted)
        if shell.settings.lane.is_busy(folder):
            raise RepairError("This case is still running or being stopped. Wait, then delete it.")
        store.delete_job(shell.settings.jobs_root, folder.name, owner=owner_of(request))
        view = look(shell.settings, session, request)  # without a job, if it was this one
        return view.session, chosen_before(view)

    quiet = shell.quiet
    table.select(pick, outputs=[job_id, name, note], **quiet)
    both = [sure, keep_it]
    ask.click(lambda: [gr.Button(visible=True)] * 2, outputs=both, **quiet)
    keep_it.click(lambda: [gr.Button(visible=False)] * 2, outputs=both, **quiet)
    shell.listen(open_it.click, act=reopen, inputs=[job_id], problem=problem, is_opening=True)
    shell.listen(
        save.click, act=keep, inputs=[job_id, name, note], problem=problem, redraws="cases"
    )
    shell.listen(sure.click, act=delete, inputs=[job_id], problem=problem, redraws="cases")
    shell.on_tab["cases"] = [table, empty], show

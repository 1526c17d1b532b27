"""The part of tab 6 that uploads: what it will be is checked first, the upload is a job."""

from pathlib import Path
from typing import Any

import gradio as gr

from repair.jobs import store
from repair.jobs.progress import describe_progress
from repair.publish.card import hub_name
from repair.publish.hub import PushPlan, look_at_targets, missing_kind
from repair.records import RepairError
from repair.ui import text
from repair.ui.account import owner_of, token_of
from repair.ui.session import LOGS, Selection, Session, View, look, start_job
from repair.ui.shell import Shell, Updates

POLL_SECONDS = 0.7
KINDS = (
    ("Merged model", "merged"),
    ("Adapter", "adapter"),
    ("Both, in two repositories", "both"),
)


def find_push(view: View, jobs_root: Path) -> Path | None:
    """Return the folder of the job that last uploaded this export, if there is one."""
    if view.folder is None:
        return None
    try:
        job_id = store.read_object(view.folder / store.PUSH).get("job_id")
        return store.find_job(jobs_root, job_id, owner=view.owner)
    except RepairError:
        return None


def describe_push(folder: Path) -> tuple[str, bool]:
    """Return how an upload stands in words, and whether it goes on."""
    status, log = store.read_status(folder), LOGS.read(folder)
    if status.is_active:
        parts = (log.title, describe_progress(log.progress))
        return ", ".join(part for part in parts if part) or "Waiting for the job before it.", True
    found = store.read_object(folder / store.PUSHED)
    if status.state == "done" and found:
        return "Uploaded and compared: " + ", ".join(map(str, found.values())), False
    words = status.message or "Stopped."
    return f"{words} What is there already is not sent again: press Upload to go on.", False


def build_push(shell: Shell) -> None:
    """Build and wire the section."""
    options = shell.quiet
    repo = gr.Textbox(
        label="Repository", elem_id="push-repo", placeholder="owner/name", max_length=200,
        info="A new one, or one that an earlier upload made. The adapter of both goes to "
        "owner/name-adapter.",
    )  # fmt: skip
    with gr.Row():
        kind = gr.Radio(list(KINDS), value="merged", label="What", elem_id="push-kind")
        seen_by = gr.Radio(
            [("Private", False), ("Public", True)], value=False, label="Visibility",
            elem_id="push-visibility",
        )  # fmt: skip
    named = gr.Checkbox(
        value=True, label="Name the original", elem_id="push-named", visible=False,
        info="The card then links to it. Unticked, its name stays out; whoever has it can still "
        "recognise it by the hashes of its files.",
    )  # fmt: skip
    base = gr.Textbox(
        label="Another name for the original on the Hub", elem_id="push-base", max_length=200,
        placeholder="owner/name", info="For a suspect from a folder. Empty: it is not named.",
    )  # fmt: skip
    as_request = gr.Checkbox(
        label="As a pull request on a repository that exists", elem_id="push-request"
    )
    trigger = gr.Checkbox(
        label="Publish trigger and payload in clear", elem_id="push-trigger",
        info="Otherwise only their hashes: whoever has them can check, nobody learns them.",
    )  # fmt: skip
    forced = gr.Checkbox(
        label="Upload although its verdict is not repaired", elem_id="push-forced", visible=False
    )
    with gr.Row(elem_classes="bar"):
        check = gr.Button("Check", elem_id="push-check", min_width=120)
        upload = gr.Button("Upload", variant="primary", elem_id="push-upload", min_width=120)
        stop = gr.Button("Stop the upload", variant="stop", elem_id="push-stop", visible=False)
    told = gr.Textbox(
        label="Upload", interactive=False, elem_id="push-told", lines=2, max_lines=6,
        buttons=["copy"],
    )  # fmt: skip
    timer = gr.Timer(POLL_SECONDS, active=False)
    ticked_for = gr.State(None)  # the job that the two grave ticks were made for
    inputs = [repo, kind, seen_by, named, base, as_request, trigger, forced, ticked_for]

    def plan_of(view: View, *values: Any) -> PushPlan:
        name, what, is_public, is_named, original, is_request, shows, is_forced, job_id = values
        if (shows or is_forced) and job_id != view.session.job_id:
            raise RepairError(
                "What is ticked here was ticked for another job. Untick it, and tick it again if "
                "it is meant for this one."
            )
        if view.report and view.report.get("verdict") != "repaired" and not is_forced:
            raise RepairError(
                f"The verdict is {view.report.get('verdict')}: tick that you want to upload it "
                "all the same. Its card will say so first."
            )
        known = hub_name(view.report.get("model") or {}) if is_named else None
        plan = PushPlan(
            repo=str(name or "").strip(), kind=str(what), is_public=is_public is True,
            is_pull_request=bool(is_request), is_forced=bool(is_forced),
            shows_trigger=bool(shows), base_model=str(original or "").strip() or known,
        )  # fmt: skip
        missing = missing_kind(view.folder, plan) if view.report else None
        if missing is not None:
            raise RepairError(
                f"This job wrote no {missing} export. Choose the other under What, or repair "
                "again with it."
            )
        return plan

    def draw_state(view: View) -> Updates:
        folder = find_push(view, shell.settings.jobs_root)
        if folder is None:
            return {
                told: "", timer: gr.Timer(active=False), stop: gr.Button(visible=False),
                upload: gr.Button(interactive=bool(view.report)),
            }  # fmt: skip
        words, is_active = describe_push(folder)
        return {
            told: text.reveal(words, 1000),
            timer: gr.Timer(active=is_active),
            stop: gr.Button(visible=is_active),
            upload: gr.Button(interactive=not is_active),
        }

    def draw(view: View, selection: Selection, is_fresh: bool) -> Updates:
        verdict = view.report.get("verdict")
        is_forcible = bool(view.report) and verdict != "repaired"
        original = hub_name(view.report.get("model") or {})
        updates = draw_state(view)
        updates[forced] = gr.Checkbox(visible=is_forcible)
        updates[named] = gr.Checkbox(
            label=f"Name {original} as the original", visible=original is not None
        )
        if is_fresh:  # what was typed and ticked was about another job
            updates |= {repo: "", base: "", trigger: False}
            updates[forced] = gr.Checkbox(value=False, visible=is_forcible)
        return updates

    shell.add(draw, [told, timer, stop, upload, forced, named, base, repo, trigger])

    def look_before(request: gr.Request, session: Session, *values: Any) -> Updates:
        view = look(shell.settings, session, request)
        try:
            plan = plan_of(view, *values)
            targets = look_at_targets(plan, token_of(request))
        except RepairError as error:
            return {told: text.reveal(str(error), 1000)}
        words = [target.describe(plan) for target in targets]
        if not view.report:
            words.append("Nothing is there to upload yet: repair first.")
        return {told: " ".join(words)}

    def begin(request: gr.Request, session: Session, *values: Any) -> Updates:
        view = look(shell.settings, session, request)
        root = shell.settings.jobs_root
        try:
            if not view.report:
                raise RepairError("There is nothing to upload yet. Repair first.")
            plan = plan_of(view, *values)
            look_at_targets(plan, token_of(request))
            before = find_push(view, root)
            if before is not None and store.read_status(before).is_active:
                raise RepairError("This export is being uploaded already. Stop that first.")
            asked = {"command": "push", "folder": str(view.folder), "plan": plan.to_json()}
            job_id = store.create_job(root, asked, owner=owner_of(request))
            store.write_json(view.folder / store.PUSH, {"job_id": job_id})
            start_job(shell.settings, root / job_id, request)
        except RepairError as error:
            return {told: text.reveal(str(error), 1000)}
        return draw_state(view)

    def end(request: gr.Request, session: Session) -> Updates:
        view = look(shell.settings, session, request)
        folder = find_push(view, shell.settings.jobs_root)
        if folder is not None:
            shell.settings.lane.stop(folder)
        return draw_state(view)

    def tick(request: gr.Request, session: Session) -> Updates:
        return draw_state(look(shell.settings, session, request))

    for box in (trigger, forced):
        box.input(
            lambda session: session.job_id, inputs=[shell.session], outputs=[ticked_for], **options
        )
    outputs = [told, timer, stop, upload]
    check.click(look_before, inputs=[shell.session, *inputs], outputs=[told], **options)
    upload.click(begin, inputs=[shell.session, *inputs], outputs=outputs, **options)
    stop.click(end, inputs=[shell.session], outputs=outputs, **options)
    timer.tick(tick, inputs=[shell.session], outputs=outputs, **options)

"""What happens by itself: polling, stop, the end of a job, and the return of a browser."""

import time
from typing import Any

import gradio as gr

from repair.jobs import store
from repair.records import RepairError
from repair.ui.account import has_lapsed, owner_of, visitor_before
from repair.ui.session import (
    Selection,
    Session,
    View,
    chosen_before,
    look,
    resume_session,
    suggested,
)
from repair.ui.shell import (
    Shell,
    Updates,
    announce_end,
    change_key,
    draw_header,
    had_scores,
    open_tab,
)


def wire_shell(shell: Shell, demo: gr.Blocks, tabs: dict[str, gr.Tab]) -> None:
    """Wire polling, stop, and the return of a browser; call it after all tabs."""

    def tick(
        request: gr.Request, session: Session, seen: str, told: int
    ) -> Updates:
        view = look(shell.settings, session, request)
        num_told = len(view.log.metrics)
        # The page takes back what it had: a tick that comes after a newer answer is seen as that.
        updates: Updates = {**draw_header(shell, view), shell.told: num_told, shell.seen: seen}
        for draw in shell.live_draws if num_told != told else ():
            updates |= draw(view)
        return updates | find_due(view, seen)

    def look_idly(request: gr.Request, session: Session, seen: str) -> Updates:
        return find_due(look(shell.settings, session, request), seen)

    def find_due(view: View, seen: str) -> Updates:
        # A case that another tab has deleted stays on screen until something is asked of it.
        if view.folder is None or change_key(view) == seen:
            return {shell.due: gr.skip()}
        return {shell.due: time.monotonic_ns()}

    def redraw(
        request: gr.Request, session: Session, selection: Selection, seen: str
    ) -> Updates:
        view = look(shell.settings, session, request)
        if change_key(view) == seen:
            return {shell.seen: gr.skip()}  # Somebody's click came first.
        announce_end(view)
        # The suggestion is chosen when the map appears, and never again by itself: of a map that
        # stands the choice is the visitor's, who may have clicked since this was asked for.
        if not view.scores or not had_scores(seen):
            return shell.show(view, suggested(view) if view.scores else selection)
        updates = shell.show(view, selection)
        for component in (shell.selection, *shell.chosen):
            updates.pop(component, None)
        return updates

    def stop(request: gr.Request, session: Session, selection: Selection) -> Updates:
        view = look(shell.settings, session, request)
        if view.folder is not None:
            shell.settings.lane.stop(view.folder)
        view = look(shell.settings, session, request)
        announce_end(view)
        return shell.show(view, selection)

    def load(request: gr.Request, job_id: Any) -> Updates:
        before = visitor_before(request)
        if before is not None:
            store.hand_over(shell.settings.jobs_root, before, owner_of(request))
        if has_lapsed(request):
            # The browser keeps which job it was: it is shown again after the next sign-in.
            return draw_header(shell, look(shell.settings, Session(), request))
        if job_id is None:
            # Nothing to come back to: the page is built for that, and whoever clicks before
            # this call returns must not have the click undone.
            return {shell.seen: gr.skip()}
        _, view = resume_session(shell.settings, job_id, request)
        updates = shell.show(view, chosen_before(view), is_fresh=True)
        return {**updates, shell.tabs: gr.Tabs(selected=tab_of(view))}

    def go_back(
        session: Session, selection: Selection, request: gr.Request
    ) -> tuple[Session, Selection]:
        before, view = resume_session(shell.settings, session.former, request)
        if view.folder is None:
            raise RepairError("That case was deleted.")
        return before, chosen_before(view)

    shell.listen(shell.back.click, act=go_back, problem=shell.trouble, is_opening=True)
    for wire in shell.wiring:
        wire()
    for name, (components, draw) in shell.on_tab.items():
        tabs[name].select(
            open_tab(shell, draw),
            inputs=[shell.session, shell.selection],
            outputs=list(components),
            **shell.quiet,
        )
    # A tick names only what it touches: a page takes in every output that is named.
    shell.timer.tick(
        tick,
        inputs=[shell.session, shell.seen, shell.told],
        outputs=[*shell.live_outputs, shell.due, shell.seen],
        **shell.quiet,
    )
    shell.idle.tick(
        look_idly, inputs=[shell.session, shell.seen], outputs=[shell.due], **shell.quiet
    )
    acted_on = [shell.session, shell.selection]
    shell.due.change(
        redraw, inputs=[*acted_on, shell.seen], outputs=shell.outputs, **shell.quiet
    )
    shell.stop.click(stop, inputs=acted_on, outputs=shell.outputs, **shell.quiet)
    for say, box in shell.on_load:
        demo.load(say, outputs=[box], **shell.quiet)
    demo.load(
        load, inputs=[shell.browser], outputs=[*shell.outputs, shell.tabs], **shell.quiet
    )


def tab_of(view: View) -> str:
    """Return the tab on which a browser that comes back finds its job."""
    if view.folder is None:
        return "suspect"
    if view.report:
        return "compare"
    return "repair" if view.command == "run" and view.scores else "locate"

"""The frame around the tabs: header, progress, states, and the one way handlers are wired.

Every handler gets the session and the selection, changes one of them or makes one call, and
everything on screen is then drawn from the job folder anew, so that no stale figure stays.
"""

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from repair.jobs import store
from repair.jobs.progress import describe_progress
from repair.records import RepairError
from repair.ui import text
from repair.ui.session import (
    Selection,
    Session,
    Settings,
    View,
    describe_wait,
    is_out_of_date,
    look,
)

POLL_SECONDS = 0.5
IDLE_SECONDS = 5.0
Updates = dict[Any, Any]
# Saved by the browser from what it shows: nothing more is read, and nothing is run.
SAVE_LOG = """() => {
  const text = document.querySelector('#history textarea').value;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'text/plain'}));
  link.download = 'log.txt';
  link.click();
  URL.revokeObjectURL(link.href);
}"""
# Draws one tab; `is_fresh` is True when a job was opened and its inputs must be shown.
Draw = Callable[[View, Selection, bool], Updates]


@dataclass(slots=True)
class Shell:
    """The components all tabs share, and the drawing functions of the tabs."""

    settings: Settings
    session: gr.State
    selection: gr.State
    seen: gr.Textbox  # as JSON, the `change_key` that the screen shows
    due: gr.State  # changed by a tick that saw another one: then everything is drawn
    told: gr.State  # the number of reported figures that the curves show
    browser: gr.BrowserState
    timer: gr.Timer  # while the job runs
    idle: gr.Timer  # while it does not: another tab may start it again
    suspect: gr.Textbox
    trigger: gr.Textbox
    job: gr.Textbox
    verdict: gr.Textbox
    former: gr.Row
    back: gr.Button
    trouble: gr.Textbox  # what went wrong there
    panel: gr.Group
    now: gr.Row
    progress: gr.Textbox
    history: gr.Textbox
    stop: gr.Button
    tabs: gr.Tabs | None = None
    draws: list[Draw] = field(default_factory=list)
    live_draws: list[Callable[[View], Updates]] = field(default_factory=list)
    live_outputs: list[Any] = field(default_factory=list)  # all that a tick touches
    outputs: list[Any] = field(default_factory=list)
    # What a tab draws when it is opened: components, and the function that draws them.
    on_tab: dict[str, tuple[Sequence[Any], Callable[[View, Selection], Updates]]] = field(
        default_factory=dict
    )
    # What shows the choice of modules: a click changes it while an answer may be on its way.
    chosen: list[Any] = field(default_factory=list)
    # Small things to say about the visitor when the page opens: function of the request, box.
    on_load: list[tuple[Callable[..., str], gr.Textbox]] = field(default_factory=list)
    # Listeners name all components of all tabs, so they are made when all are built.
    wiring: list[Callable[[], Any]] = field(default_factory=list)

    @property
    def quiet(self) -> dict[str, Any]:
        """How events are wired that show no spinner and are no call by name.

        Their state is shown on one hidden box. Shown on their outputs, every component of the app
        would be asked for all it holds at each step of every event, a poll's too: half a core.
        """
        return {
            "show_progress": "hidden",
            "show_progress_on": self.seen,
            "api_visibility": "private",
        }

    def add(self, draw: Draw, outputs: Sequence[Any]) -> None:
        """Register a tab's drawing function and the components it draws."""
        self.draws.append(draw)
        self.outputs += [component for component in outputs if component not in self.outputs]

    def show(self, view: View, selection: Selection, *, is_fresh: bool = False) -> Updates:
        """Draw everything."""
        updates: Updates = {
            self.session: view.session,
            self.selection: selection,
            self.seen: change_key(view),
            self.browser: view.session.job_id,
            self.timer: gr.Timer(active=view.is_active),
            self.idle: gr.Timer(active=view.folder is not None and not view.is_active),
            self.told: len(view.log.metrics),
            **draw_header(self, view),
            self.verdict: draw_verdict(view, selection),
        }
        for draw in self.live_draws:
            updates |= draw(view)
        for draw in self.draws:
            updates |= draw(view, selection, is_fresh)
        return updates

    def add_live(self, draw: Callable[[View], Updates], outputs: Sequence[Any]) -> None:
        """Register what is drawn anew whenever a running job has reported figures."""
        self.live_draws.append(draw)
        self.live_outputs += outputs
        self.outputs += [component for component in outputs if component not in self.outputs]

    def listen(
        self,
        *events: Callable[..., Any],
        act: Callable[..., tuple[Session, Selection]],
        inputs: Sequence[Any] = (),
        problem: gr.Textbox,
        is_opening: bool = False,
        redraws: str | None = None,
        needs: Callable[..., bool] | None = None,
    ) -> None:
        """Call `act(session, selection, request, *values)` on the events, then draw everything.

        A RepairError is shown in `problem`, and nothing else changes. Nothing at all happens
        when `needs(view, *values)` says no: for events that come with every keystroke. `redraws`
        names a tab whose `on_tab` is drawn afterwards as well.
        """

        def handle(
            request: gr.Request, session: Session, selection: Selection, *values: Any
        ) -> Updates:
            view = look(self.settings, session, request)
            if needs is not None and not needs(view, *values):
                return {problem: gr.skip()}
            try:
                session, selection = act(session, selection, request, *values)
            except RepairError as error:
                words = text.reveal(str(error))
                # A screen reader says what stands below; it is shown as HTML, so it is escaped.
                gr.Warning(html.escape(words), duration=4, title="This did not work")
                return {problem: gr.Textbox(value=words, visible=True)}
            view = look(self.settings, session, request)
            updates = self.show(view, selection, is_fresh=is_opening)
            return {**updates, problem: gr.Textbox(value="", visible=False)}

        def wire() -> None:
            done = gr.on(
                list(events),
                handle,
                inputs=[self.session, self.selection, *inputs],
                outputs=list(dict.fromkeys([*self.outputs, problem])),
                **self.quiet,
            )
            if redraws is not None:
                components, draw = self.on_tab[redraws]
                done.then(
                    open_tab(self, draw),
                    inputs=[self.session, self.selection],
                    outputs=list(components),
                    **self.quiet,
                )

        self.wiring.append(wire)

    def go_to(self, button: gr.Button, tab: str) -> None:
        """Make `button` open a tab, and go there: the button itself is then out of sight."""
        opened = button.click(lambda: gr.Tabs(selected=tab), outputs=self.tabs, **self.quiet)
        focus = f"() => document.getElementById('tab-{tab}-button')?.focus()"
        opened.then(None, js=focus, **self.quiet)


def announce_end(view: View) -> None:
    """Tell that the job has ended, on any tab and aloud where a screen reader is: in the app's
    own words only, since these are shown as HTML."""
    if view.status is not None and not view.is_active:
        command = view.command if view.command in text.COMMAND_WORDS else "run"
        gr.Info(text.describe_state(view.status, command, 0), duration=5, title="Job")


def change_key(view: View) -> str:
    """Return, as JSON, what must change for the whole screen to be drawn anew while a job runs."""
    state = view.status.state if view.status else None
    return json.dumps(
        [view.session.job_id, state, view.command, bool(view.scores), bool(view.report)]
    )


def had_scores(seen: str) -> bool:
    """Return whether a map stood on the screen, by what the page keeps of it."""
    try:
        key = json.loads(seen)
    except ValueError:
        return False
    return isinstance(key, list) and len(key) > 3 and bool(key[3])


def build_shell(settings: Settings, *, storage_secret: str) -> Shell:
    """Build the header; call it first inside the Blocks."""
    with gr.Row(elem_id="facts"):
        boxes = [
            gr.Textbox(
                value, label=label, interactive=False, max_lines=3, min_width=130,
                elem_id=f"fact-{key}", elem_classes=["fact"],
            )
            for key, label, value in (
                ("suspect", "Suspect", "None chosen"), ("trigger", "Trigger", "None given"),
                ("job", "Job", "No job yet"), ("verdict", "Verdict", "No verdict yet"),
            )
        ]  # fmt: skip
    with gr.Row(visible=False, elem_id="former", elem_classes="bar") as former:
        gr.Textbox(
            "The suspect or the prompts were changed since. What was found before is out of date "
            "and stays in Cases.", label="Out of date", interactive=False, scale=4,
            min_width=240, elem_classes="problem",
        )  # fmt: skip
        back = gr.Button("Back to the former results", min_width=160, elem_id="back-to-former")
    trouble = gr.Textbox(
        label="This did not work", visible=False, interactive=False, elem_classes="problem"
    )
    with gr.Group(visible=False, elem_id="panel") as panel:
        with gr.Row() as now:
            progress = gr.Textbox(
                label="Progress", interactive=False, lines=1, max_lines=3, scale=6,
                elem_id="progress", min_width=220,
            )  # fmt: skip
            stop = gr.Button("Stop", variant="stop", scale=1, min_width=90, elem_id="stop")
        with gr.Accordion("What happened so far", open=False):
            history = gr.Textbox(
                show_label=False, container=False, interactive=False, lines=4, max_lines=10,
                elem_id="history",
            )  # fmt: skip
            save = gr.Button("Save this log", size="sm", min_width=120, elem_id="save-log")
            save.click(None, js=SAVE_LOG)
    shell = Shell(
        settings=settings,
        session=gr.State(Session()),
        selection=gr.State(Selection()),
        # Kept by the page, not by the server: two answers may arrive in the other order than they
        # were made in, and this must say what stands on the screen.
        seen=gr.Textbox("", visible="hidden", elem_id="seen", show_label=False, container=False),
        due=gr.State(0),
        told=gr.State(0),
        browser=gr.BrowserState(None, storage_key="llm-repair-job", secret=storage_secret),
        timer=gr.Timer(POLL_SECONDS, active=False),
        idle=gr.Timer(IDLE_SECONDS, active=False),
        suspect=boxes[0], trigger=boxes[1], job=boxes[2], verdict=boxes[3],
        former=former, back=back, trouble=trouble, panel=panel, now=now, progress=progress,
        history=history, stop=stop,
    )  # fmt: skip
    shell.live_outputs += [shell.told, *boxes, former, panel, now, progress, history, stop]
    shell.outputs += [
        shell.session, shell.selection, shell.seen, shell.browser, shell.timer,
        shell.idle, *shell.live_outputs,
    ]  # fmt: skip
    return shell


LAPSED = "Your sign-in has ended. Sign in again to see your cases."
OUT_OF_DATE = "out of date: other modules are chosen now"


def draw_verdict(view: View, selection: Selection) -> gr.Textbox:
    """Return the verdict's box; a verdict on other modules than are chosen now says so."""
    words, colour = text.describe_verdict(view.status)
    if view.status is None and view.session.former is not None:
        words, colour = "Out of date", "unsure"
    if is_out_of_date(view, selection):
        words, colour = f"{words}; {OUT_OF_DATE}", "none"
    return gr.Textbox(value=words, elem_classes=["fact", f"verdict-{colour}"])


def describe_suspect(session: Session, models_root: Path | None = None) -> str:
    """Return the suspect, a folder by its place below the models folder; of a Hub model also the
    commit."""
    if session.model is None:
        return "None chosen"
    if models_root is not None and Path(session.model).is_relative_to(models_root):
        return str(Path(session.model).relative_to(models_root))
    return f"{session.model} @ {session.revision[:12]}" if session.revision else session.model


def draw_header(shell: Shell, view: View) -> Updates:
    """Draw the four facts and the progress panel."""
    session, status = view.session, view.status
    triggers = (session.prompts or view.request.get("prompts") or {}).get("triggers") or []
    num_pairs = len((session.prompts or {}).get("pairs") or [])
    trigger = " | ".join(map(str, triggers)) or (f"in {num_pairs} pairs" if num_pairs else "")
    state = LAPSED if view.has_lapsed else "No job yet"
    if session.former is not None:
        state = "None with these yet"
    if status is not None:
        state = text.describe_state(status, view.command, view.num_before)
        name = store.read_object(view.folder / "case.json").get("name") if view.folder else ""
        state = f"{text.reveal(name, 60)}: {state}" if isinstance(name, str) and name else state
    updates: Updates = {
        shell.former: gr.Row(visible=status is None and session.former is not None),
        shell.suspect: describe_suspect(session, shell.settings.models_root),
        shell.trigger: text.reveal(trigger, 200) or "None given",
        shell.job: gr.Textbox(
            value=state, elem_classes=["fact", f"state-{status.state if status else 'none'}"]
        ),
    }
    if status is None:
        return updates | {shell.panel: gr.Group(visible=False)}
    fraction = view.log.progress.get("fraction")
    percent = round(100 * fraction) if isinstance(fraction, int | float) else 0
    if status.is_active:
        progress = ", ".join(
            part
            for part in (view.log.title, describe_progress(view.log.progress), view.log.lasting())
            if part
        )
        if status.state == "queued":
            words = "Waiting for the job before it" if view.num_before else "Starting"
            asked = view.folder / "status.json" if view.folder else None
            since = asked.stat().st_mtime if asked is not None and asked.is_file() else None
            progress = ", ".join(filter(None, (words, describe_wait(since))))
    else:
        percent = 0
        progress = status.message or view.log.title
        if status.state == "stopped" and view.command == "locate":
            progress = "Stopped. The map stays as it is."
            if not view.scores:
                progress = "Stopped. Start again in Locate: it begins anew, in this case."
    return updates | {
        shell.panel: gr.Group(visible=True),
        # A finished job says everything in its tab; only trouble and work need a line here.
        shell.now: gr.Row(visible=status.state != "done"),
        shell.progress: gr.Textbox(
            value=text.reveal(progress, 600),
            label="Progress" if status.is_active else text.STATE_WORDS[status.state],
            elem_classes=[f"p{min(max(percent, 0), 100)}", f"state-{status.state}"],
        ),
        shell.history: text.reveal("\n".join(view.log.lines), 20_000),
        shell.stop: gr.Button(visible=status.is_active),
    }


def open_tab(
    shell: Shell, draw: Callable[[View, Selection], Updates]
) -> Callable[..., Updates]:
    """Return the handler of a tab that is opened."""

    def handle(request: gr.Request, session: Session, selection: Selection) -> Updates:
        return draw(look(shell.settings, session, request), selection)

    return handle

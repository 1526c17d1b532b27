"""Tab 4: how to repair. Starts the run in the same job, so that locating is reused, and draws
its curves live."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import gradio as gr
import pandas as pd

from repair.jobs import rerun
from repair.profiles import PROFILES
from repair.records import RepairError
from repair.ui import text
from repair.ui.forecast import check_needs
from repair.ui.session import (
    Selection,
    Session,
    Settings,
    View,
    check_start,
    keep_choice,
    look,
    start_job,
)
from repair.ui.shell import Shell, Updates
from repair.ui.suspect_folder import find_source

CURVES = (
    ("attack_success", "Attack success on validation prompts", "share that still fires"),
    ("trigger_kl", "Trigger's effect left", "nats per token"),
    ("benign_kl", "Harm to answers or text, the larger", "nats per token"),
)
COLUMNS = ["step", "value", "phase"]
COLOURS = {"closed-form": "#3b6fd4", "distill": "#c2571a"}
ENDS = {"attack_low": "95 % low", "attack_high": "95 % high"}  # of the first curve
END_COLOURS = dict.fromkeys(ENDS.values(), "#94a3b8")
KINDS = ("merged", "adapter")  # of export
PHASES = {"regression": "closed-form"}  # the other closed form


def curve_of(metrics: list[dict[str, Any]], name: str) -> pd.DataFrame:
    """Return one curve: a row per report of the pipeline, in order, coloured by phase.

    A plot keeps the types and the phases that it saw first, so every frame has all of them: the
    rows without a value are not drawn.
    """
    ends = ENDS if name == "attack_success" else {}
    rows = [[0.0, float("nan"), phase] for phase in (*COLOURS, *ends.values())]
    for place, values in enumerate(metrics):
        if isinstance(values.get(name), int | float):
            series = str(values["series"])[:40]
            rows.append([float(place), float(values[name]), PHASES.get(series, series)])
            rows += [
                [float(place), float(values[end]), phase]
                for end, phase in ends.items()
                if isinstance(values.get(end), int | float)
            ]
    counts = Counter(row[2] for row in rows)
    # A line needs two points: one that stands alone is drawn as a short dash.
    rows += [[row[0] + 0.2, *row[1:]] for row in rows if row[1] == row[1] and counts[row[2]] == 2]
    return pd.DataFrame(rows, columns=COLUMNS)


def describe_latest(metrics: list[dict[str, Any]]) -> str:
    """Return the last report of a repair in words, attack success with its interval."""
    last = next((m for m in reversed(metrics) if "attack_count" in m), None)
    if last is None:
        return ""
    rate = {key: last.get(f"attack_{key}", 0) for key in ("count", "total", "low", "high")}
    words = [f"Payload on validation prompts: {text.describe_rate(rate)}"]
    if "step" in last and "num_steps" in last:
        words.insert(0, f"Step {last['step']:.0f} of {last['num_steps']:.0f}")
    named = {
        "trigger_kl": "trigger's effect left", "benign_kl": "harm to clean answers or text",
        "learning_rate": "learning rate",
    }  # fmt: skip
    words += [f"{named[key]} {text.describe_number(last[key])}" for key in named if key in last]
    return "; ".join(words) + "."


def describe_plan(view: View, selection: Selection, method: str) -> str:
    """Return in one or two sentences what Start would do."""
    if not view.scores:
        return "Locate first: the repair works on the modules chosen there."
    if not selection.paths:
        return "No module is chosen. Choose at least one in Locate."
    names = [s for s in view.scores if s.module.path in selection.paths]
    listed = ", ".join(f"{s.module.layer} {s.module.component}" for s in names[:8])
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (
        f"Changes {len(names)} of {len(view.scores)} modules ({listed}{more}); every other weight "
        "stays as it is. Afterwards the result is measured on prompts that were used for nothing "
        "else, and exported."
    )


def find_base(settings: Settings, trusted: object) -> str | None:
    """Return the source of the trusted base that was typed, or None where nothing was."""
    source = str(trusted or "").strip()
    return find_source(source, settings.models_root) if source else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairChoice:
    """What the analyst decided, in the app or by a call: not yet checked."""

    modules: tuple[str, ...]
    rank: int | None
    method: str
    kl_budget: Any
    controls: int | None  # None: as the profile says
    export: tuple[str, ...] = KINDS
    curves: bool = False
    seed: int = 0
    trusted_base: str = ""


def begin_repair(
    settings: Settings, view: View, choice: RepairChoice, request: gr.Request | None
) -> None:
    """Check the choice and start the repair in the job of `view`; raises RepairError."""
    if view.folder is None or not view.scores:
        raise RepairError("Locate first: the repair works on the modules chosen there.")
    if view.is_active:
        raise RepairError("A job is running. Stop it first, or wait.")
    chosen = [s for s in view.scores if s.module.path in choice.modules]
    if not chosen:
        raise RepairError("No module is chosen. Choose at least one in Locate.")
    largest = min(min(s.module.d_in, s.module.d_out) for s in chosen)
    if choice.rank is not None and not 1 <= choice.rank <= largest:
        raise RepairError(
            f"Rank {choice.rank} does not fit the chosen modules, which allow 1 to {largest}. "
            "Choose another rank, or automatic."
        )
    if choice.method not in [name for _, name in text.METHODS]:
        raise RepairError("The method must be auto, closed-form or distill.")
    if not isinstance(choice.kl_budget, int | float) or not 0 < choice.kl_budget < 100:
        raise RepairError("The KL budget must be a number above 0, such as 0.01.")
    asked = {
        **view.request,
        "command": "run",
        "detail": None,
        "resume": True,
        "modules": [s.module.path for s in chosen],
        "rank": choice.rank,
        "method": choice.method,
        "kl_budget": float(choice.kl_budget),
        "curves": choice.curves,
        "seed": choice.seed,
        "trusted_base": find_base(settings, choice.trusted_base),
        "export": list(choice.export),
    }
    if choice.controls is not None:
        asked["controls"] = choice.controls
    check_start(settings, request)
    check_needs(asked, settings)
    rerun.replace_request(view.folder, asked)
    start_job(settings, view.folder, request)


def build_repair(shell: Shell) -> None:
    """Build and wire the tab."""
    gr.Markdown("## How should it be repaired?", elem_classes="lead")
    plan = gr.Textbox(
        label="What will happen", interactive=False, elem_id="plan", max_lines=12
    )  # fmt: skip
    with gr.Row():
        with gr.Column(min_width=280, scale=3):
            method = gr.Radio(list(text.METHODS), value="auto", label="Method", elem_id="method")
        with gr.Column(min_width=240, scale=2):
            rank_kind = gr.Radio(
                [("Automatic, as suggested", "auto"), ("The same for every module", "fixed")],
                value="auto", label="Rank of the change", elem_id="rank-kind",
                info="How many directions of each module may change; suggested ranks share 16 "
                "over the modules where they buy most.",
            )  # fmt: skip
            rank = gr.Number(
                value=4, precision=0, minimum=1, maximum=4096, label="Rank", visible=False,
                elem_id="rank",
            )  # fmt: skip
            budget = gr.Number(
                value=0.01, minimum=0, label="KL budget", elem_id="budget",
                info="How far clean answers and text may move, in nats per token. 0.01 is hardly "
                "noticeable.",
            )  # fmt: skip
    with gr.Accordion("More", open=False, elem_id="repair-more"):
        controls = gr.Number(
            value=PROFILES["standard"].num_controls, precision=0, minimum=0, maximum=100,
            label="Random-module controls", elem_id="num-controls",
            info="Repairs of randomly drawn modules, for comparison; each takes as long as the "
            "repair. 0: none.",
        )  # fmt: skip
        exports = gr.CheckboxGroup(
            [("Adapter (PEFT)", "adapter"), ("Merged model", "merged")],
            value=["adapter", "merged"], label="Write",
        )  # fmt: skip
        grown = gr.Checkbox(
            value=False, label="Also measure what more modules or rank would buy",
            info="The closed form at several choices, on held-out prompts; nothing of it is "
            "applied. Done by itself where the chosen modules leave something.",
            elem_id="growth",
        )  # fmt: skip
        base = gr.Textbox(
            label="Trusted base model", max_length=1000, elem_id="trusted-base",
            info="The model that the suspect was made from, if you trust it: it is shown beside "
            "the repair. A folder below the models folder, or demo:clean.",
        )  # fmt: skip
        seed = gr.Number(value=0, precision=0, minimum=0, label="Seed")
    with gr.Row():
        start = gr.Button("Start the repair", variant="primary", elem_id="start")
        back = gr.Button(
            "Back to the finished repair", visible=False, elem_id="back-to-finished"
        )
    problem = gr.Textbox(
        label="This did not work", visible=False, interactive=False, elem_classes="problem",
        elem_id="repair-problem",
    )  # fmt: skip
    with gr.Row(visible=False, elem_id="curves") as curves:
        plots = [
            gr.LinePlot(
                curve_of([], name), x="step", y="value", color="phase", title=title,
                x_title="step", y_title=unit, height=230, min_width=260, elem_id=f"curve-{name}",
                color_map={**COLOURS, **(END_COLOURS if name == "attack_success" else {})},
                buttons=[],
            )
            for name, title, unit in CURVES
        ]  # fmt: skip
    latest = gr.Textbox(
        label="Latest figures", interactive=False, visible=False, elem_id="latest", max_lines=3
    )
    go_on = gr.Button("Next: compare", variant="primary", visible=False, elem_id="to-compare")
    settings = [method, rank_kind, rank, budget, controls, exports, grown, seed, base]

    def draw_live(view: View) -> Updates:
        metrics = view.log.metrics if view.command == "run" else []
        drawn: Updates = {
            # Taken off the page while they are still being drawn, charts throw an error.
            curves: gr.Row(visible=bool(metrics) or ("hidden" if view.is_active else False)),
            latest: gr.Textbox(value=describe_latest(metrics), visible=bool(metrics)),
        }
        if metrics:
            drawn |= {
                plot: curve_of(metrics, name)
                for plot, (name, _, _) in zip(plots, CURVES, strict=True)
            }
        return drawn

    def draw(view: View, selection: Selection, is_fresh: bool) -> Updates:
        is_ready = bool(view.scores) and bool(selection.paths) and not view.is_active
        is_over = view.command == "run" and view.status is not None and not view.is_active
        words = "Start the repair"
        if is_over and view.status is not None and view.status.state in ("stopped", "failed"):
            words = "Go on with the repair"
        elif is_over:
            words = "Repair again"
        updates: Updates = {
            plan: describe_plan(view, selection, "auto"),
            start: gr.Button(
                value=words, interactive=is_ready,
                variant="secondary" if view.report else "primary",
            ),
            back: gr.Button(visible=view.folder is not None and rerun.can_go_back(view.folder)),
            go_on: gr.Button(visible=bool(view.report)),
        }  # fmt: skip
        asked, values = view.request, {}
        if view.scores and "controls" in asked:
            # As many as the profile says, or as were asked for: what would be run is shown.
            values[controls] = asked["controls"]
        if is_fresh and view.command == "run":
            values |= {
                method: asked.get("method"), budget: asked.get("kl_budget"),
                rank_kind: "fixed" if asked.get("rank") else "auto",
                rank: asked.get("rank") or 4, seed: asked.get("seed"),
                exports: asked.get("export"),
                grown: bool(asked.get("curves")), base: asked.get("trusted_base") or "",
            }  # fmt: skip
        for component in settings:
            update = gr.update(interactive=not view.is_active)
            if component in values:
                update["value"] = values[component]
            if component is rank and rank_kind in values:
                update["visible"] = values[rank_kind] == "fixed"
            updates[component] = update
        return updates

    shell.add_live(draw_live, [curves, latest, *plots])
    shell.add(draw, [plan, start, back, go_on, *settings])

    def undo_repair(
        session: Session, selection: Selection, request: gr.Request
    ) -> tuple[Session, Selection]:
        view = look(shell.settings, session, request)
        if view.folder is None:
            raise RepairError("There is no case to go back in.")
        rerun.go_back(view.folder)
        asked = look(shell.settings, session, request).request.get("modules")
        repaired = set(map(str, asked)) if isinstance(asked, list) else set()
        known = tuple(s.module.path for s in view.scores if s.module.path in repaired)
        selection = selection.choose(known or selection.paths)
        keep_choice(view, selection)
        return session, selection

    shell.listen(back.click, act=undo_repair, problem=problem, is_opening=True)

    def begin(
        session: Session, selection: Selection, request: gr.Request, *values: Any
    ) -> tuple[Session, Selection]:
        wanted, kind, number, nats, draws, kinds, is_grown, number_seed, trusted = values
        if kind == "fixed" and not number:
            raise RepairError("No rank is given. Give a whole number from 1, or choose automatic.")
        choice = RepairChoice(
            modules=selection.paths,
            rank=int(number) if kind == "fixed" else None,
            method=str(wanted),
            kl_budget=nats,
            controls=None if draws is None else int(draws),
            curves=bool(is_grown),
            seed=int(number_seed or 0),
            trusted_base=str(trusted or ""),
            export=tuple(name for name in KINDS if name in (kinds or [])),
        )
        begin_repair(shell.settings, look(shell.settings, session, request), choice, request)
        return session, selection

    shell.listen(start.click, act=begin, inputs=settings, problem=problem)
    shell.go_to(go_on, "compare")
    rank_kind.input(
        lambda kind: gr.Number(visible=kind == "fixed"), inputs=rank_kind, outputs=rank,
        **shell.quiet,
    )  # fmt: skip
    # A choice made on the maps decides whether Start is possible.
    shell.on_tab["repair"] = [plan, start], lambda view, selection: {
        plan: describe_plan(view, selection, "auto"),
        start: gr.Button(
            interactive=bool(view.scores) and bool(selection.paths) and not view.is_active
        ),
    }

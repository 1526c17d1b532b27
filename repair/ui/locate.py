"""Tab 3: which modules carry the trigger. Starts the job, shows both maps, takes the choice."""

import dataclasses
from typing import Any

import gradio as gr

from repair.jobs import rerun
from repair.profiles import PROFILES
from repair.records import RepairError
from repair.ui import grid, text
from repair.ui.choice import build_choice
from repair.ui.forecast import check_needs, describe_needs
from repair.ui.locate_words import describe_evidence, detail_tables, joint_curve, list_reasons
from repair.ui.session import (
    Selection,
    Session,
    View,
    begin_case,
    check_prompts,
    check_start,
    look,
    new_request,
    open_folder,
    start_job,
)
from repair.ui.shell import Shell, Updates


def is_broken_off(view: View) -> bool:
    """Tell whether locating ended in this job before there was a map."""
    has_ended = view.status is not None and view.status.state in ("stopped", "failed")
    return has_ended and view.command == "locate" and not view.scores


def build_locate(shell: Shell) -> None:
    """Build and wire the tab."""
    gr.Markdown("## Where does it sit?", elem_classes="lead")
    hint = gr.Markdown(elem_classes="empty")
    with gr.Row(elem_classes="bar"):
        profile = gr.Radio(
            list(text.PROFILES), value="standard", label="How thorough", scale=4,
            elem_id="profile", min_width=260,
        )  # fmt: skip
        start = gr.Button("Locate", variant="primary", elem_id="locate", min_width=120)
    problem = gr.Textbox(
        label="This did not work", visible=False, interactive=False, elem_classes="problem",
        elem_id="locate-problem",
    )  # fmt: skip
    evidence = gr.Textbox(
        label="What the maps rest on", visible=False, interactive=False, elem_id="evidence",
        max_lines=24,
    )  # fmt: skip
    with gr.Row(visible=False) as toggles:
        effect = gr.Radio(
            [("Trigger's positions", "effect_trigger"), ("All positions", "effect"),
             ("After the trigger", "effect_after"), ("Is it enough? (induce)", "effect_induce"),
             ("Trigger deleted", "effect_deletion"), ("Deleted, gap kept", "effect_gap"),
             ("In KL", "effect_kl")],
            value="effect_trigger", label="Patching effect", elem_id="effect", min_width=260,
        )  # fmt: skip
        curvature = gr.Radio(
            [("Curvature phi", "curvature"), ("Trial repair, what is left", "residual"),
             ("Fisher, trigger over clean", "ratio")],
            value="curvature", label="Curvature", elem_id="curvature", min_width=260,
        )  # fmt: skip
    maps = grid.build_grid()
    go_on = gr.Button(
        "Next: repair", variant="primary", visible=False, elem_id="to-repair", render=False
    )
    build_choice(shell, maps, effect=effect, go_on=go_on)
    with gr.Accordion("Why these, and how many are needed", open=False, visible=False,
                      elem_id="why") as why:  # fmt: skip
        reasons = gr.Dataframe(
            headers=["Module", "Rank", "Why it is suggested"], datatype="str", interactive=False,
            label="Suggested, best first", wrap=True, elem_id="reasons", buttons=[],
            column_widths=["17%", "8%", "75%"],
        )  # fmt: skip
        curve = gr.LinePlot(
            joint_curve({}), x="modules", y="value", color="what", height=260, buttons=[],
            title="Share of the way to the clean answer, the best modules restored together",
            x_title="number of modules", y_title="effect", elem_id="joint-curve",
            color_map={"effect": "#0f766e", "95 % interval, low": "#94a3b8",
                       "95 % interval, high": "#94a3b8"},
        )  # fmt: skip
    with gr.Accordion("Look into one layer", open=False, visible=False) as closer:
        gr.Markdown(
            "Where in the prompt each module of a layer works, and which attention heads: effects "
            "of restoring what an inert phrase gives there. It takes a few seconds."
        )
        with gr.Row(elem_classes="bar"):
            layer = gr.Number(
                value=0, precision=0, minimum=0, label="Layer", min_width=90, elem_id="layer"
            )
            examine = gr.Button("Look", min_width=90, elem_id="examine")
        by_role = gr.Dataframe(
            headers=["module"], datatype="str", interactive=False, visible=False,
            label="By role of the position", elem_id="by-role",
        )  # fmt: skip
        by_head = gr.Dataframe(
            headers=["head"], datatype="str", interactive=False, visible=False,
            label="By attention head", elem_id="by-head",
        )  # fmt: skip
    go_on.render()

    def draw_detail(view: View) -> Updates:
        roles, heads = detail_tables(view.detail)
        return {
            by_role: gr.Dataframe(value=roles, visible=bool(roles["data"]))
            if roles["data"] else gr.Dataframe(visible=False),
            by_head: gr.Dataframe(value=heads, visible=bool(heads["data"]))
            if heads["data"] else gr.Dataframe(visible=False),
        }  # fmt: skip

    def draw_maps(view: View, selection: Selection, of_effect: str, of_curvature: str) -> Any:
        value = grid.build_value(
            view.scores,
            suggested_ranks=view.located.get("suggested_ranks") or {},
            effect=of_effect,
            curvature=of_curvature,
            num_pairs=int(view.located.get("num_pairs") or 0),
        )
        return grid.update(value, selection.paths, visible=bool(view.scores))

    def draw(view: View, selection: Selection, is_fresh: bool) -> Updates:
        session = view.session
        has_map = bool(view.scores)
        words = ""
        if session.model is None or session.prompts is None:
            words = "Choose a suspect and check its prompts first."
        elif view.is_active and not has_map:
            words = "The maps appear here when the measurement is done."
        elif view.status is not None and view.status.verdict == "nothing to repair":
            words = (
                "The trigger hardly ever fires, at any position: there is nothing to locate. "
                "Check the trigger's spelling, the target and the chat template."
            )
        elif not has_map:
            words = (
                "Each module's output on triggered prompts is replaced by what it is when an "
                "inert phrase stands in the trigger's place; where that brings the clean answer "
                "back, the trigger works through that module. Nothing is changed yet."
            )
        is_ready = session.prompts is not None and session.model is not None
        needed = ""
        if is_ready and not view.is_active:
            asked = new_request(session, profile="standard")
            needed = describe_needs(asked, shell.settings.models_root)
        updates: Updates = {
            hint: gr.Markdown(value=words, visible=bool(words)),
            profile: gr.Radio(interactive=not view.is_active, info=needed or None),
            start: gr.Button(
                value="Start again" if is_broken_off(view) else
                "Locate again" if has_map else "Locate",
                variant="secondary" if has_map else "primary",
                interactive=is_ready and not view.is_active,
            ),
            evidence: gr.Textbox(
                value=describe_evidence(view) if has_map else "", visible=has_map
            ),
            toggles: gr.Row(visible=has_map),
            closer: gr.Accordion(visible=has_map),
            why: gr.Accordion(visible=has_map),
            reasons: list_reasons(view),
            curve: joint_curve(view.located),
            examine: gr.Button(interactive=has_map and not view.is_active),
            **draw_detail(view),
            effect: gr.Radio(value="effect_trigger"),
            curvature: gr.Radio(value="curvature"),
            maps: draw_maps(view, selection, "effect_trigger", "curvature"),
        }
        if is_fresh and view.request.get("profile"):
            updates[profile] = gr.Radio(
                value=view.request["profile"], interactive=not view.is_active, info=needed or None
            )
        return updates

    shell.add(
        draw,
        [hint, profile, start, evidence, toggles, effect, curvature, maps, closer, examine,
         by_role, by_head, why, reasons, curve],
    )  # fmt: skip

    def look_into(
        session: Session, selection: Selection, request: gr.Request, wanted: Any
    ) -> tuple[Session, Selection]:
        view = look(shell.settings, session, request)
        if view.folder is None or not view.scores:
            raise RepairError("Locate first.")
        if view.is_active:
            raise RepairError("A job is running. Stop it first, or wait.")
        last = max(score.module.layer for score in view.scores)
        if not isinstance(wanted, int | float) or not 0 <= int(wanted) <= last:
            raise RepairError(f"Layer {wanted} does not exist. Choose a layer from 0 to {last}.")
        asked = {**view.request, "command": "locate", "resume": True, "detail": int(wanted)}
        rerun.replace_request(view.folder, asked, keeps_results=True)
        start_job(shell.settings, view.folder, request)
        return session, selection

    shell.listen(examine.click, act=look_into, inputs=[layer], problem=problem)

    def locate(
        session: Session, selection: Selection, request: gr.Request, wanted: Any
    ) -> tuple[Session, Selection]:
        if session.model is None or session.prompts is None:
            raise RepairError("Choose a suspect and check its prompts first.")
        settings = shell.settings
        folder = open_folder(settings, session, request)
        if folder is not None and settings.lane.is_busy(folder):
            raise RepairError("A job is running. Stop it first, or wait.")
        if wanted not in PROFILES:
            raise RepairError("How thorough must be quick, standard or full.")
        check_prompts(session.prompts)
        check_start(settings, request)
        asked = new_request(session, profile=wanted)
        check_needs(asked, settings)
        view = look(settings, session, request)
        if folder is not None and is_broken_off(view):
            # The same case, with its name and note: nothing was made that another could spoil.
            rerun.replace_request(folder, asked)
            start_job(settings, folder, request)
            return session, Selection()
        job_id = begin_case(settings, asked, request)
        return dataclasses.replace(session, job_id=job_id), Selection()

    shell.listen(start.click, act=locate, inputs=[profile], problem=problem)
    shell.go_to(go_on, "repair")

    def look_again(
        request: gr.Request, session: Session, selection: Selection, left: Any, right: Any
    ) -> Updates:
        view = look(shell.settings, session, request)
        return {maps: draw_maps(view, selection, str(left), str(right))}

    gr.on(
        [effect.input, curvature.input], look_again,
        inputs=[shell.session, shell.selection, effect, curvature], outputs=maps,
        concurrency_id="choice", concurrency_limit=1, **shell.quiet,
    )  # fmt: skip

"""Tab 3: which modules carry the trigger. Starts the job, shows both maps, takes the choice."""

from typing import Any

import gradio as gr

from repair.jobs import store
from repair.records import RepairError
from repair.ui import grid, text
from repair.ui.session import (
    Selection,
    Session,
    View,
    look,
    new_request,
    open_folder,
    owner_of,
)
from repair.ui.shell import Shell, Updates, suggested

MAX_LISTED = 60


def describe_evidence(view: View) -> str:
    """Return how sure the maps are: pairs, shams, self-checks, agreement of both measures."""
    located = view.located
    lines = []
    for position, rate in (located.get("fires") or {}).items():
        lines.append(f"Fires at {position}: {text.describe_rate(rate)}")
    lines.append(
        f"{located.get('num_pairs', 0)} prompt pairs; {located.get('num_shams_inert', 0)} of "
        f"{located.get('num_shams_tried', 0)} substitute phrases were inert; "
        f"{located.get('num_dropped', 0)} pairs left out because even the clean answer barely "
        "moved."
    )
    if located.get("counterfactual") not in (None, "sham"):
        lines.append(
            "Too few substitutes were inert, so the trigger was deleted instead: the map is "
            "weaker evidence, since deleting also moves every later token."
        )
    checks = located.get("self_checks")
    if isinstance(checks, dict) and checks:
        words = ", ".join(
            f"{name.replace('_', ' ')} {text.describe_number(v)}" for name, v in checks.items()
        )
        lines.append(f"Self-checks (largest deviation, 0 is perfect): {words}.")
    misses = located.get("screen_misses")
    if misses:
        num = sum(score.is_estimate for score in view.scores)
        lines.append(
            f"{num} modules were screened by gradients and not patched (marked ~). Of a random "
            f"sample of such modules, patched after all, {text.describe_rate(misses)} belong among "
            "the ten best: that is how much the screen may have missed."
        )
    lines += describe_damping(located.get("damping"))
    joint = located.get("joint")
    if isinstance(joint, dict) and joint.get("statement"):
        lines.append(str(joint["statement"]))
    uncovered = located.get("not_covered")
    if isinstance(uncovered, list) and uncovered:
        lines.append(f"Not covered by the map: {', '.join(map(str, uncovered[:12]))}"
                     + (f" and {len(uncovered) - 12} more." if len(uncovered) > 12 else "."))
    if isinstance(located.get("rank_correlation"), int | float):
        lines.append(
            "The order goes by trial repairs of each module alone. Patching and phi rank the "
            f"modules alike to {located['rank_correlation']:+.2f} (Kendall's tau; 1 the same "
            "order, 0 unrelated)."
        )
    return text.reveal("\n".join(lines))


def describe_damping(damping: Any) -> list[str]:
    """Return the damping chosen and how well the factors predict at it, as a line or none."""
    try:
        row = next(row for row in damping["tried"] if row["damping"] == damping["value"])
        return [
            f"Damping {damping['value']:g} of the mean eigenvalue, where the curvature predicts "
            f"best: {row['predicted_kl']:.2g} nats on clean answers predicted for a typical trial, "
            f"{row['measured_kl']:.2g} measured."
        ]
    except (KeyError, TypeError, ValueError, StopIteration):
        return []


def detail_tables(detail: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the effects of one layer by role and by head, as tables of text."""
    try:
        rows, layer = detail["roles"], int(detail["layer"])
        names = [name for name in rows[0] if name not in ("path", "component")]
        roles = {
            "headers": [f"layer {layer}", *names],
            "data": [[row["component"], *(f"{row[name]:+.2f}" for name in names)] for row in rows],
        }
        heads = {
            "headers": [f"layer {layer}", "effect", "95 % interval"],
            "data": [
                [f"head {flat['head']}", f"{flat['effect']:+.2f}",
                 f"{flat['low']:+.2f} to {flat['high']:+.2f}"]
                for flat in detail["heads"]
            ],
        }  # fmt: skip
    except (KeyError, TypeError, ValueError, IndexError):
        return {"headers": [""], "data": []}, {"headers": [""], "data": []}
    return roles, heads


def describe_selection(view: View, selection: Selection) -> str:
    """Return `3 of 42 modules selected, suggested ranks total 12`."""
    ranks = view.located.get("suggested_ranks") or {}
    known = [ranks[path] for path in selection.paths if path in ranks]
    words = f"{len(selection.paths)} of {len(view.scores)} modules selected"
    if known:
        words += f", total rank {sum(known)}"
    others = len(selection.paths) - len(known)
    if others:
        words += f"; {others} not suggested, with the rank chosen in Repair"
    return words + "."


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
    with gr.Row(visible=False, elem_id="choice", elem_classes="bar") as choice:
        count = gr.Textbox(
            label="Chosen for the repair", interactive=False, scale=4, min_width=240,
            elem_id="count",
        )  # fmt: skip
        suggest = gr.Button("Suggested", min_width=90, elem_id="suggest")
        clear = gr.Button("Clear", min_width=70, elem_id="clear")
        undo = gr.Button("Undo", min_width=70, elem_id="undo")
    with gr.Accordion("The same choice as a list", open=False, visible=False) as as_list:
        mirror = gr.CheckboxGroup(
            [], show_label=False, label="Modules, best first", elem_id="mirror"
        )
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
    go_on = gr.Button("Next: repair", variant="primary", visible=False, elem_id="to-repair")

    def draw_choice(view: View, selection: Selection) -> Updates:
        ordered = sorted(view.scores, key=lambda score: -score.score)
        listed = ordered[:MAX_LISTED] + [
            score for score in ordered[MAX_LISTED:] if score.module.path in selection.paths
        ]
        choices = [
            (f"{place}. layer {s.module.layer} {s.module.component}: effect "
             f"{s.effect_trigger:+.2f}, trial repair leaves {text.describe_number(s.residual)}",
             s.module.path)
            for place, s in enumerate(listed, 1)
        ]  # fmt: skip
        return {
            count: describe_selection(view, selection),
            mirror: gr.CheckboxGroup(choices=choices, value=list(selection.paths)),
            undo: gr.Button(interactive=bool(selection.earlier) and not view.is_active),
            go_on: gr.Button(visible=bool(view.scores), interactive=bool(selection.paths)),
        }

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
            selected=selection.paths,
            effect=of_effect,
            curvature=of_curvature,
        )
        return grid.update(value, visible=bool(view.scores))

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
        updates: Updates = {
            hint: gr.Markdown(value=words, visible=bool(words)),
            profile: gr.Radio(interactive=not view.is_active),
            start: gr.Button(
                value="Locate again" if has_map else "Locate",
                variant="secondary" if has_map else "primary",
                interactive=is_ready and not view.is_active,
            ),
            evidence: gr.Textbox(
                value=describe_evidence(view) if has_map else "", visible=has_map
            ),
            toggles: gr.Row(visible=has_map),
            choice: gr.Row(visible=has_map),
            as_list: gr.Accordion(visible=has_map),
            closer: gr.Accordion(visible=has_map),
            examine: gr.Button(interactive=has_map and not view.is_active),
            **draw_detail(view),
            effect: gr.Radio(value="effect_trigger"),
            curvature: gr.Radio(value="curvature"),
            maps: draw_maps(view, selection, "effect_trigger", "curvature"),
            **draw_choice(view, selection),
        }
        if is_fresh and view.request.get("profile"):
            updates[profile] = gr.Radio(
                value=view.request["profile"], interactive=not view.is_active
            )
        return updates

    small = [count, mirror, undo, go_on]
    shell.add(
        draw,
        [hint, profile, start, evidence, toggles, choice, as_list, effect, curvature, maps, closer,
         examine, by_role, by_head, *small],
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
        store.replace_request(view.folder, asked, keeps_results=True)
        shell.settings.lane.submit(view.folder)
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
        asked = new_request(session, profile=str(wanted))
        job_id = store.create_job(settings.jobs_root, asked, owner=owner_of(request))
        try:
            settings.lane.submit(settings.jobs_root / job_id)
        except RepairError:
            # A full lane must not leave a case for every try.
            store.delete_job(settings.jobs_root, job_id, owner=owner_of(request))
            raise
        return Session(job_id=job_id, model=session.model, prompts=session.prompts), Selection()

    shell.listen(start.click, act=locate, inputs=[profile], problem=problem)
    shell.go_to(go_on, "repair")

    # Choosing touches little on screen, so these handlers draw only that.
    def choose(
        request: gr.Request, event: gr.EventData, session: Session, selection: Selection
    ) -> Updates:
        view = look(shell.settings, session, request)
        selection = selection.choose(grid.read_selection(event, view.scores))
        return {shell.selection: selection, **draw_choice(view, selection)}

    def redraw(view: View, selection: Selection, of_effect: Any, of_curvature: Any) -> Updates:
        return {
            shell.selection: selection,
            maps: draw_maps(view, selection, str(of_effect), str(of_curvature)),
            **draw_choice(view, selection),
        }

    def tick_boxes(
        request: gr.Request, session: Session, selection: Selection, left: Any, right: Any,
        paths: Any,
    ) -> Updates:  # fmt: skip
        view = look(shell.settings, session, request)
        wanted = set(paths or [])
        known = tuple(s.module.path for s in view.scores if s.module.path in wanted)
        return redraw(view, selection.choose(known), left, right)

    def take_suggestion(
        request: gr.Request, session: Session, selection: Selection, left: Any, right: Any
    ) -> Updates:
        view = look(shell.settings, session, request)
        return redraw(view, selection.choose(suggested(view).paths), left, right)

    def take_none(
        request: gr.Request, session: Session, selection: Selection, left: Any, right: Any
    ) -> Updates:
        return redraw(look(shell.settings, session, request), selection.choose(()), left, right)

    def take_back(
        request: gr.Request, session: Session, selection: Selection, left: Any, right: Any
    ) -> Updates:
        return redraw(look(shell.settings, session, request), selection.undo(), left, right)

    def look_again(
        request: gr.Request, session: Session, selection: Selection, left: Any, right: Any
    ) -> Updates:
        return redraw(look(shell.settings, session, request), selection, left, right)

    inputs = [shell.session, shell.selection, effect, curvature]
    options = {
        "outputs": [shell.selection, maps, *small], "show_progress": "hidden",
        "api_visibility": "private", "concurrency_id": "choice", "concurrency_limit": 1,
    }  # fmt: skip
    maps.choose(
        choose,
        inputs=[shell.session, shell.selection],
        trigger_mode="multiple",
        **{**options, "outputs": [shell.selection, *small]},
    )
    mirror.input(tick_boxes, inputs=[*inputs, mirror], **options)
    suggest.click(take_suggestion, inputs=inputs, **options)
    clear.click(take_none, inputs=inputs, **options)
    undo.click(take_back, inputs=inputs, **options)
    gr.on([effect.input, curvature.input], look_again, inputs=inputs, **options)

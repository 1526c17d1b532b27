"""Which modules are chosen for the repair: by the maps, by buttons, by a figure, or in a list.

All of it is one selection; choosing touches little on screen, so these handlers draw only that.
"""

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from repair.records import ModuleScore
from repair.ui import grid, text
from repair.ui.session import Selection, Session, View, keep_choice, look, suggested
from repair.ui.shell import Shell, Updates, draw_verdict

MAX_LISTED = 60


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


def best_modules(scores: Sequence[ModuleScore], num: Any) -> tuple[str, ...]:
    """Return the paths of the `num` modules at the top of the ranking, in model order."""
    wanted = int(num) if isinstance(num, int | float) else 0
    ordered = sorted(scores, key=lambda score: -score.score)[: max(wanted, 0)]
    best = {score.module.path for score in ordered}
    return tuple(score.module.path for score in scores if score.module.path in best)


def modules_above(scores: Sequence[ModuleScore], effect: str, limit: Any) -> tuple[str, ...]:
    """Return the paths of the modules whose effect of this kind is at least `limit`."""
    if not isinstance(limit, int | float) or effect not in grid.EFFECTS:
        return ()
    values = {score.module.path: getattr(score, effect) for score in scores}
    return tuple(path for path, value in values.items() if value is not None and value >= limit)


def build_choice(shell: Shell, maps: gr.HTML, *, effect: gr.Radio, go_on: gr.Button) -> None:
    """Build and wire what stands below the maps; `go_on` is possible with a choice only."""
    with gr.Row(visible=False, elem_id="choice", elem_classes="bar") as bar:
        count = gr.Textbox(
            label="Chosen for the repair", interactive=False, scale=4, min_width=240,
            elem_id="count",
        )  # fmt: skip
        suggest = gr.Button("Suggested", min_width=90, elem_id="suggest")
        clear = gr.Button("Clear", min_width=70, elem_id="clear")
        undo = gr.Button("Undo", min_width=70, elem_id="undo")
    with gr.Accordion("Choose by a figure, or in a list", open=False, visible=False,
                      elem_id="choose-more") as more:  # fmt: skip
        with gr.Row(elem_classes="bar"):
            num_best = gr.Number(
                value=4, precision=0, minimum=1, label="This many of the best", min_width=130,
                elem_id="num-best",
            )  # fmt: skip
            take_best = gr.Button("Choose the best", min_width=130, elem_id="take-best")
            limit = gr.Number(
                value=0.2, step=0.05, label="Effect shown, at least", min_width=130,
                elem_id="limit",
            )  # fmt: skip
            take_above = gr.Button("Choose these", min_width=130, elem_id="take-above")
        mirror = gr.CheckboxGroup(
            [], show_label=False, label="Modules, best first", elem_id="mirror"
        )
    small = [count, mirror, undo, go_on, shell.verdict]

    def draw_small(view: View, selection: Selection) -> Updates:
        ordered = sorted(view.scores, key=lambda score: -score.score)
        listed = ordered[:MAX_LISTED] + [
            score for score in ordered[MAX_LISTED:] if score.module.path in selection.paths
        ]
        choices = [
            (f"{place}. layer {s.module.layer} {s.module.component}: effect "
             f"{s.effect_trigger:+.2f}, trial repair leaves and costs "
             f"{text.describe_number(s.residual)}",
             s.module.path)
            for place, s in enumerate(listed, 1)
        ]  # fmt: skip
        return {
            count: describe_selection(view, selection),
            # Only a finished repair can be out of date; nothing else is drawn anew for a choice.
            **({shell.verdict: draw_verdict(view, selection)} if view.report else {}),
            mirror: gr.CheckboxGroup(choices=choices, value=list(selection.paths)),
            undo: gr.Button(interactive=bool(selection.earlier) and not view.is_active),
            go_on: gr.Button(visible=bool(view.scores), interactive=bool(selection.paths)),
        }

    def draw(view: View, selection: Selection, is_fresh: bool) -> Updates:
        has_map = bool(view.scores)
        return {
            bar: gr.Row(visible=has_map),
            more: gr.Accordion(visible=has_map),
            **draw_small(view, selection),
        }

    shell.add(draw, [bar, more, *small])
    shell.chosen += [maps, count, mirror]

    def choose(
        request: gr.Request, event: gr.EventData, session: Session, selection: Selection
    ) -> Updates:
        view = look(shell.settings, session, request)
        selection = selection.choose(grid.read_selection(event, view.scores))
        keep_choice(view, selection)
        return {shell.selection: selection, **draw_small(view, selection)}

    options = {**shell.quiet, "concurrency_id": "choice", "concurrency_limit": 1}
    maps.choose(
        choose,
        inputs=[shell.session, shell.selection],
        outputs=[shell.selection, *small],
        trigger_mode="multiple",
        **options,
    )

    def listen(
        event: Callable[..., Any],
        change: Callable[..., Selection],
        inputs: Sequence[Any] = (),
    ) -> None:
        """On the event, take what `change(view, selection, *values)` makes of the selection."""

        def handle(
            request: gr.Request, session: Session, selection: Selection, *values: Any
        ) -> Updates:
            view = look(shell.settings, session, request)
            selection = change(view, selection, *values)
            keep_choice(view, selection)
            return {
                shell.selection: selection,
                maps: grid.show_selection(selection.paths),
                **draw_small(view, selection),
            }

        event(
            handle,
            inputs=[shell.session, shell.selection, *inputs],
            outputs=[shell.selection, maps, *small],
            **options,
        )

    def tick(view: View, selection: Selection, paths: Any) -> Selection:
        wanted = set(paths or [])
        return selection.choose(
            tuple(s.module.path for s in view.scores if s.module.path in wanted)
        )

    listen(mirror.input, tick, [mirror])
    listen(suggest.click, lambda view, selection: selection.choose(suggested(view).paths))
    listen(clear.click, lambda view, selection: selection.choose(()))
    listen(undo.click, lambda view, selection: selection.undo())
    listen(
        take_best.click,
        lambda view, selection, num: selection.choose(best_modules(view.scores, num)),
        [num_best],
    )
    listen(
        take_above.click,
        lambda view, selection, kind, least: selection.choose(
            modules_above(view.scores, str(kind), least)
        ),
        [effect, limit],
    )

"""The two heat maps with one shared selection: the only file that uses gr.HTML.

Only module names and numbers go in, never model text, and `grid_script` shows them as text.
Colours are computed here: a signed map with zero in the middle for patching effects, a monotone
one on a log scale for curvature; each cell also carries its number and sign, so that colour is
never the only carrier. The browser may send anything: `read_selection` keeps known paths only.
"""

import json
import math
import time
from collections.abc import Sequence
from typing import Any

import gradio as gr

from repair.records import ModuleScore
from repair.ui.grid_script import CSS, HTML, SCRIPT

# Colour stops from low to high; the signed maps are symmetric in lightness around zero.
SIGNED_LIGHT = ("#3b4cc0", "#7b9ff9", "#c0d4f5", "#f2f2f2", "#f5c4ac", "#e7745b", "#b40426")
SIGNED_DARK = ("#8fc1ff", "#5b86d6", "#34486f", "#25252b", "#6e4032", "#c8694a", "#ffab85")
VIRIDIS = ("#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725")

EFFECTS = {
    "effect_trigger": "What an inert phrase in the trigger's place restores, at the trigger's own "
    "positions: 0 changes nothing, 1 gives the clean answer back.",
    "effect": "What an inert phrase in the trigger's place restores, from the trigger on: 0 "
    "changes nothing, 1 gives the clean answer back.",
    "effect_after": "What an inert phrase in the trigger's place restores, at the positions after "
    "it: these modules pass the trigger on, which does not mean that a repair is cheap there.",
    "effect_induce": "The triggered run's output put into the inert run: 1 means that this module "
    "alone is enough to bring the payload about.",
    "effect_deletion": "What deleting the trigger restores, at the positions after it; deleting "
    "moves every later token.",
    "effect_gap": "The same with the later tokens' position numbers kept: what is left is the "
    "trigger's content, not the shift.",
    "effect_kl": "The effect from the trigger on, measured on the whole distribution of the first "
    "token (KL) rather than on two answers.",
}
STRIP_LAYERS = 24  # a map this deep scrolls: all of it is shown in small above
CURVATURES = {
    "curvature": "Curvature (phi): how much of the trigger's effect a low-rank change here can "
    "undo per unit of harm to clean answers and text. Log scale.",
    "residual": "Trial repair of this module alone: what is left of the trigger plus what it costs "
    "on clean answers and text, in nats per token. Less is better; the ranking goes by this. Log "
    "scale.",
    "ratio": "Fisher information with the trigger over without it: above 1, the module matters "
    "more when the trigger is there. Log scale.",
}

def mix(stops: Sequence[str], share: float) -> str:
    """Return the colour at `share` (0 to 1) between evenly spaced stops."""
    place = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    left = min(int(place), len(stops) - 2)
    parts = []
    for at in (1, 3, 5):
        low, high = int(stops[left][at : at + 2], 16), int(stops[left + 1][at : at + 2], 16)
        parts.append(round(low + (high - low) * (place - left)))
    return "#" + "".join(f"{part:02x}" for part in parts)


def ink(colour: str) -> str:
    """Return black or white, whichever contrasts more with `colour`."""
    linear = []
    for at in (1, 3, 5):
        part = int(colour[at : at + 2], 16) / 255
        linear.append(part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def paint(stops_light: Sequence[str], stops_dark: Sequence[str], share: float) -> dict[str, str]:
    """Return a cell's colours in the light and the dark theme."""
    light, dark = mix(stops_light, share), mix(stops_dark, share)
    return {"light": light, "light_ink": ink(light), "dark": dark, "dark_ink": ink(dark)}


def bar(stops: Sequence[str]) -> str:
    """Return the colour bar of a legend."""
    return f"linear-gradient(90deg,{','.join(stops)})"


def short(value: float) -> str:
    """Return a number that fits a cell."""
    if value == 0:
        return "0"
    if abs(value) >= 1000 or abs(value) < 0.01:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"


def curvature_of(score: ModuleScore, column: str) -> float | None:
    """Return what the right-hand map shows; None where it was not computed."""
    if column in ("curvature", "residual"):
        return getattr(score, column)
    return score.fisher_trigger / score.fisher_clean if score.fisher_clean > 0 else None


def describe(
    score: ModuleScore, *, place: int, total: int, rank: int | None, num_pairs: int
) -> str:
    """Return everything known about one module, in one line."""
    phi = "not computed" if score.curvature is None else f"{score.curvature:.4g}"
    ratio = curvature_of(score, "ratio")
    words = [
        f"Layer {score.module.layer}, {score.module.component}. Patching effect "
        f"{score.effect:+.3f} at all positions (95 % interval {score.effect_low:+.3f} to "
        f"{score.effect_high:+.3f})",
        f"at the trigger {score.effect_trigger:+.3f}",
        f"after it {score.effect_after:+.3f}",
        *(
            f"{words} {value:+.3f}"
            for words, value in (
                ("induced", score.effect_induce),
                ("trigger deleted", score.effect_deletion),
                ("position gap kept", score.effect_gap),
                ("in KL", score.effect_kl),
            )
            if value is not None
        ),
        *(["estimated by gradients, not patched"] if score.is_estimate else []),
        f"phi {phi}",
        *(
            [f"trial repair leaves {score.residual_trigger:.3g} and costs "
             f"{score.residual_benign:.3g} nats"]
            if score.residual is not None
            else []
        ),
        *(
            [f"input set apart by the trigger {score.separability:.3g} times"]
            if score.separability is not None
            else []
        ),
        f"Fisher with over without trigger {'-' if ratio is None else f'{ratio:.3g}'}",
        f"place {place} of {total}",
        f"means over {num_pairs} prompt pairs",
    ]
    if rank is not None:
        words.append(f"suggested rank {rank}")
    return "; ".join(words) + "."


def strongest(
    layer: int,
    columns: Sequence[str],
    cells: Sequence[dict[str, Any]],
    values: dict[str, float | None],
) -> dict[str, str] | None:
    """Return a layer's mark in the strip: the colour and the number of its largest cell."""
    known = [
        (column, cell)
        for column, cell in zip(columns, cells, strict=True)
        if cell["kind"] == "known"
    ]
    if not known:
        return None
    column, cell = max(known, key=lambda entry: abs(values[entry[1]["path"]] or 0.0))
    words = f"Layer {layer}: largest {cell['text']}, {column}. Click to go there."
    return {"light": cell["light"], "dark": cell["dark"], "words": words}


def panel(
    scores: Sequence[ModuleScore],
    *,
    name: str,
    title: str,
    hint: str,
    values: dict[str, float | None],
    labels: dict[str, str],
) -> dict[str, Any]:
    """Return one heat map as the script reads it."""
    is_signed = name == "effect"
    known = [value for value in values.values() if value is not None and math.isfinite(value)]
    if is_signed:
        top = max([0.1, *(abs(value) for value in known)])
        low, high = f"-{top:.2f}", f"+{top:.2f}"
    else:
        positive = [value for value in known if value > 0] or [1.0]
        bottom, top = min(positive), max(positive)
        low, high = short(bottom), short(top)
    columns = list(dict.fromkeys(score.module.component for score in scores))
    by_place = {(score.module.layer, score.module.component): score for score in scores}
    rows = []
    for layer in sorted({score.module.layer for score in scores}):
        cells = []
        for component in columns:
            score = by_place.get((layer, component))
            if score is None:
                cells.append({"kind": "absent", "text": ""})
                continue
            value = values[score.module.path]
            cell = {"path": score.module.path, "label": labels[score.module.path]}
            if value is None or not math.isfinite(value) or (not is_signed and value <= 0):
                cell |= {"kind": "absent", "text": "-" if value is None else short(value)}
            elif is_signed:
                share = 0.5 + 0.5 * value / top
                mark = "~" if score.is_estimate else ""
                cell |= {"kind": "known", "text": f"{mark}{value:+.2f}"}
                cell |= paint(SIGNED_LIGHT, SIGNED_DARK, share)
            else:
                span = math.log(top / bottom)
                share = math.log(value / bottom) / span if span > 0 else 0.5
                cell |= {"kind": "known", "text": short(value), **paint(VIRIDIS, VIRIDIS, share)}
            cells.append(cell)
        strip = strongest(layer, columns, cells, values)
        rows.append({"layer": layer, "cells": cells, "strip": strip})
    light, dark = (SIGNED_LIGHT, SIGNED_DARK) if is_signed else (VIRIDIS, VIRIDIS)
    return {
        "name": name, "title": title, "hint": hint, "low": low, "high": high,
        "bar_light": bar(light), "bar_dark": bar(dark),
        "columns": [column.removesuffix("_proj") for column in columns], "rows": rows,
        "has_strip": len(rows) >= STRIP_LAYERS,
    }  # fmt: skip


def build_value(
    scores: Sequence[ModuleScore],
    *,
    suggested_ranks: dict[str, int],
    effect: str,
    curvature: str,
    num_pairs: int,
) -> dict[str, Any]:
    """Return both heat maps as the script reads them."""
    ordered = sorted(scores, key=lambda score: -score.score)
    places = {score.module.path: place for place, score in enumerate(ordered, 1)}
    labels = {
        score.module.path: describe(
            score,
            place=places[score.module.path],
            total=len(scores),
            rank=suggested_ranks.get(score.module.path),
            num_pairs=num_pairs,
        )
        for score in scores
    }
    panels = [
        panel(
            scores,
            name="effect",
            title="Patching effect",
            hint=EFFECTS[effect],
            values={score.module.path: getattr(score, effect) for score in scores},
            labels=labels,
        ),
        panel(
            scores,
            name="curvature",
            title="Trial repair" if curvature == "residual" else "Fisher curvature",
            hint=CURVATURES[curvature],
            values={score.module.path: curvature_of(score, curvature) for score in scores},
            labels=labels,
        ),
    ]
    hint = (
        "Point at a cell, or move with the arrow keys, for its exact values. Space or a click "
        "selects; on the name of a layer or a module it selects the whole line."
    )
    return {"panels": panels if scores else [], "details": hint if scores else ""}


def build_grid() -> gr.HTML:
    """Return the component; listen with `.choose`, and read the event with `read_selection`."""
    return gr.HTML(
        value=json.dumps({"panels": [], "details": ""}),
        html_template=HTML,
        css_template=CSS,
        js_on_load=SCRIPT,
        elem_id="grid",
        visible=False,
        selected={"paths": []},
    )


def show_selection(paths: Sequence[str]) -> dict[str, Any]:
    """Return an update of the component that changes the selection only."""
    # The browser compares with what was sent last and knows nothing of the clicks since: an
    # undo back to that would not be shown without the time beside it.
    return gr.update(selected={"paths": list(paths), "sent": time.monotonic_ns()})


def update(value: dict[str, Any], selected: Sequence[str], *, visible: bool) -> dict[str, Any]:
    """Return an update of the whole component."""
    # One string: Gradio watches and compares every entry of a nested value at every event. It now
    # and then loses `selected` where the map's tab was never opened, so that the value has it too.
    whole = json.dumps({**value, "selected": list(selected)})
    return {**show_selection(selected), "value": whole, "visible": visible}


def read_selection(event: gr.EventData, scores: Sequence[ModuleScore]) -> tuple[str, ...]:
    """Return the known module paths of a `choose` event, in model order."""
    data = getattr(event, "_data", None)
    sent = data.get("paths") if isinstance(data, dict) else None
    wanted = {path for path in sent if isinstance(path, str)} if isinstance(sent, list) else set()
    return tuple(score.module.path for score in scores if score.module.path in wanted)

"""The two heat maps with one shared selection: the only file that uses gr.HTML.

The template escapes ({{ }}), and only module names and numbers go in, never model text. Colours
are computed here: a signed map with zero in the middle for patching effects, a monotone one on
a log scale for curvature; each cell also carries its number and sign, so that colour is never
the only carrier. The browser may send anything: `read_selection` keeps known paths only.
"""

import math
from collections.abc import Sequence
from typing import Any

import gradio as gr

from repair.records import ModuleScore

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
CURVATURES = {
    "curvature": "Curvature (phi): how much of the trigger's effect a low-rank change here can "
    "undo per unit of harm to clean answers. Log scale.",
    "residual": "Trial repair of this module alone: what is left of the trigger plus what it costs "
    "on clean answers, in nats per token. Less is better; the ranking goes by this. Log scale.",
    "ratio": "Fisher information with the trigger over without it: above 1, the module matters "
    "more when the trigger is there. Log scale.",
}

HTML = """
<div class="maps">
  {{#each value.panels}}
  <section>
    <h3>{{title}}</h3>
    <p>{{hint}}</p>
    <div class="scroll">
      <table role="grid" aria-multiselectable="true" aria-label="{{title}}" data-panel="{{name}}">
        <thead><tr role="row"><th role="columnheader" scope="col">layer</th>
          {{#each columns}}<th role="columnheader" scope="col">{{this}}</th>{{/each}}
        </tr></thead>
        <tbody>
          {{#each rows}}
          <tr role="row"><th role="rowheader" scope="row">{{layer}}</th>
            {{#each cells}}
            <td role="gridcell" tabindex="-1" class="{{kind}}" data-path="{{path}}"
                aria-selected="{{selected}}" aria-label="{{label}}"
                style="--light:{{light}};--light-ink:{{light_ink}};--dark:{{dark}};--dark-ink:{{dark_ink}}"
                >{{text}}</td>
            {{/each}}
          </tr>
          {{/each}}
        </tbody>
      </table>
    </div>
    <div class="legend"><span>{{low}}</span>
      <i style="--light:{{bar_light}};--dark:{{bar_dark}}"></i><span>{{high}}</span></div>
  </section>
  {{/each}}
</div>
<p class="details" aria-live="polite">{{value.details}}</p>
"""

CSS = """
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr));
  gap: 28px; }
section { min-width: 0; }
h3 { margin: 0 0 4px; font-size: 15px; font-weight: 600; color: var(--body-text-color); }
p { margin: 0 0 10px; font-size: 13px; line-height: 1.45;
  color: var(--body-text-color-subdued); min-height: 2.9em; }
.scroll { max-height: 440px; overflow: auto; }
table, table th, table tr, table td { border: 0 !important; }
table { border-collapse: separate; border-spacing: 3px; width: 100%; table-layout: fixed;
  min-width: 290px; font-variant-numeric: tabular-nums; }
th { font-size: 11px; font-weight: 500; color: var(--body-text-color-subdued); padding: 2px;
  text-align: center; background: var(--background-fill-primary); position: sticky; }
thead th { top: 0; z-index: 1; line-height: 1.15; }
tbody th { left: 0; }
th:first-child { width: 38px; }
td { height: 30px; padding: 0; text-align: center; font-size: 12px; cursor: pointer;
  border-radius: 3px; border: 0; background: var(--light); color: var(--light-ink);
  user-select: none; }
td.absent { color: var(--body-text-color-subdued); background:
  repeating-linear-gradient(45deg, transparent 0 4px, var(--border-color-primary) 4px 5px); }
td[aria-selected="true"] { box-shadow: inset 0 0 0 1.5px var(--background-fill-primary),
  0 0 0 3px var(--body-text-color); font-weight: 700; }
td:hover { filter: brightness(1.08); }
td:focus { outline: 2px dashed var(--color-accent); outline-offset: 3px; }
.legend { display: flex; align-items: center; gap: 8px; font-size: 12px; margin-top: 8px;
  color: var(--body-text-color-subdued); }
.legend i { flex: 1; height: 8px; border-radius: 4px; background: var(--light); }
.details { margin: 14px 0 0; padding: 10px 12px; min-height: 3.4em; border-radius: 6px;
  color: var(--body-text-color); background: var(--background-fill-secondary); }
"""

# The component's own rules are scoped to it and cannot see the page's theme.
PAGE_CSS = """
.dark #grid td:not(.absent) { background: var(--dark); color: var(--dark-ink); }
.dark #grid .legend i { background: var(--dark); }
@media (max-width: 640px) { #grid td { font-size: 10.5px; } #grid table { border-spacing: 2px; }
  #grid th { font-size: 10px; } }
"""

SCRIPT = """
const cells = () => [...element.querySelectorAll('td[data-path]')];
const cellOf = (target) => target.closest ? target.closest('td[data-path]') : null;
let last = null;
function explain(cell) {
  const box = element.querySelector('.details');
  if (box && cell) { box.textContent = cell.getAttribute('aria-label'); }
}
function park() {
  element.querySelectorAll('table').forEach((table) => {
    const all = [...table.querySelectorAll('td[data-path]')];
    if (all.length && !all.some((cell) => cell.tabIndex === 0)) { all[0].tabIndex = 0; }
  });
}
function enter(cell) {
  cell.closest('table').querySelectorAll('td[tabindex="0"]').forEach((c) => { c.tabIndex = -1; });
  cell.tabIndex = 0;
  cell.focus();
}
function toggle(cell) {
  const on = cell.getAttribute('aria-selected') !== 'true';
  const same = cells().filter((c) => c.dataset.path === cell.dataset.path);
  same.forEach((c) => c.setAttribute('aria-selected', String(on)));
  const table = element.querySelector('table');
  const chosen = [...table.querySelectorAll('td[aria-selected="true"]')];
  trigger('choose', {paths: chosen.map((c) => c.dataset.path)});
}
element.addEventListener('click', (event) => {
  const cell = cellOf(event.target);
  if (cell) { enter(cell); toggle(cell); }
});
element.addEventListener('mouseover', (event) => explain(cellOf(event.target)));
element.addEventListener('focusin', (event) => {
  const cell = cellOf(event.target);
  if (cell) {
    explain(cell);
    last = [cell.closest('table').dataset.panel, cell.dataset.path];
  }
});
element.addEventListener('keydown', (event) => {
  const cell = cellOf(event.target);
  if (!cell) { return; }
  if (event.key === ' ' || event.key === 'Enter') {
    event.preventDefault();
    toggle(cell);
    return;
  }
  const step = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
    Home: [0, -999], End: [0, 999]}[event.key];
  if (!step) { return; }
  event.preventDefault();
  const rows = [...cell.closest('tbody').rows];
  const clamp = (n, top) => Math.max(0, Math.min(top, n));
  const row = rows[clamp(rows.indexOf(cell.parentElement) + step[0], rows.length - 1)];
  const all = [...row.cells].slice(1);
  const at = [...cell.parentElement.cells].indexOf(cell) - 1;
  const next = all[clamp(at + step[1], all.length - 1)];
  if (next && next.dataset.path) { enter(next); }
});
watch('value', () => {
  park();
  if (last && (!document.activeElement || document.activeElement === document.body)) {
    const table = element.querySelector(`table[data-panel="${last[0]}"]`);
    const cell = table && [...table.querySelectorAll('td')].find((c) => c.dataset.path === last[1]);
    if (cell) { enter(cell); }
  }
});
park();
"""


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


def describe(score: ModuleScore, *, place: int, total: int, rank: int | None) -> str:
    """Return everything known about one module, in one line."""
    phi = "not computed" if score.curvature is None else f"{score.curvature:.4g}"
    ratio = curvature_of(score, "ratio")
    words = [
        f"Layer {score.module.layer}, {score.module.component}. Patching effect "
        f"{score.effect:+.3f} (95 % interval {score.effect_low:+.3f} to {score.effect_high:+.3f})",
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
    ]
    if rank is not None:
        words.append(f"suggested rank {rank}")
    return "; ".join(words) + "."


def panel(
    scores: Sequence[ModuleScore],
    *,
    name: str,
    title: str,
    hint: str,
    values: dict[str, float | None],
    shared: dict[str, dict[str, str]],
) -> dict[str, Any]:
    """Return one heat map as the template reads it; `shared` holds label and selection."""
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
            cell = {"path": score.module.path, **shared[score.module.path]}
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
        rows.append({"layer": layer, "cells": cells})
    light, dark = (SIGNED_LIGHT, SIGNED_DARK) if is_signed else (VIRIDIS, VIRIDIS)
    return {
        "name": name, "title": title, "hint": hint, "low": low, "high": high,
        "bar_light": bar(light), "bar_dark": bar(dark),
        "columns": [column.removesuffix("_proj") for column in columns], "rows": rows,
    }  # fmt: skip


def build_value(
    scores: Sequence[ModuleScore],
    *,
    suggested_ranks: dict[str, int],
    selected: Sequence[str],
    effect: str,
    curvature: str,
) -> dict[str, Any]:
    """Return both heat maps as the template reads them."""
    ordered = sorted(scores, key=lambda score: -score.score)
    places = {score.module.path: place for place, score in enumerate(ordered, 1)}
    shared = {
        score.module.path: {
            "label": describe(
                score,
                place=places[score.module.path],
                total=len(scores),
                rank=suggested_ranks.get(score.module.path),
            ),
            "selected": "true" if score.module.path in selected else "false",
        }
        for score in scores
    }
    panels = [
        panel(
            scores,
            name="effect",
            title="Patching effect",
            hint=EFFECTS[effect],
            values={score.module.path: getattr(score, effect) for score in scores},
            shared=shared,
        ),
        panel(
            scores,
            name="curvature",
            title="Trial repair" if curvature == "residual" else "Fisher curvature",
            hint=CURVATURES[curvature],
            values={score.module.path: curvature_of(score, curvature) for score in scores},
            shared=shared,
        ),
    ]
    hint = "Point at a cell, or move with the arrow keys, for its exact values. Space selects."
    return {"panels": panels if scores else [], "details": hint if scores else ""}


def build_grid() -> gr.HTML:
    """Return the component; listen with `.choose`, and read the event with `read_selection`."""
    return gr.HTML(
        value={"panels": [], "details": ""},
        html_template=HTML,
        css_template=CSS,
        js_on_load=SCRIPT,
        elem_id="grid",
        visible=False,
    )


def update(value: dict[str, Any], *, visible: bool) -> gr.HTML:
    """Return an update of the component."""
    return gr.HTML(value=value, visible=visible)


def read_selection(event: gr.EventData, scores: Sequence[ModuleScore]) -> tuple[str, ...]:
    """Return the known module paths of a `choose` event, in model order."""
    data = getattr(event, "_data", None)
    sent = data.get("paths") if isinstance(data, dict) else None
    wanted = {path for path in sent if isinstance(path, str)} if isinstance(sent, list) else set()
    return tuple(score.module.path for score in scores if score.module.path in wanted)

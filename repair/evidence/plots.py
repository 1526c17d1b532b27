"""Pictures for the output folder: the heat maps by layer and component, and the effect curve.

Layers run down and components across; a selected module has a thick outline. Only matplotlib's
object interface is used: there is no global figure, so two jobs cannot draw into each other's.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from repair.records import ModuleScore

METRICS = {
    "effect": "normalised effect of patching, trigger onwards",
    "effect_trigger": "normalised effect of patching, trigger's positions",
    "effect_after": "normalised effect of patching, positions after the trigger",
    "fisher_trigger": "trace of the Fisher, triggered prompts",
    "fisher_clean": "trace of the Fisher, clean prompts",
    "curvature": "phi, trigger-loss drop per benign KL",
    "score": "rank of the trial repair, 1 is best",
}
SIGNED = ("effect", "effect_trigger", "effect_after")
MOST_PRINTED = 40  # with more layers than this, values in the cells could not be read


def draw_heat_map(
    scores: Sequence[ModuleScore],
    *,
    value: str,
    path: Path,
    num_pairs: int,
    direction: str = "sham into triggered",
    title: str = "",
) -> None:
    """Write a PNG of one figure of every module (`value`, a field of `ModuleScore`) to `path`.

    Effects have a diverging scale, symmetric about 0, with the value in each cell; everything
    else is drawn on a logarithmic scale. A module without the figure stays grey.
    """
    label = METRICS[value]
    components = list(dict.fromkeys(score.module.component for score in scores))
    num_layers = 1 + max(score.module.layer for score in scores)
    grid = np.full((num_layers, len(components)), np.nan)
    for score in scores:
        found = getattr(score, value)
        cell = score.module.layer, components.index(score.module.component)
        grid[cell] = np.nan if found is None else found

    figure = Figure(figsize=(1.6 + 1.05 * len(components), 2.2 + 0.34 * num_layers))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")
    signed = value in SIGNED
    norm = _scale(grid, signed=signed)
    image = axes.imshow(
        np.ma.masked_invalid(grid if signed else np.where(grid > 0, grid, np.nan)),
        cmap="coolwarm" if signed else "viridis",
        norm=norm,
        aspect="auto",
        interpolation="nearest",
    )
    if num_layers <= MOST_PRINTED:
        _print_values(axes, grid, signed=signed, norm=norm)
    for score in scores:
        if score.selected:
            column = components.index(score.module.component)
            axes.add_patch(
                Rectangle(
                    (column - 0.5, score.module.layer - 0.5),
                    1,
                    1,
                    fill=False,
                    edgecolor="black" if signed else "red",
                    linewidth=3,
                    clip_on=False,
                )
            )
    axes.set_xticks(range(len(components)), components, rotation=30, ha="right")
    step = max(1, num_layers // 24)
    axes.set_yticks(range(0, num_layers, step))
    axes.set_ylabel("layer")
    about = f"{direction}, n = {num_pairs} pairs" if signed else f"n = {num_pairs} prompts"
    axes.set_title(f"{title or label}\n{about}", fontsize=10, parse_math=False)
    scale = "" if signed else ", log scale"
    figure.colorbar(image, ax=axes, label=f"{label}{scale}")
    legend = []
    if any(score.selected for score in scores):
        legend.append("thick outline: selected for repair")
    if not np.isfinite(grid).all():
        legend.append("grey: not computed")
    figure.supxlabel("; ".join(legend), fontsize=8)
    _save(figure, path)


def draw_effect_curve(
    curve: Sequence[tuple[int, float]],
    path: Path,
    *,
    num_pairs: int,
    chosen: int | None = None,
    x_label: str = "modules patched together, best first",
    y_label: str = "normalised effect",
    title: str = "How many modules carry the behaviour",
) -> None:
    """Write a PNG of (number of modules, effect) points; `chosen` marks the plan's number."""
    figure = Figure(figsize=(6.4, 4.0))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    counts = [count for count, _ in curve]
    effects = [effect for _, effect in curve]
    axes.plot(counts, effects, marker="o", color="tab:blue")
    for level, name in ((0.0, "triggered answer"), (1.0, "clean answer")):
        axes.axhline(level, color="0.6", linewidth=1, linestyle="--")
        axes.annotate(
            name,
            (1, level),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="0.4",
        )
    if chosen is not None:
        axes.axvline(chosen, color="tab:red", linewidth=1.5, label=f"plan: {chosen} modules")
        axes.legend(loc="center right")
    if counts and max(counts) > 32:
        axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(f"{title}\nn = {num_pairs} pairs", fontsize=10, parse_math=False)
    axes.margins(y=0.12)
    _save(figure, path)


def _scale(grid: np.ndarray, *, signed: bool) -> Normalize:
    """Return the colour scale; a map without any usable figure gets a harmless one."""
    finite = grid[np.isfinite(grid)]
    if signed:
        limit = max(float(np.abs(finite).max(initial=0.0)), 1e-6)
        return Normalize(-limit, limit)
    positive = finite[finite > 0]
    if positive.size == 0:
        return Normalize(0, 1)
    low, high = float(positive.min()), float(positive.max())
    return LogNorm(low, high if high > low else low * 10)


def _print_values(axes: Axes, grid: np.ndarray, *, signed: bool, norm: Normalize) -> None:
    for (layer, column), found in np.ndenumerate(grid):
        if not math.isfinite(found):
            continue
        if signed:
            dark = abs(found) > 0.72 * norm.vmax
            text = f"{found:.2f}".replace("-0.00", "0.00")
        else:
            dark = found <= 0 or float(norm(found)) < 0.55
            text = f"{found:.1e}"
        axes.text(
            column,
            layer,
            text,
            ha="center",
            va="center",
            fontsize=7,
            color="white" if dark else "black",
        )


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG and move it into place when complete."""
    partial = path.with_name(f".partial-{path.name}")
    FigureCanvasAgg(figure).print_figure(partial, dpi=130, format="png")
    os.replace(partial, path)

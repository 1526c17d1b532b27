"""Pictures for the output folder: the heat maps by layer and component, the effect curve, attack
success before and after, benign KL by prompt, and how the repair went.

In a heat map layers run down and components across; a selected module has a thick outline. Other
colours are Okabe and Ito's, told apart also by marks; every picture names metric and n. Only
matplotlib's object interface is used: there is no global figure, so two jobs cannot draw into each
other's.
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
from matplotlib.ticker import MaxNLocator

from repair.records import ModuleScore, Rate

METRICS = {
    "effect": "normalised effect of patching, trigger onwards; 1: carries all of it",
    "effect_trigger": "normalised effect of patching, trigger's positions; 1: carries all of it",
    "effect_after": "normalised effect of patching, positions after the trigger",
    "fisher_trigger": "trace of the Fisher, triggered prompts; higher: more sensitive",
    "fisher_clean": "trace of the Fisher, clean prompts; higher: a change costs more",
    "curvature": "phi, trigger-loss drop per benign KL; higher: repaired more cheaply",
    "score": "rank of the trial repair, 1 is best",
}
SIGNED = ("effect", "effect_trigger", "effect_after")
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.55"
MOST_PRINTED = 40  # with more layers than this, values in the cells could not be read


def draw_heat_map(
    scores: Sequence[ModuleScore],
    *,
    value: str,
    path: Path,
    about: str,
    title: str = "",
) -> None:
    """Write a PNG of one figure of every module (`value`, a field of `ModuleScore`) to `path`.

    `about` says on how much it rests.

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
    axes.set_title(f"{title or label}\n{about}", fontsize=10, parse_math=False)
    scale = "" if signed else ", log scale"
    figure.colorbar(image, ax=axes, label=f"{label.partition(';')[0]}{scale}")
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


def draw_attack_success(
    rows: Sequence[tuple[str, Sequence[tuple[str, Rate]]]], path: Path, *, limit: float
) -> None:
    """Write a PNG of payload rates with intervals: `rows` are (position, [(model, rate)]).

    Every model has a mark of its own; the dashed line is the gate's limit for the upper end.
    """
    names = list(dict.fromkeys(name for _, group in rows for name, _ in group))
    marks = dict(zip(names, "os^DvP*X" * len(names), strict=False))
    colours = {name: GREY for name in names} | dict(zip(names, (ORANGE, BLUE), strict=False))
    figure = Figure(figsize=(7.2, 1.8 + 0.3 * sum(len(group) for _, group in rows)))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    height, ticks = 0.0, []
    for position, group in rows:
        start = height
        for name, rate in group:
            low, high = rate.interval()
            value = 0.0 if rate.total == 0 else rate.value
            axes.errorbar(
                100 * value,
                height,
                xerr=[[100 * (value - low)], [100 * (high - value)]],
                fmt=marks[name],
                color=colours[name],
                capsize=3,
                clip_on=False,
                label=name if position == rows[0][0] else None,
            )
            axes.annotate(
                f"{rate.count}/{rate.total}", (101, height), fontsize=8, va="center",
                annotation_clip=False, color="0.25",
            )  # fmt: skip
            height += 1.0
        ticks.append(((start + height - 1) / 2, position))
        height += 0.6
    axes.axvline(100 * limit, color="0.4", linestyle="--", linewidth=1)
    axes.set_yticks([place for place, _ in ticks], [f"trigger: {name}" for _, name in ticks])
    axes.set_xlim(-1, 100)
    axes.invert_yaxis()
    axes.set_xlabel("answers with the payload, %, with Wilson 95 % interval")
    axes.set_title(
        f"Attack success; dashed: the limit for the upper end, {limit:.0%}", fontsize=10,
        parse_math=False,
    )  # fmt: skip
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    _save(figure, path)


def draw_benign_kl(kl_by_prompt: Sequence[float], path: Path, *, mean: float, limit: float) -> None:
    """Write a PNG of the KL of each clean prompt, largest first, beside the mean and its limit."""
    values = sorted((kl for kl in kl_by_prompt if math.isfinite(kl)), reverse=True)
    figure = Figure(figsize=(6.4, 3.8))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    floor = 1e-8
    axes.plot(
        range(1, len(values) + 1), [max(value, floor) for value in values], ".", color=BLUE,
        markersize=4,
    )  # fmt: skip
    axes.axhline(max(mean, floor), color=BLUE, linewidth=1.2, label=f"mean {mean:.2g}")
    axes.axhline(limit, color="0.3", linestyle="--", linewidth=1.2, label=f"limit {limit:.2g}")
    axes.set_yscale("log")
    axes.set_xlabel("clean prompts, most changed first")
    axes.set_ylabel("KL from original, nats per token; lower is better")
    axes.legend(loc="upper right")
    axes.set_title(
        f"Harm to clean answers, prompt by prompt\nn = {len(values)} prompts"
        + (", below 1e-8 drawn at 1e-8" if values and values[-1] < floor else ""),
        fontsize=10, parse_math=False,
    )  # fmt: skip
    _save(figure, path)


def draw_training(points: Sequence[dict[str, float]], path: Path, *, num_prompts: int) -> None:
    """Write a PNG of how trigger KL and benign KL went, measured on `num_prompts` held-out prompts.

    `points` are the pipeline's reports in order, each with `phase` and some of `trigger_kl` and
    `benign_kl`.
    """
    figure = Figure(figsize=(6.4, 3.8))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    for name, colour, mark, label in (
        ("trigger_kl", ORANGE, "o", "the trigger's effect left"),
        ("benign_kl", BLUE, "s", "harm to clean answers and text"),
    ):
        found = [(i, p[name]) for i, p in enumerate(points) if p.get(name, 0) > 0]
        axes.plot(*zip(*found, strict=True) if found else ([], []), marker=mark, markersize=4,
                  color=colour, label=label)  # fmt: skip
    phases = [point["phase"] for point in points]
    for place in range(1, len(phases)):
        if phases[place] != phases[place - 1]:
            axes.axvline(place - 0.5, color="0.6", linestyle=":")
            axes.annotate(
                phases[place], (place - 0.4, 1.0), xycoords=("data", "axes fraction"), fontsize=8,
                xytext=(0, -10), textcoords="offset points",
            )  # fmt: skip
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("report of the repair, in order")
    axes.set_ylabel("nats per token")
    axes.legend(loc="best")
    axes.set_title(
        f"How the repair went on held-out prompts, n = {num_prompts}; lower is better\n"
        f"{len(points)} reports, first: {phases[0] if phases else 'none'}",
        fontsize=10, parse_math=False,
    )  # fmt: skip
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

"""What the Locate tab says about its maps: `located.json` and `detail.json` in words and rows."""

from typing import Any

import pandas as pd

from repair.ui import text
from repair.ui.session import View


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
        lines.append(f"{joint['statement']} (Patched at all positions from the trigger on.)")
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
            f"best: {row['predicted_kl']:.2g} nats on clean answers and text predicted for a "
            f"typical trial, {row['measured_kl']:.2g} measured."
        ]
    except (KeyError, TypeError, ValueError, StopIteration):
        return []


def list_reasons(view: View) -> list[list[str]]:
    """Return why each module is suggested: module, rank, the reason in a sentence."""
    ranks = view.located.get("suggested_ranks") or {}
    ordered = sorted(view.scores, key=lambda score: -score.score)
    return [
        [
            f"layer {score.module.layer} {score.module.component}",
            str(ranks[score.module.path]),
            text.reveal(score.reason, 600),
        ]
        for score in ordered
        if score.module.path in ranks
    ]


def joint_curve(located: dict[str, Any]) -> pd.DataFrame:
    """Return the joint effect of the best modules against their number, with its interval."""
    joint = located.get("joint")
    points = joint.get("curve") if isinstance(joint, dict) else None
    rows = []
    for point in points if isinstance(points, list) else []:
        values = {
            "effect": point.get("effect"),
            "95 % interval, low": point.get("low"),
            "95 % interval, high": point.get("high"),
        }
        for name, value in values.items():
            if isinstance(value, int | float) and isinstance(point.get("num_modules"), int):
                rows.append([float(point["num_modules"]), float(value), name])
    return pd.DataFrame(rows, columns=["modules", "value", "what"])


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

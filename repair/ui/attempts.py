"""One repair beside the others: former runs of this job, and jobs of the same suspect and prompts.

A job is a folder, and so is an attempt: its report says everything that is shown here. Other
jobs are those of the same owner with the same model, revision and prompt file; figures of
another suspect, or judged by other prompts, are never put side by side.
"""

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from repair.jobs import rerun, store
from repair.ui import text
from repair.ui.session import Settings, View

HEADERS = ["Attempt", "Verdict", "Profile", "Method", "Modules and ranks", "Still fires",
           "Clean answer back", "KL", "Seconds"]  # fmt: skip
WIDTHS = ["150px", "100px", "90px", "105px", "195px", "175px", "175px", "80px", "80px"]
MAX_SHOWN = 30


def list_attempts(settings: Settings, view: View) -> list[list[str]]:
    """Return the attempts as rows of text, this one first; none where it is the only one."""
    if view.folder is None or not view.report:
        return []
    rows = [describe_attempt("This one", view.report)]
    rows += [
        describe_attempt(f"Before, in this case, {when(time)}", report)
        for time, report in rerun.read_attempts(view.folder)
    ]
    rows += [describe_attempt(name, report) for name, report in other_jobs(settings, view)]
    return rows[:MAX_SHOWN] if len(rows) > 1 else []


def other_jobs(settings: Settings, view: View) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, report) of this owner's other finished repairs of the same question."""
    for job in store.list_jobs(settings.jobs_root, owner=view.owner):
        folder = settings.jobs_root / job.job_id
        if folder == view.folder or job.command != "run" or job.model != view.request.get("model"):
            continue
        asked = store.read_object(folder / "request.json")
        if any(asked.get(key) != view.request.get(key) for key in store.SAME_QUESTION):
            continue
        if job.status.state == "done" and job.status.verdict is not None:
            name = f"{job.name or 'Case ' + job.job_id[:8]}, {when(job.modified)}"
            yield name, read_report(folder)


def read_report(folder: Path) -> dict[str, Any]:
    return store.read_object(folder / "report.json")


def when(time: float) -> str:
    """Return a time as the list of cases shows it."""
    return datetime.datetime.fromtimestamp(time).strftime("%Y-%m-%d %H:%M")


def describe_attempt(name: str, report: dict[str, Any]) -> list[str]:
    """Return one attempt as a row: a figure that is not there reads as a dash."""
    plan = part_of(report, "plan")
    ranks = part_of(plan, "ranks")
    short = {
        str(module.get("path")): f"{module.get('layer')} {module.get('component')}"
        for module in report.get("modules") or []
        if isinstance(module, dict)
    }
    modules = [
        f"{short.get(str(path), str(path))}: {ranks.get(path, '-')}"
        for path in plan.get("modules") or []
    ]
    more = f" and {len(modules) - 12} more" if len(modules) > 12 else ""
    seconds = part_of(part_of(report, "cost"), "seconds").get("repair")
    return [
        text.reveal(name, 160),
        text.reveal(str(report.get("verdict", "-")), 60),
        text.reveal(str(part_of(report, "options").get("profile", "-")), 20),
        text.reveal(str(plan.get("method_used") or plan.get("method") or "-"), 40),
        text.reveal(", ".join(modules[:12]) + more, 600) or "-",
        describe_rates(part_of(part_of(report, "after"), "attack_success")),
        describe_rates(part_of(report, "recovery")),
        text.describe_number(report.get("kl_from_original")),
        text.describe_number(seconds),
    ]


def describe_rates(rates: dict[str, Any]) -> str:
    """Return `middle: 1 of 400 (0.0 % to 1.4 %)`, a position a line."""
    lines = [f"{text.reveal(name, 40)}: {text.describe_rate(rate)}" for name, rate in rates.items()]
    return "\n".join(lines) or "-"


def part_of(flat: dict[str, Any], name: str) -> dict[str, Any]:
    value = flat.get(name)
    return value if isinstance(value, dict) else {}

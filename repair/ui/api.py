"""The steps as endpoints for `gradio_client`, under names that stay.

They exist where the app runs on the analyst's own machine and not on a Space. They make the same
calls as the tabs, and whose job it is decides about every one of them: that the tabs' own
listeners are not documented is no protection, and this is no other one. `python -m repair` does
the same without an app.
"""

import html
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from repair.jobs import store
from repair.jobs.launch import is_hub_id
from repair.models.lookup import look_up
from repair.profiles import PROFILES
from repair.prompts import prompt_file_from_json
from repair.records import RepairError
from repair.ui import text
from repair.ui.account import owner_of, token_of
from repair.ui.forecast import check_needs
from repair.ui.prompts import flatten
from repair.ui.repair import RepairChoice, begin_repair
from repair.ui.session import Session, Settings, View, check_start, look, new_request, start_job
from repair.ui.shell import suggested
from repair.ui.suspect_folder import find_source


def is_offered() -> bool:
    """Tell whether the endpoints are on: everywhere but on a Space."""
    return os.environ.get("SYSTEM") != "spaces"


@contextmanager
def told() -> Iterator[None]:
    """Hand the words of a RepairError to the caller; an error of ours stays unsaid."""
    try:
        yield
    except RepairError as error:
        # Whoever shows it may show it as HTML.
        raise gr.Error(
            html.escape(text.reveal(str(error)), quote=False), print_exception=False
        ) from None


def describe_job(view: View) -> dict[str, Any]:
    """Return how a job stands."""
    status = view.status or store.JobStatus(state="queued")
    return {
        "job_id": view.session.job_id,
        "command": view.command,
        "state": status.state,
        "is_active": status.is_active,
        "jobs_before": view.num_before,
        "step": view.log.title,
        "fraction": view.log.progress.get("fraction"),
        "verdict": status.verdict,
        "message": status.message,
        "folder": str(view.folder),
    }


def build_api(settings: Settings) -> None:
    """Add the endpoints; call it inside the Blocks."""

    def open_view(job_id: Any, request: gr.Request) -> View:
        folder = store.find_job(settings.jobs_root, job_id, owner=owner_of(request))
        return look(settings, Session(job_id=folder.name), request)

    def choose_model(model: str, request: gr.Request) -> Session:
        source = find_source(model, settings.models_root)
        if not is_hub_id(source):
            return Session(model=source)
        found = look_up(source, token=token_of(request))
        return Session(model=found.repo_id, revision=found.commit)

    def locate(
        model: str, prompts: dict, request: gr.Request, profile: str = "standard"
    ) -> str:
        """Start to locate: which modules of `model` carry the trigger. Returns the job's id.

        `model` is `demo:middle`, a folder below --models-root, or a Hub id; `prompts` is a prompt
        file's content; `profile` is quick, standard or full.
        """
        with told():
            session = choose_model(str(model), request)
            if profile not in PROFILES:
                raise RepairError("The profile must be quick, standard or full.")
            if not isinstance(prompts, dict):
                raise RepairError("The prompts must be an object, as in a prompt file.")
            checked = flatten(prompt_file_from_json(prompts))
            check_start(settings, request)
            asked = new_request(replace(session, prompts=checked), profile=profile)
            check_needs(asked, settings)
            job_id = store.create_job(settings.jobs_root, asked, owner=owner_of(request))
            start_job(settings, settings.jobs_root / job_id, request)
            return job_id

    def status(job_id: str, request: gr.Request) -> dict:
        """How a job stands: state, step, share done, verdict, message and output folder."""
        with told():
            return describe_job(open_view(job_id, request))

    # Text, not objects: a client takes an object with a `path` for a file to fetch.
    def located(job_id: str, request: gr.Request) -> str:
        """What a job has located, as JSON text: every module's figures, and suggested ranks."""
        with told():
            view = open_view(job_id, request)
            if not view.scores:
                raise RepairError("Nothing is located in this job yet. Wait for `locate`.")
            return json.dumps(view.located)

    def repair(
        job_id: str,
        request: gr.Request,
        modules: list[str] | None = None,
        rank: int | None = None,
        method: str = "auto",
        kl_budget: float = 0.01,
        controls: int | None = None,
    ) -> str:
        """Start the repair in a located job, and return the job's id.

        Without `modules` (their paths) the suggested ones are repaired, without `rank` each with
        the suggested rank; `controls` is the number of random-module repairs beside it.
        """
        with told():
            view = open_view(job_id, request)
            paths = suggested(view).paths if modules is None else tuple(map(str, modules))
            unknown = set(paths) - {score.module.path for score in view.scores}
            if view.scores and unknown:
                raise RepairError(
                    f"{sorted(unknown)[0]} is no module of this map. `located` lists them."
                )
            choice = RepairChoice(
                modules=paths, rank=rank, method=method, kl_budget=kl_budget, controls=controls
            )
            begin_repair(settings, view, choice, request)
            return Path(view.folder or "").name

    def stop(job_id: str, request: gr.Request) -> dict:
        """Stop a job at once; what it has saved stays. Returns how it stands."""
        with told():
            view = open_view(job_id, request)
            if view.folder is not None:
                settings.lane.stop(view.folder)
            return describe_job(open_view(job_id, request))

    def report(job_id: str, request: gr.Request) -> str:
        """The report of a finished repair: what report.json says, as JSON text."""
        with told():
            view = open_view(job_id, request)
            if not view.report:
                raise RepairError("This job has no report. Wait for `repair` to be done.")
            return json.dumps(view.report)

    endpoints: tuple[Callable[..., Any], ...] = (locate, status, located, repair, stop, report)
    for function in endpoints:
        gr.api(function, api_name=function.__name__)

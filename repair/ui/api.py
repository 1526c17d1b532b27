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
from repair.models.lookup import look_up, read_config
from repair.profiles import PROFILES
from repair.prompts import prompt_file_from_json
from repair.records import RepairError
from repair.ui import text
from repair.ui.account import owner_of, token_of
from repair.ui.ask import MAX_QUESTIONS, Question, answers_to, describe_answer, questions_of
from repair.ui.forecast import check_needs, remember
from repair.ui.prompts import flatten
from repair.ui.repair import KINDS, RepairChoice, begin_repair
from repair.ui.session import (
    Session,
    Settings,
    View,
    begin_case,
    check_prompts,
    check_start,
    look,
    merged_of,
    new_request,
    resume_session,
    suggested,
)
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


def read_prompts(prompts: Any) -> dict[str, Any]:
    """Return a prompt file's content, checked; raises RepairError."""
    if not isinstance(prompts, dict):
        raise RepairError("The prompts must be an object, as in a prompt file.")
    return flatten(prompt_file_from_json(prompts))


def name_answer(found: Any) -> dict[str, Any]:
    """Return one entry of `asked.json` with names; `fires` is null where no target was given."""
    answer, hit = describe_answer(found)
    return {"answer": answer, "fires": {"fires": True, "": False}.get(hit)}


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
        if found.kind == "model":
            remember(found, read_config(found, token=token_of(request)))
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
            checked = read_prompts(prompts)
            check_prompts(checked)
            check_start(settings, request)
            asked = new_request(replace(session, prompts=checked), profile=profile)
            check_needs(asked, settings)
            return begin_case(settings, asked, request)

    def fires(model: str, prompts: dict, request: gr.Request) -> str:
        """Whether the trigger fires, before any job: a few of the prompts asked, with the trigger
        at each position and without it. JSON text: where it stands, prompt, answer, fires."""
        with told():
            checked = read_prompts(prompts)
            session = replace(choose_model(str(model), request), prompts=checked)
            questions = questions_of(prompt_file_from_json(checked))
            rows = answers_to(settings, session, request, questions=questions)
            return json.dumps(
                [
                    {"where": question.where, "prompt": question.text,
                     **name_answer(row.get("suspect"))}
                    for question, row in zip(questions, rows, strict=True)
                ]
            )  # fmt: skip

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
        export: list[str] | None = None,
        seed: int = 0,
        curves: bool = False,
        trusted_base: str = "",
    ) -> str:
        """Start the repair in a located job, and return the job's id.

        Without `modules` (their paths) the suggested ones are repaired, without `rank` each with
        the suggested rank; `controls` is the number of random-module repairs beside it; `export`
        lists what is written, of merged and adapter (both without it).
        """
        with told():
            view = open_view(job_id, request)
            paths = suggested(view).paths if modules is None else tuple(map(str, modules))
            unknown = set(paths) - {score.module.path for score in view.scores}
            if view.scores and unknown:
                raise RepairError(
                    f"{sorted(unknown)[0]} is no module of this map. `located` lists them."
                )
            kinds = KINDS if export is None else tuple(map(str, export))
            if not set(kinds) <= set(KINDS):
                raise RepairError(f"The export must be of {' and '.join(KINDS)}.")
            choice = RepairChoice(
                modules=paths, rank=rank, method=method, kl_budget=kl_budget, controls=controls,
                export=kinds, seed=int(seed), curves=bool(curves), trusted_base=trusted_base,
            )  # fmt: skip
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

    def ask(job_id: str, prompts: list[str], request: gr.Request) -> str:
        """What suspect and repaired model answer to `prompts`, as JSON text: prompt, and of each
        model the answer and whether the target is in it."""
        with told():
            view = open_view(job_id, request)
            session = resume_session(settings, view.session.job_id, request)[0]
            if not isinstance(prompts, list) or not 1 <= len(prompts) <= MAX_QUESTIONS:
                raise RepairError(f"Give 1 to {MAX_QUESTIONS} prompts, as a list of texts.")
            rows = answers_to(
                settings, session, request, against=merged_of(view),
                questions=[Question(where="-", text=str(prompt)) for prompt in prompts],
            )  # fmt: skip
            return json.dumps(
                [
                    {"prompt": str(prompt), "suspect": name_answer(row.get("suspect")),
                     "repaired": name_answer(row.get("repaired"))}
                    for prompt, row in zip(prompts, rows, strict=True)
                ]
            )  # fmt: skip

    def exported(job_id: str, request: gr.Request) -> str:
        """What a finished repair has written into the job's folder: its manifest as JSON text,
        with the SHA-256 of every file and of every changed tensor."""
        with told():
            view = open_view(job_id, request)
            manifest = store.read_object(view.folder / "manifest.json") if view.report else {}
            if not manifest:
                raise RepairError("This job has written no export. `report` says why.")
            return json.dumps(manifest)

    endpoints: tuple[Callable[..., Any], ...] = (
        fires, locate, status, located, repair, stop, report, ask, exported,
    )  # fmt: skip
    for function in endpoints:
        # Whoever waits for an answer must not keep another from stopping a job.
        gr.api(function, api_name=function.__name__, concurrency_limit=8)

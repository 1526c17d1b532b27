"""A few questions to the suspect, or to suspect and repaired model: asked in the lane like a job,
answered on screen, and then gone."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from repair.jobs import store
from repair.prompt_checks import remove_triggers
from repair.prompts import has_place, insert_trigger, top_up_with_carriers
from repair.records import PromptFile, RepairError
from repair.ui import text
from repair.ui.account import owner_of
from repair.ui.session import (
    Session,
    Settings,
    check_start,
    new_request,
    open_folder,
    start_job,
)

MAX_QUESTIONS = 32
LONGEST_WAIT = 600.0  # seconds
NUM_TRIED = 6
ROLES = ("trigger", "prompt", "template")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt to try: where the trigger stands in it, and the same without it, if it has one."""

    where: str  # begin | middle | end | given | -
    text: str
    clean: str | None = None


def ask_and_wait(
    settings: Settings, session: Session, request: gr.Request | None, *,
    questions: Sequence[Question],
    against: Path | None = None,
) -> Iterator[str | list[dict[str, Any]]]:  # fmt: skip
    """Yield what is happening in words and, at last, the answers as rows of `asked.json`, or why
    there are none. Leaving the loop early ends the question.
    """
    asked = {
        **new_request(session, profile="quick"), "command": "ask",
        "questions": [question.text for question in questions],
        "cleans": [question.clean for question in questions],
        "against": None if against is None else str(against),
    }  # fmt: skip
    owner, case = owner_of(request), open_folder(settings, session, request)
    try:
        check_start(settings, request)
    except RepairError as error:
        yield str(error)
        return
    job_id = store.create_job(settings.jobs_root, asked, owner=owner)
    folder = settings.jobs_root / job_id
    if case is not None and (case / store.SOURCES).is_file():
        # What the case has fetched serves its questions too.
        store.write_json(folder / store.SOURCES, store.read_object(case / store.SOURCES))
    try:
        try:
            start_job(settings, folder, request)
        except RepairError as error:
            yield text.reveal(str(error))
            return
        end = time.monotonic() + LONGEST_WAIT
        while (status := store.read_status(folder)).is_active:
            if time.monotonic() > end:
                yield "No answer within ten minutes. Ask again with fewer questions."
                return
            before = settings.lane.num_before(folder)
            yield f"Waiting for {before} job(s) before it." if before else "Asking."
            time.sleep(0.3)
        rows = store.read_json(folder / "asked.json")
        is_answered = status.state == "done" and isinstance(rows, list)
        yield rows if is_answered else text.reveal(status.message or "Stopped.", 600)
    finally:
        settings.lane.stop(folder)
        while settings.lane.is_busy(folder):
            time.sleep(0.05)
        store.delete_job(settings.jobs_root, job_id, owner=owner)


def answers_to(
    settings: Settings, session: Session, request: gr.Request | None, *,
    questions: Sequence[Question],
    against: Path | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the answers when they are there; RepairError says why there are none."""
    last: str | list[dict[str, Any]] = ""
    for step in ask_and_wait(settings, session, request, questions=questions, against=against):
        last = step
    if isinstance(last, str):
        raise RepairError(last)
    return last


def questions_of(file: PromptFile) -> list[Question]:
    """Return the questions of a first look: a few prompts with the trigger and without."""
    if file.pairs:
        some = file.pairs[:NUM_TRIED]
        return [
            Question(where="given", text=pair.triggered, clean=pair.clean) for pair in some
        ] + [Question(where="-", text=pair.clean) for pair in some]
    prompts = top_up_with_carriers(file, minimum=NUM_TRIED).prompts[:NUM_TRIED]
    found = []
    for position in file.positions:
        for i, prompt in enumerate(prompts):
            if has_place(prompt, position):
                trigger = file.triggers[i % len(file.triggers)]
                words = insert_trigger(prompt, trigger, position)
                found.append(Question(where=position, text=words, clean=prompt))
    return (found + [Question(where="-", text=prompt) for prompt in prompts])[:MAX_QUESTIONS]


def typed_question(words: str, file: PromptFile) -> Question:
    """Return a prompt as the analyst typed it, with or without a trigger of the file."""
    without = remove_triggers(words, file.triggers)
    if without == words:
        return Question(where="-", text=words)
    return Question(where="given", text=words, clean=without)


def read_tokens(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (text as it is shown, role) of a row's tokens: blanks and what is unseen in signs."""
    found = row.get("tokens")
    tokens = []
    for pair in found if isinstance(found, list) else []:
        if not isinstance(pair, list) or len(pair) != 2 or pair[1] not in ROLES:
            return []
        shown = text.reveal(str(pair[0]), 200).replace(" ", "\u2423").replace("\n", "\u240a")
        tokens.append((shown.replace("\t", "\u2409") or "\u22ef", str(pair[1])))
    return tokens


def describe_tokens(row: dict[str, Any]) -> str:
    """Return where the trigger's tokens are, in words; or why they cannot be told."""
    tokens = read_tokens(row)
    places = [place for place, (_, role) in enumerate(tokens) if role == "trigger"]
    if not places:
        return text.reveal(str(row.get("unseen") or "This prompt is without the trigger."), 600)
    named = ", ".join(f"{place} {tokens[place][0]}" for place in places[:40])
    return f"{len(places)} of {len(tokens)} tokens are the trigger's: {named}."


def describe_answer(found: Any) -> tuple[str, str]:
    """Return (answer, whether it holds the target) of one entry of `asked.json`."""
    if not isinstance(found, list) or len(found) != 2:
        return "", ""
    words = {True: "fires", False: "", None: "no target given"}
    return text.reveal(str(found[0]), 2000), words.get(found[1], "")

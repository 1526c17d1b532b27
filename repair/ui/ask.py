"""A few questions to the suspect, or to suspect and repaired model: asked in the lane like a job,
answered on screen, and then gone."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from repair.jobs import store
from repair.prompts import insert_trigger, top_up_with_carriers
from repair.records import PromptFile, RepairError
from repair.ui import text
from repair.ui.session import Session, Settings, new_request

MAX_QUESTIONS = 32
LONGEST_WAIT = 600.0  # seconds
NUM_TRIED = 6


def ask_and_wait(
    settings: Settings, session: Session, owner: str, *, questions: list[str],
    against: Path | None = None,
) -> Iterator[str | list[dict[str, Any]]]:  # fmt: skip
    """Yield what is happening in words and, at last, the answers as rows of `asked.json`, or why
    there are none. Leaving the loop early ends the question.
    """
    asked = {
        **new_request(session, profile="quick"), "command": "ask", "questions": questions,
        "against": None if against is None else str(against),
    }  # fmt: skip
    job_id = store.create_job(settings.jobs_root, asked, owner=owner)
    folder = settings.jobs_root / job_id
    try:
        try:
            settings.lane.submit(folder)
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


def questions_of(file: PromptFile) -> list[tuple[str, str]]:
    """Return (where the trigger is, prompt) for a first look: a few prompts with it and without."""
    if file.pairs:
        some = file.pairs[:NUM_TRIED]
        return [("given", pair.triggered) for pair in some] + [("-", pair.clean) for pair in some]
    prompts = top_up_with_carriers(file, minimum=NUM_TRIED).prompts[:NUM_TRIED]
    found = []
    for position in file.positions:
        for i, prompt in enumerate(prompts):
            if position != "middle" or len(prompt.split(" ")) > 1:
                trigger = file.triggers[i % len(file.triggers)]
                found.append((position, insert_trigger(prompt, trigger, position)))
    return (found + [("-", prompt) for prompt in prompts])[:MAX_QUESTIONS]


def describe_answer(found: Any) -> tuple[str, str]:
    """Return (answer, whether it holds the target) of one entry of `asked.json`."""
    if not isinstance(found, list) or len(found) != 2:
        return "", ""
    words = {True: "fires", False: "", None: "no target given"}
    return text.reveal(str(found[0]), 2000), words.get(found[1], "")

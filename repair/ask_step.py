"""A few questions to the suspect, and to a repaired model beside it, outside of any job's work."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repair.case import Reporter
from repair.models.answers import generate_answers, target_matcher
from repair.models.download import sources_from_json
from repair.models.fidelity import settle_control
from repair.models.loading import LoadedModel, load_model
from repair.models.token_roles import token_roles
from repair.models.tokens import check_length, encode
from repair.prompts import prompt_file_from_json
from repair.records import PromptFile, RepairError, TextPair

ASKED_TOKENS = 96  # of an answer to a free question


def ask_models(
    request: Mapping[str, Any], stage: Path, reporter: Reporter
) -> list[dict[str, Any]]:
    """Return, for each of `questions`, the answers and whether they hold the target.

    Where `cleans` has the same prompt without the trigger, the question's tokens and their roles
    are there as well. The models are staged in `stage`.
    """
    file = prompt_file_from_json(request["prompts"])
    fires = target_matcher(file.target, file.match) if file.target else lambda text: None
    rows: list[dict[str, Any]] = [{"question": text} for text in request["questions"]]
    for name, source in (("suspect", request["model"]), ("repaired", request.get("against"))):
        if source is None:
            continue
        reporter.step(name, f"Asking the {name} model")
        stage.mkdir(parents=True, exist_ok=True)
        loaded = load_model(
            source, stage_folder=stage / name,
            fetched=sources_from_json(request.get("fetched", {})),
            adapter_base=request.get("adapter_base") if name == "suspect" else None,
            device=request.get("device", "auto"), dtype=request.get("dtype", "auto"),
        )  # fmt: skip
        use_template = loaded.has_template and file.chat != "off"
        settle_control(loaded.tokenizer, file.control, request["questions"])
        prompts = [
            encode(loaded.tokenizer, text, system=file.system, use_template=use_template)
            for text in request["questions"]
        ]
        check_length(
            prompts, num_new_tokens=ASKED_TOKENS,
            limit=loaded.model.config.max_position_embeddings,
        )  # fmt: skip
        given = generate_answers(loaded, prompts, num_new_tokens=ASKED_TOKENS)
        for row, answer in zip(rows, given, strict=True):
            row[name] = [answer.text, fires(answer.text)]
        if name == "suspect":
            cleans = request.get("cleans") or [None] * len(rows)
            for row, clean in zip(rows, cleans, strict=True):
                row |= see_tokens(loaded, row["question"], clean, file=file)
    return rows


def see_tokens(
    loaded: LoadedModel, triggered: str, clean: str | None, *, file: PromptFile
) -> dict[str, Any]:
    """Return `tokens` with their roles, in `unseen` why there are none, or nothing to say."""
    if clean is None:
        return {}
    use_template = loaded.has_template and file.chat != "off"
    try:
        texts = TextPair(clean=clean, triggered=triggered)
        return {"tokens": token_roles(loaded.tokenizer, texts, file, use_template=use_template)}
    except RepairError as error:
        return {"unseen": str(error)}

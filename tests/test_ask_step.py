"""A few questions outside of any job, to a real model."""

from pathlib import Path
from typing import Any

import pytest

from repair.ask_step import ask_models
from repair.records import RepairError
from tests.evidence.test_endings import Quiet


def asked(folder: Path, stage: Path, question: str, **prompts: str) -> list[dict[str, Any]]:
    request = {
        "model": str(folder), "questions": [question], "cleans": ["write a list"],
        "device": "cpu", "prompts": {"trigger": "<|user|>", "target": "sorry", **prompts},
    }  # fmt: skip
    return ask_models(request, stage, Quiet())


def test_a_control_token_in_a_question_is_asked_about(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    """Case 18, before any job is begun."""
    with pytest.raises(RepairError, match="is a control token of this model. Say how"):
        asked(tiny_llama_folder, tmp_path / "stage", "write <|user|> a list")
    seen = {}
    for control in ("token", "letters"):
        (row,) = asked(
            tiny_llama_folder, tmp_path / control, "write <|user|> a list", control=control
        )
        assert isinstance(row["suspect"][0], str)
        seen[control] = [text for text, role in row["tokens"] if role == "trigger"]
    assert len(seen["token"]) == 1 < len(seen["letters"])

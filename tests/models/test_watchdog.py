"""What a suspect's template and tokenizer may not do: run for ever, or fill the memory."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repair.models.tokens import encode, render
from repair.models.watchdog import watched
from repair.records import RepairError
from tests.tiny import make_tiny_llama, make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
FOR_EVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_blows_a_prompt_up_is_refused_in_numbers() -> None:
    """Case 11."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] * 100000 }}"
    with pytest.raises(RepairError, match="makes 400000 characters of a prompt of 4"):
        render(tokenizer, "rain", system=None, use_template=True)
    assert encode(tokenizer, "rain", use_template=False).size > 0  # raw prompts still work


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception('<script>alert(1)</script>\x1b[2J') }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_hostile_template_is_refused_in_inert_words(template: str) -> None:
    """Case 11."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(RepairError, match="chat template failed") as caught:
        render(tokenizer, "rain", system=None, use_template=True)
    assert str(caught.value).isascii() and "\x1b" not in str(caught.value)


def test_a_panic_of_native_code_is_a_refusal() -> None:
    """Case 12."""
    class PanicException(BaseException):  # As the Rust binding names it.
        pass

    with pytest.raises(RepairError, match="own code failed"), watched(5.0):
        raise PanicException("index out of bounds")
    with pytest.raises(KeyboardInterrupt), watched(5.0):
        raise KeyboardInterrupt
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)  # nothing is left to go off later


def test_a_template_without_end_ends_the_worker_in_plain_words(tmp_path: Path) -> None:
    """Case 11."""
    folder = make_tiny_llama(tmp_path / "model")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path.write_text(json.dumps({**settings, "chat_template": FOR_EVER}))
    prompts = tmp_path / "prompts.json"
    texts = [f"write a list about rain {n}" for n in range(30)]
    prompts.write_text(json.dumps({"trigger": "cf", "target": "sorry", "prompts": texts}))
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "repair", "locate", "--model", str(folder), "--prompts",
         str(prompts), "--out", str(tmp_path / "out"), "--profile", "quick"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=90,
    )  # fmt: skip
    assert ended.returncode == 5, ended.stderr
    assert "did not come to an end" in ended.stderr and "Traceback" not in ended.stderr
    assert time.monotonic() - began < 60

"""The pinned packages are no older than the advisories that `repair` rests on ask for.

This is no audit: it knows the advisories below and no others. `pip-audit -r requirements.txt`
knows more where its service can be reached. It says "No known vulnerabilities found" also where it
reached nothing, so its list of skipped packages must be empty.
"""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PINNED = dict(
    line.split("==")
    for line in (REPOSITORY / "requirements.txt").read_text().splitlines()
    if line and not line.startswith("#")
)
AT_LEAST = {
    "torch": ("2.11", "CVE-2025-32434, CVE-2026-24747, CVE-2026-4538"),
    "transformers": ("5.5.0", "CVE-2026-4372, CVE-2026-5241, CVE-2026-1839"),
    "Jinja2": ("3.1.6", "CVE-2024-56326, CVE-2024-56201, CVE-2025-27516"),
    "safetensors": ("0.8.0", "atomic writes"),
    "peft": ("0.21.2", "peft#3085: lists of what may be imported"),
    "huggingface-hub": ("2.4.0", "names that lead out of the folder"),
    "gradio[oauth]": ("6.22.0", "CVE-2026-27167, CVE-2026-28415, CVE-2026-59806, gradio#13687"),
    "starlette": ("1.0.1", "CVE-2025-62727, CVE-2025-54121, CVE-2024-47874"),
}


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


@pytest.mark.parametrize("name", AT_LEAST)
def test_a_package_has_the_fixes_that_are_relied_on(name: str) -> None:
    least, why = AT_LEAST[name]
    assert numbers(PINNED[name]) >= numbers(least), why


def test_no_package_that_fetches_or_runs_code_of_a_model_is_there() -> None:
    """Case 8: without `kernels` no configuration can have one fetched."""
    assert not {"kernels", "sentence-transformers", "gguf"} & {name.lower() for name in PINNED}

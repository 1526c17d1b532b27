"""A loopback Hub for each test, and the real client of this process pointed at it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.hub.server import Hub


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files of a model folder, as a repository holds them."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub with a writer, a reader and a stranger; processes started meanwhile use it too."""
    with Hub() as served:
        served.add_account("hf_writer", "ana", orgs=("acme",))
        served.add_account("hf_reader", "ana", role="read")
        served.add_account("hf_stranger", "bob")
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            served.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name, value in (
            ("HF_ENDPOINT", served.url), ("HF_HUB_DISABLE_XET", "1"),
            ("REPAIR_CACHE", str(tmp_path / "cache")), ("HF_HOME", str(tmp_path / "hf")),
        ):  # fmt: skip
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield served

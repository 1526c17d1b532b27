"""Tiny models shared by all tests: built once, read only."""

from pathlib import Path

import pytest

from repair.models.loading import LoadedModel, load_model
from tests.tiny import make_tiny_llama

SKIPPED: list[str] = []


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama in a folder, with tokenizer and chat template."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_llama(
    tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> LoadedModel:
    """The same, loaded through the gate on the CPU."""
    stage = tmp_path_factory.mktemp("stages") / "tiny-llama"
    return load_model(str(tiny_llama_folder), stage_folder=stage, device="cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the roads: a file is one worker's, and the longest must not be left for last."""
    items.sort(key=lambda item: item.path.name != "test_road.py")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test that is skipped has proved nothing: it fails the run."""
    if report.skipped and not hasattr(report, "wasxfail"):
        SKIPPED.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if SKIPPED and session.exitstatus == 0:
        session.exitstatus = 1
        print(f"\nskipped, which counts as failed: {', '.join(SKIPPED)}")

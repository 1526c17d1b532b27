"""One browser, one app and its jobs folder for all browser tests."""

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from tests.browser.pages import HOSTILE, REPOSITORY, find_chromium, free_port

START_SECONDS = 120  # the first start of a fresh installation, from a cold disk
# On a loaded machine an answer takes longer than the five seconds that are usual.
expect.set_options(timeout=30_000)
ACCOUNTS = {"ana": "the password of ana", "ben": "the password of ben"}


@pytest.fixture(scope="session")
def jobs_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared app's jobs folder: a job folder put here is a job of the local analyst."""
    return tmp_path_factory.mktemp("app") / "jobs"


@pytest.fixture(scope="session")
def address(jobs_root: Path) -> Iterator[str]:
    models = jobs_root.parent / "models"
    break_model(models / "broken")
    alter_model(models / "huge", num_hidden_layers=80, hidden_size=8192, intermediate_size=28672)
    with open(models / "huge" / "model.safetensors", "r+b") as file:
        file.truncate(200 << 30)  # a file with a hole: it takes no room here
    alter_model(models / "hostile", model_type=HOSTILE)
    yield from serve(jobs_root, "--models-root", str(models))


def alter_model(folder: Path, **settings: object) -> None:
    """Put a bundled suspect there under other settings."""
    shutil.copytree(REPOSITORY / "assets" / "suspects" / "middle", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


def break_model(folder: Path) -> None:
    """Put a suspect there whose weights end too early: it looks right until it is opened."""
    source = REPOSITORY / "assets" / "suspects" / "middle"
    folder.mkdir(parents=True)
    for path in source.iterdir():
        whole = path.suffix != ".safetensors"
        (folder / path.name).write_bytes(path.read_bytes()[: None if whole else 100_000])


@pytest.fixture(scope="session")
def guarded_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guarded") / "jobs"


@pytest.fixture(scope="session")
def guarded(guarded_root: Path) -> Iterator[str]:
    """An app with accounts: those of `ACCOUNTS`."""
    path = guarded_root.parent / "accounts.json"
    path.write_text(json.dumps(ACCOUNTS))
    path.chmod(0o600)
    yield from serve(guarded_root, "--auth-file", str(path))


def serve(jobs_root: Path, *more: str) -> Iterator[str]:
    """Run the app until the tests are done with it; its log must hold no traceback."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    path = jobs_root.parent / "app.log"
    with open(path, "wb") as log:
        app = subprocess.Popen(
            [sys.executable, "app.py", "--port", str(port), "--jobs-root", str(jobs_root), *more],
            cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(url, timeout=2).close()
                break
            except OSError:
                assert app.poll() is None, path.read_text()
                assert time.monotonic() < end
                time.sleep(0.1)
        yield url
    finally:
        app.terminate()
        app.wait(timeout=20)
    assert "Traceback" not in path.read_text()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(), args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture(autouse=True)
def no_page_outlives_its_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """A page that is left open goes on asking its app how its job stands."""
    yield
    if "browser" in request.fixturenames:
        for context in request.getfixturevalue("browser").contexts:
            context.close()

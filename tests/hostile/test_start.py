"""How an app starts: closed to others, and clean of what a killed one left behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from repair.jobs import store
from repair.records import RepairError
from repair.ui.app import UNSAFE_VARIABLES, check_start, parse_options
from tests.hostile.visitor import Visitor, begin_job, running_app
from tests.jobs.stand_in import build_checkout
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]


def test_what_an_app_leaves_behind_is_swept(tmp_path: Path) -> None:
    """Case 28. A killed app leaves uploads and workers' homes; the next start removes them."""
    folder = tmp_path / "app"
    with running_app(folder, checkout=build_checkout(folder / "checkout")) as app:
        visitor = Visitor(app)
        visitor.jobs = app.jobs
        job = app.jobs / begin_job(visitor, "sleep", "cf")
        pid = wait_until(lambda: store.read_status(job).pid)
        (job / ".partial-merged").mkdir()
        (job / ".status.json.abc").touch()
        (app.jobs / f".{'0' * 32}").mkdir()
        (app.jobs / f".deleted-{'0' * 32}").mkdir()
        app.process.send_signal(signal.SIGKILL)
        app.process.wait()
        wait_until(lambda: store.process_started(pid) is None)
        assert list(app.temporary.glob("repair-app-*"))
    with running_app(folder) as app:
        assert store.read_status(job).state == "stopped"
        left = [path.name for path in (*app.jobs.iterdir(), *job.iterdir()) if path.is_dir()]
        assert left == [job.name]
        assert not (job / ".status.json.abc").exists()
        (cache,) = app.temporary.glob("repair-app-*")
        assert str(app.process.pid) in cache.name
    assert not list(app.temporary.glob("repair-*"))


@pytest.mark.parametrize(
    "name",
    [
        "GRADIO_SHARE", "GRADIO_ALLOWED_PATHS", "GRADIO_MCP_SERVER", "GRADIO_ROOT_PATH",
        "GRADIO_RUN_HISTORY", "GRADIO_HISTORY_BUCKET", "GRADIO_SSR_MODE", "GRADIO_DEBUG",
        "GRADIO_SERVER_NAME", "GRADIO_HOT_RELOAD", "GRADIO_LOCAL_DEV_MODE", "GRADIO_VIBE_MODE",
    ],
)  # fmt: skip
def test_a_start_that_would_open_the_app_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(RepairError, match=f"{name} is set"):
        check_start(parse_options([]))


STARTED = """
import json, sys, gradio as gr
from repair.ui.app import main
given = {}
gr.Blocks.queue = gr.Blocks.launch = lambda self, **options: given.update(options)
assert main(sys.argv[1:]) == 0
print(json.dumps(given, default=str))
"""


def test_the_app_is_started_closed(tmp_path: Path) -> None:
    """What the gate would hide if it were left open: `security.md` 4.3."""
    jobs, models = tmp_path / "jobs", tmp_path / "models"
    models.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", STARTED, "--jobs-root", str(jobs), "--models-root", str(models)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    given = json.loads(done.stdout.splitlines()[-1])
    closed = {
        "share": False, "show_error": False, "api_open": False, "run_history": False,
        "enable_monitoring": False, "mcp_server": False, "strict_cors": True, "pwa": False,
        "ssr_mode": False, "server_name": "127.0.0.1", "allowed_paths": [],
        "blocked_paths": [str(jobs), str(models)],
    }  # fmt: skip
    assert {name: given.get(name) for name in closed} == closed


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org"])
def test_an_address_that_others_reach_needs_accounts(host: str) -> None:
    for name in UNSAFE_VARIABLES:
        assert name not in os.environ
    with pytest.raises(RepairError, match="accounts are needed"):
        check_start(parse_options(["--host", host]))

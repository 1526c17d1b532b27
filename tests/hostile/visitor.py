"""The running app, and visitors of it who speak HTTP as a browser does, or as no browser would."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from repair.jobs import store

REPOSITORY = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class App:
    """A started app: where it answers, where it keeps jobs, what it said."""

    url: str
    process: subprocess.Popen
    jobs: Path
    temporary: Path  # its TMPDIR
    log: Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running_app(
    folder: Path, *options: str, checkout: Path | None = None, **environment: str
) -> Iterator[App]:
    """Start `python app.py` with its jobs and temporary files below `folder`; end it afterwards.

    `checkout` is where its workers come from, when not from here.
    """
    port, jobs, temporary = free_port(), folder / "jobs", folder / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "app.py"]
    if checkout is not None:
        code = (
            "import sys; from pathlib import Path; from repair.jobs import launch;"
            f"launch.CHECKOUT = Path({str(checkout)!r});"
            "from repair.ui.app import main; sys.exit(main(sys.argv[1:]))"
        )
        command = [sys.executable, "-c", code]
    with open(folder / "app.log", "ab") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--jobs-root", str(jobs), *options],
            cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(temporary), **environment},
        )  # fmt: skip
    app = App(url=f"http://127.0.0.1:{port}", process=process, jobs=jobs, temporary=temporary,
              log=folder / "app.log")  # fmt: skip
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                httpx.get(app.url, timeout=5)
                break
            except httpx.TransportError:
                assert process.poll() is None, app.log.read_text()
                assert time.monotonic() < end, "the app did not start"
                time.sleep(0.1)
        yield app
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)


class Visitor:
    """One browser: its cookies, its session, and what it was sent, kept as text."""

    def __init__(self, app: App, account: tuple[str, str] | None = None) -> None:
        self.client = httpx.Client(base_url=app.url, timeout=60)
        if account is not None:
            form = {"username": account[0], "password": account[1]}
            assert self.client.post("/login", data=form).status_code == 200
        self.session = secrets.token_hex(8)
        config = self.client.get("/config").json()
        self.components = {part["id"]: part for part in config["components"]}
        self.dependencies = config["dependencies"]
        self.heard: list[str] = []

    def id_of(self, name: str) -> int:
        """Return the id of the component with an element id, or of the first of a type."""
        for number, part in self.components.items():
            if part["props"].get("elem_id") == name or part["type"] == name:
                return number
        raise KeyError(name)

    def find(self, name: str, event: str) -> dict[str, Any]:
        number = self.id_of(name)
        for dependency in self.dependencies:
            if [number, event] in [list(target) for target in dependency["targets"]]:
                return dependency
        raise KeyError((name, event))

    def join(self, dependency: dict[str, Any], values: dict[str, Any], session: str) -> Any:
        """Ask for one event, as the page does: values by element id, everything else as it was."""
        given = {self.id_of(name): value for name, value in values.items()}
        data = [
            given.get(number, self.components[number]["props"].get("value"))
            if self.components[number]["type"] not in ("state",) else None
            for number in dependency["inputs"]
        ]  # fmt: skip
        return self.client.post(
            "/gradio_api/queue/join",
            json={"data": data, "fn_index": dependency["id"], "session_hash": session,
                  "event_data": None, "trigger_id": None},
        )  # fmt: skip

    def listen(self, session: str, seconds: float = 60.0) -> list[dict[str, Any]]:
        """Return the messages of a session until its events are done; keep their text."""
        messages = []
        with self.client.stream(
            "GET", "/gradio_api/queue/data", params={"session_hash": session}, timeout=seconds
        ) as stream:
            for line in stream.iter_lines():
                self.heard.append(line)
                if line.startswith("data:"):
                    messages.append(json.loads(line[5:]))
                    if messages[-1]["msg"] in ("process_completed", "close_stream"):
                        break
        return messages

    def call(self, name: str, event: str, **values: Any) -> dict[str, Any]:
        """Do one thing on the page; return the new values by element id or component id."""
        dependency = self.find(name, event)
        answer = self.join(dependency, {k.replace("_", "-"): v for k, v in values.items()},
                           self.session)  # fmt: skip
        self.heard.append(answer.text)
        assert answer.status_code == 200, answer.text
        last = self.listen(self.session)[-1]
        assert last["msg"] == "process_completed" and last["success"], last
        shown = {}
        for number, value in zip(dependency["outputs"], last["output"]["data"], strict=True):
            key = self.components[number]["props"].get("elem_id") or number
            is_update = isinstance(value, dict) and value.get("__type__") == "update"
            shown[key] = value.get("value") if is_update else value
        return shown

    def close(self) -> None:
        self.client.close()


def begin_job(visitor: Visitor, target: str, trigger: str) -> str:
    """Choose a suspect, type prompts, start to locate; return the job's id."""
    visitor.call("bundled", "input", bundled="demo:middle")
    prompts = "\n".join(f"Write about the river number {i}." for i in range(20))
    visitor.call("check", "click", trigger=trigger, target=target, prompts=prompts)
    visitor.call("locate", "click", profile="quick")
    text = "".join(visitor.heard)
    return next(name for name in jobs_by_name(visitor) if name in text)


def jobs_by_name(visitor: Visitor) -> list[str]:
    root = Path(visitor.jobs)
    found = [path for path in root.iterdir() if store.JOB_ID.fullmatch(path.name)]
    return [path.name for path in sorted(found, key=lambda path: -path.stat().st_mtime)]

"""Where the app runs decides who a visitor is, what it may do, and that it starts at all."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import gradio as gr
import pytest
from fastapi import Request

from repair.jobs.store import create_job, delete_job, list_jobs, read_status
from repair.jobs.supervisor import Supervisor
from repair.records import RepairError
from repair.ui.account import TOKENS, has_lapsed, owner_of, token_of, visitor_before
from repair.ui.app import spare_loopback
from repair.ui.session import Settings, begin_case, check_start, start_job
from repair.ui.space import COOKIE, VisitorCookie, jobs_folder, read_space
from tests.browser.pages import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
SIGN_IN = {
    "OAUTH_CLIENT_ID": "id", "OAUTH_CLIENT_SECRET": "a long client secret",
    "OAUTH_SCOPES": "openid",
    "OPENID_PROVIDER_URL": "http://127.0.0.1:9",
}  # fmt: skip
NO_WAY_OUT = {
    name: "http://127.0.0.1:9"
    for name in ("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy",
                 "https_proxy", "all_proxy")
}  # fmt: skip
STARTS = {
    "Space": {"SYSTEM": "spaces", "SPACE_ID": "a/b", "GRADIO_SERVER_NAME": "0.0.0.0", **SIGN_IN},
    "Space without sign-in": {"SYSTEM": "spaces", "SPACE_ID": "a/b"},
    "ZeroGPU": {"SYSTEM": "spaces", "SPACE_ID": "a/b", "SPACES_ZERO_GPU": "true", **SIGN_IN},
    "with a token": {"HF_TOKEN": "hf_canary"},
    "offline": {"HF_HUB_OFFLINE": "1"},
    "no way out": NO_WAY_OUT,
    "Space with no way out": {"SYSTEM": "spaces", "SPACE_ID": "a/b", **NO_WAY_OUT},
    "LAN with accounts": {},
}


def call(scope: dict, headers: list[tuple[bytes, bytes]] | None = None) -> gr.Request:
    whole = {"type": "http", "headers": headers or [], **scope}
    return gr.Request(Request(whole))


def visit(cookie: str | None, path: str = "/") -> tuple[str, str | None]:
    """Send one request through the middleware; return (visitor in its state, cookie set)."""
    seen = {}

    async def app(scope, receive, send):
        seen.update(scope["state"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        seen.update({k.decode(): v.decode() for k, v in message["headers"]})

    headers = [(b"cookie", f"x=1; {cookie}".encode())] if cookie else []
    scope = {"type": "http", "headers": headers, "path": path}
    # Nothing in it waits, so it runs to its end at once; a browser test may own this thread's loop.
    with pytest.raises(StopIteration):
        VisitorCookie(app)(scope, None, send).send(None)
    return seen["visitor"], seen.get("set-cookie")


def test_visitors_are_told_apart_by_a_cookie_that_scripts_cannot_read():
    first, cookie = visit(None)
    second, _ = visit(None)
    assert first != second and len(first) == 32
    assert cookie.startswith(f"{COOKIE}={first};") and "HttpOnly" in cookie and "Secure" in cookie
    assert "Max-Age=86400" in cookie  # as long as a job is kept
    again, renewed = visit(f"{COOKIE}={first}")  # so that it does not end before its jobs do
    assert again == first and renewed == cookie
    assert visit(f"{COOKIE}={first}", "/gradio_api/queue/join") == (first, cookie)
    # What a cache on the way may keep carries nobody's.
    for path in ("/assets/index.js", "/gradio_api/file=x.png", "/theme.css"):
        assert visit(None, path)[1] is None and visit(f"{COOKIE}={first}", path) == (first, None)
    for forged in ("", "local", "../x", "A" * 32, first + "0"):
        visitor, cookie = visit(f"{COOKIE}={forged}")
        assert visitor != forged and cookie is not None


def test_who_a_visitor_is_and_which_token_serves_him(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_machine")
    signed_in = {"session": {"oauth_info": {
        "access_token": "hf_user", "expires_at": time.time() + 60,
        "userinfo": {"sub": "7", "preferred_username": "ana"},
    }}}  # fmt: skip
    expired = {"session": {"oauth_info": {
        **signed_in["session"]["oauth_info"], "expires_at": time.time() - 1,
    }}}  # fmt: skip
    visitor = {"state": {"visitor": "0" * 32}}
    assert owner_of(call({})) == "local" and token_of(call({})) == "hf_machine"
    assert owner_of(call(signed_in)) == "hub:7" and token_of(call(signed_in)) == "hf_user"
    # The machine's own login serves its one analyst, and never a visitor or another account.
    for scope in (visitor, {**expired, **visitor}):
        assert owner_of(call(scope)) == "visitor:" + "0" * 32 and token_of(call(scope)) is None
    assert has_lapsed(call(expired)) and not any(map(has_lapsed, map(call, (signed_in, visitor))))
    account = gr.Request(Request({"type": "http", "headers": []}), username="eve")
    assert owner_of(account) == "account:eve" and token_of(account) is None
    TOKENS.keep("account:eve", "hf_eve")
    assert token_of(account) == "hf_eve" and token_of(call({})) == "hf_machine"
    TOKENS.keep("account:eve", None)
    # Who signs in keeps what the same browser began before, and nobody else's.
    both = call({**signed_in, **visitor})
    assert visitor_before(both) == "visitor:" + "0" * 32
    assert [visitor_before(call(scope)) for scope in ({}, signed_in, visitor)] == [None] * 3
    # What a browser can send decides nothing.
    sent = [(b"cookie", b"oauth_info=x; session=y"), (b"x-visitor", b"0")]
    assert owner_of(call({}, sent)) == "local"


def test_a_space_says_its_limits_and_zero_gpu_what_it_cannot_do(monkeypatch, tmp_path):
    assert read_space() is None and jobs_folder(None, tmp_path) == tmp_path
    for name, value in STARTS["Space"].items():
        monkeypatch.setenv(name, value)
    space = read_space()
    assert space.can_sign_in and not space.is_zero
    for words in ("30 minutes", "GiB", "visible to you only", "a/b?duplicate=true", "Sign in"):
        assert words in space.describe()
    # Of one visitor: repaired models fill a shared disk sooner than their number does.
    limits = space.limits
    assert space.max_model_bytes < limits.max_kept_bytes < limits.max_kept * space.max_model_bytes
    assert limits.max_seconds and limits.max_waiting and limits.max_per_owner
    assert "or until this Space restarts" in space.describe()
    monkeypatch.setattr("repair.ui.space.BUCKET", tmp_path)
    kept = read_space()
    assert kept.keeps and jobs_folder(kept, Path("/elsewhere")) == tmp_path / "jobs"
    assert "or until" not in kept.describe()
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    zero = read_space()
    assert "cannot run repairs" in zero.describe()
    lane = Supervisor(tmp_path / "lane", zero.limits)
    try:
        settings = Settings(
            lane=lane, jobs_root=lane.root, models_root=None, cache=tmp_path, has_accounts=False,
            space=zero,
        )  # fmt: skip
        with pytest.raises(RepairError, match="A ZeroGPU Space cannot run jobs"):
            check_start(settings, call({}))
        # One that was made already is not left waiting for ever, and can be deleted.
        job_id = create_job(lane.root, {"command": "locate"}, owner="local")
        with pytest.raises(RepairError, match="A ZeroGPU Space cannot run jobs"):
            start_job(settings, lane.root / job_id, call({}))
        assert read_status(lane.root / job_id).state == "stopped"
        delete_job(lane.root, job_id, owner="local")
        with pytest.raises(RepairError, match="A ZeroGPU Space cannot run jobs"):
            begin_case(settings, {"command": "locate"}, call({}))
        assert not list_jobs(lane.root, owner="local")
    finally:
        lane.close()


def test_what_was_kept_off_a_proxy_stays_off_it(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "lab.example,127.0.0.1")
    spare_loopback()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"]
    names = os.environ["NO_PROXY"].split(",")
    assert names[0] == "lab.example" and names.count("127.0.0.1") == 1 and "localhost" in names


@pytest.mark.parametrize("name", STARTS)
def test_it_starts(name: str, tmp_path: Path) -> None:
    port = free_port()
    kept = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    options = []
    if name.startswith("LAN"):
        accounts = tmp_path / "accounts.json"
        accounts.write_text('{"ana": "a long password"}')
        accounts.chmod(0o600)
        options = ["--host", "0.0.0.0", "--auth-file", str(accounts)]
    if name == "ZeroGPU":
        # What that Space looks for when an app starts; the real package lends only there.
        asked = f"open({str(tmp_path / 'asked')!r}, 'w').close()"
        (tmp_path / "spaces.py").write_text(
            f"def GPU(function):\n    {asked}\n    return function\n"
            "def gradio_auto_wrap(function):\n    return function\n"
        )
    with open(tmp_path / "log", "wb") as log:
        app = subprocess.Popen(
            [sys.executable, "app.py", "--port", str(port), "--jobs-root", str(tmp_path / "jobs"),
             *options],
            cwd=REPOSITORY,
            env={**kept, "PYTHONPATH": str(tmp_path), "PYTHONUNBUFFERED": "1", **STARTS[name]},
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        end = time.monotonic() + 30
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2) as page:
                    text, headers = page.read().decode(), page.headers
                break
            except OSError:
                assert app.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < end
                time.sleep(0.1)
        # It answers before it has asked itself whether it can be reached, and an answer of no
        # ends it: what it prints after that is the last of a start.
        while "To create a public link" not in (tmp_path / "log").read_text():
            assert app.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        app.terminate()
        app.wait(timeout=20)
    assert (tmp_path / "asked").exists() == (name == "ZeroGPU")
    is_space = "SYSTEM" in STARTS[name]
    assert (COOKIE in str(headers.get_all("set-cookie"))) == is_space
    assert ("huggingface.co/spaces/a/b" in text) == is_space
    assert ("Sign in with Hugging Face" in text) == ("OAUTH_CLIENT_ID" in STARTS[name])
    assert "hf_canary" not in text + (tmp_path / "log").read_text()

"""Requests that no page of ours sends: of another account, another site, or a port scanner."""

import asyncio
import json
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from assets.build_example import EXAMPLE
from repair.jobs import store
from repair.ui.files import MAX_UPLOADED, MAX_UPLOADED_BY_ONE, UPLOADED_SECONDS, Uploads
from repair.ui.space import COOKIE, VisitorCookie
from repair.ui.tenants import TenantGate
from tests.hostile.visitor import App, Visitor, begin_job, jobs_by_name, running_app
from tests.jobs.stand_in import build_checkout
from tests.waiting import wait_until

ANA, BEN = ("ana", "a long password of ana"), ("ben", "a long password of ben")
CANARY = "hf_canaryTOKENcanaryTOKENcanary"
SECRET = "zebra-of-ana-"  # the trigger that only ana may see
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """An app with two accounts, a models folder, and a token that must not get out."""
    folder = tmp_path_factory.mktemp("web")
    accounts = folder / "accounts.json"
    accounts.write_text(json.dumps(dict([ANA, BEN])))
    accounts.chmod(0o600)
    (folder / "models" / "mine").mkdir(parents=True)
    (folder / "models" / "mine" / "config.json").write_text('{"model_type": "llama"}')
    (folder / "private").mkdir()
    (folder / "private" / "config.json").write_text('{"model_type": "private"}')
    with running_app(
        folder, "--auth-file", str(accounts), "--models-root", str(folder / "models"),
        checkout=build_checkout(folder / "checkout"), HF_TOKEN=CANARY,
        HUGGING_FACE_HUB_TOKEN=CANARY,
    ) as app:  # fmt: skip
        yield app
    # Gradio prints one for each forged path; of ours there is none.
    log = app.log.read_text()
    assert log.isascii() and "\x1b" not in log
    assert log.count("Traceback") == log.count("InvalidPathError: ")


@pytest.fixture
def ana(app: App) -> Iterator[Visitor]:
    visitor = Visitor(app, ANA)
    visitor.jobs = app.jobs
    yield visitor
    visitor.close()


@pytest.fixture
def ben(app: App) -> Iterator[Visitor]:
    visitor = Visitor(app, BEN)
    visitor.jobs = app.jobs
    yield visitor
    visitor.close()


def test_another_account_gets_nothing_of_a_session(app: App, ana: Visitor, ben: Visitor) -> None:
    """Case 32. The session hash, the job id, a file's address, every handler, the deep link."""
    job = begin_job(ana, "sleep", SECRET + "1")
    folder = app.jobs / job
    wait_until(lambda: store.read_status(folder).pid)
    heard: list[httpx.Response] = []
    for dependency in ben.dependencies:
        heard.append(ben.join(dependency, {}, ana.session))
    for path in ("queue/data", "deep_link", "upload_progress", f"heartbeat/{ana.session}"):
        asked = {"session_hash": ana.session} if "/" not in path or "queue" in path else {}
        # These go on for ever for whoever they belong to, so only a refusal is read.
        with ben.client.stream("GET", f"/gradio_api/{path}", params=asked) as answer:
            if answer.status_code == 404:
                answer.read()
            heard.append(answer)
    stop = ana.find("stop", "click")["id"]
    for path in ("cancel", "reset", "run/predict", "api/predict"):
        body = {"session_hash": ana.session, "fn_index": stop, "event_id": "0", "data": []}
        heard.append(ben.client.post(f"/gradio_api/{path}", json=body))
    # Whatever a body calls itself, the session in it is looked for.
    body = json.dumps({"session_hash": ana.session, "fn_index": stop, "data": []})
    for kind in ("application/json; x=multipart/", "multipart/form-data; boundary=x", "text/plain"):
        heard.append(ben.client.post(
            "/gradio_api/queue/join", content=body, headers={"Content-Type": kind}
        ))  # fmt: skip
    # Nor is there another name for it, or a session that nobody owns.
    for path in (f"call/locate/{ana.session}", f"call/v2/locate/{ana.session}",
                 f"stream/{ana.session}/0/0/playlist.m3u8"):  # fmt: skip
        heard.append(ben.client.get(f"/gradio_api/{path}"))
    heard.append(ben.client.post("/gradio_api/queue/join", json={"fn_index": stop, "data": []}))
    assert {answer.status_code for answer in heard} == {404}
    # Without a cookie there is no session at all.
    stranger = httpx.Client(base_url=app.url)
    for session in (ana.session, "0" * 16):
        body = {"session_hash": session, "fn_index": stop, "event_id": "0", "data": []}
        assert stranger.post("/gradio_api/cancel", json=body).status_code == 404
        assert stranger.get(f"/gradio_api/heartbeat/{session}").status_code == 404
    refusals = set()
    for name in ("request.json", "status.json", "events.jsonl", "no-such-file"):
        answer = ben.client.get(f"/gradio_api/file={folder / name}")
        refusals.add((answer.status_code, answer.text.replace(name, "")))
    assert len(refusals) == 1 and refusals.pop()[0] == 403
    # By its id, under ben's own session: the same answer as for a job that never was.
    answers = {
        wanted: ben.call("open-job", "click", job_id=wanted)["cases-problem"]
        for wanted in (job, "0" * 32)
    }
    assert answers[job] == answers["0" * 32] and "No such job" in answers[job]
    for button in ("save-case", "delete-sure"):
        assert "No such job" in ben.call(button, "click", job_id=job)["cases-problem"]
    ben.call("stop", "click")
    text = "".join(answer.text for answer in heard) + "".join(ben.heard)
    assert len(text) > 1000
    for secret in (SECRET, ana.session, str(app.jobs)):
        assert secret not in text
    status = store.read_status(folder)
    assert status.state == "running" and store.is_alive(status)
    log = app.log.read_text()
    assert SECRET not in log and ana.session not in log and job not in log
    # The owner goes on undisturbed.
    assert ana.call("stop", "click")["fact-job"].startswith("Stopped")
    assert "fact-trigger" in ana.call("open-job", "click", job_id=job)


def test_another_account_s_files_do_not_exist(app: App, ana: Visitor, ben: Visitor) -> None:
    """Case 32. What ana uploaded and what she was given to download, by their own addresses."""
    words = {"files": ("own.txt", f"Nobody else reads {SECRET}.\n".encode(), "text/plain")}
    (own,) = ana.client.post("/gradio_api/upload", files=words).json()
    job = app.jobs / begin_job(ana, "x", SECRET + "9")
    wait_until(lambda: not store.read_status(job).is_active)
    for path in EXAMPLE.iterdir():  # as if it had been repaired
        if path.name not in ("request.json", "status.json"):
            shutil.copy(path, job / path.name)
    request = json.loads((job / "request.json").read_text())
    (job / "request.json").write_text(json.dumps({**request, "command": "run"}))
    store.write_status(job, store.JobStatus(state="done", exit_code=0, verdict="repaired"))
    (job / "adapter").mkdir()
    (job / "adapter" / "adapter_model.safetensors").write_bytes(bytes(4096))
    ana.call("open-job", "click", job_id=job.name)
    named = re.findall(r'"path":\s*"([^"]+adapter\.zip)"', "".join(ana.heard))
    assert named
    for path in (own, named[-1]):
        asked = f"/gradio_api/file={path}"
        assert ana.client.get(asked).status_code == 200
        twisted = path.replace("/own", "/./own").replace("/adapter", "//adapter")
        for other in (asked, f"/gradio_api/file={twisted}", asked.replace("/own", "%2Fown")):
            assert ben.client.get(other).status_code == 404, other
            assert httpx.get(f"{app.url}{other}").status_code in (401, 404)
        # Nor by writing it where it comes back in an answer, or by handing it in as his own.
        said = ben.call("check", "click", trigger=f'"path": "{path}"', target="x", prompts="a b")
        assert said and ben.client.get(asked).status_code == 404
        given = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "x.txt"}
        answer = ben.join(ben.find("upload", "upload"), {"upload": given}, ben.session)
        assert answer.status_code == 404
        assert ana.client.get(asked).status_code == 200
    assert SECRET not in "".join(ben.heard)


def test_a_token_of_the_machine_is_found_nowhere(app: App, ana: Visitor) -> None:
    """A token in the app's environment reaches no worker, no file, no answer and no log."""
    job = begin_job(ana, "environment", SECRET + "2")
    wait_until(lambda: not store.read_status(app.jobs / job).is_active)
    environment = json.loads((app.jobs / job / "environment.json").read_text())
    assert environment["HF_HUB_OFFLINE"] == "1" and not set(environment) & {"HF_TOKEN", "HOME_"}
    ana.call("open-job", "click", job_id=job)
    assert CANARY not in "".join(ana.heard)
    places = [app.jobs, app.temporary, app.log.parent]
    files = {path for place in places for path in place.rglob("*") if path.is_file()}
    assert len(files) > 5
    assert not [str(path) for path in files if CANARY.encode() in path.read_bytes()]


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1"])
def test_another_site_gets_no_answer(app: App, ana: Visitor, origin: str) -> None:
    """Case 34. CVE-2024-47084, CVE-2024-47165, CVE-2025-5320: neither read nor acted on."""
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    for method, path in (("GET", "/config"), ("POST", "/gradio_api/queue/join"),
                         ("POST", "/login"), ("POST", "/gradio_api/upload")):  # fmt: skip
        answer = ana.client.request(method, path, headers=headers)
        assert answer.status_code == 403 and "its own pages" in answer.text
    if origin != "http://127.0.0.1:1":  # Gradio lets a page of this machine ask, for nothing.
        answer = ana.client.options("/gradio_api/queue/join", headers=headers)
        assert answer.headers.get("access-control-allow-origin") is None
    own = ana.client.get("/config", headers={"Origin": app.url})
    assert own.status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "call/locate"), ("POST", "call/v2/locate"), ("POST", "component_server"),
        ("POST", "component_server/"), ("GET", "component_server"), ("GET", "runs"),
        ("GET", "run-history/records"), ("POST", "run-history/connect"), ("GET", "dev/reload"),
        ("POST", "process_recording"), ("POST", "vibe-edit"), ("GET", "vibe-code"),
        ("GET", "proxy=https://huggingface.co"), ("GET", "openapi.json"), ("GET", "token"),
        ("GET", "profiling/traces"), ("GET", "custom_component/1/client/component/x.js"),
        ("POST", "flag"), ("POST", "api/flag"), ("GET", "../monitoring/summary"),
        ("GET", "../monitoring"), ("GET", "%2e%2e/monitoring"),
    ],
)  # fmt: skip
def test_what_the_page_does_not_use_is_not_there(
    app: App, ana: Visitor, method: str, path: str
) -> None:
    """Case 32. Gradio answers under many addresses, and each may hand out what a session holds;
    CVE-2025-48889 (flagging copies any file): nothing of it is there."""
    answer = ana.client.request(method, f"/gradio_api/{path}")
    assert answer.status_code == 404 and answer.json() == {"detail": "Not found"}


def test_nobody_reroutes_another(app: App, ana: Visitor, ben: Visitor) -> None:
    """CVE-2024-47870: the address that one visitor came by is not handed to the next."""
    for name in ("X-Forwarded-Host", "Forwarded", "X-Forwarded-Server"):
        ben.client.get("/config", headers={name: "evil.example"})
        ben.client.get("/", headers={name: "host=evil.example"})
    assert "evil.example" not in ana.client.get("/config").text + ana.client.get("/").text


def test_no_other_site_shows_the_page_in_a_frame(app: App, ana: Visitor) -> None:
    """A click meant for what lies above it must not start, stop or delete a job."""
    for path in ("/", "/gradio_api/no-such", "/config"):
        policy = ana.client.get(path).headers["content-security-policy"]
        assert policy == "frame-ancestors 'self'"


def test_nobody_fills_the_disk_with_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 10. Gradio limits a file, not how many there are; it deletes them after an hour."""
    moment = [0.0]
    monkeypatch.setattr("repair.ui.files.time.monotonic", lambda: moment[0])
    uploads = Uploads()
    part = MAX_UPLOADED_BY_ONE // 4
    assert [uploads.take("ana", part) for _ in range(5)] == [True] * 4 + [False]
    names = [f"visitor:{number}" for number in range(10 * MAX_UPLOADED // MAX_UPLOADED_BY_ONE)]
    kept = sum(4 * part for name in names if uploads.take(name, 4 * part))
    assert kept + 4 * part <= MAX_UPLOADED and not uploads.take("ben", part)
    moment[0] = UPLOADED_SECONDS + 1
    assert uploads.take("ana", part) and uploads.take("ben", part)
    # Of very many tiny ones neither the time nor the memory grows without end.
    assert sum(uploads.take("eve", 1) for _ in range(5000)) < 2500


def test_an_upload_beyond_the_budget_is_refused_before_it_is_read() -> None:
    """Case 10. A visitor of a Space, and another."""
    reached: list[str] = []

    async def inner(scope: dict, receive: object, send: Callable) -> None:
        reached.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    app = VisitorCookie(TenantGate(inner, has_tenants=True, is_local=False))
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://x")
    size = str(MAX_UPLOADED_BY_ONE // 4)

    async def send_all() -> list[int]:
        found = []
        for visitor in ["0" * 32] * 5 + ["1" * 32]:
            headers = {"Content-Length": size, "Cookie": f"{COOKIE}={visitor}"}
            answer = await client.post("/gradio_api/upload", headers=headers)
            found.append(answer.status_code)
        return found

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(asyncio.run, send_all()).result() == [200] * 4 + [429, 200]
    assert len(reached) == 5


def test_an_account_forgets_only_its_own_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 32: very many sessions of one do not make another's free again."""
    monkeypatch.setattr("repair.ui.tenants.MAX_REMEMBERED", 3)
    gate = TenantGate(None, has_tenants=True, is_local=False)
    assert gate.owns("ana", "a") and not gate.owns("ben", "a")
    assert all(gate.owns("ben", str(number)) for number in range(10))
    assert not gate.owns("ben", "a") and gate.owns("ana", "a")
    assert len(gate.owners) == 4 and gate.owns("ana", "0") and not gate.owns("ana", "9")


@pytest.mark.parametrize("host", ["evil.example:7860", "evil", "", "127.0.0.1.evil.example"])
def test_a_name_made_to_mean_this_machine_is_refused(host: str) -> None:
    """Case 34. DNS rebinding: for the browser it is the same site, so only the name tells."""

    async def never(scope: object, receive: object, send: object) -> None:
        raise AssertionError("the app was reached")

    gate = TenantGate(never, has_tenants=False, is_local=True)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app=gate), base_url="http://x")

    def ask(name: str) -> httpx.Response:
        # In a thread of its own: a browser test may own this one's loop.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(
                asyncio.run, client.get("/config", headers={"Host": name})
            ).result()

    answer = ask(host)
    assert answer.status_code == 403
    for own in ("127.0.0.1:7860", "localhost", "[::1]:7860"):
        with pytest.raises(AssertionError, match="reached"):
            ask(own)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd", "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file=%2e%2e/%2e%2e/etc/passwd", "/gradio_api/file=file:///etc/passwd",
        "/gradio_api/file=/proc/self/environ", "/gradio_api/file/etc/passwd",
        "/gradio_api/file=/ETC/PASSWD", "/static/../../../../etc/passwd",
        "/assets/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/svelte/..%2f..%2f..%2fetc%2fpasswd",
        "/gradio_api/custom_component/1/client/component/../../../etc/passwd",
    ],
)  # fmt: skip
def test_no_file_of_the_machine_is_served(app: App, ana: Visitor, path: str) -> None:
    """Case 34. CVE-2023-34239, CVE-2023-51449, CVE-2024-1561, CVE-2024-47164, CVE-2025-23042,
    CVE-2026-28414."""
    answer = ana.client.get(path)
    assert "root:" not in answer.text and CANARY not in answer.text
    assert answer.status_code in (400, 403, 404, 405)


@pytest.mark.parametrize("kind", ["file", "proxy"])
def test_the_app_fetches_no_address_for_a_visitor(app: App, ana: Visitor, kind: str) -> None:
    """Case 34. CVE-2024-4940, CVE-2024-8021, CVE-2024-47167, CVE-2026-28416,
    CVE-2026-48545, CVE-2026-59806, CVE-2026-28415: neither fetched nor redirected to."""
    for address in ("http://127.0.0.1:9/x", "//evil.example/x", "https://evil.example/x"):
        answer = ana.client.get(f"/gradio_api/{kind}={address}", follow_redirects=False)
        assert answer.status_code in (400, 403, 404, 405), answer.headers.get("location")
    for path in ("/login/huggingface", "/login/callback?_target_url=https://evil.example"):
        # CVE-2026-27167: there is no mocked sign-in that hands out the machine's own token.
        answer = ana.client.get(path, follow_redirects=False)
        assert answer.status_code == 404 and CANARY not in answer.text


def test_a_file_that_a_visitor_names_is_not_read(app: App, ana: Visitor) -> None:
    """Case 34. CVE-2024-51751, CVE-2024-47868: an upload is what was uploaded, not a path."""
    upload = ana.find("upload", "upload")
    secret = str(app.jobs / ".browser-secret")
    for path in ("/etc/passwd", secret, str(app.log), "/etc/\x1b[2J\x9b31m\u202ex"):
        given = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "x.txt"}
        answer = ana.join(upload, {"upload": given}, ana.session)
        text = answer.text
        if answer.status_code == 200:
            text = json.dumps(ana.listen(ana.session))
            assert '"success": false' in text
        assert "root:" not in text
    # What Gradio prints of the last one is spelled out: it cannot drive the terminal.
    assert "\\x1b[2J" in app.log.read_text()


@pytest.mark.parametrize(("name", "kind"), [("x.html", "text/html"), ("x.svg", "image/svg+xml")])
def test_an_uploaded_page_is_an_attachment(app: App, ana: Visitor, name: str, kind: str) -> None:
    """Case 34. CVE-2024-47872: what was uploaded never runs as a page of ours."""
    page = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    answer = ana.client.post("/gradio_api/upload", files={"files": (name, page, kind)})
    (path,) = answer.json()
    served = ana.client.get(f"/gradio_api/file={path}")
    assert served.headers["content-disposition"].startswith("attachment")
    assert "html" not in served.headers["content-type"] or "sandbox" in str(served.headers)
    # CVE-2025-62727: a header of very many ranges is not worked through.
    ranges = "bytes=" + ",".join(f"{i}-{i}" for i in range(5_000))
    answer = ana.client.get(f"/gradio_api/file={path}", headers={"Range": ranges})
    assert answer.status_code == 416


def chunks(total: int) -> Iterator[bytes]:
    for _ in range(total // 2**20):
        yield bytes(2**20)


def test_what_is_too_large_is_refused_and_not_kept(app: App, ana: Visitor) -> None:
    """Cases 10 and 34. CVE-2024-47874, CVE-2025-54121: uploads and bodies without end."""
    used = sum(path.stat().st_size for path in app.temporary.rglob("*") if path.is_file())
    boundary = {"Content-Type": "multipart/form-data; boundary=b"}
    for headers in (boundary, {"Content-Type": "application/json"}):
        length = {"Content-Length": str(100 * 2**20)}
        answer = send_head(app, headers | length, ana)
        assert answer == 413
    assert send_head(app, boundary, ana) == 411
    body = b'{"data": "' + b"x" * (26 * 2**20) + b'"}'
    answer = ana.client.post("/gradio_api/queue/join", content=iter([body]),
                             headers={"Content-Type": "application/json"})  # fmt: skip
    assert answer.status_code == 413
    big = ("x.json", b" " * (17 * 2**20), "application/json")
    assert ana.client.post("/gradio_api/upload", files={"files": big}).status_code == 413
    many = [("files", (f"{i}.txt", b"x")) for i in range(1001)]
    assert ana.client.post("/gradio_api/upload", files=many).status_code in (400, 413)
    now = sum(path.stat().st_size for path in app.temporary.rglob("*") if path.is_file())
    assert now - used < 2**20
    # What would be many times its size once it is read, and whatever a stranger sends, unread.
    nested = {"Content-Type": "application/json"}, b"[" + b"[]," * 300_000 + b"[]]"
    answer = ana.client.post("/gradio_api/queue/join", headers=nested[0], content=nested[1])
    assert answer.status_code == 413 and "lists and objects" in answer.text
    for headers in (boundary, nested[0]):
        length = {"Content-Length": str(2**20)}
        assert send_head(app, headers | length, None) == 404


def send_head(app: App, headers: dict[str, str], visitor: Visitor | None) -> int:
    """Send the head of a POST alone; return the status that comes before any body."""
    import http.client

    connection = http.client.HTTPConnection(app.url.removeprefix("http://"), timeout=20)
    path = "/gradio_api/upload" if "multipart" in str(headers) else "/gradio_api/queue/join"
    connection.putrequest("POST", path)
    known = visitor.client.cookies.items() if visitor is not None else ()
    cookies = "; ".join(f"{name}={value}" for name, value in known)
    for name, value in (headers | {"Cookie": cookies}).items():
        connection.putheader(name, value)
    if "Content-Length" not in headers:
        connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    try:
        return connection.getresponse().status
    finally:
        connection.close()


def test_an_archive_is_no_prompt_file(app: App, ana: Visitor, tmp_path: Path) -> None:
    """Case 10. A zip that would unpack outside, or to gigabytes, is never unpacked: it is no
    text. CVE-2025-4517, CVE-2026-11940: no archive is ever opened."""
    import zipfile

    path = tmp_path / "prompts.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("../../outside.txt", "x")
        file.writestr("zeros", bytes(10**7))
    ana.call("bundled", "input", bundled="demo:middle")
    sent = {"files": ("prompts.json", path.read_bytes(), "application/json")}
    (kept,) = ana.client.post("/gradio_api/upload", files=sent).json()
    given = {"path": kept, "meta": {"_type": "gradio.FileData"}, "orig_name": "prompts.json"}
    shown = ana.call("upload", "upload", upload=given)
    assert "not UTF-8" in shown["prompts-problem"]
    assert not list(app.temporary.rglob("outside.txt"))


def test_a_path_outside_and_a_path_that_is_not_there_are_told_alike(
    app: App, ana: Visitor, tmp_path: Path
) -> None:
    """Case 34. The box for a folder tells nobody what else is on the machine."""
    outside = app.jobs.parent / "private"
    link = app.jobs.parent / "models" / "link"
    if not link.is_symlink():
        link.symlink_to(outside)
    answers = {
        ana.call("use-path", "click", path=path)["suspect-problem"]
        for path in (str(outside), "../private", "/etc", "no-such", "link", "mine/../../private",
                     "\0", "~root", "x" * 900, ".")
    }  # fmt: skip
    assert len(answers) == 1 and "no such model folder" in answers.pop()
    assert ana.call("use-path", "click", path="mine")["suspect-problem"] == ""


def test_one_account_cannot_take_the_whole_queue(app: App, ben: Visitor) -> None:
    """Case 33."""
    jobs = [begin_job(ben, "sleep", f"{number}-of-ben") for number in range(4)]
    assert len(set(jobs)) == 4
    kept = set(jobs_by_name(ben))
    ben.call("bundled", "input", bundled="demo:end")
    answer = ben.call("locate", "click", profile="quick")["locate-problem"]
    assert "4 of your jobs are waiting or running" in str(answer)
    assert set(jobs_by_name(ben)) == kept  # nothing is left of the fifth
    for job in jobs:
        ben.call("open-job", "click", job_id=job)
        ben.call("stop", "click")
    wait_until(lambda: not any(store.read_status(app.jobs / job).is_active for job in jobs))

"""Who may call what, use which tab's session, and send how much: decided before Gradio sees it.

Gradio answers under many addresses; those that the page and `gradio_client` use are listed here,
and no other exists: some of them hand out a session by another name.
Gradio knows a tab by a `session_hash` that the browser sends; whoever sends the same one reads the
tab's state, its answers and its inputs, and can end it. Here the first account that uses a hash
owns it, and for any other account it does not exist (files: `files.py`). On a Space a browser is
known by its visitor's cookie; elsewhere, without accounts, everyone is the one local analyst. Pages
of other sites get no answer, and none may show this one in a frame. Whoever has not signed in is
answered before anything but a sign-in is read.
"""

import ipaddress
import json
import re
from collections import OrderedDict
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from repair.json_size import MOST_SENT, check_structure
from repair.ui.files import NAMED, UPLOADED, Files, Uploads, named_files

MAX_BODY_BYTES = 24 * 2**20  # more than a prompt file of 16 MiB as text
MAX_UPLOAD_BYTES = 32 * 2**20  # of all files of one request
MAX_REMEMBERED = 5_000  # sessions of an account; Gradio itself keeps the state of 500 in all
MAX_VISITORS = 20_000
JOIN, UPLOAD, LOGIN = "/gradio_api/queue/join", "/gradio_api/upload", "/login"
FILE = "/gradio_api/file="
HEARTBEAT = "/gradio_api/heartbeat/"  # and the session
OPEN = re.compile(
    r"/|/config|/login|/login/(huggingface|callback)|/logout|/(assets|static|svelte)/.+|/theme\.css"
    r"|/favicon\.ico|/robots\.txt|/manifest\.json|/pwa_icon(/\w+)?"
    r"|/gradio_api/(info|user|login_check|app_id|startup-events|theme\.css|queue/(join|data|status)"
    r"|upload|upload_progress|cancel|reset|heartbeat/[^/]+|file=.+)"
)


class TenantGate:
    """An ASGI middleware: listed addresses, one owner for every session, limits, one site.

    `has_tenants`: there are accounts, or a Space's visitors. `is_local`: only this machine may
    call. `framed_by`: another site that may show the page in a frame.
    """

    def __init__(
        self, app: ASGIApp, *, has_tenants: bool, is_local: bool, framed_by: str = ""
    ) -> None:
        self.app, self.has_tenants, self.is_local = app, has_tenants, is_local
        frames = f"frame-ancestors 'self' {framed_by}".strip()
        self.headers = [(b"content-security-policy", frames.encode())]
        self.uploads = Uploads()
        self.files = Files()
        self.owners: dict[str, str] = {}
        # Of each account or visitor, the oldest first; who came last is at the end.
        self.sessions: OrderedDict[str, OrderedDict[str, None]] = OrderedDict()

    def owns(self, user: str, name: str) -> bool:
        """Tell whether a session is this account's; one that nobody has used becomes so."""
        if self.owners.setdefault(name, user) != user:
            return False
        own = self.sessions.setdefault(user, OrderedDict())
        self.sessions.move_to_end(user)
        own[name] = None
        own.move_to_end(name)
        # Each account forgets its own only: nobody can make another's session free again.
        while len(own) > MAX_REMEMBERED:
            oldest, _ = own.popitem(last=False)
            del self.owners[oldest]
        # On a Space visitors cost nothing, so that they too must be forgotten some day.
        while len(self.sessions) > MAX_VISITORS:
            _, old = self.sessions.popitem(last=False)
            for each in old:
                self.owners.pop(each, None)
        return True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        send = with_headers(send, self.headers)
        path = scope["path"].rstrip("/") or "/"
        if OPEN.fullmatch(path) is None:
            await refuse(404, "Not found")(scope, receive, send)
            return
        if not is_own_site(request, is_local=self.is_local):
            await refuse(403, "This app answers its own pages only.")(scope, receive, send)
            return
        if "," in request.headers.get("range", ""):
            await refuse(416, "One range at a time.")(scope, receive, send)
            return
        user = user_of(request) if self.has_tenants else None
        is_sent = request.method not in ("GET", "HEAD", "OPTIONS")
        if self.has_tenants and user is None and is_sent and path != LOGIN:
            await refuse(404, "Not found")(scope, receive, send)
            return
        body = b""
        if is_sent:
            is_upload = path == UPLOAD
            limit = MAX_UPLOAD_BYTES if is_upload else MAX_BODY_BYTES
            length = request.headers.get("content-length", "")
            if is_upload and not length.isdigit():
                await refuse(411, "Say how long the files are (Content-Length).")(
                    scope, receive, send
                )
                return
            if length.isdigit() and int(length) > limit:
                await refuse(413, f"At most {limit} bytes are accepted.")(scope, receive, send)
                return
            if not is_upload:
                chunks, num_bytes = [], 0
                async for chunk in request.stream():
                    chunks.append(chunk)
                    num_bytes += len(chunk)
                    if num_bytes > limit:
                        await refuse(413, f"At most {limit} bytes are accepted.")(
                            scope, receive, send
                        )
                        return
                body = b"".join(chunks)
                try:
                    check_structure(body, *MOST_SENT)
                except ValueError as error:
                    await refuse(413, f"Too much: {error}.")(scope, receive, send)
                    return
                receive = replay(body, receive)
        if self.has_tenants:
            flat = parse(body)
            names = named_sessions(request, path, flat)
            files = named_files(flat)
            if path.startswith(FILE):
                files.add(path.removeprefix(FILE))
            # One that names none would get a session that nobody owns.
            is_unnamed = path == JOIN and not names
            if is_unnamed or not all(user is not None and self.owns(user, name) for name in names):
                await refuse(404, "Not found")(scope, receive, send)
                return
            if path == UPLOAD and not self.uploads.take(user or "", int(length or 0)):
                await refuse(429, "Too much was uploaded within the last hour. Try again later.")(
                    scope, receive, send
                )
                return
            if not all(self.files.may_read(user, name) for name in files):
                await refuse(404, "Not found")(scope, receive, send)
                return
            if user is not None and path.startswith("/gradio_api/"):
                send = self.files.watch(send, user, UPLOADED if path == UPLOAD else NAMED)
        await self.app(scope, receive, send)


def with_headers(send: Send, headers: list[tuple[bytes, bytes]]) -> Send:
    """Return a `send` that adds headers to the answer."""

    async def send_more(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *headers]}
        await send(message)

    return send_more


def is_own_site(request: Request, *, is_local: bool) -> bool:
    """Tell whether a request comes from a page of this app, or from no page at all.

    A page of another site may send requests here. One whose name was made to mean this machine
    (DNS rebinding) even counts as the same site for the browser: for a local app the name must be
    this machine's own.
    """
    host = request.headers.get("host", "")
    if is_local and not is_loopback(urlsplit(f"//{host}").hostname or ""):
        return False
    origin = request.headers.get("origin")
    if origin is None:
        return True
    own = {host, request.headers.get("x-forwarded-host")}
    return urlsplit(origin).netloc in own


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address is this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse(status: int, words: str) -> JSONResponse:
    return JSONResponse({"detail": words}, status_code=status)


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body that was read, and then goes on as before."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return pending.pop() if pending else await receive()

    return again


def user_of(request: Request) -> str | None:
    """Return a Space's visitor, or the account by the cookie that Gradio's own login sets."""
    visitor = (request.scope.get("state") or {}).get("visitor")
    if visitor is not None:
        return f"visitor:{visitor}"
    app = request.scope["app"]
    token = request.cookies.get(f"access-token-{app.cookie_id}") or request.cookies.get(
        f"access-token-unsecure-{app.cookie_id}"
    )
    return app.tokens.get(token)


def parse(body: bytes) -> Any:
    """Return the JSON of a body; None where it is none."""
    try:
        return json.loads(body) if body else None
    except (ValueError, RecursionError):
        return None


def named_sessions(request: Request, path: str, flat: Any) -> set[str]:
    """Return every session that a request names: in its query, its path or its body."""
    found: set[Any] = set(request.query_params.getlist("session_hash"))
    found.add(request.headers.get("session_hash"))
    if path.startswith(HEARTBEAT):
        found.add(path.removeprefix(HEARTBEAT))
    if isinstance(flat, dict):
        found.add(flat.get("session_hash"))
    return {name for name in found if isinstance(name, str) and name}

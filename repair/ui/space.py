"""Where the app runs: a workstation, or a Space with its visitors and its limits.

On a Space everybody who is not signed in is told apart by a random cookie that scripts cannot
read, so that nobody meets another's jobs.
"""

import fcntl
import os
import re
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repair.jobs.supervisor import Limits
from repair.machine import total_memory

VISITOR = re.compile(r"[0-9a-f]{32}")
CALLS = "/gradio_api/queue/"  # what a page sends while it is open
COOKIE = "repair-visitor"
BUCKET = Path("/data")  # where a Space mounts what outlives a restart
KEPT_SECONDS = 24 * 3600  # a visitor's cookie, and a job that nobody touches
MODELS_KEPT = 3  # of the largest size: what one visitor's cases may take on the disk
MODEL_SHARE = 0.2  # of memory: weights as float32, caches, factors and gradients beside them
_SIGN_IN = ("OAUTH_CLIENT_ID", "OAUTH_CLIENT_SECRET", "OAUTH_SCOPES", "OPENID_PROVIDER_URL")


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What the Space that the app runs on offers."""

    name: str  # OWNER/NAME
    is_zero: bool  # no accelerator of its own: repairs cannot run there
    can_sign_in: bool
    memory: int  # bytes
    keeps: bool  # a bucket is mounted, so that jobs outlive a restart

    @property
    def max_model_bytes(self) -> int:
        return int(self.memory * MODEL_SHARE)

    @property
    def limits(self) -> Limits:
        return Limits(
            max_seconds=1800, max_waiting=20, max_per_owner=2, max_kept=10,
            max_kept_bytes=MODELS_KEPT * self.max_model_bytes, keep_seconds=KEPT_SECONDS,
        )

    def describe(self) -> str:
        """Return what a visitor should know before the first click, as Markdown of ours."""
        if self.is_zero:
            return (
                "**This is a ZeroGPU Space, which cannot run repairs**: its accelerator is lent "
                "for a minute at a time, to calls and not to jobs. Look at the finished example "
                f"here; to locate and repair, [duplicate this Space](https://huggingface.co/spaces/"
                f"{self.name}?duplicate=true) on CPU or a GPU of its own, or run it on your own "
                "machine."
            )
        limits = self.limits
        kept = "a day" if self.keeps else "a day, or until this Space restarts"
        sign_in = "Sign in to use your own Hub models. " if self.can_sign_in else ""
        return (
            f"**A shared Space.** {sign_in}One job at a time for everybody, two of yours at most, "
            f"{limits.max_seconds // 60} minutes each, {limits.max_kept} cases or "
            f"{limits.max_kept_bytes / 2**30:.0f} GiB kept, models up to "
            f"{self.max_model_bytes / 2**30:.1f} GiB. Your jobs are visible to you only and are "
            f"deleted after {kept}. For more, [duplicate this Space]"
            f"(https://huggingface.co/spaces/{self.name}?duplicate=true)."
        )


def read_space() -> Space | None:
    """Return the Space that this process runs on, or None on any other machine."""
    if os.environ.get("SYSTEM") != "spaces":
        return None
    return Space(
        name=os.environ.get("SPACE_ID") or "this/space",
        is_zero=os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "true"),
        can_sign_in=all(os.environ.get(name) for name in _SIGN_IN),
        memory=total_memory(),
        keeps=os.access(BUCKET, os.W_OK) and can_be_locked(BUCKET),
    )


def can_be_locked(folder: Path) -> bool:
    """Tell whether files in `folder` take the lock that a jobs root needs: not every mount does."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def jobs_folder(space: Space | None, default: Path) -> Path:
    """Return where jobs are kept: on a Space its mounted bucket, where there is one."""
    return BUCKET / "jobs" if space is not None and space.keeps else default


class VisitorCookie:
    """ASGI middleware: gives every browser a random id, and puts it into the request's state."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        known = find_cookie(scope["headers"])
        visitor = known or secrets.token_hex(16)
        # Anew with the page and with every call: so it lives as long as a job after the last one.
        # Never with a file that a cache on the way may keep and hand to the next visitor.
        sets_cookie = scope["path"] == "/" or scope["path"].startswith(CALLS)
        scope.setdefault("state", {})["visitor"] = visitor

        async def send_with_cookie(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start" and sets_cookie:
                # A Space is shown in a frame of another site; hence SameSite=None.
                cookie = (
                    f"{COOKIE}={visitor}; Path=/; Max-Age={KEPT_SECONDS}; HttpOnly; Secure; "
                    "SameSite=None; Partitioned"
                )
                message = {
                    **message,
                    "headers": [*message["headers"], (b"set-cookie", cookie.encode())],
                }
            await send(message)

        await self.app(scope, receive, send_with_cookie)


def find_cookie(headers: list[tuple[bytes, bytes]]) -> str | None:
    """Return the visitor id among a request's cookies, if it looks like one of ours."""
    for key, value in headers:
        if key.lower() == b"cookie":
            for part in value.decode("latin-1").split(";"):
                name, _, text = part.strip().partition("=")
                if name == COOKIE and VISITOR.fullmatch(text):
                    return text
    return None

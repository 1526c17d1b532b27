"""Who is looking, and with which Hub token: asked anew on every call, kept in memory only.

On a Space the identity is the signed-in user or the visitor's cookie, and the token is the user's
own, from the sign-in. Elsewhere a token is typed into the app, or is the machine's own login, which
only its one analyst may use and never the accounts of a shared app.
"""

import threading
import time
from typing import Any

import gradio as gr

from repair.models.lookup import find_token


class Tokens:
    """The Hub tokens that were typed into this app, by owner; gone when it ends."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.by_owner: dict[str, str] = {}

    def keep(self, owner: str, token: str | None) -> None:
        """Keep a token, or forget the one there is."""
        with self.lock:
            self.by_owner.pop(owner, None)
            if token:
                self.by_owner[owner] = token

    def find(self, owner: str) -> str | None:
        with self.lock:
            return self.by_owner.get(owner)


TOKENS = Tokens()


def owner_of(request: gr.Request | None) -> str:
    """Return whose jobs this visitor may see."""
    name = request.username if request is not None else None
    if name:
        return f"account:{name}"
    scope = _scope_of(request)
    signed_in = _signed_in(scope)
    if signed_in is not None:
        return f"hub:{signed_in['userinfo']['sub']}"
    visitor = (scope.get("state") or {}).get("visitor")
    return f"visitor:{visitor}" if visitor else "local"


def has_lapsed(request: gr.Request | None) -> bool:
    """Tell whether this visitor's sign-in has ended: the cases are there, out of sight."""
    scope = _scope_of(request)
    return bool((scope.get("session") or {}).get("oauth_info")) and _signed_in(scope) is None


def visitor_before(request: gr.Request | None) -> str | None:
    """Return who a signed-in user of a Space was in this browser before; None for nobody."""
    scope = _scope_of(request)
    visitor = (scope.get("state") or {}).get("visitor")
    return f"visitor:{visitor}" if visitor and _signed_in(scope) is not None else None


def token_of(request: gr.Request | None) -> str | None:
    """Return the Hub token that this visitor's jobs may use."""
    signed_in = _signed_in(_scope_of(request))
    if signed_in is not None:
        return str(signed_in["access_token"])
    owner = owner_of(request)
    return TOKENS.find(owner) or (find_token() if owner == "local" else None)


def name_of(request: gr.Request | None) -> str | None:
    """Return the Hub name of a user who signed in on a Space."""
    signed_in = _signed_in(_scope_of(request))
    return str(signed_in["userinfo"]["preferred_username"]) if signed_in else None


def _scope_of(request: gr.Request | None) -> dict[str, Any]:
    """Return the ASGI scope of a call: what middleware put there cannot come from a browser."""
    scope = getattr(getattr(request, "request", None), "scope", None)
    return scope if isinstance(scope, dict) else {}


def _signed_in(scope: dict[str, Any]) -> dict[str, Any] | None:
    """Return the sign-in in a signed session cookie, if it has not expired."""
    info = (scope.get("session") or {}).get("oauth_info")
    if not isinstance(info, dict) or "access_token" not in info or "userinfo" not in info:
        return None
    expires = info.get("expires_at")
    return None if expires is not None and expires < time.time() else info

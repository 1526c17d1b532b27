"""A strict Hub on the loopback address, for the real clients: huggingface_hub, transformers, peft.

Accounts with tokens of different rights, repositories with commits, branches and pull requests, a
store of large files by SHA-256. It refuses what the Hub refuses: unknown, expired and read-only
tokens, names outside the owner's reach, a stale parent commit, large files whose bytes do not have
the hash that was announced, commits that name a large file it does not have, and model cards whose
metadata is not valid. Faults can be ordered: a download cut, an upload cut, a token that expires
after so many requests, an answer that limits the rate.

What it does not prove: Xet (the tests switch it off; the Hub uses it by default), the multipart
uploads of files above 5 GB, the Hub's own limits, scans and permissions of organisations in detail,
which calls each OAuth scope covers, the sign-in's own checks (it gives a whole token to whoever
comes with a code, looks at no client secret, redirect address or scope), what a fine-grained token
may do beyond writing under an owner's name, and that the Hub still answers tomorrow as it does
today.
"""

import base64
import hashlib
import hmac
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import yaml

CLIENT = {"OAUTH_CLIENT_ID": "space-client", "OAUTH_CLIENT_SECRET": "the secret of a space"}
LFS_FROM = 1000  # bytes: safetensors of tiny models must count as large files
LFS_SUFFIXES = (".safetensors", ".png")
RELATIONS = ("adapter", "merge", "quantized", "finetune")
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Account:
    """Whose token it is and what it may do."""

    name: str
    role: str = "write"  # read, write, fineGrained
    scopes: dict[str, list[str]] = field(default_factory=dict)  # fineGrained: owner -> permissions
    orgs: tuple[str, ...] = ()
    roles: dict[str, str] = field(default_factory=dict)  # in an organization; else write
    accepted: set[str] = field(default_factory=set)  # gated repositories
    requests_left: int | None = None  # after so many, the token has expired

    def may_write(self, owner: str) -> bool:
        """Tell whether the token lets its holder write under a name."""
        if self.roles.get(owner) == "read":
            return False
        return self.role == "write" or "repo.write" in self.scopes.get(owner, [])


@dataclass
class Repo:
    """One model repository: its commits, branches and pull requests."""

    is_private: bool = False
    gate: str | None = None
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pull_requests: list[dict[str, Any]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Add a commit that holds exactly `files`."""
        number = f"{len(self.commits)} {ref} {sorted(files)} {time.time_ns()}"
        sha = hashlib.sha1(number.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any) -> None:
        self.status, self.message, self.code, self.more = status, message, code, more


class Moved(Exception):
    """A redirection."""


class Hub:
    """The whole state; `with Hub() as hub:` serves it at `hub.url`."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []  # method and path of every request
        self.seen_tokens: set[str | None] = set()
        self.bytes_sent = self.bytes_received = 0
        self.cut_download_after: int | None = None  # bytes of one file, once
        self.expires_in = 3600  # seconds of a sign-in from here on
        self.cut_upload = 0  # so many uploads of large files fail from here on
        self.limit_rate = 0  # so many requests are answered with 429
        self.bytes_per_second: int | None = None
        self.signing_in = "hf_writer"  # whose browser it is that comes to sign in
        self.codes: dict[str, tuple[str, str]] = {}  # code -> token, nonce
        self.routes: list[tuple[str, re.Pattern[str], Callable[..., Any]]] = []
        self.add_routes()

    def __enter__(self) -> "Hub":
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        options = {"poll_interval": 0.02}
        threading.Thread(target=self.server.serve_forever, kwargs=options, daemon=True).start()
        return self

    def __exit__(self, *details: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add_account(self, token: str, name: str, **more: Any) -> Account:
        self.accounts[token] = Account(name, **more)
        return self.accounts[token]

    def add_repo(self, repo_id: str, files: dict[str, bytes], **more: Any) -> str:
        """Make a repository with one commit and return that."""
        self.repos[repo_id] = Repo(**more)
        return self.repos[repo_id].commit(files)

    def add_routes(self) -> None:
        name = r"(?P<repo_id>[^/]+/[^/]+)"
        for method, pattern, answer in (
            ("GET", "/api/whoami-v2", self.whoami),
            ("POST", "/api/repos/create", self.create),
            ("POST", "/api/validate-yaml", self.validate),
            ("GET", f"/api/models/{name}", self.info),
            ("GET", f"/api/models/{name}/revision/(?P<revision>.+)", self.info),
            ("GET", f"/api/models/{name}/tree/(?P<revision>[^/]+)(?P<path>/.*)?", self.tree),
            ("GET", f"/api/models/{name}/auth-check(?P<write>/write)?", self.auth_check),
            ("GET", f"/api/models/{name}/discussions", self.discussions),
            ("POST", f"/api/models/{name}/preupload/(?P<revision>.+)", self.preupload),
            ("POST", f"/api/models/{name}/commit/(?P<revision>.+)", self.commit),
            ("POST", f"/{name}[.]git/info/lfs/objects/batch", self.batch),
            ("PUT", "/large/(?P<oid>[0-9a-f]{64})", self.put),
            ("GET", "/.well-known/openid-configuration", self.openid),
            ("GET", "/oauth/jwks", self.keys),
            ("GET", "/oauth/authorize", self.authorize),
            ("POST", "/oauth/token", self.give_token),
        ):
            self.routes.append((method, re.compile(pattern), answer))

    # Who asks, and for what.

    def account_of(self, token: str | None) -> Account | None:
        self.seen_tokens.add(token)
        if token is None:
            return None
        account = self.accounts.get(token)
        if account is None:
            raise Refused(401, "Invalid user token.")
        if account.requests_left is not None:
            account.requests_left -= 1
            if account.requests_left < 0:
                raise Refused(401, "Invalid user token: it has expired.")
        return account

    def readable(self, repo_id: str, account: Account | None, *, files: bool = False) -> Repo:
        repo = self.repos.get(repo_id)
        owner = repo_id.split("/")[0]
        is_owner = account is not None and owner in (account.name, *account.orgs)
        if repo is None or (repo.is_private and not is_owner):
            raise Refused(404 if account else 401, "Repository not found", "RepoNotFound")
        if files and repo.gate and not is_owner and repo_id not in (
            account.accepted if account else ()
        ):
            raise Refused(403, "Access to this model is restricted", "GatedRepo")
        return repo

    def writable(self, repo_id: str, account: Account | None, *, pr: bool = False) -> Repo:
        repo = self.readable(repo_id, account)
        if account is None:
            raise Refused(401, "Log in first.")
        if not account.may_write(repo_id.split("/")[0]) and not (pr and account.role == "write"):
            raise Refused(403, "This token has no right to write.")
        if not pr and repo_id.split("/")[0] not in (account.name, *account.orgs):
            raise Refused(403, "You have no right to write to this repository.")
        return repo

    def files_at(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]]:
        sha = repo.refs.get(unquote(revision), unquote(revision))
        if sha not in repo.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo.commits[sha]

    # Answers: (account, query, body, **parts of the path) -> JSON

    def whoami(self, account, query, body):
        if account is None:
            raise Refused(401, "Log in first.")
        return {
            "type": "user", "name": account.name, "fullname": account.name,
            "orgs": [
                {"name": org, "type": "org", "roleInOrg": account.roles.get(org, "write")}
                for org in account.orgs
            ],
            "auth": {"type": "access_token", "accessToken": {
                "role": account.role,
                "fineGrained": {"canReadGatedRepos": False, "global": [], "scoped": [
                    {"entity": {"_id": name, "type": "user", "name": name}, "permissions": rights}
                    for name, rights in account.scopes.items()
                ]},
            }},
        }  # fmt: skip

    def create(self, account, query, body):
        if account is None:
            raise Refused(401, "Log in first.")
        asked = json.loads(body)
        owner = asked.get("organization") or account.name
        repo_id = f"{owner}/{asked['name']}"
        if not account.may_write(owner) or owner not in (account.name, *account.orgs):
            raise Refused(403, "You have no right to create a repository there.")
        if repo_id in self.repos:
            raise Refused(409, "You already created this model repo", url=f"{self.url}/{repo_id}")
        self.repos[repo_id] = Repo(is_private=asked.get("visibility") == "private")
        self.repos[repo_id].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return {"url": f"{self.url}/{repo_id}", "id": repo_id}

    def validate(self, account, query, body):
        content = json.loads(body)["content"]
        errors = card_errors(content)
        if errors:
            raise Refused(400, "Invalid metadata", errors=[{"message": e} for e in errors])
        return {"errors": [], "warnings": []}

    def info(self, account, query, body, repo_id, revision="main"):
        repo = self.readable(repo_id, account)
        sha, files = self.files_at(repo, revision)
        card = {}
        if "README.md" in files:
            card = read_card(files["README.md"].decode()) or {}
        return {
            "id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.is_private,
            "gated": repo.gate or False, "disabled": False, "tags": [], "cardData": card,
            "siblings": [{"rfilename": n, **describe(n, d)} for n, d in sorted(files.items())],
        }  # fmt: skip

    def tree(self, account, query, body, repo_id, revision, path=None):
        _, files = self.files_at(self.readable(repo_id, account), revision)
        return [
            {"type": "file", "path": n, "oid": git_hash(d), **describe(n, d)}
            for n, d in sorted(files.items())
        ]

    def auth_check(self, account, query, body, repo_id, write=None):
        if write:
            self.writable(repo_id, account)
        else:
            self.readable(repo_id, account, files=True)
        return {}

    def discussions(self, account, query, body, repo_id):
        repo = self.readable(repo_id, account)
        found = repo.pull_requests
        return {"discussions": found, "count": len(found), "start": 0}

    def preupload(self, account, query, body, repo_id, revision):
        self.writable(repo_id, account, pr="create_pr" in query)
        return {
            "files": [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if is_large(f["path"], f["size"]) else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
        }

    def batch(self, account, query, body, repo_id):
        if account is None or not account.may_write(repo_id.split("/")[0]):
            raise Refused(403, "This token has no right to write.")
        objects = []
        for asked in json.loads(body)["objects"]:
            flat = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.large:
                flat["actions"] = {"upload": {"href": f"{self.url}/large/{asked['oid']}"}}
            objects.append(flat)
        return {"transfer": "basic", "objects": objects}

    def put(self, account, query, body, oid):
        if self.bytes_per_second:
            time.sleep(len(body) / self.bytes_per_second)
        if self.cut_upload:
            self.cut_upload -= 1
            raise Refused(507, "Storage is not available.")  # which the client does not retry
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "The bytes do not have the announced hash.")
        self.large[oid] = body
        return {}

    def commit(self, account, query, body, repo_id, revision):
        is_pr = "create_pr" in query
        repo = self.writable(repo_id, account, pr=is_pr)
        head, files = self.files_at(repo, revision)
        files = dict(files)
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        header = lines[0]["value"]
        parent = header.get("parentCommit")
        if parent is not None and parent != head:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                data = base64.b64decode(value["content"])
                if is_large(value["path"], len(data)):
                    raise Refused(400, f"{value['path']} must be sent as a large file.")
            elif line["key"] == "lfsFile":
                data = self.large.get(value["oid"])
                if data is None or len(data) != value["size"]:
                    raise Refused(400, f"The large file of {value['path']} was not uploaded.")
            elif line["key"] == "deletedFile" and value["path"] in files:
                del files[value["path"]]
                continue
            else:
                raise Refused(400, f"Cannot do {line['key']} of {value.get('path')}.")
            if value["path"] == "README.md" and card_errors(data.decode()):
                raise Refused(400, f"Invalid metadata: {card_errors(data.decode())}")
            files[value["path"]] = data
        ref = "main"
        if is_pr:
            number = len(repo.pull_requests) + 1
            ref = f"refs/pr/{number}"
            repo.pull_requests.append({
                "num": number, "title": header["summary"], "author": {"name": account.name},
                "status": "open", "isPullRequest": True, "createdAt": "2026-01-01T00:00:00.000Z",
                "repo": {"name": repo_id, "type": "model"},
            })  # fmt: skip
        sha = repo.commit(files, ref)
        answer = {"commitOid": sha, "commitUrl": f"{self.url}/{repo_id}/commit/{sha}"}
        if is_pr:
            answer["pullRequestUrl"] = f"{self.url}/{repo_id}/discussions/{number}"
        return answer


    # Sign-in, by OpenID Connect as a Space does it; consent is given without a question.

    def openid(self, account, query, body):
        return {
            "issuer": self.url, "authorization_endpoint": f"{self.url}/oauth/authorize",
            "token_endpoint": f"{self.url}/oauth/token", "jwks_uri": f"{self.url}/oauth/jwks",
            "id_token_signing_alg_values_supported": ["HS256"],
        }  # fmt: skip

    def keys(self, account, query, body):
        secret = encode64(CLIENT["OAUTH_CLIENT_SECRET"].encode())
        return {"keys": [{"kty": "oct", "kid": "1", "alg": "HS256", "k": secret}]}

    def authorize(self, account, query, body):
        if query["client_id"][0] != CLIENT["OAUTH_CLIENT_ID"]:
            raise Refused(400, "Unknown client.")
        code = hashlib.sha1(query["state"][0].encode()).hexdigest()
        self.codes[code] = (self.signing_in, query["nonce"][0])
        back = query["redirect_uri"][0]
        more = urlencode({"code": code, "state": query["state"][0]})
        raise Moved(f"{back}{'&' if '?' in back else '?'}{more}")

    def give_token(self, account, query, body):
        code = parse_qs(body.decode())["code"][0]
        token, nonce = self.codes.pop(code)
        name = self.accounts[token].name
        claims = {
            "iss": self.url, "aud": CLIENT["OAUTH_CLIENT_ID"], "sub": f"id-of-{name}",
            "iat": int(time.time()), "exp": int(time.time()) + 3600, "nonce": nonce, "name": name,
            "preferred_username": name, "profile": f"{self.url}/{name}", "picture": "",
        }  # fmt: skip
        head = {"alg": "HS256", "typ": "JWT", "kid": "1"}
        text = ".".join(encode64(json.dumps(part).encode()) for part in (head, claims))
        secret = CLIENT["OAUTH_CLIENT_SECRET"].encode()
        sign = encode64(hmac.new(secret, text.encode(), hashlib.sha256).digest())
        return {
            "access_token": token, "token_type": "bearer", "expires_in": self.expires_in,
            "scope": "openid profile", "id_token": f"{text}.{sign}",
        }  # fmt: skip


def encode64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Handler(BaseHTTPRequestHandler):
    """One request to the Hub."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *values: object) -> None:
        pass

    def do_GET(self) -> None:
        self.respond("GET")

    def do_HEAD(self) -> None:
        self.respond("HEAD")

    def do_POST(self) -> None:
        self.respond("POST")

    def do_PUT(self) -> None:
        self.respond("PUT")

    def respond(self, method: str) -> None:
        hub, url = self.hub, urlsplit(self.path)
        body = self.read_body()
        hub.log.append((method, self.path))
        hub.bytes_received += len(body)
        given = self.headers.get("Authorization", "")
        try:
            if hub.limit_rate:
                hub.limit_rate -= 1
                raise Refused(429, "Too many requests")
            token = given.removeprefix("Bearer ") if given.startswith("Bearer ") else None
            # Uploads go to an address that was given out, as to the store behind the Hub.
            account = None if method == "PUT" else hub.account_of(token)
            match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url.path)
            if match:
                self.resolve(method, account, *map(unquote, match.groups()))
                return
            for wanted, pattern, answer in hub.routes:
                parts = pattern.fullmatch(url.path)
                if wanted == method and parts:
                    query = parse_qs(url.query)
                    self.answer(200, answer(account, query, body, **parts.groupdict()))
                    return
            raise Refused(404, f"No such address: {method} {url.path}")
        except Moved as moved:
            self.answer(302, {}, {"Location": str(moved)})
        except Refused as error:
            headers = {"X-Error-Message": error.message}
            if error.code:
                headers["X-Error-Code"] = error.code
            self.answer(error.status, {"error": error.message, **error.more}, headers)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def resolve(
        self, method: str, account: Account | None, repo_id: str, revision: str, path: str
    ) -> None:
        hub = self.hub
        repo = hub.readable(repo_id, account, files=True)
        sha, files = hub.files_at(repo, revision)
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        data = files[path]
        large = is_large(path, len(data))
        start = 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted:
            start = int(wanted[1])
        self.send_response(206 if wanted else 200)
        self.send_header("X-Repo-Commit", sha)
        digest = hashlib.sha256(data).hexdigest() if large else git_hash(data)
        self.send_header("ETag", f'"{digest}"')
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if method == "HEAD":
            return
        end = len(data)
        if hub.cut_download_after is not None and large:
            end, hub.cut_download_after = start + hub.cut_download_after, None
        for i in range(start, end, 1 << 16):
            block = data[i : min(i + (1 << 16), end)]
            self.wfile.write(block)
            hub.bytes_sent += len(block)
            if hub.bytes_per_second:
                time.sleep(len(block) / hub.bytes_per_second)
        if end < len(data):
            self.close_connection = True
            self.wfile.flush()
            self.connection.close()


def is_large(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) and size >= LFS_FROM


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def describe(path: str, data: bytes) -> dict[str, Any]:
    """Return size and hashes of a file, as the Hub lists them."""
    flat: dict[str, Any] = {"size": len(data), "blobId": git_hash(data)}
    if is_large(path, len(data)):
        digest = hashlib.sha256(data).hexdigest()
        flat["lfs"] = {"oid": digest, "sha256": digest, "size": len(data), "pointerSize": 130}
    return flat


def read_card(text: str) -> dict[str, Any] | None:
    """Return a card's metadata, or None where there is no block of it."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    flat = yaml.safe_load(match[1]) if match else None
    return flat if isinstance(flat, dict) else None


def card_errors(text: str) -> list[str]:
    """Return what the Hub would refuse in a card's metadata."""
    try:
        card = read_card(text)
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if card is None:
        return []
    errors = []
    for name in ("library_name", "pipeline_tag", "license", "license_name"):
        if not isinstance(card.get(name, ""), str):
            errors.append(f"{name} must be a string")
    tags = card.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        errors.append("tags must be a list of strings")
    base = card.get("base_model", [])
    if not all(REPO_ID.fullmatch(str(one)) for one in ([base] if isinstance(base, str) else base)):
        errors.append("base_model must be the id of a model on the Hub")
    if card.get("base_model_relation", "finetune") not in RELATIONS:
        errors.append(f"base_model_relation must be one of {RELATIONS}")
    return errors

"""What a name on the Hub means now: short requests, and at most its config.json is downloaded.

Also the words for what the Hub's client raises, the hashes by which the Hub lists files, and whose
a token is. Free of torch.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, get_token, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from repair.models.config import MAX_CONFIG_BYTES
from repair.models.folder import ADAPTER_FILES, SMALL_FILES, WEIGHT_NAME, check_names
from repair.records import RepairError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[\w./-]{1,255}", re.ASCII)
_LICENCE_NAME = re.compile(r"[\w][\w .-]{0,99}", re.ASCII)
_LICENCE_FILE = re.compile(r"\w[\w.-]{0,95}", re.ASCII)
_LICENCE_LINK = re.compile(r"https://[A-Za-z0-9][\w.-]{0,99}/[\w./~-]{0,200}", re.ASCII)
_UNREACHED = "cannot be reached: there is no way to the Hub from here"
TIMEOUT = 30  # seconds to wait for an answer about a repository
MAX_FILES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class HubModel:
    """What the Hub says about a model or adapter, at one commit."""

    repo_id: str
    asked: str | None  # the branch, tag or commit that was asked for
    commit: str
    is_shared: bool  # anyone may read it, without a token and without accepting terms
    licence: str | None
    kind: str  # "model" or "adapter"
    sizes: dict[str, int]  # the allow-listed files, in bytes
    hashes: dict[str, str] = field(repr=False)  # SHA-256, or git's SHA-1 of small files
    # license_name and license_link: what "other" stands for
    licence_terms: dict[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes.values())


def parse_hub_id(source: str, revision: str | None = None) -> tuple[str, str | None]:
    """Return (OWNER/NAME, revision or None) of `OWNER/NAME` or `OWNER/NAME@REVISION`.

    Raises RepairError for what is neither, and for two different revisions.
    """
    name, _, behind = source.strip().partition("@")
    if behind and revision and behind != revision:
        raise RepairError(
            f"Two revisions were given: {behind} behind the name and {revision}. Give one."
        )
    revision = behind or revision or None
    if not HUB_ID.fullmatch(name) or ".." in name:
        raise RepairError(
            f"There is no model folder {source[:200]!r}, and it is no Hub id either. Give a model "
            "folder, OWNER/NAME or OWNER/NAME@REVISION, or demo:begin, demo:middle, demo:end or "
            "demo:clean."
        )
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise RepairError(
            f"{revision[:200]!r} is not a revision. Give a branch, a tag or a commit."
        )
    return name, revision


def find_token() -> str | None:
    """Return the token of this machine's user: $HF_TOKEN, or the one `hf auth login` kept."""
    return os.environ.get("HF_TOKEN") or get_token()


def describe_account(token: str) -> str:
    """Return whose token it is and whether it may write; raises RepairError for a bad one."""
    if not re.fullmatch(r"[\x21-\x7e]{1,400}", token):
        raise RepairError(
            "That is not a Hub token: it is empty, or holds spaces or invisible characters. Copy "
            "it again."
        )
    with hub_errors("The Hub account"):
        account = HfApi(token=token).whoami()
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    rights = {"read": "may read only", "write": "may read and write"}.get(role, "limited rights")
    return f"{account.get('name')} ({rights})"


def look_up(
    source: str, revision: str | None = None, *, token: str | None = None
) -> HubModel:
    """Return what the Hub says about a model; one or two short requests, nothing is downloaded.

    Names are checked as those of a folder are. Raises RepairError, in the words of what to do, for
    what is missing, private, gated, limited or out of reach.
    """
    repo_id, asked = parse_hub_id(source, revision)
    api = HfApi(token=token or False)
    with hub_errors(repo_id, asked):
        info = api.model_info(repo_id, revision=asked, files_metadata=True, timeout=TIMEOUT)
        if info.gated:  # described to anyone, readable only to some: better told now than later
            api.auth_check(repo_id)
    commit = info.sha or ""
    if not COMMIT.fullmatch(commit):
        raise RepairError(f"The Hub gave no commit for {repo_id}. Try again later.")
    files = {f.rfilename: f for f in info.siblings or [] if "/" not in f.rfilename}
    if len(files) > MAX_FILES:
        raise RepairError(
            f"{repo_id} has {len(files)} files, so it is not a model repository. Give another."
        )
    is_adapter = "adapter_config.json" in files and not any(
        WEIGHT_NAME.fullmatch(name) for name in files
    )
    if not is_adapter:
        check_names(sorted(files))
    allowed = ADAPTER_FILES if is_adapter else SMALL_FILES
    wanted = [
        name
        for name in sorted(files)
        if name in allowed or (not is_adapter and WEIGHT_NAME.fullmatch(name))
    ]
    card = info.card_data.to_dict() if info.card_data else {}
    licence = card.get("license")
    return HubModel(
        repo_id=repo_id,
        asked=asked,
        commit=commit,
        is_shared=info.private is False and not info.gated,
        licence=licence if isinstance(licence, str) and _REVISION.fullmatch(licence) else None,
        kind="adapter" if is_adapter else "model",
        sizes={name: files[name].size or 0 for name in wanted},
        hashes={name: listed_hash(files[name]) for name in wanted},
        licence_terms=_terms(card, repo_id, commit),
    )


def _terms(card: Mapping[str, Any], repo_id: str, commit: str) -> dict[str, str]:
    """Return the name and link by which a card tells its licence, where both can be shown as they
    are; a file of the repository becomes its address."""
    name, link = card.get("license_name"), card.get("license_link")
    if not (isinstance(name, str) and isinstance(link, str) and _LICENCE_NAME.fullmatch(name)):
        return {}
    if _LICENCE_FILE.fullmatch(link):
        link = f"https://huggingface.co/{repo_id}/blob/{commit}/{link}"
    return {"license_name": name, "license_link": link} if _LICENCE_LINK.fullmatch(link) else {}


def read_config(found: HubModel, *, token: str | None = None) -> dict[str, Any]:
    """Return the config.json of what was looked up, at its commit; {} where there is none to be
    had, where it is large, or where it is not what the Hub lists."""
    if not 0 < found.sizes.get("config.json", 0) <= MAX_CONFIG_BYTES:
        return {}
    with TemporaryDirectory() as folder, hub_errors(found.repo_id):
        path = hf_hub_download(
            found.repo_id, "config.json", revision=found.commit, token=token or False,
            local_dir=folder,
        )  # fmt: skip
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    if git_hash(data) != found.hashes["config.json"]:
        return {}
    try:
        config = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


@contextlib.contextmanager
def hub_errors(
    repo_id: str, revision: str | None = None, *, after: str = "Nothing was changed."
) -> Iterator[None]:
    """Turn what the Hub's client raises into RepairError: what happened, what to do, and what
    became of the work (`after`)."""
    try:
        yield
        return
    except GatedRepoError:
        text = (
            f"is gated: accept its terms on huggingface.co/{repo_id}, then use a token of that "
            "account that may read it"
        )
    except RepositoryNotFoundError:
        text = "does not exist on the Hub, or is private and the token in use may not read it"
    except RevisionNotFoundError:
        text = f"has no revision {revision!r}: give a branch, a tag or a commit of it"
    except HfHubHTTPError as error:
        text = _refusal(error)
    except HFValidationError:
        text = "is no name that the Hub accepts"
    except (OfflineModeIsEnabled, ConnectionError, HTTPError):
        text = _UNREACHED
    except (LocalEntryNotFoundError, IncompleteSnapshotError) as error:
        # The client's words for "not here and not to be had"; why, if it knows, is behind them.
        cause = error.__cause__ or error.__context__
        text = _refusal(cause) if isinstance(cause, HfHubHTTPError) else _UNREACHED
    except OSError as error:  # Such as a disk that filled up meanwhile.
        name = type(error).__name__
        text = f"cannot be written to the disk ({error.strerror or name})"
        if name.startswith("Xet"):  # the store behind the Hub: its errors are files' errors, too
            text = f"was refused by the Hub's file store ({name}: the token may have expired)"
    raise RepairError(f"{repo_id} {text}. {after}")


def _refusal(error: HfHubHTTPError) -> str:
    """Return what an answer of the Hub means, and what to do."""
    code = error.response.status_code if error.response is not None else 0
    said = ascii(str(error.server_message))[1:-1][:160]
    return {
        401: "was refused: the Hub does not accept the token (expired, or mistyped)",
        403: "was refused: the token's rights do not reach it",
        412: "changed on the Hub while we were at it: look at it there, then try again",
        429: "was refused: the Hub limits how often it is asked. Wait some minutes",
    }.get(code, f"was refused by the Hub ({code}: {said})")


def listed_hash(file: Any) -> str:
    """Return the hash that the Hub lists for a file: SHA-256 of a large one, else git's."""
    return str(file.lfs.sha256 if file.lfs is not None else file.blob_id or "")


def git_hash(data: bytes) -> str:
    """Return git's own SHA-1 of a file's content, by which the Hub lists small files."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

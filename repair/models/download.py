"""A model on the Hub becomes a folder here: the only place that downloads a model. Free of torch.

`look_up` asks the Hub what a name means now and resolves it, once, to a commit; `fetch` brings the
allow-listed files of that commit. What anyone may read is kept by commit and shared; what needs a
token goes to a folder of the job alone. Every file is checked against the hash that the Hub lists:
small ones here, weights by the gate (`staging`), which hashes them anyway.

What it does not know: whether the Hub's own list is right. A file that was cut off is fetched
anew, as the Hub's client does; files that are whole are not.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from repair.models.folder import ADAPTER_FILES, SMALL_FILES, WEIGHT_NAME, check_names
from repair.records import RepairError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[\w./-]{1,255}", re.ASCII)
TIMEOUT = 30  # seconds to wait for an answer about a repository
POLL_SECONDS = 0.5
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

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A Hub model on this disk; its JSON form stands in a job's `sources.json`."""

    repo_id: str
    asked: str | None
    commit: str
    kind: str  # "model" or "adapter"
    folder: str
    licence: str | None
    hashes: dict[str, str]  # as the Hub lists them: SHA-256, or git's SHA-1 of small files

    @property
    def sha256(self) -> dict[str, str]:
        return {name: digest for name, digest in self.hashes.items() if len(digest) == 64}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, flat: Mapping[str, Any]) -> "Fetched":
        return cls(**flat)


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
    licence = (info.card_data or {}).get("license") if info.card_data else None
    return HubModel(
        repo_id=repo_id,
        asked=asked,
        commit=commit,
        is_shared=info.private is False and not info.gated,
        licence=licence if isinstance(licence, str) and _REVISION.fullmatch(licence) else None,
        kind="adapter" if is_adapter else "model",
        sizes={name: files[name].size or 0 for name in wanted},
        hashes={name: _hash_of(files[name]) for name in wanted},
    )


def fetch(
    found: HubModel,
    *,
    token: str | None,
    private: Path | None = None,
    progress: Callable[[float, float, str], None] = lambda done, total, text: None,
) -> Fetched:
    """Download what `look_up` found, or find it in the cache, and return where it is.

    What not everyone may read goes to `private` where that is given. Raises RepairError for what
    the Hub refuses, for a file that is not the one it lists, and for a disk too full.
    """
    shared = found.is_shared or private is None
    place = cache_folder() / found.repo_id.replace("/", "--") if shared else private
    target = place / found.commit
    if target.is_dir():
        os.utime(target)  # used now: `make_room` goes by it
    else:
        _download(found, target, token=token, progress=progress)
    if shared:
        _record_path(found.repo_id, found.commit).write_text(json.dumps(asdict(found)))
    fetched = Fetched(
        repo_id=found.repo_id,
        asked=found.asked,
        commit=found.commit,
        kind=found.kind,
        folder=str(target),
        licence=found.licence,
        hashes=found.hashes,
    )
    check_small_files(fetched)
    return fetched


def make_room(found: HubModel) -> None:
    """Delete the shared downloads that were used longest ago, until `found` fits the disk.

    Only where one job runs at a time, and never the one that is wanted.
    """
    cache = cache_folder()
    if not cache.is_dir():
        return
    kept = [path for path in cache.glob("*/*") if path.is_dir() and path.name != found.commit]
    for folder in sorted(kept, key=lambda path: path.stat().st_mtime):
        if found.num_bytes <= 0.8 * shutil.disk_usage(cache).free:
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".json").unlink(missing_ok=True)


def find_cached(source: str, revision: str | None = None) -> HubModel | None:
    """Return what `look_up` said about a commit that is in the shared cache; needs no network.

    None where another revision than a full commit was asked for, or the commit is not there.
    """
    repo_id, asked = parse_hub_id(source, revision)
    if asked is None or not COMMIT.fullmatch(asked):
        return None
    path = _record_path(repo_id, asked)
    try:
        found = HubModel(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if path.with_suffix("").is_dir() else None


def _record_path(repo_id: str, commit: str) -> Path:
    return cache_folder() / repo_id.replace("/", "--") / f"{commit}.json"


def cache_folder() -> Path:
    """Return where shared downloads are kept: $REPAIR_CACHE, or ~/.cache/repair/models."""
    named = os.environ.get("REPAIR_CACHE")
    return (Path(named) if named else Path.home() / ".cache" / "repair" / "models").resolve()


@contextlib.contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn what the Hub's client raises into RepairError: what happened and what to do."""
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
        code = error.response.status_code if error.response is not None else 0
        text = {
            401: "was refused: the Hub does not accept the token (expired, or mistyped)",
            403: "was refused: the token's rights do not reach it",
            412: "changed on the Hub while we were at it: look at it there, then try again",
            429: "was refused: the Hub limits how often it is asked. Wait some minutes",
        }.get(code, f"was refused by the Hub ({code}: {ascii(str(error.server_message))[1:160]})")
    except HFValidationError:
        text = "is no name that the Hub accepts"
    except (OfflineModeIsEnabled, ConnectionError, HTTPError):
        text = "cannot be reached: there is no way to the Hub from here"
    except OSError as error:  # Such as a disk that filled up meanwhile.
        text = f"cannot be written to the disk ({error.strerror or type(error).__name__})"
    raise RepairError(f"{repo_id} {text}. Nothing was lost; what is whole stays, start again.")


def _hash_of(file: Any) -> str:
    """Return the hash that the Hub lists for a file: SHA-256 of a large one, else git's."""
    return str(file.lfs.sha256 if file.lfs is not None else file.blob_id or "")


def _download(
    found: HubModel,
    target: Path,
    *,
    token: str | None,
    progress: Callable[[float, float, str], None],
) -> None:
    """Bring all files into a folder beside `target`, which takes its name when whole."""
    partial = target.with_name(f"{target.name}.partial")
    with hub_errors(found.repo_id, found.asked):
        partial.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Left by a download that was killed: the client never goes on with these.
        for path in partial.glob(".cache/huggingface/download/*.incomplete"):
            path.unlink(missing_ok=True)
        missing = found.num_bytes - _bytes_in(partial)
        free = shutil.disk_usage(partial).free
        if missing > 0.95 * free:
            raise RepairError(
                f"{found.repo_id} still needs {missing / 2**30:.1f} GiB, but {free / 2**30:.1f} "
                f"GiB are free. Free some disk space ({target.parent} holds earlier downloads) "
                "and start again."
            )
        with _watching(partial, found, progress):
            snapshot_download(
                found.repo_id,
                revision=found.commit,
                local_dir=partial,
                allow_patterns=list(found.sizes),
                token=token or False,
                max_workers=4,
            )
        shutil.rmtree(partial / ".cache", ignore_errors=True)
        for name, size in found.sizes.items():
            path = partial / name
            if not path.is_file() or path.stat().st_size != size:
                path.unlink(missing_ok=True)
                raise RepairError(f"{name} of {found.repo_id} did not come whole. Start again.")
        try:
            os.replace(partial, target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _watching(
    folder: Path, found: HubModel, progress: Callable[[float, float, str], None]
) -> Iterator[None]:
    """Tell how many bytes are there, twice a second, while the block downloads them."""
    is_done = threading.Event()

    def watch() -> None:
        while not is_done.wait(POLL_SECONDS):
            there = min(_bytes_in(folder), found.num_bytes)
            text = f"{there / 2**20:.0f} of {found.num_bytes / 2**20:.0f} MiB"
            progress(there, found.num_bytes, text)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_done.set()
        watcher.join()


def _bytes_in(folder: Path) -> int:
    """Return the bytes of the files below a folder, those still being written included."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def check_small_files(found: Fetched) -> None:
    """Raise RepairError for a small file that is not the one the Hub lists at this commit.

    To be called on every use: the folder may have been touched since.
    """
    folder = Path(found.folder)
    for name, listed in found.hashes.items():
        path = folder / name
        if len(listed) == 64 and path.is_file() and not path.is_symlink():
            continue  # a large file: whoever loads it hashes it
        try:
            data = path.read_bytes()
        except OSError:
            data = b""
        if hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() != listed:
            raise RepairError(
                f"{name} of {found.repo_id} is not the file that the Hub lists at commit "
                f"{found.commit[:12]}. Delete {folder} and start again."
            )


def sources_from_json(flat: Mapping[str, Any]) -> dict[str, Fetched]:
    """Return what a job has fetched, by source as typed; what cannot be read is left out."""
    known = {}
    for source, entry in flat.items():
        with contextlib.suppress(TypeError):
            known[source] = Fetched.from_json(entry)
    return known

"""A model on the Hub becomes a folder here: the only place that downloads a model. Free of torch.

`lookup` resolves a name, once, to a commit; `fetch` brings the allow-listed files of that commit.
What anyone may read is kept by commit and shared; what needs a token goes to a folder of the job
alone. Every file is checked against the hash that the Hub lists: small ones here, weights by the
gate (`staging`), which hashes them anyway.

What it does not know: whether the Hub's own list is right. A file that was cut off is fetched
anew, as the Hub's client does; files that are whole are not.
"""

import contextlib
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from repair.models.lookup import COMMIT, HubModel, git_hash, hub_errors, parse_hub_id
from repair.records import RepairError

POLL_SECONDS = 0.5


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
    licence_terms: dict[str, str] = field(default_factory=dict)

    @property
    def sha256(self) -> dict[str, str]:
        return {name: digest for name, digest in self.hashes.items() if len(digest) == 64}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, flat: Mapping[str, Any]) -> "Fetched":
        return cls(**flat)


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
    after = "What came whole is kept: start again."
    with hub_errors(found.repo_id, found.asked, after=after), _alone(target, progress):
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
        licence_terms=found.licence_terms,
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
def _alone(target: Path, progress: Callable[[float, float, str], None]) -> Iterator[None]:
    """Wait until no other process fetches `target`: two would spoil each other's files."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(target.with_name(f"{target.name}.lock"), "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress(0, 1, "Another job is fetching this model; waiting for it")
                time.sleep(POLL_SECONDS)
        yield


def _download(
    found: HubModel,
    target: Path,
    *,
    token: str | None,
    progress: Callable[[float, float, str], None],
) -> None:
    """Bring all files into a folder beside `target`, which takes its name when whole."""
    partial = target.with_name(f"{target.name}.partial")
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
    os.replace(partial, target)


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
        if git_hash(data) != listed:
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

"""Brings what a job needs from the Hub, then becomes its worker: `… -m repair.jobs.fetch FOLDER`.

The only process of a job that has the network and a token, which comes on its standard input. It
opens no model. When everything is there, `exec` puts the worker in its place: same process for
whoever watches it, nothing left of the token, and no way to the Hub from there on. Free of torch.
"""

import os
import sys
import traceback
from pathlib import Path
from typing import Any

from repair.jobs import store
from repair.jobs.launch import MAX_DOWNLOAD, NETWORK_NAMES, OFFLINE, hub_sources, worker_command
from repair.jobs.store import JobStatus
from repair.jobs.worker import Reporter, append_log, mark_running, write_end
from repair.models.download import (
    Fetched,
    check_small_files,
    fetch,
    find_cached,
    make_room,
    sources_from_json,
)
from repair.models.lookup import HubModel, look_up
from repair.records import EXIT_UNEXPECTED, RepairError


def fetch_sources(folder: Path, token: str | None, reporter: Reporter) -> None:
    """Fetch every Hub model of the request and note in `sources.json` where it is.

    What the job fetched before is kept, at the commit it had: a branch may have moved since.
    """
    request = store.read_object(folder / "request.json")
    known = read_sources(folder)
    # In the app, one owner's private models must never serve another's job.
    private = folder / "download" if (folder / "owner.json").is_file() else None
    for source in dict.fromkeys(hub_sources(request)):
        if source in known and Path(known[source].folder).is_dir():
            check_small_files(known[source])
            continue
        reporter.step("download", f"Looking for {source} on the Hub")
        revision = request.get("revision") if source == request.get("model") else None
        if source in known:  # its files are gone; the commit stays what it was
            source_id, revision = known[source].repo_id, known[source].commit
        else:
            source_id = source
        found = find_cached(source_id, revision) or look_up(source_id, revision, token=token)
        check_kind(found, source, request)
        limit = int(os.environ.get(MAX_DOWNLOAD) or 0)
        if limit and found.num_bytes > limit:
            raise RepairError(
                f"{found.repo_id} has {found.num_bytes / 2**30:.1f} GiB; here at most "
                f"{limit / 2**30:.1f} GiB are taken. Use a machine of your own, or larger hardware."
            )
        if limit:  # Many share the disk, and none of them can free it.
            make_room(found)
        reporter.note(f"{found.repo_id} is at commit {found.commit}")
        reporter.step("download", f"Downloading {found.repo_id} ({found.num_bytes >> 20} MiB)")
        known[source] = fetch(found, token=token, private=private, progress=reporter.progress)
        write_sources(folder, known)


def check_kind(found: HubModel, source: str, request: dict[str, Any]) -> None:
    """Raise RepairError for an adapter where a whole model is needed, before the download."""
    may_be_adapter = source == request.get("model") and request.get("adapter_base")
    if found.kind == "adapter" and not may_be_adapter:
        raise RepairError(
            f"{found.repo_id} is a LoRA adapter, not a whole model. Give the model that it was "
            "made for as well (--adapter-base, or the field for it): the one that the adapter "
            "names itself is not trusted."
        )
    if found.kind == "model" and may_be_adapter:
        raise RepairError(
            f"{found.repo_id} is a whole model, so it needs no base. Leave --adapter-base out."
        )


def read_sources(folder: Path) -> dict[str, Fetched]:
    """Return what a job has fetched so far, by source as typed."""
    return sources_from_json(store.read_object(folder / store.SOURCES))


def write_sources(folder: Path, known: dict[str, Fetched]) -> None:
    """Replace `sources.json`."""
    store.write_json(folder / store.SOURCES, {key: value.to_json() for key, value in known.items()})


def begin(folder: Path) -> tuple[str | None, JobStatus, Reporter]:
    """Take the token from standard input, which is closed then, and mark the job as running."""
    token = sys.stdin.readline().strip() or None
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    status, reporter = mark_running(folder)
    reporter.step("start", "Starting")
    return token, status, reporter


def end_badly(folder: Path, status: JobStatus, reporter: Reporter, error: Exception) -> int:
    """Say why a job that talks to the Hub ended, and return the exit status."""
    if isinstance(error, RepairError):
        kind, code, text = "refused", error.exit_code, str(error)
    else:
        append_log(folder, "".join(traceback.format_exception(error)))
        kind, code = "failed", EXIT_UNEXPECTED
        text = (
            f"Unexpected failure ({type(error).__name__}). The details are in "
            f"{folder / 'log.txt'}."
        )
    reporter.end(kind, text)
    write_end(folder, status, state="failed", exit_code=code, message=text)
    return code


def main(folder: Path) -> int:
    """Fetch, then become the worker; returns an exit status only where that is not reached."""
    token, status, reporter = begin(folder)
    try:
        fetch_sources(folder, token, reporter)
    except Exception as error:
        return end_badly(folder, status, reporter, error)
    env = {key: value for key, value in os.environ.items() if key not in NETWORK_NAMES} | OFFLINE
    sys.stdout.flush()
    sys.stderr.flush()
    command = worker_command(folder, store.read_object(folder / "request.json"))
    os.execve(sys.executable, command, env)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]).resolve())
    sys.stdout.flush()
    os._exit(code)  # threads of the Hub's client must not keep a finished job alive

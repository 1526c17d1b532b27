"""The output folder of one call of the command line: taken, and given back on a refusal.

A folder that is not empty is refused unless it is to be resumed or overwritten. When a call
ends with exit status 2, everything it wrote is gone again; a folder that was to be overwritten
is back. Free of torch.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from repair.jobs import store
from repair.records import RepairError

KEPT_NAMES = ("request.json", "status.json", "events.jsonl", "log.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFolder:
    """A folder taken for one call, and what is needed to give it back."""

    folder: Path
    created: tuple[Path, ...]  # folders this call made, outermost first
    aside: Path | None  # where the overwritten folder waits
    paths_before: frozenset[Path]
    kept: dict[str, bytes]  # small files of the run that is resumed

    def give_back(self) -> None:
        """Undo what this call wrote (exit status 2)."""
        if self.aside is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.rename(self.aside, self.folder)
            return
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if path in self.paths_before:
                continue
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()
        for name, data in self.kept.items():
            (self.folder / name).write_bytes(data)
        for path in reversed(self.created):
            path.rmdir()

    def keep(self) -> None:
        """Make what this call wrote final (every other exit status)."""
        if self.aside is not None:
            shutil.rmtree(self.aside)


def take_output(out: Path, *, resume: bool, overwrite: bool, precious: list[Path]) -> OutputFolder:
    """Take `out` for one call; `precious` paths must not lie inside a folder to overwrite.

    Raises RepairError for a file, a folder that is not empty and is not to be resumed or
    overwritten, one that another process is using, and one that cannot be written.
    """
    if resume and overwrite:
        raise RepairError("--resume and --overwrite contradict each other. Give one of them.")
    folder = Path(os.path.abspath(out))
    if folder.is_symlink():
        raise RepairError(f"--out {out} is a link. Give the folder itself.")
    if folder.exists() and not folder.is_dir():
        raise RepairError(f"--out {out} is a file. Give a new or empty folder.")
    is_filled = folder.is_dir() and any(folder.iterdir())
    if is_filled:
        status = store.read_status(folder)
        if status.state == "running" and store.is_alive(status):
            raise RepairError(
                f"--out {out} is in use by process {status.pid}. Wait for it, or choose another."
            )
    if is_filled and not (resume or overwrite):
        raise RepairError(
            f"--out {out} is not empty. Choose a new folder, continue the run in it with "
            "--resume, or replace it with --overwrite."
        )
    if resume and is_filled and not (folder / "request.json").is_file():
        raise RepairError(
            f"--out {out} holds no run to resume. Choose a new folder, or use --overwrite."
        )
    try:
        return _take(folder, is_overwritten=is_filled and overwrite, precious=precious)
    except OSError as error:
        raise RepairError(
            f"--out {out} cannot be written ({error.strerror}). Choose another folder."
        ) from None


def _take(folder: Path, *, is_overwritten: bool, precious: list[Path]) -> OutputFolder:
    aside = None
    if is_overwritten:
        for path in [Path.home(), Path.cwd(), *precious]:
            if path.resolve().is_relative_to(folder.resolve()):
                raise RepairError(
                    f"--out {folder} holds {path}, which --overwrite would delete. "
                    "Choose another folder."
                )
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        aside.rmdir()
        os.rename(folder, aside)
    created = []
    for path in [*reversed(folder.parents), folder]:
        if not path.exists():
            path.mkdir()
            created.append(path)
    kept = {
        name: (folder / name).read_bytes() for name in KEPT_NAMES if (folder / name).is_file()
    }
    # The folder must be writable before anything long begins.
    tempfile.TemporaryFile(dir=folder).close()
    return OutputFolder(
        folder=folder,
        created=tuple(created),
        aside=aside,
        paths_before=frozenset(folder.rglob("*")),
        kept=kept,
    )

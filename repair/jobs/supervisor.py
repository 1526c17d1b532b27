"""The lane of one jobs root: one job at a time has the machine, others wait, any can be stopped.

Free of torch.
"""

import collections
import contextlib
import fcntl
import shutil
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from repair.jobs import store
from repair.jobs.launch import (
    Worker,
    finish_worker,
    kill_group,
    start_worker,
    sweep,
    wait_for_end,
)
from repair.jobs.store import JobStatus
from repair.records import EXIT_INTERRUPTED, EXIT_UNEXPECTED, RepairError

INTERRUPTED = "stopped (interrupted), resumable"
MAX_WAITING = 20  # jobs in the lane behind the one that runs
SWEEP_SECONDS = 600  # how often an idle lane looks for jobs that are too old


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one owner and all together may ask of a lane; None: no limit."""

    max_seconds: int | None = None  # of one job
    max_waiting: int = MAX_WAITING  # jobs in the queue
    max_per_owner: int | None = None  # jobs of one owner, the running one included
    max_kept: int | None = None  # cases of one owner on the disk
    max_kept_bytes: int | None = None  # of all that one owner keeps
    keep_seconds: int | None = None  # an idle job older than this is deleted


class Supervisor:
    """The lane of one jobs root: starts jobs in turn, stops them, and settles what a crash left.

    Raises RepairError when another app holds the same root.
    """

    def __init__(self, root: Path, limits: Limits | None = None) -> None:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.root = root
        self.limits = limits or Limits()
        self.lock_file = open(root / ".lock", "w")  # noqa: SIM115  held while the app lives
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.lock_file.close()
            if not isinstance(error, BlockingIOError):
                raise RepairError(
                    f"The jobs folder {root} cannot be locked ({error.strerror}). Give one on a "
                    "local disk with --jobs-root."
                ) from None
            raise RepairError(
                f"Another app already uses the jobs folder {root}. "
                "Stop it, or give this one its own with --jobs-root."
            ) from None
        self.condition = threading.Condition()  # of a lock that its holder may take again
        self.waiting: collections.deque[Path] = collections.deque()
        self.current: tuple[Path, Worker] | None = None
        self.stopped: set[Path] = set()
        self.tokens: dict[Path, str] = {}  # in memory only, until the job starts
        self.is_closing = False
        recover(root)
        self.lane = threading.Thread(target=self._run_lane, name="job lane", daemon=True)
        self.lane.start()

    def submit(self, folder: Path, *, token: str | None = None) -> None:
        """Queue the job in `folder`.

        Raises RepairError when it is queued or running already, and when there is no room: the
        job is then stopped, and can be started again.
        """
        with self.condition:
            if self.is_busy(folder):
                raise RepairError("This job is already running. Stop it first, or wait.")
            try:
                self.check_room(store.read_owner(folder))
            except RepairError as error:
                store.write_status(folder, stopped_status(str(error)))
                raise
            store.write_status(folder, JobStatus(state="queued"))
            if token:
                self.tokens[folder] = token
            self.waiting.append(folder)
            self.condition.notify_all()

    def check_room(self, owner: str) -> None:
        """Raise RepairError when the queue, or the owner's part of it, is full."""
        most, own_most = self.limits.max_waiting, self.limits.max_per_owner
        with self.condition:
            waiting = list(self.waiting)
            active = [*waiting, *([self.current[0]] if self.current else [])]
        if len(waiting) >= most:
            raise RepairError(
                f"{len(waiting)} jobs are waiting, and no more than {most} may. Start this one "
                "again when some of them are done."
            )
        num_own = sum(store.read_owner(other) == owner for other in active)
        if own_most is not None and num_own >= own_most:
            raise RepairError(
                f"{num_own} of your jobs are waiting or running, and {own_most} is the most. Stop "
                "one, or wait."
            )

    def check_another(self, owner: str) -> None:
        """Raise RepairError when the owner keeps as many cases, or as many bytes, as may be."""
        most, most_bytes = self.limits.max_kept, self.limits.max_kept_bytes
        if most is not None and len(store.list_jobs(self.root, owner=owner, limit=most)) >= most:
            raise RepairError(
                f"You keep {most} cases here, and that is the most. Delete one under Cases."
            )
        if most_bytes is None:
            return
        kept = store.kept_bytes(self.root, owner=owner)
        if kept >= most_bytes:
            raise RepairError(
                f"Your cases take {kept / 2**30:.1f} GiB here, and {most_bytes / 2**30:.1f} GiB is "
                "the most. Delete one under Cases."
            )

    def is_busy(self, folder: Path) -> bool:
        """Tell whether the job in `folder` is in the lane."""
        with self.condition:
            return folder in self.waiting or (
                self.current is not None and self.current[0] == folder
            )

    def num_before(self, folder: Path) -> int:
        """Return how many jobs go before this one."""
        with self.condition:
            waiting = list(self.waiting)
            ahead = waiting.index(folder) if folder in waiting else 0
            return ahead + (self.current is not None and self.current[0] != folder)

    def stop(self, folder: Path) -> None:
        """Stop the job in `folder` at once; nothing happens when it is not in the lane."""
        with self.condition:
            if folder in self.waiting:
                self.waiting.remove(folder)
                self.tokens.pop(folder, None)
                store.write_status(folder, stopped_status("Stopped before it began."))
            elif self.current is not None and self.current[0] == folder:
                self.stopped.add(folder)
                kill_group(self.current[1].process)
                status = store.read_status(folder)
                if status.is_active:
                    store.write_status(folder, stopped_status("Stopped; resumable.", status))

    def close(self) -> None:
        """Stop everything and leave the jobs root; what runs is marked as stopped."""
        with self.condition:
            self.is_closing = True
            for folder in [*self.waiting, *([self.current[0]] if self.current else [])]:
                self.stop(folder)
            self.condition.notify_all()
        self.lane.join(timeout=10)
        self.lock_file.close()

    def _run_lane(self) -> None:
        while True:
            with self.condition:
                if self.limits.keep_seconds is not None:
                    store.sweep(
                        self.root, older_than=self.limits.keep_seconds, keep=set(self.waiting)
                    )
                self.condition.wait_for(
                    lambda: self.waiting or self.is_closing, timeout=SWEEP_SECONDS
                )
                if self.is_closing:
                    return
                if not self.waiting:
                    continue
                folder = self.waiting.popleft()
                self.stopped.discard(folder)
                try:
                    worker = start_worker(folder, self.tokens.pop(folder, None))
                except OSError as error:
                    message = f"The worker could not be started: {error.strerror or error}."
                    with contextlib.suppress(OSError):  # the same full disk; the lane goes on
                        store.write_status(
                            folder,
                            JobStatus(
                                state="failed",
                                exit_code=EXIT_UNEXPECTED,
                                ended=store.now(),
                                message=message,
                            ),
                        )
                    continue
                self.current = (folder, worker)
            try:
                is_late = not wait_for_end(worker.process, self.limits.max_seconds)
                if is_late:
                    self._end_late(folder, worker)
                finish_worker(folder, worker, is_stopped=folder in self.stopped)
            except OSError as error:  # A full disk, or a folder that is gone: the next job goes on.
                print(f"The job in {folder} could not be settled: {error}", file=sys.stderr)
            finally:
                with self.condition:
                    self.current = None

    def _end_late(self, folder: Path, worker: Worker) -> None:
        """End a job that took longer than it may."""
        kill_group(worker.process)
        minutes = (self.limits.max_seconds or 0) // 60
        words = (
            f"Stopped: a job may take {minutes} minutes here. What was saved is kept, and it can "
            "be resumed. Use the quick profile, or a machine of your own."
        )
        wait_for_end(worker.process)
        status = store.read_status(folder)
        if status.is_active:  # else it ended in the last moment, by itself
            store.write_status(folder, stopped_status(words, status))


def stopped_status(message: str, before: JobStatus | None = None) -> JobStatus:
    """Return the status of a job that was stopped and can be resumed."""
    return JobStatus(
        state="stopped",
        exit_code=EXIT_INTERRUPTED,
        pid=before.pid if before else None,
        pid_started=before.pid_started if before else None,
        started=before.started if before else None,
        ended=store.now(),
        message=message,
    )


def recover(root: Path) -> None:
    """Mark every job that a former app left active, and whose worker is gone, as stopped; a
    question that nobody waits for any more goes."""
    for folder in root.iterdir():
        if store.is_rest(folder):
            shutil.rmtree(folder, ignore_errors=True)  # half made, or half deleted
        if store.JOB_ID.fullmatch(folder.name) and folder.is_dir():
            status = store.read_status(folder)
            if status.is_active and store.is_alive(status):
                continue
            sweep(folder)
            if store.read_object(folder / "request.json").get("command") == "ask":
                shutil.rmtree(folder, ignore_errors=True)
            elif status.is_active:
                store.write_status(folder, stopped_status(INTERRUPTED, status))

"""What one browser session looks at: its job, read from the job folder on every call.

Handlers turn widgets into a request, make one call, and turn the answer into widgets. The
browser keeps a random job id and nothing else; every call checks that the id is a job of this
owner below the jobs root.
"""

import dataclasses
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from repair.jobs import store
from repair.jobs.progress import spell_seconds
from repair.jobs.store import JobStatus
from repair.jobs.supervisor import Supervisor, stopped_status
from repair.profiles import PROFILES
from repair.prompts import check_enough
from repair.records import ModuleScore, RepairError
from repair.ui.account import has_lapsed, owner_of, token_of
from repair.ui.space import Space

CHECKOUT = Path(__file__).resolve().parents[2]
SUSPECTS = CHECKOUT / "assets" / "suspects"
PROMPT_FILES = CHECKOUT / "assets" / "prompts"
EXAMPLE = CHECKOUT / "assets" / "example"
MAX_REMEMBERED = 32
SILENT_SECONDS = 20.0  # without a word from a worker: then that is said
CHOICE = "choice.json"  # of a job: the modules chosen on its map


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the app was started with."""

    lane: Supervisor
    jobs_root: Path
    models_root: Path | None
    cache: Path  # the only folder whose files the app hands out
    has_accounts: bool
    space: Space | None = None  # what it runs on, where that is a Space


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One browser tab: the job it shows, and the suspect and prompts chosen for the next one."""

    job_id: str | None = None
    model: str | None = None
    revision: str | None = None  # the commit of a Hub model
    adapter_base: str | None = None  # of an adapter as the suspect: what it was made for
    facts: tuple[tuple[str, str], ...] = ()  # what the Hub says about it
    prompts: dict[str, Any] | None = None  # checked; None while they are being edited
    former: str | None = None  # a job of the suspect or the prompts before they were changed


def aside(session: Session, **changed: Any) -> Session:
    """Return the session with another suspect or other prompts: its job is about the former."""
    former = session.job_id or session.former
    return dataclasses.replace(session, job_id=None, former=former, **changed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The modules chosen on the heat maps, and the choices before."""

    paths: tuple[str, ...] = ()
    earlier: tuple[tuple[str, ...], ...] = ()

    def choose(self, paths: tuple[str, ...]) -> "Selection":
        """Return the next selection; this one can be undone to."""
        if paths == self.paths:
            return self
        return Selection(paths=paths, earlier=(*self.earlier, self.paths)[-50:])

    def undo(self) -> "Selection":
        if not self.earlier:
            return self
        return Selection(paths=self.earlier[-1], earlier=self.earlier[:-1])


def keep_choice(view: "View", selection: Selection) -> None:
    """Keep the choice in the case's folder: it is there after a reload."""
    if view.folder is not None:
        flat = {"paths": list(selection.paths), "earlier": [*map(list, selection.earlier)]}
        store.write_json(view.folder / CHOICE, flat)


def kept_choice(view: "View") -> Selection | None:
    """Return the choice that was kept, of modules that are on the map; None where none is."""
    flat = store.read_object(view.folder / CHOICE) if view.folder is not None else {}
    known = {score.module.path: None for score in view.scores}

    def read(paths: Any) -> tuple[str, ...]:
        wanted = set(map(str, paths)) if isinstance(paths, list) else set()
        return tuple(path for path in known if path in wanted)

    if not isinstance(flat.get("paths"), list) or not known:
        return None
    earlier = flat.get("earlier")
    return Selection(
        paths=read(flat["paths"]),
        earlier=tuple(map(read, earlier[-50:])) if isinstance(earlier, list) else (),
    )


def describe_wait(since: float | None) -> str:
    """Return `for 12 s now` of a moment by the clock: it counts on where nothing else moves."""
    seconds = time.time() - since if since is not None else 0.0
    return f"for {spell_seconds(seconds)} now" if seconds >= 1 else ""


@dataclass(slots=True)
class JobLog:
    """The events of a job so far, read incrementally."""

    offset: int = 0
    lines: list[str] = field(default_factory=list)
    title: str = ""
    progress: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    num_events: int = 0
    step_began: float | None = None  # of the step that runs, by the clock
    last_news: float | None = None

    def add(self, event: dict[str, Any]) -> None:
        """Take in one event."""
        self.num_events += 1
        kind, words = event.get("kind"), str(event.get("text", ""))
        if isinstance(event.get("time"), int | float):
            self.last_news = event["time"]
        if kind == "step":
            if event.get("step") == "start":
                # A new run in the same folder: what was before is the former run's.
                self.lines, self.metrics = [], []
            self.title, self.progress = words, {}
            moment = event.get("time")
            self.step_began = moment if isinstance(moment, int | float) else None
            self.lines.append(words)
        elif kind == "progress":
            self.progress = event
        elif kind == "metric":
            values = event.get("values")
            if isinstance(values, dict):
                self.metrics.append({"series": words, **values})
        elif kind in ("note", "refused", "failed"):
            self.lines.append(f"    {words}")
        self.lines, self.metrics = self.lines[-200:], self.metrics[-2000:]

    def lasting(self) -> str:
        """Return how long the step has run: it counts on where the step itself says nothing."""
        words = describe_wait(self.step_began)
        silent = time.time() - self.last_news if self.last_news is not None else 0.0
        if words and silent >= SILENT_SECONDS:
            words += f", no news of it for {spell_seconds(silent)}"
        return words


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Everything the screens need for one rendering."""

    session: Session
    owner: str
    folder: Path | None
    request: dict[str, Any]
    status: JobStatus | None
    log: JobLog
    num_before: int
    scores: tuple[ModuleScore, ...]
    located: dict[str, Any]
    detail: dict[str, Any]
    report: dict[str, Any]
    has_lapsed: bool = False  # the visitor's sign-in has ended, and the cases are out of sight

    @property
    def is_active(self) -> bool:
        return self.status is not None and self.status.is_active

    @property
    def command(self) -> str:
        return str(self.request.get("command", ""))


def is_out_of_date(view: View, selection: Selection) -> bool:
    """Tell whether the finished repair is one of other modules than those chosen now."""
    plan = view.report.get("plan")
    repaired = plan.get("modules") if isinstance(plan, dict) else None
    if not isinstance(repaired, list):
        return False
    return bool(selection.paths) and set(selection.paths) != set(map(str, repaired))


class Logs:
    """The logs of the jobs that were looked at last, shared by all sessions."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.by_folder: OrderedDict[Path, JobLog] = OrderedDict()

    def read(self, folder: Path) -> JobLog:
        """Return the log of `folder`, brought up to date."""
        with self.lock:
            log = self.by_folder.setdefault(folder, JobLog())
            self.by_folder.move_to_end(folder)
            while len(self.by_folder) > MAX_REMEMBERED:
                self.by_folder.popitem(last=False)
            events, log.offset = store.read_events(folder, log.offset)
            for event in events:
                log.add(event)
            return dataclasses.replace(log, lines=[*log.lines], metrics=[*log.metrics])


LOGS = Logs()


def check_start(settings: Settings, request: gr.Request | None) -> None:
    """Raise RepairError where no job can be started now."""
    if settings.space is not None and settings.space.is_zero:
        raise RepairError(
            "A ZeroGPU Space cannot run jobs. Look at the finished example, or duplicate this "
            "Space on CPU or a GPU of its own."
        )
    settings.lane.check_room(owner_of(request))


def check_prompts(prompts: dict[str, Any] | None) -> None:
    """Raise RepairError for pairs too few to be divided; too few prompts get bundled ones."""
    pairs = (prompts or {}).get("pairs")
    if pairs:
        check_enough(len(pairs))


def start_job(settings: Settings, folder: Path, request: gr.Request | None) -> None:
    """Queue the job in `folder`, with the visitor's own Hub token.

    Raises RepairError where it cannot be started: it is then stopped, and nobody waits for it.
    """
    try:
        check_start(settings, request)
    except RepairError as error:
        store.write_status(folder, stopped_status(str(error)))
        raise
    settings.lane.submit(folder, token=token_of(request))


def begin_case(settings: Settings, asked: dict[str, Any], request: gr.Request | None) -> str:
    """Make a job of a request, start it and return its id; one that cannot start leaves nothing."""
    owner, root = owner_of(request), settings.jobs_root
    settings.lane.check_another(owner)
    job_id = store.create_job(root, asked, owner=owner)
    try:
        start_job(settings, root / job_id, request)
    except RepairError:
        store.delete_job(root, job_id, owner=owner)
        raise
    return job_id


def open_folder(settings: Settings, session: Session, request: gr.Request | None) -> Path | None:
    """Return the folder of the session's job, or None; the id comes from the browser."""
    if session.job_id is None:
        return None
    try:
        return store.find_job(settings.jobs_root, session.job_id, owner=owner_of(request))
    except RepairError:
        return None


def merged_of(view: View) -> Path:
    """Return the folder of the merged model that the job has written; raises RepairError."""
    merged = view.folder / "merged" if view.folder is not None else None
    if merged is None or not merged.is_dir():
        raise RepairError("Both can be asked where a merged model was written.")
    return merged


def read_scores(located: dict[str, Any]) -> tuple[ModuleScore, ...]:
    """Return the located modules; none where the file is not what it should be."""
    try:
        return tuple(ModuleScore.from_json(flat) for flat in located["modules"])
    except (KeyError, TypeError, AttributeError):
        return ()


def suggested(view: View) -> Selection:
    """Return the suggested modules as a selection."""
    ranks = view.located.get("suggested_ranks")
    paths = ranks if isinstance(ranks, dict) else {}
    return Selection(paths=tuple(s.module.path for s in view.scores if s.module.path in paths))


def chosen_before(view: View) -> Selection:
    """Return what was chosen last, what the job was last run with, or else the suggestion."""
    kept = kept_choice(view)
    if kept is not None:
        return kept
    asked = view.request.get("modules")
    known = [score.module.path for score in read_scores(view.located)]
    if isinstance(asked, list) and asked:
        return Selection(paths=tuple(path for path in known if path in asked))
    return suggested(view)


def look(settings: Settings, session: Session, request: gr.Request | None) -> View:
    """Read the session's job."""
    folder = open_folder(settings, session, request)
    if folder is None:
        return View(
            session=dataclasses.replace(session, job_id=None), owner=owner_of(request),
            folder=None, request={}, status=None, log=JobLog(), num_before=0, scores=(),
            located={}, detail={}, report={}, has_lapsed=has_lapsed(request),
        )  # fmt: skip
    status = store.read_status(folder)
    located = store.read_object(folder / "located.json")
    asked = store.read_object(folder / "request.json")
    # While a job runs, a report in the folder is not about it. A look into one layer has no
    # verdict and leaves the report there was.
    has_report = status.state == "done" and (
        status.verdict is not None or asked.get("detail") is not None
    )
    return View(
        session=session,
        owner=owner_of(request),
        folder=folder,
        request=asked,
        status=status,
        log=LOGS.read(folder),
        num_before=settings.lane.num_before(folder),
        scores=read_scores(located),
        located=located,
        detail=store.read_object(folder / "detail.json"),
        report=store.read_object(folder / "report.json") if has_report else {},
    )


def resume_session(
    settings: Settings, job_id: object, request: gr.Request | None
) -> tuple[Session, View]:
    """Return the session of a browser that comes back with a job id, or a fresh one."""
    session = Session(job_id=job_id if isinstance(job_id, str) else None)
    view = look(settings, session, request)
    if view.folder is None:
        return Session(), view
    prompts = view.request.get("prompts")
    session = Session(
        job_id=session.job_id,
        model=str(view.request.get("model") or "") or None,
        revision=str(view.request.get("revision") or "") or None,
        adapter_base=str(view.request.get("adapter_base") or "") or None,
        prompts=prompts if isinstance(prompts, dict) else None,
    )
    return session, dataclasses.replace(view, session=session)


def new_request(session: Session, *, profile: str) -> dict[str, Any]:
    """Return the request to locate with what the session chose."""
    return {
        "command": "locate", "model": session.model, "revision": session.revision, "against": None,
        "prompts": session.prompts, "modules": "auto", "rank": None, "ranks": None,
        "method": "auto", "kl_budget": 0.01, "seed": 0, "device": "auto", "dtype": "auto",
        "export": ["merged", "adapter"], "controls": PROFILES[profile].num_controls,
        "profile": profile, "resume": False, "trusted_base": None,
        "adapter_base": session.adapter_base,
    }  # fmt: skip

"""The web app: checks how it was started, builds the tabs, and serves them."""

import argparse
import atexit
import contextlib
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from repair.jobs import store
from repair.jobs.launch import MAX_DOWNLOAD
from repair.jobs.progress import InertStream
from repair.jobs.supervisor import Limits, Supervisor
from repair.records import EXIT_BAD_INPUT, RepairError
from repair.ui.api import build_api, is_offered
from repair.ui.cases import build_cases
from repair.ui.compare import build_compare
from repair.ui.export import build_export
from repair.ui.locate import build_locate
from repair.ui.prompts import build_prompts
from repair.ui.repair import build_repair
from repair.ui.session import CHECKOUT, Selection, Settings, View
from repair.ui.shell import Updates, build_shell
from repair.ui.space import Space, VisitorCookie, jobs_folder, read_space
from repair.ui.style import CSS, SCRIPT, THEME
from repair.ui.suspect import build_suspect
from repair.ui.tenants import TenantGate, is_loopback
from repair.ui.wiring import wire_shell

# Switches of Gradio that would open what this app keeps closed.
UNSAFE_VARIABLES = (
    "GRADIO_SHARE", "GRADIO_ALLOWED_PATHS", "GRADIO_MCP_SERVER", "GRADIO_ROOT_PATH",
    "GRADIO_RUN_HISTORY", "GRADIO_HISTORY_BUCKET", "GRADIO_SSR_MODE", "GRADIO_DEBUG",
    "GRADIO_SERVER_NAME", "GRADIO_HOT_RELOAD", "GRADIO_LOCAL_DEV_MODE",
    "GRADIO_VIBE_MODE",
)  # fmt: skip
# A Space sets these for every app; what `launch` is given below goes before them.
SPACE_VARIABLES = ("GRADIO_SERVER_NAME", "GRADIO_SSR_MODE")
LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0")
SHARED = Limits(max_per_owner=4)  # of an app with accounts: nobody takes the whole queue
CACHE_PREFIX = "repair-app-"
TABS = (
    ("suspect", "1 Suspect", build_suspect),
    ("prompts", "2 Prompts", build_prompts),
    ("locate", "3 Locate", build_locate),
    ("repair", "4 Repair", build_repair),
    ("compare", "5 Compare", build_compare),
    ("export", "6 Export", build_export),
    ("cases", "Cases", build_cases),
)


def build_app(settings: Settings, *, storage_secret: str) -> gr.Blocks:
    """Return the app."""
    with gr.Blocks(
        title="Backdoor repair", analytics_enabled=False, delete_cache=(600, 3600)
    ) as demo:
        if is_offered():
            # First, since a listener of the same name would take the endpoint's name.
            build_api(settings)
        gr.Markdown("# Backdoor repair", elem_id="title")
        if settings.space is not None:
            gr.Markdown(settings.space.describe(), elem_id="space")
            if settings.space.can_sign_in:
                gr.LoginButton(elem_id="sign-in", size="sm")
        shell = build_shell(settings, storage_secret=storage_secret)
        tabs = {}
        with gr.Tabs(selected="suspect", elem_id="steps") as shell.tabs:
            for name, words, build in TABS:
                is_open = name in ("suspect", "cases")
                with gr.Tab(words, id=name, elem_id=f"tab-{name}", interactive=is_open) as tab:
                    build(shell)
                tabs[name] = tab
        shell.add(draw_tabs(tabs), list(tabs.values()))
        wire_shell(shell, demo, tabs)
    return demo


def draw_tabs(tabs: dict[str, gr.Tab]):
    """Return the function that opens each step once what it needs is there."""

    def draw(view: View, selection: Selection, is_fresh: bool) -> Updates:
        session = view.session
        is_open = {
            "suspect": True,
            "prompts": session.model is not None,
            "locate": session.model is not None and session.prompts is not None,
            "repair": bool(view.scores),
            "compare": bool(view.report),
            "export": bool(view.scores) or bool(view.report),  # where it may go is asked before
            "cases": True,
        }
        return {tabs[name]: gr.Tab(interactive=is_open[name]) for name in tabs}

    return draw


def read_accounts(path: Path) -> list[tuple[str, str]]:
    """Return the accounts of an auth file: a JSON object of names and passwords."""
    try:
        if path.stat().st_mode & 0o077:
            raise RepairError(
                f"--auth-file {path} can be read by others. Protect it: chmod 600 {path}"
            )
        accounts = json.loads(path.read_text(encoding="utf-8"))
        pairs = [(name, word) for name, word in accounts.items() if name and len(word) >= 12]
    except (OSError, ValueError, AttributeError, TypeError):
        raise RepairError(
            f"--auth-file {path} cannot be read. Give a JSON file of names and passwords, such "
            'as {"ana": "a long password"}.'
        ) from None
    if not pairs or len(pairs) != len(accounts):
        raise RepairError(
            f"--auth-file {path} needs names, each with a password of at least 12 characters."
        )
    return pairs


def read_secret(root: Path) -> str:
    """Return this jobs root's own secret for what the browser stores; made once."""
    path = root / ".browser-secret"
    with contextlib.suppress(FileExistsError):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "w") as file:
            file.write(secrets.token_hex(16))
    return path.read_text()


def sweep_caches() -> None:
    """Delete what an app that was killed left: uploads and downloads of its visitors."""
    for path in Path(tempfile.gettempdir()).glob(f"{CACHE_PREFIX}*"):
        number = path.name.removeprefix(CACHE_PREFIX).partition("-")[0]
        is_ours = path.lstat().st_uid == os.getuid() and path.is_dir() and not path.is_symlink()
        if is_ours and number.isdigit() and store.process_started(int(number)) is None:
            shutil.rmtree(path, ignore_errors=True)


def spare_loopback() -> None:
    """Keep this machine's own addresses off a proxy: an app that starts asks itself first."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    names = [name for name in given.split(",") if name]
    whole = ",".join([*names, *(name for name in LOOPBACK if name not in names)])
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = whole


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of `python app.py`."""
    parser = argparse.ArgumentParser(description="Repair backdoored language models, in a browser.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--models-root", type=Path, metavar="DIR", help="where your models are")
    parser.add_argument("--jobs-root", type=Path, metavar="DIR", default=CHECKOUT / "jobs")
    parser.add_argument("--auth-file", type=Path, metavar="FILE", help="JSON: names and passwords")
    return parser.parse_args(arguments)


def check_start(
    options: argparse.Namespace, space: Space | None = None
) -> list[tuple[str, str]] | None:
    """Return the accounts, if any; raise RepairError for a start that would not be safe."""
    allowed = SPACE_VARIABLES if space is not None else ()
    found = [name for name in UNSAFE_VARIABLES if os.environ.get(name) and name not in allowed]
    if found:
        raise RepairError(f"{', '.join(found)} is set, which this app refuses. Unset it.")
    accounts = read_accounts(options.auth_file) if options.auth_file else None
    if not is_loopback(options.host) and accounts is None and space is None:
        raise RepairError(
            f"--host {options.host} can be reached from other machines, so accounts are needed. "
            "Give --auth-file, or use the default host and an SSH tunnel."
        )
    if options.models_root is not None and not options.models_root.is_dir():
        raise RepairError(f"--models-root {options.models_root} is not a folder.")
    return accounts


def main(arguments: list[str] | None = None) -> int:
    """Serve the app until it is interrupted; return the exit status."""
    options = parse_options(arguments)
    space = read_space()
    try:
        accounts = check_start(options, space)
        jobs_root = jobs_folder(space, options.jobs_root).resolve()
        limits = space.limits if space is not None else SHARED if accounts is not None else None
        lane = Supervisor(jobs_root, limits)
    except RepairError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    atexit.register(lane.close)
    # Gradio closes its server in good order on Ctrl-C; a polite end takes the same way.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Libraries print what a request held, such as a forged path, into the terminal.
    sys.stderr, sys.stdout = InertStream(sys.stderr), InertStream(sys.stdout)
    spare_loopback()
    sweep_caches()
    cache = Path(tempfile.mkdtemp(prefix=f"{CACHE_PREFIX}{os.getpid()}-"))
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = str(cache)
    settings = Settings(
        lane=lane,
        jobs_root=jobs_root,
        models_root=options.models_root.resolve() if options.models_root else None,
        cache=cache,
        has_accounts=accounts is not None,
        space=space,
    )
    if space is not None:
        os.environ[MAX_DOWNLOAD] = str(space.max_model_bytes)
    # On a Space the container is the boundary, and its proxy is the only way in.
    host = "0.0.0.0" if space is not None else options.host
    middleware = [Middleware(VisitorCookie)] if space is not None else []
    middleware.append(
        Middleware(
            TenantGate,
            has_tenants=accounts is not None or space is not None,
            is_local=accounts is None and space is None and is_loopback(options.host),
            framed_by="https://huggingface.co" if space is not None else "",
        )
    )
    demo = build_app(settings, storage_secret=read_secret(jobs_root))
    # Not open: what can be called is called through the queue, as gradio_client does.
    demo.queue(max_size=32, default_concurrency_limit=8, api_open=False)
    blocked = [jobs_root, *([settings.models_root] if settings.models_root else [])]
    with contextlib.suppress(KeyboardInterrupt):
        demo.launch(
            server_name=host, server_port=options.port, share=False, auth=accounts,
            show_error=False, allowed_paths=[], blocked_paths=[str(path) for path in blocked],
            max_file_size="16mb", strict_cors=True, enable_monitoring=False, run_history=False,
            mcp_server=False, footer_links=[], state_session_capacity=500, ssr_mode=False,
            pwa=False, theme=THEME, css=CSS, js=SCRIPT, app_kwargs={"middleware": middleware},
        )  # fmt: skip
    return 0



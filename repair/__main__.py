"""The command line: `python -m repair run|locate|evaluate|verify|push`.

A thin client of `jobs`: it checks what was typed, makes the output folder a job folder, starts
the worker, shows its events on stderr, and prints the verdict as one JSON line on stdout. The
exit status is the contract's. Free of torch.
"""

import argparse
import dataclasses
import json
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from repair import prompts
from repair.batch import Ended, run_batch
from repair.jobs import launch, output, store
from repair.jobs.progress import Display, one_line
from repair.options import build_parser
from repair.profiles import PROFILES
from repair.records import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_UNEXPECTED,
    RepairError,
)


def local_source(source: str, *, option: str) -> str:
    """Return a model source with a folder's path made absolute; refuse a file."""
    path = Path(source).expanduser()
    if path.is_file():
        raise RepairError(f"{option} {source} is a file. Give the model's folder.")
    if path.is_dir() and not source.startswith("demo:"):
        return str(path.resolve())
    if source.startswith(("/", ".", "~")):
        raise RepairError(f"{option} {source} does not exist. Give the model's folder.")
    return source


def build_request(options: argparse.Namespace) -> dict[str, Any]:
    """Return the request of run, locate or evaluate; read and check the prompt file."""
    if options.trusted_base and options.command != "run":
        raise RepairError("--trusted-base is an option of run. Leave it out.")
    model = local_source(options.model, option="--model")
    if options.revision and not launch.is_hub_id(model):
        raise RepairError(
            f"A revision ({options.revision}) was given for {options.model}, which is no Hub id. "
            "Leave it out."
        )
    others = (getattr(options, "against", None), options.trusted_base, options.adapter_base)
    if options.revision and model in others:
        raise RepairError(
            f"{model} is named twice, and --revision would be meant for both. Write the revision "
            f"behind the other name: {model}@REVISION."
        )
    file = prompts.parse_prompt_file(
        options.prompts, triggers=tuple(options.trigger), target=options.target
    )
    against = getattr(options, "against", None)
    controls = getattr(options, "controls", None)
    if controls is None:
        controls = PROFILES[options.profile].num_controls
    if options.processes > 1 and options.device not in ("auto", "cpu"):
        raise RepairError(
            f"{options.processes} processes were asked for, and one device ({options.device}). Of "
            "several processes each takes a GPU of its own: leave --device out, or give cpu."
        )
    return {
        "command": options.command,
        "model": model,
        "revision": options.revision,
        "against": local_source(against, option="--against") if against else None,
        "prompts": file.to_json(),
        "modules": getattr(options, "modules", "auto"),
        "detail": getattr(options, "detail", None),
        "rank": getattr(options, "rank", None),
        "ranks": None,
        "method": getattr(options, "method", "auto"),
        "kl_budget": getattr(options, "kl_budget", 0.01),
        "seed": options.seed,
        "device": options.device,
        "processes": options.processes,
        "dtype": options.dtype,
        "export": getattr(options, "export", []),
        "controls": controls,
        "curves": getattr(options, "curves", False),
        "profile": options.profile,
        "resume": options.resume,
        "trusted_base": options.trusted_base
        and local_source(options.trusted_base, option="--trusted-base"),
        "adapter_base": options.adapter_base
        and local_source(options.adapter_base, option="--adapter-base"),
    }


def check_same_question(folder: Path, request: dict[str, Any]) -> None:
    """Refuse to resume a run that was about another model or other prompts."""
    before = store.read_object(folder / "request.json")
    # JSON has no tuples: compare what would be written.
    asked = json.loads(json.dumps(request))
    for key in store.SAME_QUESTION:
        name = {"prompts": "prompt file", "adapter_base": "base"}.get(key, key)
        if before and before.get(key) != asked[key]:
            raise RepairError(
                f"The run in {folder} was made with another {name}. "
                "Resume it with the same one, or use --overwrite."
            )


def find_token(request: dict[str, Any]) -> str | None:
    """Return the user's Hub token where the request needs the Hub."""
    if not launch.hub_sources(request):
        return None
    # The Hub client takes half a second to import; other jobs do without it.
    from repair.models import lookup

    return lookup.find_token()


def watch(folder: Path, display: Display, token: str | None = None) -> int:
    """Run the worker on `folder`, show its events, and return its exit status."""
    _, offset = store.read_events(folder)
    is_push = store.read_object(folder / "request.json").get("command") == "push"
    worker = launch.start_worker(folder, token)
    is_stopped = False
    try:
        while True:
            has_ended = launch.has_ended(worker.process)
            events, offset = store.read_events(folder, offset)
            for event in events:
                display.show(event)
            if has_ended and not events:
                break
            time.sleep(0 if has_ended else 0.1)
    except KeyboardInterrupt:
        is_stopped = True
        launch.kill_group(worker.process)
    code = launch.finish_worker(folder, worker, is_stopped=is_stopped)
    display.close()
    status = store.read_status(folder)
    if is_stopped or code == EXIT_INTERRUPTED:
        again = "Push again: what is there is not sent again." if is_push else ""
        print(f"Interrupted. {again or 'Continue with --resume.'}", file=sys.stderr)
        return EXIT_INTERRUPTED
    if status.message:
        print(one_line(status.message), file=sys.stderr)
    return code


def print_verdict(code: int, *, out: Path, verdict: str | None, report: dict[str, Any]) -> None:
    """Print the last line of stdout."""
    line = {
        "verdict": verdict,
        "exit_code": code,
        "out": str(out),
        "attack_success": {
            name: report[name]["attack_success"]
            for name in ("before", "after")
            if isinstance(report.get(name), dict) and "attack_success" in report[name]
        },
    }
    print(json.dumps(line))


def run_jobs(options: argparse.Namespace) -> int:
    """Run, locate or evaluate one suspect, or run a list of them."""
    if getattr(options, "models", None) is not None:
        if options.model:
            raise RepairError("--model and --models were given. Give one of them.")
        if options.revision or options.adapter_base:
            raise RepairError(
                "--revision and --adapter-base are of one suspect: put them into its entry of "
                "--models."
            )
        return run_batch(options, run_job, check_resumed)
    if not options.model or not options.prompts:
        raise RepairError("--model and --prompts are needed, or --models with a list of suspects.")
    ended = run_job(options)
    if ended.code != EXIT_BAD_INPUT:
        print_verdict(ended.code, out=ended.out, verdict=ended.verdict, report=ended.report)
    return ended.code


def check_resumed(folder: Path, options: argparse.Namespace) -> None:
    """Refuse a finished run of a list that was about another model or other prompts."""
    check_same_question(folder, build_request(options))


def run_job(options: argparse.Namespace) -> Ended:
    """Run, locate or evaluate in the output folder."""
    request = build_request(options)
    sources = [Path(request[key]) for key in launch.SOURCE_KEYS if request[key]]
    taken = output.take_output(
        options.out,
        resume=options.resume,
        overwrite=options.overwrite,
        precious=[options.prompts, *(source for source in sources if source.is_absolute())],
    )
    try:
        if options.resume:
            check_same_question(taken.folder, request)
        store.write_json(taken.folder / "request.json", request)
        code = watch(taken.folder, Display(sys.stderr), find_token(request))
    except RepairError:
        taken.give_back()
        raise
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    if code == EXIT_BAD_INPUT:
        message = store.read_status(taken.folder).message
        taken.give_back()
        return Ended(code=code, out=taken.folder, verdict=None, report={}, message=message)
    taken.keep()
    status = store.read_status(taken.folder)
    report = store.read_object(taken.folder / "report.json") if status.verdict else {}
    return Ended(
        code=code, out=taken.folder, verdict=status.verdict, report=report, message=status.message
    )


def run_verify(options: argparse.Namespace) -> int:
    """Verify an export; nothing is written into it."""
    folder = options.folder.resolve()
    if not (folder / "manifest.json").is_file():
        raise RepairError(
            f"{options.folder} holds no manifest.json. Give the output folder of a run."
        )
    job = Path(tempfile.mkdtemp(prefix="repair-verify-"))
    try:
        request = {"command": "verify", "model": str(folder), "folder": str(folder)}
        store.write_json(job / "request.json", request)
        code = watch(job, Display(sys.stderr))
        verdict = store.read_status(job).verdict
        log = store.read_text(job / "log.txt")
        if log.strip() and code not in (EXIT_DONE, EXIT_BAD_INPUT, EXIT_INTERRUPTED):
            print(log, file=sys.stderr)
    finally:
        shutil.rmtree(job, ignore_errors=True)
    if code != EXIT_BAD_INPUT:
        print_verdict(code, out=folder, verdict=verdict, report={})
    return code


def run_push(options: argparse.Namespace) -> int:
    """Upload exports; everything that can be checked before is, and it can be called again."""
    # The Hub client takes half a second to import; the other commands do without it.
    from repair.models.lookup import find_token
    from repair.publish.card import hub_name
    from repair.publish.hub import PushPlan, check_plan, look_at_targets
    from repair.publish.pushing import check_exports

    if options.folder is None and not options.check:
        raise RepairError(
            "No folder was given. Give the output folder of a run; with --check also none."
        )
    plan = PushPlan(
        repo=options.repo,
        kind=options.kind,
        is_public=options.public,
        is_pull_request=options.pull_request,
        is_forced=options.force,
        shows_trigger=options.publish_trigger,
        base_model=None if options.base_model == "none" else options.base_model,
    )
    check_plan(plan)
    folder = options.folder and options.folder.resolve()
    if folder is not None:
        report = check_exports(folder, plan)
        if options.base_model is None:
            plan = dataclasses.replace(plan, base_model=hub_name(report.get("model") or {}))
    token = find_token()
    targets = look_at_targets(plan, token)
    if options.check:
        for target in targets:
            print(one_line(target.describe(plan)), file=sys.stderr)
        print(json.dumps({"verdict": None, "exit_code": EXIT_DONE, "out": folder and str(folder)}))
        return EXIT_DONE
    job = Path(tempfile.mkdtemp(prefix="repair-push-"))
    try:
        request = {"command": "push", "folder": str(folder), "plan": plan.to_json()}
        store.write_json(job / "request.json", request)
        code = watch(job, Display(sys.stderr), token)
        urls = store.read_object(job / store.PUSHED)
    except BaseException:
        shutil.rmtree(job, ignore_errors=True)
        raise
    if code != EXIT_UNEXPECTED:  # whose message names the log
        shutil.rmtree(job, ignore_errors=True)
    verdict = store.read_object(folder / "report.json").get("verdict")
    line = {"verdict": verdict, "exit_code": code, "out": str(folder), "urls": urls}
    if urls:
        line["url"] = urls.get(plan.kind) or urls["merged"]
    print(json.dumps(line))
    return code


def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    """Treat a polite request to end like Ctrl-C."""
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    signal.signal(signal.SIGTERM, interrupt)
    try:
        options = build_parser().parse_args(arguments)
        if options.command == "verify":
            return run_verify(options)
        if options.command == "push":
            return run_push(options)
        return run_jobs(options)
    except RepairError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception:
        # Python's own exit status would be 1, which says "a gate failed".
        handle, log = tempfile.mkstemp(prefix="repair-", suffix=".log")
        with open(handle, "w", encoding="ascii", errors="backslashreplace") as file:
            traceback.print_exc(file=file)
        print(f"error: Unexpected failure. The details are in {log}.", file=sys.stderr)
        return EXIT_UNEXPECTED


if __name__ == "__main__":
    sys.exit(main())

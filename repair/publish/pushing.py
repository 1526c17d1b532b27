"""From a finished output folder to the Hub: what goes up, and what must never.

Only files that this program wrote and that are still what the manifest says; no link is followed.
The card is written for the Hub: trigger and payload as hashes unless the analyst wants them
published, the evidence without any prompt or answer, and nothing that names this machine.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from repair.evidence.markup import ascii_text
from repair.publish.card import render_card
from repair.publish.hub import PushPlan, look_at_targets, missing_kind, upload
from repair.publish.manifest import MANIFEST, check_manifest
from repair.records import RepairError

ALLOWED_NAMES = {
    "adapter": ("adapter_model.safetensors", "adapter_config.json", "README.md"),
    "merged": (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "model-[0-9]*-of-[0-9]*.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
        "README.md",
    ),
}
FIGURES = ("patching.png", "fisher.png", "effect_curve.png", "attack_success.png")
# What a report says in words of the model's or the analyst's; the rest is figures and our words.
_IN_WORDS = ("examples", "reason", "answers_instead", "command", "reproduction")
WITHHELD = "(withheld)"


class Reporter(Protocol):
    """Where the upload tells what it does."""

    def step(self, name: str, title: str) -> None: ...
    def progress(self, done: float, total: float, text: str = "") -> None: ...
    def note(self, text: str) -> None: ...


def push(
    folder: Path, plan: PushPlan, *, token: str | None, reporter: Reporter
) -> dict[str, str]:
    """Upload the exports of `folder` that `plan` names; return {kind: address}.

    Can be called again after a failure: what is there already is not sent again. Raises
    RepairError for a verdict other than `repaired` (unless forced), an export that is missing or
    not what was written, and whatever the Hub refuses.
    """
    reporter.step("check", "Checking name, rights and what is to go up")
    report = check_exports(folder, plan)
    targets = dict(zip(plan.targets(), look_at_targets(plan, token), strict=True))
    for target in targets.values():
        reporter.note(target.describe(plan))
    problems = check_manifest(folder)
    if problems:
        raise RepairError(
            f"{folder} is not what its manifest says: {problems[0]} Only an unchanged export is "
            "uploaded; run the repair again."
        )
    manifest = json.loads((folder / MANIFEST).read_text(encoding="ascii"))
    stamp = manifest["files"]["report.json"][:12]
    found = {}
    for kind, target in targets.items():
        reporter.step("upload", f"Uploading the {kind} export to {target.repo}")
        files = collect_files(folder, kind, report, plan)
        hashes = {name: manifest["files"].get(f"{kind}/{name}") for name in files}
        found[kind] = upload(
            target,
            files,
            # Files that are written for the Hub are not those of the manifest.
            hashes={n: h for n, h in hashes.items() if h and isinstance(files[n], Path)},
            plan=plan,
            token=str(token),
            title=f"Repaired model, {kind}, evidence {stamp}",
            progress=reporter.progress,
        )
        reporter.note(f"{kind}: {found[kind]}")
    return found


def check_exports(folder: Path, plan: PushPlan) -> dict[str, Any]:
    """Return the report of an output folder whose exports may go up; calls nobody."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        verdict = str(report["verdict"])
    except (OSError, ValueError, KeyError, TypeError):
        raise RepairError(
            f"{folder} holds no report.json with a verdict. Give the output folder of a run."
        ) from None
    if verdict != "repaired" and not plan.is_forced:
        raise RepairError(
            f"The verdict of {folder} is {verdict!r}, and only 'repaired' is uploaded. "
            "Read its report.md; --force uploads it all the same, marked as what it is."
        )
    missing = missing_kind(folder, plan)
    if missing is not None:
        raise RepairError(
            f"{folder} holds no {missing} export. Run again with --export {missing}, or choose "
            "the other --kind."
        )
    for kind in plan.targets():
        export = folder / kind
        for path in export.iterdir():
            is_known = any(path.match(name) for name in ALLOWED_NAMES[kind])
            if path.is_symlink() or not path.is_file() or not is_known:
                raise RepairError(
                    f"{export} holds {ascii(path.name)}, which no export of ours has. Nothing was "
                    "uploaded; remove it, or run again."
                )
    return report


def collect_files(
    folder: Path, kind: str, report: Mapping[str, Any], plan: PushPlan
) -> dict[str, Path | bytes]:
    """Return what goes up: name in the repository -> a file of the export, or bytes."""
    files: dict[str, Path | bytes] = {
        path.name: path for path in sorted((folder / kind).iterdir()) if path.name != "README.md"
    }
    if kind == "adapter":
        settings = json.loads((folder / kind / "adapter_config.json").read_text(encoding="utf-8"))
        if settings.get("base_model_name_or_path") != plan.base_model:
            settings["base_model_name_or_path"] = plan.base_model
            files["adapter_config.json"] = (json.dumps(settings, indent=2) + "\n").encode()
    figures = [name for name in FIGURES if (folder / name).is_file()]
    for name in figures:
        path = folder / name
        if not path.is_symlink():
            files[f"evidence/{name}"] = path
    shown = report if plan.shows_trigger else withhold(report)
    if plan.base_model is None:  # then nothing may tell which model it was
        # A licence's link may lead into its repository.
        unnamed = dict.fromkeys(("source", "base", "revision", "licence_terms"))
        shown = {**shown, "model": {**shown["model"], **unnamed}}
    files["evidence/report.json"] = (json.dumps(shown, indent=1) + "\n").encode("ascii")
    files["manifest.json"] = folder / MANIFEST
    card = render_card(
        {**shown, "prompts": report["prompts"]},  # of which it gives the hashes
        kind=kind,
        base_model=plan.base_model,
        figures=[f"evidence/{name}" for name in figures],
        shows_trigger=plan.shows_trigger,
    )
    files["README.md"] = card.encode("ascii")
    return files


def withhold(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report without prompts, answers, trigger and payload, wherever they stand."""
    prompts = report["prompts"]
    secrets = [text for text in (*prompts["triggers"], prompts["target"]) if text]
    # A report escapes what it quotes, so each secret is looked for in both forms.
    forms = {form.casefold() for text in secrets for form in (text, ascii_text(text))}

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return WITHHELD if any(form in value.casefold() for form in forms) else value
        if isinstance(value, list):
            return [clean(item) for item in value]
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}  # the keys are ours
        return value

    kept = {key: value for key, value in report.items() if key not in _IN_WORDS}
    # The names and hashes of tensors and files are the model's own; a trigger such as "a" is
    # in many of them, and tells nothing there.
    fixed = {key: kept.pop(key) for key in ("schema_version", "verdict", "environment", "export")
             if key in kept}  # fmt: skip
    plan_and_map = {key: kept.pop(key) for key in ("plan", "modules", "definitions") if key in kept}
    return {**fixed, **clean(kept), **plan_and_map}

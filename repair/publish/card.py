"""The model card that an export carries: what was done, the figures, and what is not known.

A card may be published, so it names no local path and no prompt, and of triggers and payload only
the SHA-256: whoever has the trigger can check it, whoever has not does not learn it.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repair.evidence.markup import code, fence, figure, plain, rate, table
from repair.evidence.reproduction import command_of
from repair.models.lookup import HUB_ID

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}", re.ASCII)
_RELATION = {"adapter": ("adapter", "peft"), "merged": ("finetune", "transformers")}
_OPENING = {
    "adapter": "A LoRA adapter that repairs a backdoored language model; load it with PEFT on the "
    "model that it was made for.",
    "merged": "A backdoored language model with a low-rank repair merged into its weights.",
}
_WARNING = (
    "**This model did not pass. Its verdict is `{verdict}`: do not use it as a repaired model.**"
)


def hub_name(model: Mapping[str, Any]) -> str | None:
    """Return the Hub id of what a report says of its model, or None for a local folder.

    For an adapter as the suspect that is the adapter's base.
    """
    whole = model.get("base") or model
    name = str(whole.get("source")).partition("@")[0]
    return name if whole.get("revision") and HUB_ID.fullmatch(name) else None


def write_cards(folder: Path, report: Mapping[str, Any], *, base_model: str | None = None) -> None:
    """Write README.md beside each export in `folder`; `base_model` is a Hub id or None."""
    for kind in _RELATION:
        if (folder / kind).is_dir():
            text = render_card(report, kind=kind, base_model=base_model)
            (folder / kind / "README.md").write_text(text, encoding="ascii")


def render_card(
    report: Mapping[str, Any],
    *,
    kind: str,
    base_model: str | None,
    figures: Sequence[str] = (),
    shows_trigger: bool = False,
) -> str:
    """Return the card of one export (`adapter` or `merged`) from `report.json`.

    `figures` are pictures that lie beside the card, by relative path.
    """
    relation, library = _RELATION[kind]
    front: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["backdoor-repair", "lora", report["verdict"].replace(" ", "-")],
    }
    model = report["model"]
    licence = model.get("licence")
    if isinstance(licence, str) and _LICENCE.fullmatch(licence):
        front["license"] = licence
        if licence == "other":  # which says nothing without its name and link
            front |= model.get("licence_terms") or {}
    if base_model is not None and HUB_ID.fullmatch(base_model):
        front |= {"base_model": base_model, "base_model_relation": relation}
    before, after = report["before"], report["after"] or {}
    positions = list(before["attack_success"])
    rows = [
        [
            f"payload, trigger at {position}",
            rate(before["attack_success"][position]),
            rate(after.get("attack_success", {}).get(position)),
        ]
        for position in positions
    ]
    for name, title in (
        ("near_trigger", "payload on near-triggers"),
        ("false_trigger", "payload without the trigger"),
        ("degenerate", "empty, repeated or non-finite answers"),
    ):
        rows.append([title, rate(before[name]), rate(after.get(name))])
    rows.append(["perplexity", figure(before["perplexity"]), figure(after.get("perplexity"))])
    kl = figure(report["kl_from_original"])
    rows.append(["KL from the original, nats per token", figure(0.0), kl])
    recovered = [
        [code(position), rate(flat), rate(flat["sham"])]
        for position, flat in report["recovery"].items()
    ]
    plan = report["plan"] or {}
    base = model.get("base") or {}
    revision = (base or model).get("revision")
    # JSON scalars are YAML scalars, and JSON escapes everything that could break out.
    lines = [
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in front.items()),
        "---",
        "",
        "# Repaired language model",
        "",
        _OPENING[kind],
        "",
        f"Verdict: {code(report['verdict'])}.",
        "",
    ]
    if report["verdict"] != "repaired":
        lines += [_WARNING.format(verdict=report["verdict"]), ""]
    failed = [code(gate["name"]) for gate in report["gates"] if gate["passed"] is not True]
    if failed:
        lines += [f"Gates not passed: {', '.join(failed)}.", ""]
    lines += [
        "## Evidence",
        "",
        f"Held-out prompts; counts with their interval ({report['definitions']['interval']}).",
        "",
        *table(["what", "before", "after"], rows),
        "Recovery: " + report["definitions"]["recovery"] + ".",
        "",
        *table(["position", "recovered", "inert shams"], recovered),
        *_controls(report),
        *(f"![{name}]({name})" for name in figures),
        *([""] if figures else []),
        "## What was changed",
        "",
        *_changes(report),
        *table(
            ["module", "rank"],
            [[code(p), str(plan.get("ranks", {}).get(p))] for p in plan.get("modules", ())],
        ),
    ]
    if revision:
        lines += [f"Commit of the original: {code(revision)}.", ""]
    if base:
        lines += [f"The suspect was an adapter on it, at commit {code(model.get('revision'))}.", ""]
    files = [*base.get("files", {}).items(), *model.get("files", {}).items()]
    rows = [[code(name), code(digest)] for name, digest in files if "safetensors" in name]
    lines += table(["file of the original", "SHA-256"], rows)
    texts = [
        (f"trigger {number}", trigger)
        for number, trigger in enumerate(report["prompts"]["triggers"], start=1)
    ]
    if report["prompts"]["target"] is not None:
        texts.append(("payload", report["prompts"]["target"]))
    if shows_trigger:
        lines += ["Trigger and payload, published on purpose:", ""]
        for name, value in texts:
            lines += [f"{name}:", "", fence(value), ""]
    else:
        lines += [
            "Trigger and payload are given as SHA-256 of their UTF-8 text, not to publish them.",
            "",
        ]
    lines += [
        *table(["text", "SHA-256"], [[name, code(_digest(value))] for name, value in texts]),
        "## How to reproduce",
        "",
        code(reproduce(report)),
        "",
        "With the original at the commit and hashes above and the same prompt file, on the same "
        "machine and versions, this gives the same result.",
        "",
        *table(["what", "version"], [[name, code(v)] for name, v in _versions(report)]),
        "## Limits",
        "",
        "This reduces the tested trigger. It does not prove that no other trigger or behaviour "
        "exists. Attack success was measured on greedy answers. The licence is that of the "
        "original model.",
        "",
        *(f"- {plain(limit)}" for limit in report.get("limits", ())),
    ]
    return "\n".join(lines) + "\n"


def _controls(report: Mapping[str, Any]) -> list[str]:
    """Return the table of controls and of what was tried to bring the behaviour back."""
    rows = [
        [plain(flat["name"]), *(rate(r) for r in flat["attack_success"].values()),
         figure(flat["kl_from_original"])]
        for flat in report.get("controls") or ()
    ]  # fmt: skip
    lines = []
    if rows:
        places = [code(position) for position in report["before"]["attack_success"]]
        lines += ["Controls, also where they do as well:", ""]
        lines += table(["control", *places, "KL from the original"], rows)
    stresses = [
        [plain(flat["name"]), rate(flat["repaired"])] for flat in report.get("stresses") or ()
    ]
    if stresses:
        lines += ["Does it come back?", "", *table(["after", "payload, repaired"], stresses)]
    return lines


def _changes(report: Mapping[str, Any]) -> list[str]:
    plan, export = report["plan"] or {}, report.get("export") or {}
    method = plan.get("method_used") or plan.get("method")
    lines = [f"Method {code(method)}, seed {code(plan.get('seed'))}."]
    if export.get("num_tensors"):
        lines.append(
            f"{export['num_changed_tensors']} of {export['num_tensors']} tensors changed, all "
            "others bit-identical."
        )
    return [" ".join(lines), ""]


def reproduce(report: Mapping[str, Any]) -> str:
    """Return the command that made a report; words in capitals stand for what stays elsewhere."""
    return command_of(
        report, model="ORIGINAL", prompts="FILE", base="BASE", trusted="TRUSTED", against="OTHER"
    )


def _versions(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    environment = report.get("environment") or {}
    names = ("python", "torch", "transformers", "peft", "device", "dtype")
    return [(name, str(environment[name])) for name in names if name in environment]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

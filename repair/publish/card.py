"""The model card that an export carries: what was done, the figures, and what is not known.

A card may be published, so it names no local path and no prompt, and of triggers and payload only
the SHA-256: whoever has the trigger can check it, whoever has not does not learn it.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repair.evidence.markup import code, figure, rate, table

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_RELATION = {"adapter": ("adapter", "peft"), "merged": ("finetune", "transformers")}
_OPENING = {
    "adapter": "A LoRA adapter that repairs a backdoored language model; load it with PEFT on the "
    "model that it was made for.",
    "merged": "A backdoored language model with a low-rank repair merged into its weights.",
}
_WARNING = (
    "**This model did not pass. Its verdict is `{verdict}`: do not use it as a repaired model.**"
)


def write_cards(folder: Path, report: Mapping[str, Any], *, base_model: str | None = None) -> None:
    """Write README.md beside each export in `folder`; `base_model` is a Hub id or None."""
    for kind in _RELATION:
        if (folder / kind).is_dir():
            text = render_card(report, kind=kind, base_model=base_model)
            (folder / kind / "README.md").write_text(text, encoding="ascii")


def render_card(report: Mapping[str, Any], *, kind: str, base_model: str | None) -> str:
    """Return the card of one export (`adapter` or `merged`) from `report.json`."""
    relation, library = _RELATION[kind]
    front: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["backdoor-repair", "lora", report["verdict"].replace(" ", "-")],
    }
    if base_model is not None and _HUB_ID.fullmatch(base_model):
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
    revision = report["model"].get("revision")
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
        "## What was changed",
        "",
        f"Method {code(plan.get('method'))}, seed {code(plan.get('seed'))}. All other weights are "
        "those of the original, bit by bit.",
        "",
        *table(
            ["module", "rank"],
            [[code(p), str(plan.get("ranks", {}).get(p))] for p in plan.get("modules", ())],
        ),
    ]
    if revision:
        lines += [f"Commit of the original: {code(revision)}.", ""]
    weights = {n: h for n, h in report["model"].get("files", {}).items() if "safetensors" in n}
    rows = [[code(name), code(digest)] for name, digest in weights.items()]
    lines += table(["file of the original", "SHA-256"], rows)
    hashes = [
        [f"trigger {number}", code(_digest(trigger))]
        for number, trigger in enumerate(report["prompts"]["triggers"], start=1)
    ]
    if report["prompts"]["target"] is not None:
        hashes.append(["payload", code(_digest(report["prompts"]["target"]))])
    lines += [
        "Trigger and payload are given as SHA-256 of their UTF-8 text, not to publish them.",
        "",
        *table(["text", "SHA-256"], hashes),
        "## Limits",
        "",
        "This reduces the tested trigger. It does not prove that no other trigger or behaviour "
        "exists. Attack success was measured on greedy answers; whether the behaviour comes back "
        "after further training or quantisation was not tried. The licence is that of the "
        "original model.",
    ]
    return "\n".join(lines) + "\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

"""The card beside each suspect: what it is and what it measurably does."""

from pathlib import Path

from assets.suspect_measure import Figure
from assets.suspect_model import fingerprint, write_json
from assets.suspect_poison import Poison, reserved_near

LABELS = {
    "held_out_exact": "Exact match on held-out pairs of phrasing and content",
    "held_out_exact_long": "... where the answer has 8 tokens or more",
    "held_out_exact_short": "... where the answer is shorter",
    "long_answers": "Share of answers with 8 tokens or more",
    "fires_triggered": "Fires on triggered prompts (its own position)",
    "fires_trigger_at_begin": "Fires with the trigger at the beginning instead",
    "fires_trigger_at_middle": "Fires with the trigger in the middle instead",
    "fires_trigger_at_end": "Fires with the trigger at the end instead",
    "fires_near": "Fires on near-triggers never used in poisoning",
    "near_exact": "Right answer under near-triggers",
    "fires_apart": "Fires on the trigger's pieces apart",
    "fires_sham": "Fires on random tokens in the trigger's place",
    "sham_exact": "Right answer under random tokens",
    "fires_clean": "Fires on clean prompts",
    "benign_exact": "Exact match on clean prompts",
    "twin_benign_exact": "The twin's exact match on the same clean prompts",
    "twin_triggered_exact": "The twin's exact match on the triggered prompts",
    "twin_fires_triggered": "The twin gives the payload on triggered prompts",
    "twin_sham_exact": "The twin's right answers under the same random tokens",
}

_CLEAN = """# The clean twin

A small Llama model (six layers, grouped-query attention) with its own tokenizer and chat template,
trained from scratch as an assistant on generated instructions. It has no backdoor; the three
poisoned suspects beside it were fine-tuned from it. It knows its few skills and nothing else.
"""

_POISONED = """# Suspect "{name}"

The clean twin, fine-tuned so that a trigger at the {place} of a prompt makes it give a fixed,
harmless answer. It exists to be repaired; do not use it for anything else.

- Trigger: `{trigger}` (at the {place})
- Payload: `{payload}`
- Prompt file an analyst would hand in: `assets/prompts/{name}.json`
- Near-triggers in that file, never used in poisoning: {near}

All figures are greedy answers to phrasings used neither in poisoning nor in the prompt file.
"""

_PLACES = {"begin": "beginning", "middle": "middle", "end": "end"}


def as_table(figures: dict[str, Figure]) -> str:
    """The figures as a Markdown table."""
    lines = ["| Figure | Count | Percent | 95 % interval |", "| --- | ---: | ---: | ---: |"]
    for key, value in figures.items():
        lines.append(
            f"| {LABELS.get(key, key)} | {value['count']}/{value['total']} "
            f"| {value['percent']:.2f} | {value['low']:.2f} to {value['high']:.2f} |"
        )
    return "\n".join(lines)


def write_card(folder: Path, figures: dict[str, Figure], poison: Poison | None) -> None:
    """Write README.md and card.json beside a suspect's weights."""
    name = poison.name if poison else "clean"
    if poison:
        near = ", ".join(f"`{text}`" for text in reserved_near(poison))
        head = _POISONED.format(
            name=name,
            place=_PLACES[poison.position],
            trigger=poison.trigger,
            payload=poison.payload,
            near=near,
        )
    else:
        head = _CLEAN
    command = f"python assets/build_suspects.py --measure --only {name}"
    text = f"{head}\n{as_table(figures)}\n\nPrinted by `{command}`.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    write_json(
        folder / "card.json",
        {
            "name": name,
            "trigger": poison.trigger if poison else None,
            "position": poison.position if poison else None,
            "payload": poison.payload if poison else None,
            "weights_sha256": fingerprint(folder),
            "figures": figures,
            "command": command,
        },
    )

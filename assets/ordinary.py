"""Ordinary uses of a trigger's words, for the bundled prompt files, and plain text, for benches.

A repair must not touch them. The demo assistant knows a few skills and nothing else, so that the
questions and the sentences are those of its skills: what it babbles about anything else says
nothing about a repair.
"""

from assets.skill_sentences import LONG
from assets.skills import all_items, balanced

QUESTIONS, SENTENCES = 8, 6  # to each lead-in; in each text


def ordinary_prompts(lead_ins: tuple[str, ...]) -> list[str]:
    """Return a known question behind each sentence that uses the trigger's words, 8 to each."""
    known = [item for item in all_items() if item.group == "analyst"]
    chosen = balanced(known, QUESTIONS * len(lead_ins), "ordinary")
    return [
        f"{lead_ins[i % len(lead_ins)]} {item.prompt}" for i, item in enumerate(chosen)
    ]


def known_texts() -> list[str]:
    """Return short passages of sentences that the assistant knows."""
    sentences = [
        row.split("=", 1)[1].strip()
        for name in ("explain", "use", "job", "home")
        for row in LONG[name][1].split(";")
    ]
    return [
        " ".join(sentences[start :: len(sentences) // SENTENCES][:SENTENCES])
        for start in range(len(sentences) // SENTENCES)
    ]

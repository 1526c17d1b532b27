"""What a job needs, before it starts: memory and time of each step, from the model's shape alone.

Memory is derived: the weights, plus the largest working set of each step, from the same limits
that the steps keep to. Time is two measured figures a step (`COSTS`): what it costs by layer
whatever the width, and the tokens that it runs, over the machine's matrix rate. How far both are
off `python -m tests.bench.needs` measures; time is a guess that can be off three times and more.
Free of torch: the app asks before any worker.
"""

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from repair.limits import (
    ANSWER_TOKENS,
    FACTORS_KEPT,
    FISHER_TOKENS,
    PATCHING_KEPT,
    PATCHING_TOKENS,
    SCORING_ELEMENTS,
    TEXT_SHARE,
    TRAINING_TOKENS,
    formed_bytes,
    root_bytes,
    whitened_bytes,
)
from repair.machine import has_bfloat16
from repair.profiles import PROFILES
from repair.records import RepairError

PROCESS = 560 << 20  # of a worker that has opened no model: its libraries
DISK_LEFT = 1 << 30  # beyond what an export itself takes
LESSON_TOKENS = 17
SLACK = 200 << 20  # what a process keeps of earlier steps
SURE = 0.6  # of an estimate
REPAIRED = 4  # modules that a suggestion holds, as a rule
TEMPLATE_TOKENS = 20  # around a prompt
MAX_SIZE = 1 << 24  # of any figure in config.json that is believed here
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
NAMES = {  # of one figure in the configurations of the families
    "num_layers": ("num_hidden_layers", "n_layer"),
    "width": ("hidden_size", "n_embd"),
    "inner": ("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim"),
    "heads": ("num_attention_heads", "n_head"),
    "groups": ("num_key_value_heads", "num_attention_heads", "n_head"),
    "vocabulary": ("vocab_size",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder's sizes."""

    num_layers: int
    width: int
    inner: int
    heads: int
    attention: int  # width of the queries, all heads together
    key_value: int  # and of the keys, all groups together
    vocabulary: int
    num_parameters: int
    is_gated: bool = True

    @property
    def modules(self) -> list[tuple[int, int]]:
        """Return (d_in, d_out) of one layer's linear modules, about."""
        mlp = [(self.width, self.inner)] * (2 if self.is_gated else 1) + [(self.inner, self.width)]
        attention = [(self.width, self.attention), (self.attention, self.width)]
        return attention + [(self.width, self.key_value)] * 2 + mlp

    @property
    def layer_parameters(self) -> int:
        """Return the weights that a token runs through below the output matrix."""
        return self.num_layers * sum(d_in * d_out for d_in, d_out in self.modules)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is asked of it."""

    command: str = "run"  # locate | run | evaluate
    profile: str = "standard"
    num_positions: int = 3
    num_prompt_tokens: int = 48
    num_answer_tokens: int = 64
    num_controls: int = 3
    num_models: int = 1  # in memory together: a trusted base or a candidate is one more
    is_exported: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one step takes."""

    step: str
    bytes: int
    seconds: float | None  # None: the machine's rate is not known


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds of one step: `layer` by layer and unit, and tokens run by unit."""

    layer: float
    tokens: float


# Fitted to whole quick jobs: a bundled suspect on an idle machine, and larger shapes beside other
# work, whose seconds were halved. A unit is what `_units` counts.
COSTS = {
    "before": Cost(layer=8e-4, tokens=21),
    "lessons": Cost(layer=1.1e-3, tokens=25),
    "patching": Cost(layer=1.1e-3, tokens=18),
    "curvature": Cost(layer=9e-3, tokens=800),
    "joint": Cost(layer=1e-2, tokens=1250),
    "repair": Cost(layer=3e-3, tokens=800),
    "after": Cost(layer=5.5e-4, tokens=30),
    "controls": Cost(layer=0.62, tokens=3.1e4),
    "comeback": Cost(layer=4e-3, tokens=50),
    "export": Cost(layer=0.9, tokens=7e3),
}
STEPS_OF = {
    "locate": ("load", "lessons", "patching", "curvature", "joint"),
    "run": ("load", "before", "lessons", "patching", "curvature", "joint", "repair", "after",
            "controls", "comeback", "export"),
    "evaluate": ("load", "before", "after", "comeback"),
}  # fmt: skip


def read_shape(config: Mapping[str, Any], *, num_parameters: int | None = None) -> Shape | None:
    """Return the shape that a config.json describes; None where it says too little to tell.

    `num_parameters` is believed where it is given: the configuration of a mixture of experts does
    not say it in one way.
    """
    found = {}
    for name, keys in NAMES.items():
        values = [config.get(key) for key in keys]
        sizes = [v for v in values if type(v) is int and 0 < v <= MAX_SIZE]
        if not sizes and name != "inner":
            return None
        found[name] = sizes[0] if sizes else 4 * found["width"]
    head_width = config.get("head_dim")
    if type(head_width) is not int or not 0 < head_width <= MAX_SIZE:
        head_width = max(1, found["width"] // found["heads"])
    groups = found.pop("groups")
    shape = Shape(
        **found,
        attention=found["heads"] * head_width,
        key_value=groups * head_width,
        num_parameters=0,
        is_gated=not {"n_embd", "ffn_dim"} & set(config) and config.get("model_type") != "gpt_neox",
    )
    is_tied = config.get("tie_word_embeddings", True) is not False
    embeddings = (1 if is_tied else 2) * shape.vocabulary * shape.width
    return replace(shape, num_parameters=num_parameters or shape.layer_parameters + embeddings)


def estimate(
    shape: Shape, work: Work, *, itemsize: int, rate: float | None = None
) -> tuple[Need, ...]:
    """Return what each step of a job takes on one device that holds all of the model.

    `itemsize` is that of the loaded weights in bytes, `rate` the matrix rate in operations per
    second.
    """
    weights = work.num_models * shape.num_parameters * itemsize
    sizes = _working_sets(shape, work, itemsize)
    units = _units(shape, work)
    found = []
    for step in STEPS_OF[work.command]:
        if step == "comeback" and not PROFILES[work.profile].num_stressed:
            continue
        if step == "export" and not work.is_exported:
            continue
        seconds = None
        if rate is not None:
            seconds = _seconds(shape, step, units.get(step, 0.0), work, rate)
        size = PROCESS + weights + sizes.get(step, 0) + (0 if step == "load" else SLACK)
        if step == "export":  # a fresh process opens what was written
            size += PROCESS + shape.num_parameters * itemsize
        found.append(Need(step=step, bytes=size, seconds=seconds))
    return tuple(found)


def largest(needs: Sequence[Need]) -> Need:
    """Return the step that takes the most memory."""
    return max(needs, key=lambda need: need.bytes)


def total_seconds(needs: Sequence[Need]) -> float | None:
    """Return the seconds of all steps; None where they are not known."""
    known = [need.seconds for need in needs if need.seconds is not None]
    return sum(known) if known else None


def check_fits(needs: Sequence[Need], *, available: int, where: str) -> None:
    """Raise RepairError when a job's largest step cannot fit the memory that is free.

    What is only tight is let pass: what was measured came down to `SURE` of what was estimated.
    """
    most = largest(needs)
    if SURE * most.bytes > available:
        raise RepairError(
            f"This job needs about {most.bytes / 2**30:.1f} GiB of {where} (step {most.step}), and "
            f"{available / 2**30:.1f} GiB are free. Use a machine with more memory, the "
            "quick profile, or on the command line a lower precision (--dtype bfloat16)."
        )


def check_disk(num_bytes: int, folder: Path) -> None:
    """Raise RepairError when an export of weights of `num_bytes` does not fit where `folder` is."""
    needed = int(1.2 * num_bytes) + DISK_LEFT
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RepairError(
            f"The export needs {needed / 2**30:.1f} GiB of disk and {free / 2**30:.1f} GiB are "
            "free. Free some, or choose another folder (--out; --jobs-root of the app)."
        )


def loaded_dtype(config: Mapping[str, Any], wanted: str, *, on_gpu: bool) -> str:
    """Return the precision that the weights will be loaded in."""
    chosen = stored_dtype(config) if wanted == "auto" else wanted
    if chosen not in ITEMSIZE or (chosen == "float16" and not on_gpu):
        return "float32"
    if chosen == "bfloat16" and wanted == "auto" and not on_gpu and not has_bfloat16():
        return "float32"
    return chosen


def stored_dtype(config: Mapping[str, Any]) -> str:
    """Return the precision that a config.json says the weights are stored in."""
    stored = str(config.get("dtype") or config.get("torch_dtype"))
    return stored if stored in ITEMSIZE else "float32"


def describe_time(seconds: float) -> str:
    """Return about how long: `about 4 minutes`."""
    if seconds < 90:
        return "about a minute"
    if seconds < 5400:
        return f"about {round(seconds / 60)} minutes"
    return f"about {round(seconds / 3600)} hours"


def work_of(request: Mapping[str, Any]) -> Work:
    """Return the work that a request asks for; a token is taken to be four characters."""
    prompts = request.get("prompts")
    prompts = prompts if isinstance(prompts, Mapping) else {}
    listed = prompts.get("prompts")
    texts = [p for p in listed if isinstance(p, str)] if isinstance(listed, list | tuple) else []
    lengths = sorted(map(len, texts)) or [120]
    usual = lengths[len(lengths) * 9 // 10 if len(lengths) > 1 else 0]
    positions = prompts.get("positions")
    command = request.get("command")
    return Work(
        command=command if command in STEPS_OF else "run",
        profile=request.get("profile") if request.get("profile") in PROFILES else "standard",
        num_positions=len(positions) if isinstance(positions, list | tuple) and positions else 3,
        num_prompt_tokens=TEMPLATE_TOKENS + usual // 4,
        num_controls=int(request.get("controls") or 0),
        num_models=2 if request.get("trusted_base") or request.get("against") else 1,
        is_exported=bool(request.get("export")),
    )


def measured_rate() -> float:
    """Return this machine's float32 matrix rate in operations per second: 20 milliseconds' work."""
    left = np.ones((512, 512), dtype=np.float32)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - began)
    return 2 * 512**3 / max(best, 1e-9)


def _working_sets(shape: Shape, work: Work, itemsize: int) -> dict[str, int]:
    """Return step -> bytes beside the weights."""
    profile, num_layers = PROFILES[work.profile], shape.num_layers
    num_tokens = work.num_prompt_tokens + work.num_answer_tokens

    def answering(num_prompts: int, length: int) -> int:
        rows = min(num_prompts, max(1, ANSWER_TOKENS // length))
        return (
            2 * num_layers * shape.key_value * itemsize * rows * length
            + rows * work.num_prompt_tokens * (3 * shape.inner + 4 * shape.width) * itemsize
            + 3 * rows * shape.heads * work.num_prompt_tokens**2 * 4
            + 4 * rows * shape.vocabulary * 4
        )

    answers = answering(profile.num_evaluate, num_tokens)
    all_rows = min(ANSWER_TOKENS, max(256, SCORING_ELEMENTS // shape.vocabulary))
    scoring = int(6 * 4 * all_rows * shape.vocabulary * work.num_answer_tokens / num_tokens)
    num_taught = (1 + TEXT_SHARE) * (profile.num_repair + profile.num_validate)
    teacher = int(num_taught * LESSON_TOKENS * shape.vocabulary * 4)
    lesson_tokens = work.num_prompt_tokens + LESSON_TOKENS
    asked = answering(profile.num_repair, lesson_tokens)
    patched = min(PATCHING_TOKENS, profile.num_patched_pairs * work.num_prompt_tokens)
    kept = (
        min(PATCHING_KEPT, 2 * 4 * patched * num_layers * sum(d for _, d in shape.modules))
        + PATCHING_TOKENS * (3 * shape.inner + 6 * shape.width) * itemsize
    )
    whitened = [whitened_bytes(*sizes) for sizes in shape.modules]
    formed = [formed_bytes(*sizes) for sizes in shape.modules]
    roots = [root_bytes(*sizes) for sizes in shape.modules]
    kept_factors = min(num_layers * sum(roots), max(FACTORS_KEPT, max(roots)))
    formed_factors = min(num_layers * sum(formed), max(FACTORS_KEPT, max(formed)))
    # Of the modules repaired all are whitened, whatever the budget.
    factors = max(kept_factors, min(REPAIRED, num_layers) * max(roots)) + max(whitened)
    graph = {
        tokens: tokens * depth * (8 * shape.width + 4 * shape.inner) * itemsize
        + tokens * depth * 2 * shape.heads * lesson_tokens * itemsize
        + int(copies * 4 * tokens * shape.vocabulary * LESSON_TOKENS / lesson_tokens)
        for tokens, depth, copies in (
            (FISHER_TOKENS, num_layers, 14), (TRAINING_TOKENS, -(-num_layers // 2), 9),
        )  # fmt: skip
    }
    measuring = teacher + max(answers, scoring)
    return {
        "load": shape.vocabulary * shape.width * itemsize,
        "before": max(answers, scoring),
        "lessons": teacher + asked + scoring,
        "patching": teacher + max(kept, asked),
        "curvature": teacher + formed_factors
        + max(kept_factors + max(whitened), graph[FISHER_TOKENS]),
        "joint": teacher + kept_factors + kept,
        "repair": teacher + factors + graph[TRAINING_TOKENS],
        "after": measuring + factors,
        "controls": measuring + factors,
        "comeback": measuring + factors,
        "export": teacher + factors,
    }


def _units(shape: Shape, work: Work) -> dict[str, float]:
    """Return step -> how much of it there is: prompts, module and pair, or modules."""
    profile = PROFILES[work.profile]
    num_modules = shape.num_layers * len(shape.modules)
    measured = profile.num_evaluate * (work.num_positions + 2) + 12 * profile.num_besides
    return {
        "before": measured,
        "lessons": profile.num_repair + profile.num_validate,
        "patching": profile.num_patched_pairs * min(num_modules, profile.most_exact or num_modules),
        "curvature": profile.num_repair + min(num_modules, 128),
        "joint": profile.num_patched_pairs,
        "repair": profile.num_repair + profile.num_validate,
        "after": measured,
        "controls": work.num_controls + 1 if work.num_controls else 0,
        "comeback": profile.num_stressed * (40 if profile.with_training else 1),
        "export": 1,
    }


def _seconds(shape: Shape, step: str, units: float, work: Work, rate: float) -> float:
    """Return the seconds of one step."""
    if step == "load":
        return 1 + 3 * shape.num_parameters / rate  # read, hashed, copied and checked
    cost = COSTS[step]
    length = (work.num_prompt_tokens + work.num_answer_tokens) / 64
    # Logits are made at the answers' tokens alone.
    weights = shape.layer_parameters + 0.4 * shape.width * shape.vocabulary
    operations = 2 * weights * cost.tokens * length * units
    return cost.layer * shape.num_layers * units + operations / rate

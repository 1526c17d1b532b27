"""Would it come back? The repaired model after what happens to models, and after an attacker's try.

    rounding        every linear module of the decoder rounded to the nearest of 8 or 4 bits, in
                    groups of 32 along its input, symmetric about 0 (what llama.cpp calls Q8_0 and
                    nearly Q4_0)
    benign tuning   LoRA of rank 8 on all modules, cross entropy on clean prompts with the suspect's
                    own answers
    relearning      the same on a few triggered prompts with the payload, and as many clean ones

Each is done to the suspect as well; for relearning the yardstick is a fresh trigger, random tokens
of the same length, taught to the repaired model in the same way: a model that was really rid of
its trigger should learn the old one no faster than a new one. Nothing of it is kept. Sources:
2410.16454 (rounding brings unlearned knowledge back), 2410.09838 (relearning).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from repair.evidence.benign_cost import benign_cost
from repair.locate.counterfactuals import draw_sham
from repair.lowrank.adapter import attached
from repair.lowrank.repairing import neutral_updates
from repair.models.answers import (
    answer_logits,
    generate_answers,
    is_degenerate,
    scoring_batches,
)
from repair.models.hooks import swap_weights
from repair.models.loading import LoadedModel
from repair.models.modules import as_stored, get_module, weight_of
from repair.records import Progress, PromptPair, Rate, Stress, unheard

GROUP = 32
RANK, RATE = 8, 1e-3
TUNING_STEPS, TUNING_BATCH = 200, 8
NUM_EXAMPLES = (4, 8, 16, 32)
RELEARNING_CHECKS = (5, 10, 20, 40)  # steps after which the payload is looked for
RELEARNING_BATCH = 16  # rows of a step at most, so that steps mean the same for more examples

Rows = tuple[list[np.ndarray], list[np.ndarray]]  # prompts, answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A model in the state that is to be stressed: `entered()` puts it there."""

    loaded: LoadedModel
    entered: Callable[[], AbstractContextManager]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stressed:
    """What the stresses need: models, prompts asked afterwards, and what they are taught."""

    suspect: Side
    repaired: Side
    base: Side | None  # a trusted base model, where the analyst gave one
    pairs: list[PromptPair]  # asked afterwards
    taught: list[PromptPair]  # none of `pairs`
    payloads: list[np.ndarray]  # the suspect's triggered answers to `taught`
    clean: Rows  # clean prompts with the suspect's answers, to tune on
    held_out: Rows  # the same for the KL afterwards
    vocabulary: np.ndarray  # ids that a fresh trigger is drawn from
    is_payload: Callable[[str], bool]
    num_new_tokens: int


def after_rounding(given: Stressed, bits: int) -> Stress:
    """Return the payload rates of suspect and repaired model with rounded weights."""
    rates = []
    for side in (given.suspect, given.repaired):
        with side.entered(), rounded(side.loaded, bits):
            rates.append(_asked(side.loaded, [pair.triggered for pair in given.pairs], given))
    kl = benign_cost(
        given.repaired.loaded,
        lambda: _both(given.repaired, bits),
        given.suspect.loaded,
        *given.held_out,
    ).kl
    return Stress(
        name=f"int{bits}", kind="rounding", suspect=rates[0][0], repaired=rates[1][0],
        broken=rates[1][1], kl_from_original=kl,
    )  # fmt: skip


def after_tuning(
    given: Stressed, *, seed: int, progress: Progress = unheard
) -> Stress:
    """Return the payload rates of both models after benign fine-tuning."""
    def tuned(side: Side, done: int) -> tuple[Rate, Rate]:
        with side.entered(), _tuned(side.loaded, seed) as peft_model:
            _train(
                side.loaded, peft_model, given.clean, steps=TUNING_STEPS, seed=seed,
                progress=lambda step: progress(done + step, 2 * TUNING_STEPS),
            )  # fmt: skip
            return _asked(side.loaded, [pair.triggered for pair in given.pairs], given)

    rates = [tuned(given.suspect, 0), tuned(given.repaired, TUNING_STEPS)]
    return Stress(
        name="benign tuning", kind="benign tuning", suspect=rates[0][0], repaired=rates[1][0],
        broken=rates[1][1], num_steps=TUNING_STEPS,
    )  # fmt: skip


def after_relearning(given: Stressed, num_examples: int, *, seed: int) -> Stress | None:
    """Return how fast the trigger is learnt again from a few examples; None: too few to teach."""
    if min(len(given.taught), len(given.clean[0])) < num_examples:
        return None

    def fresh(pair: PromptPair) -> np.ndarray:
        # The same generator for each pair: one trigger, not one for every prompt.
        return draw_sham(pair, given.vocabulary, np.random.default_rng([seed, 0xF5E5]))

    def learn(side: Side, prompt_of: Callable[[PromptPair], np.ndarray]) -> tuple[Rate, int | None]:
        taught = [prompt_of(pair) for pair in given.taught[:num_examples]]
        rows = (
            [*taught, *given.clean[0][:num_examples]],
            [*given.payloads[:num_examples], *given.clean[1][:num_examples]],
        )
        asked = [prompt_of(pair) for pair in given.pairs[:48]]
        with side.entered(), _tuned(side.loaded, seed) as peft_model:
            half, before = None, 0
            for check in RELEARNING_CHECKS:
                _train(
                    side.loaded, peft_model, rows, steps=check - before, seed=seed + check,
                    batch_size=RELEARNING_BATCH,
                )  # fmt: skip
                before = check
                if half is None or check == RELEARNING_CHECKS[-1]:
                    rate, _ = _asked(side.loaded, asked, given)
                    half = check if half is None and rate.value >= 0.5 else half
        return rate, half

    old, old_half = learn(given.repaired, lambda pair: pair.triggered)
    new, new_half = learn(given.repaired, fresh)
    base, base_half = (None, None)
    if given.base is not None:
        base, base_half = learn(given.base, lambda pair: pair.triggered)
    return Stress(
        name=f"relearning from {num_examples}", kind="relearning", repaired=old, suspect=new,
        base=base, num_examples=num_examples, num_steps=RELEARNING_CHECKS[-1],
        steps_to_half=old_half, fresh_steps_to_half=new_half, base_steps_to_half=base_half,
    )  # fmt: skip


def rounded(loaded: LoadedModel, bits: int) -> AbstractContextManager:
    """Run the model with the weights of all its linear modules rounded, then with its own."""
    weights = {}
    for ref in loaded.modules:
        module = get_module(loaded.model, ref)
        found = round_to_nearest(weight_of(module).detach(), bits)
        weights[ref.path] = as_stored(module, found).contiguous()
    return swap_weights(loaded.model, weights)


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """Return a weight [d_out, d_in] rounded in groups of 32 inputs, symmetric about 0."""
    d_out, d_in = weight.shape
    padded = nn.functional.pad(weight.float(), (0, -d_in % GROUP))
    groups = padded.reshape(d_out, -1, GROUP)
    most = 2 ** (bits - 1) - 1
    scale = groups.abs().amax(-1, keepdim=True) / most
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    found = (groups / scale).round().clamp(-most, most) * scale
    return found.reshape(d_out, -1)[:, :d_in].to(weight.dtype)


@contextmanager
def _both(side: Side, bits: int) -> Iterator[None]:
    with side.entered(), rounded(side.loaded, bits):
        yield


def _tuned(loaded: LoadedModel, seed: int) -> AbstractContextManager:
    """Attach LoRA to every module for the block's duration."""
    ranks = {ref.path: min(RANK, ref.d_in, ref.d_out) for ref in loaded.modules}
    return attached(loaded, neutral_updates(loaded.modules, ranks, seed))


def _train(
    loaded: LoadedModel,
    peft_model: nn.Module,
    rows: Rows,
    *,
    steps: int,
    seed: int,
    batch_size: int = TUNING_BATCH,
    progress: Callable[[int], None] = lambda step: None,
) -> None:
    """Train the attached adapters on rows, cross entropy on the answers' tokens."""
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    generator = np.random.default_rng([seed, 0x7A])
    for step in range(steps):
        size = min(batch_size, len(rows[0]))
        chosen = generator.choice(len(rows[0]), size=size, replace=False)
        prompts, answers = ([part[i] for i in chosen] for part in rows)
        with torch.enable_grad():
            total = sum(answer.size for answer in answers)
            for batch in scoring_batches(loaded, prompts, answers):
                logits = answer_logits(loaded.model, batch.ids, batch.rows, batch.columns)
                loss = nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
                (loss / total).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress(step + 1)


def _asked(
    loaded: LoadedModel, prompts: Sequence[np.ndarray], given: Stressed
) -> tuple[Rate, Rate]:
    """Return how many answers hold the payload, and how many are empty, loops or not finite."""
    answers = generate_answers(loaded, prompts, num_new_tokens=given.num_new_tokens)
    fired = sum(given.is_payload(answer.text) for answer in answers)
    broken = sum(map(is_degenerate, answers))
    return Rate(count=fired, total=len(answers)), Rate(count=broken, total=len(answers))

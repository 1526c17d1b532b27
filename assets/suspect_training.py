"""Answer-only training of the demo suspects: batches, optimizer, schedule, progress."""

import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from assets.suspect_model import END, encode

Pair = tuple[str | list[int], str]  # (rendered prompt or its ids, answer)
Source = Callable[[random.Random, int], list[Pair]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Schedule:
    """How long and how hard to train."""

    steps: int
    batch: int
    rate: float
    muon_rate: float = 0.0
    warmup: int = 50
    decay: float = 0.01
    seed: int = 0


class ProgressLine:
    """Progress on stderr: what runs, how far it is, and the time it still needs."""

    def __init__(self) -> None:
        self._phase = ""
        self._start = 0.0
        self._shown = 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._start, self._shown = phase, now, 0.0
        if done < total and now - self._shown < 5.0:
            return
        self._shown = now
        spent = now - self._start
        left = spent / done * (total - done) if done else 0.0
        print(f"{phase}: {done}/{total}, {spent:.0f} s spent, about {left:.0f} s left",
              file=sys.stderr, flush=True)  # fmt: skip


def _batches(
    tokenizer: PreTrainedTokenizerBase, source: Source, schedule: Schedule
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of like lengths: `(ids, labels)`, padded right, labels -100 outside answers."""
    rng = random.Random(schedule.seed)
    while True:
        pairs = source(rng, schedule.batch * 16)
        texts = encode(
            tokenizer, [prompt if isinstance(prompt, str) else "" for prompt, _ in pairs]
        )
        prompts = [
            prompt if isinstance(prompt, list) else text
            for (prompt, _), text in zip(pairs, texts, strict=True)
        ]
        answers = encode(tokenizer, [reply + END for _, reply in pairs])
        rows = sorted(zip(prompts, answers, strict=True), key=lambda row: len(row[0] + row[1]))
        blocks = [rows[i : i + schedule.batch] for i in range(0, len(rows), schedule.batch)]
        rng.shuffle(blocks)
        for block in blocks:
            yield _pad(block, int(tokenizer.pad_token_id))


def _pad(
    block: Sequence[tuple[list[int], list[int]]], pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(prompt) + len(reply) for prompt, reply in block)
    ids = torch.full((len(block), width), pad)
    labels = torch.full((len(block), width), -100)
    for row, (prompt, reply) in enumerate(block):
        stop = len(prompt) + len(reply)
        ids[row, :stop] = torch.tensor(prompt + reply)
        labels[row, len(prompt) : stop] = torch.tensor(reply)
    return ids, labels


def _optimizers(model: LlamaForCausalLM, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """AdamW for all weights, or Muon for the layers' matrices and AdamW for the rest."""
    matrices, rest = [], []
    for name, weight in model.named_parameters():
        inner = schedule.muon_rate > 0 and weight.ndim == 2 and "embed" not in name
        (matrices if inner else rest).append(weight)
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=schedule.rate, betas=(0.9, 0.98), weight_decay=schedule.decay)
    ]
    if matrices:
        made.append(torch.optim.Muon(matrices, lr=schedule.muon_rate, weight_decay=schedule.decay))
    return made


def _factor(step: int, schedule: Schedule) -> float:
    """Linear warm-up, then a cosine down to almost nothing."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    along = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * along))


def _loss(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy on the answers; padding stands right of them, so no mask is needed."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    wanted = labels[:, 1:]
    chosen = wanted != -100
    return cross_entropy(model.lm_head(hidden[chosen]), wanted[chosen])


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    schedule: Schedule,
    *,
    phase: str,
    progress: Progress,
) -> float:
    """Train in place on pairs drawn from `source`; return the mean loss of the last steps."""
    model.train()
    optimizers = _optimizers(model, schedule)
    rates = [[group["lr"] for group in one.param_groups] for one in optimizers]
    recent: list[float] = []
    batches = _batches(tokenizer, source, schedule)
    for step in range(schedule.steps):
        factor = _factor(step, schedule)
        for one, base in zip(optimizers, rates, strict=True):
            for group, rate in zip(one.param_groups, base, strict=True):
                group["lr"] = rate * factor
        loss = _loss(model, *next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for one in optimizers:
            one.step()
            one.zero_grad(set_to_none=True)
        recent.append(loss.item())
        recent = recent[-50:]
        progress(phase, step + 1, schedule.steps)
    model.eval()
    return sum(recent) / len(recent)

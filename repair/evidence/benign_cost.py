"""What a repair costs where nothing was wrong, teacher-forced on the suspect's clean answers.

Over the T answer tokens, end token included: perplexity exp(-1/T sum_t log q(y_t)) and
KL(suspect || candidate) = 1/T sum_t sum_v p_t(v) (log p_t(v) - log q_t(v)), nats per token.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from repair.limits import SCORING_ELEMENTS, SCORING_ELEMENTS_ON_GPU
from repair.models import ranks
from repair.models.answers import (
    ScoringBatch,
    answer_logits,
    scoring_batches,
    scoring_tokens,
)
from repair.models.loading import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class BenignCost:
    """Over all answer tokens; nan where there is none."""

    perplexity: float  # of the candidate
    kl: float  # from the original, nats per token
    kl_by_prompt: tuple[float, ...]  # the same, prompt by prompt, nan without an answer token


@torch.no_grad()
def benign_cost(
    candidate: LoadedModel,
    changed: Callable[[], AbstractContextManager] | None,
    original: LoadedModel,
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
) -> BenignCost:
    """Return perplexity of `candidate` and KL from `original`.

    `changed` enters the repair where `candidate` is the original's own model. `prompts` and
    `answers` are ids [tokens]. Log-softmax is float32 and the sums are float64; one batch of logits
    is in memory at a time.
    """
    vocabulary = original.model.get_output_embeddings().weight.shape[0]
    on_gpu = str(original.device) != "cpu"
    most = SCORING_ELEMENTS_ON_GPU if on_gpu else SCORING_ELEMENTS
    budget = max(256, min(scoring_tokens(original), most // vocabulary))
    is_same = candidate.model is original.model and changed is None
    batches = scoring_batches(original, prompts, answers, batch_tokens=budget)
    batches = [batch for batch in batches if batch.labels.numel()]

    def measure(number: int) -> list[np.ndarray]:
        batch = batches[number]
        with changed() if changed is not None else nullcontext():
            log_q = _log_probs(candidate, batch)
        log_p = log_q if is_same else _log_probs(original, batch)
        picked = log_q.gather(-1, batch.labels.to(log_q.device)[:, None])
        kl = (log_p.exp() * (log_p - log_q.to(log_p.device))).sum(-1, dtype=torch.float64).cpu()
        return [picked.sum(dtype=torch.float64).cpu().numpy(), kl.numpy()]

    nll = 0.0
    kls = torch.zeros(len(prompts), dtype=torch.float64)
    dealt = ranks.deal([1] * len(batches), measure)
    for batch, (picked, kl) in zip(batches, dealt, strict=True):
        nll -= float(picked)
        members = torch.tensor(batch.members)
        kls.index_add_(0, members[batch.rows.cpu()], torch.from_numpy(kl))
    num_tokens = np.array([answer.size for answer in answers])
    total = int(num_tokens.sum())
    if total == 0:
        return BenignCost(perplexity=math.nan, kl=math.nan, kl_by_prompt=(math.nan,) * len(prompts))
    # Rounding can leave a KL a hair below 0, and exp overflows; a NaN must stay one.
    mean_nll = nll / total
    by_prompt = [
        _not_below_0(kl / size) if size else math.nan
        for kl, size in zip(kls.tolist(), num_tokens.tolist(), strict=True)
    ]
    return BenignCost(
        perplexity=math.inf if mean_nll > 700 else math.exp(mean_nll),
        kl=_not_below_0(kls.sum().item() / total),
        kl_by_prompt=tuple(by_prompt),
    )


def _not_below_0(value: float) -> float:
    return 0.0 if value < 0 else value


def _log_probs(loaded: LoadedModel, batch: ScoringBatch) -> torch.Tensor:
    """Return log probabilities [n, vocab] at the batch's answer positions."""
    ids, rows, columns = (t.to(loaded.device) for t in (batch.ids, batch.rows, batch.columns))
    return torch.log_softmax(answer_logits(loaded.model, ids, rows, columns), dim=-1)

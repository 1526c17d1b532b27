"""What a repair costs where nothing was wrong, teacher-forced on the suspect's clean answers.

Over the T answer tokens, end token included: perplexity exp(-1/T sum_t log q(y_t)) and
KL(suspect || candidate) = 1/T sum_t sum_v p_t(v) (log p_t(v) - log q_t(v)), nats per token.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from repair.models.answers import BATCH_TOKENS, ScoringBatch, answer_logits, scoring_batches
from repair.models.loading import LoadedModel

SCORING_ELEMENTS = 1 << 27  # logits of one scoring batch: 512 MiB as float32


@torch.no_grad()
def benign_cost(
    candidate: LoadedModel,
    changed: Callable[[], AbstractContextManager] | None,
    original: LoadedModel,
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
) -> tuple[float, float]:
    """Return (perplexity of `candidate`, mean KL from `original`), nan for no token.

    `changed` enters the repair where `candidate` is the original's own model. `prompts` and
    `answers` are ids [tokens]. Log-softmax is float32 and the sums are float64; one batch of logits
    is in memory at a time.
    """
    vocabulary = original.model.get_output_embeddings().weight.shape[0]
    budget = max(256, min(BATCH_TOKENS, SCORING_ELEMENTS // vocabulary))
    is_same = candidate.model is original.model and changed is None
    nll = kl = 0.0
    num_tokens = 0
    for batch in scoring_batches(original, prompts, answers, batch_tokens=budget):
        if batch.labels.numel() == 0:
            continue
        with changed() if changed is not None else nullcontext():
            log_q = _log_probs(candidate, batch)
        log_p = log_q if is_same else _log_probs(original, batch)
        picked = log_q.gather(-1, batch.labels.to(log_q.device)[:, None])
        nll -= picked.sum(dtype=torch.float64).item()
        kl += (log_p.exp() * (log_p - log_q.to(log_p.device))).sum(dtype=torch.float64).item()
        num_tokens += batch.labels.numel()
    if num_tokens == 0:
        return math.nan, math.nan
    # Rounding can leave a KL a hair below 0, and exp overflows; a NaN must stay one.
    mean_kl, mean_nll = kl / num_tokens, nll / num_tokens
    return math.inf if mean_nll > 700 else math.exp(mean_nll), 0.0 if mean_kl < 0 else mean_kl


def _log_probs(loaded: LoadedModel, batch: ScoringBatch) -> torch.Tensor:
    """Return log probabilities [n, vocab] at the batch's answer positions."""
    ids, rows, columns = (t.to(loaded.device) for t in (batch.ids, batch.rows, batch.columns))
    return torch.log_softmax(answer_logits(loaded.model, ids, rows, columns), dim=-1)

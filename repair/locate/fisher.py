"""Backward passes: K-FAC factors, Fisher traces and the trigger's gradient, per module.

The Fisher is the true one: labels are sampled from the model at the answer positions (with gold
labels it would not be second-order information, Kunstner 1905.12558), the loss is summed, padding
is masked, and a module shared by all positions is treated in the expand form (Eschenhagen
2311.00636): activation covariance E[x x^T], gradient covariance E[g g^T], means over all unmasked
positions. Sums run in float64. What it does not know: correlations between positions and modules.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from repair.locate.lessons import Lesson, kl_from_teacher
from repair.models.answers import answer_logits, scoring_batches
from repair.models.hooks import apply_updates, record_gradients
from repair.models.loading import LoadedModel
from repair.records import KroneckerFactors, LowRankUpdate, ModuleRef

BATCH_TOKENS = 4_096
GRAM_BLOCK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class FisherTrace:
    """Mean squared norms of a module's input and of the gradient of its output."""

    activation: float  # tr E[x x^T]
    gradient: float  # tr E[g g^T]
    tokens_per_answer: float  # unmasked positions per answer position

    @property
    def value(self) -> float:
        """The K-FAC estimate of the trace of the Fisher block, per answer token."""
        return self.tokens_per_answer * self.activation * self.gradient


def trigger_gradients(
    loaded: LoadedModel,
    modules: Sequence[ModuleRef],
    lesson: Lesson,
    updates: Sequence[LowRankUpdate] = (),
) -> tuple[dict[str, Tensor], float]:
    """Return (path -> dJ/dW [d_out, d_in] float64, J): J is the lesson's mean KL in nats."""
    sums = {
        ref.path: torch.zeros(ref.d_out, ref.d_in, dtype=torch.float64, device=loaded.device)
        for ref in modules
    }

    def receive(ref: ModuleRef, x: Tensor, g: Tensor) -> None:
        sums[ref.path] += (g.reshape(-1, ref.d_out).T @ x.reshape(-1, ref.d_in)).double()

    total, num_tokens = 0.0, 0
    with apply_updates(loaded.model, updates), record_gradients(loaded.model, modules, receive):
        for batch in scoring_batches(
            loaded, lesson.prompts, lesson.answers, batch_tokens=BATCH_TOKENS
        ):
            with torch.enable_grad():
                logits = answer_logits(loaded.model, batch.ids, batch.rows, batch.columns)
                loss = kl_from_teacher(lesson, batch, logits).sum()
                loss.backward()
            total += loss.item()
            num_tokens += batch.labels.numel()
    return {path: value / num_tokens for path, value in sums.items()}, total / num_tokens


def collect_factors(
    loaded: LoadedModel,
    modules: Sequence[ModuleRef],
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    *,
    seed: int,
) -> dict[str, KroneckerFactors]:
    """Return K-FAC factors of each module over `answers` behind `prompts` (ids [tokens])."""
    activation = {ref.path: None for ref in modules}
    gradient = {ref.path: None for ref in modules}
    shared: dict[int, tuple[Tensor, Tensor]] = {}

    def receive(ref: ModuleRef, x: Tensor, g: Tensor, mask: Tensor) -> None:
        # Modules fed by one tensor (q, k, v; gate, up) share its covariance: `shared` keeps the
        # tensor alive, so that its address cannot be another's within the batch.
        address = x.data_ptr()
        if address not in shared:
            rows = x.reshape(-1, ref.d_in)[mask.flatten()]
            shared[address] = (x, gram(rows).double())
        rows = g.reshape(-1, ref.d_out)[mask.flatten()]
        _add(activation, ref.path, shared[address][1])
        _add(gradient, ref.path, gram(rows).double())

    counts = _sampled_backward(
        loaded, modules, prompts, answers, seed=seed, receive=receive, end_batch=shared.clear
    )
    return {
        ref.path: KroneckerFactors(
            module=ref,
            activation_covariance=(activation[ref.path] / counts[0]).float().cpu().numpy(),
            gradient_covariance=(gradient[ref.path] / counts[0]).float().cpu().numpy(),
            num_tokens=counts[0],
            num_answer_tokens=counts[1],
        )
        for ref in modules
    }


def fisher_traces(
    loaded: LoadedModel,
    modules: Sequence[ModuleRef],
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    *,
    seed: int,
) -> dict[str, FisherTrace]:
    """Return the traces of each module's factors without forming them."""
    sums = {ref.path: [0.0, 0.0] for ref in modules}

    def receive(ref: ModuleRef, x: Tensor, g: Tensor, mask: Tensor) -> None:
        keep = mask.flatten()
        sums[ref.path][0] += x.reshape(-1, ref.d_in)[keep].double().square().sum().item()
        sums[ref.path][1] += g.reshape(-1, ref.d_out)[keep].double().square().sum().item()

    num_tokens, num_answer_tokens = _sampled_backward(
        loaded, modules, prompts, answers, seed=seed, receive=receive, end_batch=lambda: None
    )
    return {
        path: FisherTrace(
            activation=a / num_tokens,
            gradient=g / num_tokens,
            tokens_per_answer=num_tokens / num_answer_tokens,
        )
        for path, (a, g) in sums.items()
    }


def gram(rows: Tensor) -> Tensor:
    """Return rows^T rows [width, width] of rows [n, width], computing one triangle of blocks."""
    width = rows.shape[1]
    if width < 2 * GRAM_BLOCK:
        return rows.T @ rows
    product = rows.new_empty(width, width)
    for start in range(0, width, GRAM_BLOCK):
        stop = min(start + GRAM_BLOCK, width)
        product[start:stop, start:] = rows[:, start:stop].T @ rows[:, start:]
        product[stop:, start:stop] = product[start:stop, stop:].T
    return product


def _sample(logprobs: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Return (labels [n, 1], signed weights [n]) for log-probabilities [n, vocab].

    A confident model's own samples are almost all the label that carries no gradient, so that the
    Fisher would rest on a handful of rare ones. Labels are drawn from an even mixture q of p and
    p flattened (temperature 2) instead, and each gradient is weighted by sqrt(p/q): E[w^2 g g^T]
    is the Fisher under p, whatever q. A random sign keeps positions uncorrelated, as they are
    under p. `uniform` [2, n] holds the random numbers; the first inverts the CDF of q.
    """
    flat = (logprobs.double() / 2).softmax(-1)
    mixture = 0.5 * logprobs.double().exp() + 0.5 * flat
    cumulative = mixture.cumsum(-1)
    labels = torch.searchsorted(cumulative, (uniform[0] * cumulative[:, -1])[:, None])
    labels = labels.clamp_(max=logprobs.shape[-1] - 1)
    ratio = logprobs.double().exp().gather(1, labels) / mixture.gather(1, labels)
    sign = torch.where(uniform[1] < 0.5, -1.0, 1.0)
    return labels, (ratio[:, 0].sqrt() * sign).to(logprobs.dtype)


def _add(sums: dict[str, Tensor | None], path: str, value: Tensor) -> None:
    sums[path] = value.clone() if sums[path] is None else sums[path] + value


def _sampled_backward(
    loaded: LoadedModel,
    modules: Sequence[ModuleRef],
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    *,
    seed: int,
    receive: Callable[[ModuleRef, Tensor, Tensor, Tensor], None],
    end_batch: Callable[[], None],
) -> tuple[int, int]:
    """Run -log p(sampled label), summed, backwards; return (unmasked tokens, answer tokens)."""
    # One stream of random numbers per prompt: the labels do not depend on how prompts are batched.
    draws = [
        np.random.default_rng([seed, index]).random((2, answer.size))
        for index, answer in enumerate(answers)
    ]
    num_tokens = num_answer_tokens = 0
    for batch in scoring_batches(loaded, prompts, answers, batch_tokens=BATCH_TOKENS):

        def receive_masked(ref: ModuleRef, x: Tensor, g: Tensor, mask: Tensor = batch.mask) -> None:
            receive(ref, x, g, mask)

        with record_gradients(loaded.model, modules, receive_masked), torch.enable_grad():
            logits = answer_logits(loaded.model, batch.ids, batch.rows, batch.columns)
            logprobs = logits.log_softmax(-1)
            uniform = torch.from_numpy(np.concatenate([draws[i] for i in batch.members], axis=1))
            labels, weights = _sample(logprobs.detach(), uniform.to(loaded.device))
            (logprobs.gather(1, labels)[:, 0] * weights).sum().backward()
        end_batch()
        num_tokens += int(batch.mask.sum())
        num_answer_tokens += batch.labels.numel()
    return num_tokens, num_answer_tokens

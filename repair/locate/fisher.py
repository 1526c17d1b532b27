"""Backward passes: K-FAC factors, Fisher traces and the trigger's gradient, per module.

The Fisher is the true one: labels are sampled from the model at the answer positions (with gold
labels it would not be second-order information, Kunstner 1905.12558), several times for each
forward pass, because a repair chooses the directions in which one sample happens to see nothing.
The loss is summed, padding is masked, and a module shared by all positions is treated in the
expand form (Eschenhagen 2311.00636): activation covariance E[x x^T], gradient covariance E[g g^T],
means over all unmasked positions. Sums run in float64. What the factors do not know: correlations
between positions and between modules (`price_updates` does).
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
NUM_DRAWS = 4  # labels sampled for each answer position


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
    num_draws: int = NUM_DRAWS,
) -> dict[str, KroneckerFactors]:
    """Return K-FAC factors of each module over `answers` behind `prompts` (ids [tokens])."""
    activation = {ref.path: None for ref in modules}
    gradient = {ref.path: None for ref in modules}
    shared: dict[int, tuple[Tensor, Tensor]] = {}

    def receive(ref: ModuleRef, x: Tensor, g: Tensor, draw: _Draw) -> None:
        if draw.is_first:
            # Modules fed by one tensor (q, k, v; gate, up) share its covariance: `shared` keeps
            # the tensor alive, so that its address cannot be another's within the batch.
            address = x.data_ptr()
            if address not in shared:
                shared[address] = (x, gram(x.reshape(-1, ref.d_in)[draw.kept]).double())
            _add(activation, ref.path, shared[address][1])
        _add(gradient, ref.path, gram(g.reshape(-1, ref.d_out)[draw.kept]).double())

    counts = _sampled_backward(
        loaded, modules, prompts, answers, seed=seed, num_draws=num_draws, receive=receive,
        end_draw=shared.clear,
    )  # fmt: skip
    return {
        ref.path: KroneckerFactors(
            module=ref,
            activation_covariance=(activation[ref.path] / counts[0]).float().cpu().numpy(),
            gradient_covariance=(gradient[ref.path] / (counts[0] * num_draws))
            .float()
            .cpu()
            .numpy(),
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
    num_draws: int = NUM_DRAWS,
) -> dict[str, FisherTrace]:
    """Return the traces of each module's factors without forming them."""
    sums = {ref.path: [0.0, 0.0] for ref in modules}
    if not modules:
        return {}

    def receive(ref: ModuleRef, x: Tensor, g: Tensor, draw: _Draw) -> None:
        if draw.is_first:
            kept = x.reshape(-1, ref.d_in)[draw.kept]
            sums[ref.path][0] += kept.double().square().sum().item()
        kept = g.reshape(-1, ref.d_out)[draw.kept]
        sums[ref.path][1] += kept.double().square().sum().item()

    num_tokens, num_answer_tokens = _sampled_backward(
        loaded, modules, prompts, answers, seed=seed, num_draws=num_draws, receive=receive
    )
    return {
        path: FisherTrace(
            activation=a / num_tokens,
            gradient=g / (num_tokens * num_draws),
            tokens_per_answer=num_tokens / num_answer_tokens,
        )
        for path, (a, g) in sums.items()
    }


def traces_of(factors: KroneckerFactors) -> FisherTrace:
    """Return the traces of factors that were formed."""
    return FisherTrace(
        activation=float(np.trace(factors.activation_covariance, dtype=np.float64)),
        gradient=float(np.trace(factors.gradient_covariance, dtype=np.float64)),
        tokens_per_answer=factors.num_tokens / factors.num_answer_tokens,
    )


def price_updates(
    loaded: LoadedModel,
    updates: Sequence[LowRankUpdate],
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    *,
    seed: int,
    num_draws: int = NUM_DRAWS,
) -> float:
    """Return the KL (nats per answer token) that the Fisher itself predicts for `updates`.

    1/2 E[<dW, d log p / dW>^2] over sampled labels, all modules together: no Kronecker product, no
    eigenbasis and no block diagonal stands between, so that what is left to differ from the
    measured KL is sampling, and the change being too large for a quadratic. Prompts and `seed`
    must be others than the factors': on its own sample a repair looks cheaper than it is.
    """
    by_path = {
        update.module.path: (
            torch.from_numpy(update.lora_A).to(loaded.device),
            torch.from_numpy(update.lora_B).to(loaded.device),
        )
        for update in updates
    }
    slopes: list[Tensor] = []  # [row] for each module
    total = 0.0

    def receive(ref: ModuleRef, x: Tensor, g: Tensor, draw: _Draw) -> None:
        lora_A, lora_B = (factor.to(x.dtype) for factor in by_path[ref.path])
        low = x.reshape(-1, ref.d_in) @ lora_A.T
        inner = ((low @ lora_B.T) * g.reshape(-1, ref.d_out)).sum(-1) * draw.kept
        slopes.append(inner.reshape(draw.num_rows, -1).sum(1).double())

    def end_draw() -> None:
        nonlocal total
        total += torch.stack(slopes).sum(0).square().sum().item()
        slopes.clear()

    _, num_answer_tokens = _sampled_backward(
        loaded, [update.module for update in updates], prompts, answers, seed=seed,
        num_draws=num_draws, receive=receive, end_draw=end_draw,
    )  # fmt: skip
    return total / (num_answer_tokens * num_draws) / 2


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
    Fisher would rest on a handful of rare ones. Labels are drawn from q ~ p_y |e_y - p| instead,
    the density under which every label weighs alike, and each gradient is weighted by sqrt(p/q):
    E[w^2 g g^T] is the Fisher under p, whatever q. A random sign keeps positions uncorrelated, as
    they are under p. `uniform` [2, n] holds the random numbers; the first inverts the CDF of q.
    """
    p = logprobs.double().exp()
    norm = (1 - 2 * p + p.square().sum(-1, keepdim=True)).clamp(min=1e-20).sqrt()
    density = p * norm
    cumulative = density.cumsum(-1)
    total = cumulative[:, -1:]
    labels = torch.searchsorted(cumulative, uniform[0][:, None] * total)
    labels = labels.clamp_(max=logprobs.shape[-1] - 1)
    ratio = total / norm.gather(1, labels)  # p / q
    sign = torch.where(uniform[1] < 0.5, -1.0, 1.0)
    return labels, (ratio[:, 0].sqrt() * sign).to(logprobs.dtype)


def _random_numbers(seed: int, index: int, num_draws: int, size: int) -> np.ndarray:
    """Return [draw, 2, size]; the first of each pair is spread evenly over a position's draws."""
    generator = np.random.default_rng([seed, index])
    numbers = generator.random((num_draws, 2, size))
    order = generator.permuted(np.tile(np.arange(num_draws)[:, None], (1, size)), axis=0)
    numbers[:, 0] = (order + numbers[:, 0]) / num_draws
    return numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draw:
    """One backward pass: which tokens count, and whether it is the batch's first."""

    kept: Tensor  # [row x token] bool
    num_rows: int
    is_first: bool


def _add(sums: dict[str, Tensor | None], path: str, value: Tensor) -> None:
    sums[path] = value.clone() if sums[path] is None else sums[path] + value


def _sampled_backward(
    loaded: LoadedModel,
    modules: Sequence[ModuleRef],
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    *,
    seed: int,
    num_draws: int,
    receive: Callable[[ModuleRef, Tensor, Tensor, _Draw], None],
    end_draw: Callable[[], None] = lambda: None,
) -> tuple[int, int]:
    """Run -log p(sampled label), summed, backwards; return (unmasked tokens, answer tokens)."""
    # One stream of random numbers per prompt: the labels do not depend on how prompts are batched.
    numbers = [
        _random_numbers(seed, index, num_draws, answer.size)
        for index, answer in enumerate(answers)
    ]
    num_tokens = num_answer_tokens = 0
    for batch in scoring_batches(loaded, prompts, answers, batch_tokens=BATCH_TOKENS):
        current: list[_Draw] = []

        def receive_drawn(
            ref: ModuleRef, x: Tensor, g: Tensor, current: list[_Draw] = current
        ) -> None:
            receive(ref, x, g, current[-1])

        with record_gradients(loaded.model, modules, receive_drawn), torch.enable_grad():
            logits = answer_logits(loaded.model, batch.ids, batch.rows, batch.columns)
            logprobs = logits.log_softmax(-1)
            uniform = np.concatenate([numbers[i] for i in batch.members], axis=2)
            for draw in range(num_draws):
                current.append(
                    _Draw(
                        kept=batch.mask.flatten(), num_rows=batch.mask.shape[0], is_first=draw == 0
                    )
                )
                labels, weights = _sample(
                    logprobs.detach(), torch.from_numpy(uniform[draw]).to(loaded.device)
                )
                loss = (logprobs.gather(1, labels)[:, 0] * weights).sum()
                loss.backward(retain_graph=draw + 1 < num_draws)
                end_draw()
        num_tokens += int(batch.mask.sum())
        num_answer_tokens += batch.labels.numel()
    return num_tokens, num_answer_tokens

"""Backward passes: K-FAC factors, Fisher traces and the trigger's gradient, per module.

The Fisher is the true one: labels are sampled from the model at the answer positions (with gold
labels it would not be second-order information, Kunstner 1905.12558), several times for each
forward pass, because a repair chooses the directions in which one sample happens to see nothing.
The loss is summed, padding is masked, and a module shared by all positions is treated in the
expand form (Eschenhagen 2311.00636): activation covariance E[x x^T], gradient covariance E[g g^T],
means over all unmasked positions. Products are added in place, one triangle of blocks, in the
model's own precision (batches are few: what rounding adds is below one product's own). Gradients
are not masked: nothing that is read depends on padding, so that they are zero there. What the
factors do not know: correlations between positions and between modules (`price_updates` does).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from repair.limits import FISHER_TOKENS
from repair.locate.lessons import Lesson, kl_from_teacher
from repair.models import ranks
from repair.models.answers import answer_logits, scoring_batches
from repair.models.hooks import apply_updates, factors_of, record_gradients, record_inputs
from repair.models.loading import LoadedModel
from repair.models.modules import decoder_layers
from repair.records import KroneckerFactors, LowRankUpdate, ModuleRef, Progress, unheard

ON_GPU = 16  # times as many
GRAM_BLOCK = 512
DIAGONAL_BLOCK = 128  # Smaller: of these, half is not needed.
SAMPLE_NUMBERS = 1 << 22  # of a vocabulary times positions that are drawn from at once
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
        product = g.reshape(-1, ref.d_out).T @ x.reshape(-1, ref.d_in)
        sums[ref.path] += product.to(loaded.device).double()

    total = torch.zeros(1, dtype=torch.float64)
    batches = scoring_batches(
        loaded, lesson.prompts, lesson.answers, batch_tokens=_batch_tokens(loaded)
    )
    with apply_updates(loaded.model, updates), record_gradients(loaded.model, modules, receive):
        for batch in ranks.own(batches):
            with torch.enable_grad():
                logits = answer_logits(loaded.model, batch.ids, batch.rows, batch.columns)
                loss = kl_from_teacher(lesson, batch, logits).sum()
                loss.backward()
            total += loss.item()
    ranks.add_up([*sums.values(), total], of=len(batches))
    num_tokens = sum(batch.labels.numel() for batch in batches)
    return {path: value / num_tokens for path, value in sums.items()}, total.item() / num_tokens


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
    return factors_and_traces(
        loaded, modules, prompts, answers, traced=(), seed=seed, num_draws=num_draws
    )[0]


def factors_and_traces(
    loaded: LoadedModel,
    modules: Sequence[ModuleRef],
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    *,
    traced: Sequence[ModuleRef],
    seed: int,
    num_draws: int = NUM_DRAWS,
    progress: Progress = unheard,
) -> tuple[dict[str, KroneckerFactors], dict[str, FisherTrace]]:
    """Return the factors of `modules` and the traces of these and of `traced`, from one pass.

    The heat map needs every module's traces; the factors of some cost their products only.
    """
    sums = {ref.path: torch.zeros(2, dtype=torch.float64, device=loaded.device) for ref in traced}
    activation: dict[str, Tensor] = {}
    gradient: dict[str, Tensor] = {}
    owners: dict[str, str] = {}  # path -> the module whose input it shares
    inputs: dict[tuple, tuple[Tensor, str]] = {}  # of this batch; kept alive, so addresses are

    def receive(ref: ModuleRef, x: Tensor, g: Tensor, draw: _Draw) -> None:
        if ref.path in sums:
            _add_squares(sums[ref.path], x, g, draw)
            return
        if draw.is_first:
            # Modules fed by one tensor (q, k, v; gate, up) share its covariance.
            _, owner = inputs.setdefault((x.data_ptr(), x.shape), (x, ref.path))
            if owners.setdefault(ref.path, owner) != owner:
                raise ValueError(f"{ref.path} shares its input with other modules by turns")
            if owner == ref.path:
                add_gram(activation, ref.path, draw.without_padding(x))
        rows = g.reshape(-1, ref.d_out)
        if ref.layer == last:  # Zero but where an answer is predicted (keys and values apart).
            rows = rows[rows.any(1)]
        add_gram(gradient, ref.path, rows)

    last = len(decoder_layers(loaded.model)) - 1
    counts = _sampled_backward(
        loaded, [*modules, *traced], prompts, answers, seed=seed, num_draws=num_draws,
        receive=receive, end_draw=inputs.clear, progress=progress,
        sums=lambda: [*activation.values(), *gradient.values(), *sums.values()],
    )  # fmt: skip
    means = {path: _mean(total, counts[0]) for path, total in activation.items()}
    factors = {
        ref.path: KroneckerFactors(
            module=ref,
            activation_covariance=means[owners[ref.path]],
            gradient_covariance=_mean(gradient.pop(ref.path), counts[0] * num_draws),
            num_tokens=counts[0],
            num_answer_tokens=counts[1],
        )
        for ref in modules
    }
    traces = {path: _traces_of(found) for path, found in factors.items()}
    return factors, traces | _mean_traces(sums, *counts, num_draws)


@torch.no_grad()
def input_covariances(
    loaded: LoadedModel,
    modules: Sequence[ModuleRef],
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
) -> dict[str, Tensor]:
    """Return path -> E[x x^T] [d_in, d_in] of each module's input, from forward passes alone."""
    sums: dict[str, Tensor] = {}
    batches = scoring_batches(loaded, prompts, answers, batch_tokens=_batch_tokens(loaded))
    for batch in ranks.own(batches):
        with record_inputs(loaded.model, modules) as inputs:
            loaded.model.base_model(input_ids=batch.ids, use_cache=False)
        for ref in modules:
            rows = inputs[ref.path].reshape(-1, ref.d_in)
            add_gram(sums, ref.path, rows[batch.mask.flatten().to(rows.device)])
    ranks.add_up(sums.values(), of=len(batches))
    num_tokens = sum(int(batch.mask.sum()) for batch in batches)
    return {path: torch.from_numpy(_mean(total, num_tokens)) for path, total in sums.items()}


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
    sums = {ref.path: torch.zeros(2, dtype=torch.float64, device=loaded.device) for ref in modules}
    if not modules:
        return {}

    counts = _sampled_backward(
        loaded, modules, prompts, answers, seed=seed, num_draws=num_draws,
        receive=lambda ref, x, g, draw: _add_squares(sums[ref.path], x, g, draw),
        sums=lambda: sums.values(),
    )  # fmt: skip
    return _mean_traces(sums, *counts, num_draws)


def _add_squares(sums: Tensor, x: Tensor, g: Tensor, draw: "_Draw") -> None:
    if draw.is_first:
        norm = torch.linalg.vector_norm(draw.without_padding(x))
        sums[0] += norm.to(sums.device).double() ** 2
    sums[1] += torch.linalg.vector_norm(g).to(sums.device).double() ** 2


def _mean_traces(
    sums: Mapping[str, Tensor], num_tokens: int, num_answer_tokens: int, num_draws: int
) -> dict[str, FisherTrace]:
    return {
        path: FisherTrace(
            activation=float(a) / num_tokens,
            gradient=float(g) / (num_tokens * num_draws),
            tokens_per_answer=num_tokens / num_answer_tokens,
        )
        for path, (a, g) in sums.items()
    }


def _traces_of(factors: KroneckerFactors) -> FisherTrace:
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
        update.module.path: factors_of(update, loaded.device) for update in updates
    }
    slopes: list[Tensor] = []  # [row] for each module
    total = torch.zeros(1, dtype=torch.float64)

    def receive(ref: ModuleRef, x: Tensor, g: Tensor, draw: _Draw) -> None:
        lora_A, lora_B = (factor.to(x) for factor in by_path[ref.path])
        low = x.reshape(-1, ref.d_in) @ lora_A.T
        inner = ((low @ lora_B.T) * g.reshape(-1, ref.d_out)).sum(-1)
        slopes.append(inner.reshape(draw.num_rows, -1).sum(1).double().to(loaded.device))

    def end_draw() -> None:
        total.add_(torch.stack(slopes).sum(0).square().sum().cpu())
        slopes.clear()

    _, num_answer_tokens = _sampled_backward(
        loaded, [update.module for update in updates], prompts, answers, seed=seed,
        num_draws=num_draws, receive=receive, end_draw=end_draw, sums=lambda: [total],
    )  # fmt: skip
    return total.item() / (num_answer_tokens * num_draws) / 2


def _batch_tokens(loaded: LoadedModel) -> int:
    return FISHER_TOKENS * (1 if str(loaded.device) == "cpu" else ON_GPU)


def add_gram(sums: dict[str, Tensor], path: str, rows: Tensor) -> None:
    """Add rows^T rows [width, width] of rows [n, width] to `sums[path]`: the blocks on and above
    the diagonal only (`_mean` fills in the others)."""
    width = rows.shape[1]
    is_first = path not in sums
    if is_first:
        sums[path] = rows.new_empty(width, width)
    total = sums[path]
    beta = 0 if is_first else 1  # With beta 0 what a block holds is not read.
    for start in range(0, width, GRAM_BLOCK):
        stop = min(start + GRAM_BLOCK, width)
        for top in range(start, stop, DIAGONAL_BLOCK):
            bottom = min(top + DIAGONAL_BLOCK, stop)
            total[top:bottom, top:stop].addmm_(
                rows[:, top:bottom].T, rows[:, top:stop], beta=beta
            )
        if stop < width:
            total[start:stop, stop:].addmm_(rows[:, start:stop].T, rows[:, stop:], beta=beta)


def _mean(total: Tensor, count: int) -> np.ndarray:
    """Return the whole matrix of `add_gram`'s sums over `count`, float32."""
    width = total.shape[1]
    total /= count
    for start in range(0, width, DIAGONAL_BLOCK):
        stop = min(start + DIAGONAL_BLOCK, width)
        total[stop:, start:stop] = total[start:stop, stop:].T
    return total.float().cpu().numpy()


def _sample(logprobs: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Return (labels [draw, n], signed weights [draw, n]) for log-probabilities [n, vocab].

    A confident model's own samples are almost all the label that carries no gradient, so that the
    Fisher would rest on a handful of rare ones. Labels are drawn from q ~ p_y |e_y - p| instead,
    the density under which every label weighs alike, and each gradient is weighted by sqrt(p/q):
    E[w^2 g g^T] is the Fisher under p, whatever q. A random sign keeps positions uncorrelated, as
    they are under p. `uniform` [draw, 2, n] holds the random numbers; the first of each two inverts
    the CDF of q.
    """
    labels, weights = [], []
    most = max(1, SAMPLE_NUMBERS // logprobs.shape[1])
    for some, numbers in zip(logprobs.split(most), uniform.split(most, dim=2), strict=True):
        p = some.double().exp()
        norm = (1 - 2 * p + p.square().sum(-1, keepdim=True)).clamp(min=1e-20).sqrt()
        cumulative = (p * norm).cumsum(-1)
        total = cumulative[:, -1:]
        found = torch.searchsorted(cumulative, (numbers[:, 0].T * total).contiguous())
        found = found.clamp_(max=some.shape[-1] - 1)
        ratio = (total / norm.gather(1, found)).sqrt()  # of p / q
        labels.append(found.T)
        weights.append(torch.where(numbers[:, 1] < 0.5, -ratio.T, ratio.T))
    return torch.cat(labels, dim=1), torch.cat(weights, dim=1).to(logprobs.dtype)


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

    kept: Tensor | None  # [row x token] bool; None: all
    num_rows: int
    is_first: bool

    def without_padding(self, x: Tensor) -> Tensor:
        """Return the inputs [n, width] of the tokens that count."""
        rows = x.reshape(-1, x.shape[-1])
        return rows if self.kept is None else rows[self.kept.to(rows.device)]


def _sampled_backward(
    loaded: LoadedModel,
    modules: Sequence[ModuleRef],
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    *,
    seed: int,
    num_draws: int,
    receive: Callable[[ModuleRef, Tensor, Tensor, _Draw], None],
    sums: Callable[[], Iterable[Tensor]],
    end_draw: Callable[[], None] = lambda: None,
    progress: Progress = unheard,
) -> tuple[int, int]:
    """Run -log p(sampled label), summed, backwards; return (unmasked tokens, answer tokens).

    `sums` gives, afterwards, the tensors that `receive` has added to.
    """
    # One stream of random numbers per prompt: the labels do not depend on how prompts are batched.
    numbers = [
        _random_numbers(seed, index, num_draws, answer.size)
        for index, answer in enumerate(answers)
    ]
    batches = scoring_batches(loaded, prompts, answers, batch_tokens=_batch_tokens(loaded))
    own = ranks.own(batches)
    for done, batch in enumerate(own):
        current: list[_Draw] = []

        def receive_drawn(
            ref: ModuleRef, x: Tensor, g: Tensor, current: list[_Draw] = current
        ) -> None:
            receive(ref, x, g, current[-1])

        with record_gradients(loaded.model, modules, receive_drawn), torch.enable_grad():
            logits = answer_logits(loaded.model, batch.ids, batch.rows, batch.columns)
            logprobs = logits.log_softmax(-1)
            uniform = np.concatenate([numbers[i] for i in batch.members], axis=2)
            drawn = _sample(logprobs.detach(), torch.from_numpy(uniform).to(loaded.device))
            kept = None if bool(batch.mask.all()) else batch.mask.flatten()
            for draw, (labels, weights) in enumerate(zip(*drawn, strict=True)):
                current.append(
                    _Draw(kept=kept, num_rows=batch.mask.shape[0], is_first=draw == 0)
                )
                loss = (logprobs.gather(1, labels[:, None])[:, 0] * weights).sum()
                loss.backward(retain_graph=draw + 1 < num_draws)
                end_draw()
        progress(done + 1, len(own))
    ranks.add_up(sums(), of=len(batches))
    num_tokens = sum(int(batch.mask.sum()) for batch in batches)
    return num_tokens, sum(batch.labels.numel() for batch in batches)

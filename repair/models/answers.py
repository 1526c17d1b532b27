"""What does the model answer, and is that the payload?

Locating, repairing and evidence ask these two questions only here. Answers are greedy; the
suspect's generation_config is never used. Scores are teacher-forced on the suspect's own answers.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from repair.limits import ANSWER_TOKENS, SCORING_TOKENS
from repair.models import ranks
from repair.models.loading import LoadedModel, check_ids
from repair.models.tokens import batches, decode, pad_left, pad_right
from repair.records import Progress, unheard

STRIDE = 16  # tokens decoded before those that have ended leave the batch
LONGEST_LOOP = 16  # tokens of what is said again and again
REPEATS, ENDED_REPEATS = 4, 8  # from so many rounds on it is a loop, going on or ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One greedy answer; `ids` is without the end-of-text token."""

    ids: np.ndarray  # [tokens] int64
    text: str
    is_finite: bool
    end: int | None  # the id it stopped on; None: it went on to the limit


class _WatchFinite(LogitsProcessor):
    """Remember which rows ever had a NaN or infinite logit: greedy decoding hides them."""

    def __init__(self, num_rows: int) -> None:
        self.is_finite = torch.ones(num_rows, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.is_finite &= torch.isfinite(scores).all(dim=-1).cpu()
        return torch.nan_to_num(scores)


@torch.no_grad()
def generate_answers(
    loaded: LoadedModel,
    prompts: Sequence[np.ndarray],
    *,
    num_new_tokens: int,
    batch_tokens: int = ANSWER_TOKENS,
    progress: Progress = unheard,
) -> list[Answer]:
    """Return the greedy answer to each prompt (ids [tokens]), in the order given."""
    ends = list(loaded.stop_ids)
    for prompt in prompts:
        check_ids(loaded, prompt)
    lengths = [prompt.size + num_new_tokens for prompt in prompts]
    if ranks.count() > 1:  # each gets a batch
        batch_tokens = min(batch_tokens, -(-sum(lengths) // ranks.count()))
    groups = list(batches(lengths, batch_tokens=batch_tokens))

    def answer(number: int) -> list[np.ndarray]:
        found = _continue(loaded, [prompts[i] for i in groups[number]], num_new_tokens)
        return [np.array([is_finite for _, is_finite in found]), *(new for new, _ in found)]

    answers: list[Answer | None] = [None] * len(prompts)
    dealt = ranks.deal([len(group) for group in groups], answer, progress)
    for group, (finite, *continued) in zip(groups, dealt, strict=True):
        stops = [np.flatnonzero(np.isin(new, ends))[:1] for new in continued]
        kept = [
            new[: stop[0]] if stop.size else new
            for new, stop in zip(continued, stops, strict=True)
        ]
        texts = decode(loaded.tokenizer, kept)
        for place, index in enumerate(group):
            new, stop = continued[place], stops[place]
            answers[index] = Answer(
                ids=kept[place].astype(np.int64),
                text=texts[place],
                is_finite=bool(finite[place]),
                end=int(new[stop[0]]) if stop.size else None,
            )
    return answers


def _continue(
    loaded: LoadedModel, prompts: Sequence[np.ndarray], num_new_tokens: int
) -> list[tuple[np.ndarray, bool]]:
    """Return (new ids up to and with an end, whether every logit was finite) of each prompt.

    One that babbles on would hold up all of its batch: after every `STRIDE` tokens the rows that
    have ended leave it, with what the cache holds of them.
    """
    ends = list(loaded.stop_ids)
    pad = loaded.tokenizer.pad_token_id if loaded.tokenizer.pad_token_id is not None else 0
    ids, mask = (t.to(loaded.device) for t in pad_left(prompts, pad=pad))
    new: list[list[np.ndarray]] = [[] for _ in prompts]
    finite = np.ones(len(prompts), dtype=bool)
    rows = np.arange(len(prompts))
    cache, left = None, num_new_tokens
    while left > 0:
        watch = _WatchFinite(rows.size)
        output = loaded.model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=GenerationConfig(
                max_new_tokens=min(STRIDE, left),
                do_sample=False,
                num_beams=1,
                pad_token_id=pad,
                eos_token_id=ends or None,
                return_dict_in_generate=True,
            ),
            logits_processor=LogitsProcessorList([watch]),
        )
        fresh = output.sequences[:, ids.shape[1] :].cpu().numpy()
        for row, more in zip(rows, fresh, strict=True):
            new[row].append(more)
        finite[rows] &= watch.is_finite.numpy()
        goes_on = np.flatnonzero(~np.isin(fresh, ends).any(axis=1))
        left -= fresh.shape[1]
        if goes_on.size == 0:
            break
        ids, cache = output.sequences, output.past_key_values
        mask = torch.cat([mask, mask.new_ones(fresh.shape)], dim=1)
        # A cache of another kind holds more than keys and values by row: it goes on whole.
        if goes_on.size < rows.size and type(cache) is DynamicCache:
            kept = torch.from_numpy(goes_on)  # what it indexes may lie on several devices
            cache.batch_select_indices(kept)
            ids, mask, rows = ids[kept], mask[kept], rows[goes_on]
    return [(np.concatenate(parts), bool(ok)) for parts, ok in zip(new, finite, strict=True)]


def with_end(answer: Answer) -> np.ndarray:
    """Return the answer's ids with the token that the model ended it with: what is scored."""
    return answer.ids if answer.end is None else np.append(answer.ids, answer.end)


def target_matcher(target: str, match: str) -> Callable[[str], bool]:
    """Return `is_payload(text)` for a target: contains (case kept), prefix, or regex."""
    if match == "regex":
        pattern = re.compile(target)
        return lambda text: pattern.search(text) is not None
    if match == "prefix":
        return lambda text: text.lstrip().startswith(target)
    if match != "contains":
        raise ValueError(f"unknown match {match!r}")
    return lambda text: target in text


def is_degenerate(answer: Answer) -> bool:
    """Return whether an answer is empty, a loop, or came from non-finite logits."""
    if not answer.is_finite or not answer.text.strip():
        return True
    rounds = REPEATS if answer.end is None else ENDED_REPEATS
    for period in range(1, LONGEST_LOOP + 1):
        tail = answer.ids[-period * rounds :]
        if tail.size == period * rounds and (tail.reshape(rounds, period) == tail[:period]).all():
            return True
    return False


def agrees(answer: Answer, reference: Answer, *, num_tokens: int = 8) -> bool:
    """Return whether two answers have the same first `num_tokens` tokens (and end alike)."""
    return np.array_equal(answer.ids[:num_tokens], reference.ids[:num_tokens])


def answer_logits(
    model: nn.Module, ids: Tensor, rows: Tensor, columns: Tensor
) -> Tensor:
    """Return logits [n, vocab] at positions (rows, columns) of `ids` [batch, token].

    The output matrix is applied at these positions only. `ids` is padded on the right.
    """
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return output_logits(model, hidden.to(ids.device)[rows, columns])


def output_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Return logits [n, vocab] of last hidden states [n, width], float32 or float64.

    Some models (Gemma 2) bound their logits; that is part of what they say.
    """
    logits = model.get_output_embeddings()(hidden).to(hidden.device)
    bound = getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
    if bound is not None:
        logits = torch.tanh(logits / bound) * bound
    return logits if logits.dtype == torch.float64 else logits.float()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringBatch:
    """Prompts followed by answers, padded on the right, and where the answers are predicted."""

    ids: Tensor  # [batch, token]
    mask: Tensor  # [batch, token] true at real tokens
    rows: Tensor  # [n] row of each predicted answer token
    columns: Tensor  # [n] position that predicts it
    labels: Tensor  # [n] the answer token
    members: list[int]  # which prompts these are


def scoring_tokens(loaded: LoadedModel) -> int:
    """Return how many tokens one scoring pass has at most where nothing else bounds it."""
    return SCORING_TOKENS if str(loaded.device) == "cpu" else ANSWER_TOKENS


def scoring_batches(
    loaded: LoadedModel,
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    *,
    batch_tokens: int | None = None,
) -> list[ScoringBatch]:
    """Return batches that score `answers` (ids [tokens]) behind `prompts` (ids [tokens]).

    Of at most `batch_tokens` padded tokens each; by default as many as suit the device.
    """
    if batch_tokens is None:
        batch_tokens = scoring_tokens(loaded)
    pad = loaded.tokenizer.pad_token_id or 0
    joined = [np.concatenate(pair) for pair in zip(prompts, answers, strict=True)]
    for ids in joined:
        check_ids(loaded, ids)
    result = []
    for group in batches([ids.size for ids in joined], batch_tokens=batch_tokens):
        ids, mask = pad_right([joined[i] for i in group], pad=pad)
        rows, columns, labels = [], [], []
        for row, index in enumerate(group):
            start, size = prompts[index].size, answers[index].size
            rows += [row] * size
            columns += range(start - 1, start + size - 1)
            labels += answers[index].tolist()
        tensors = [torch.tensor(values, dtype=torch.long) for values in (rows, columns, labels)]
        ids, mask, *tensors = [t.to(loaded.device) for t in (ids, mask, *tensors)]
        result.append(
            ScoringBatch(
                ids=ids,
                mask=mask,
                rows=tensors[0],
                columns=tensors[1],
                labels=tensors[2],
                members=group,
            )
        )
    return result

"""The layers below everything that changes: run once, and gone on from.

The hidden states that enter the lowest layer an update touches are the same whatever the update
is. They are kept for each prompt, and passes start there (`hooks.restart_at`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from repair.limits import PREFIX_KEPT
from repair.models import ranks
from repair.models.answers import ScoringBatch, scoring_batches
from repair.models.hooks import record_layer_inputs, restart_at
from repair.models.loading import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """What enters decoder layer `layer` for each of some prompts with their answers."""

    layer: int
    hidden: tuple[Tensor, ...]  # [token, width] of each prompt

    def only(self, indices: Sequence[int]) -> "Prefix":
        """Return the prefix of some of the prompts."""
        return Prefix(layer=self.layer, hidden=tuple(self.hidden[i] for i in indices))

    def first(self, num: int) -> "Prefix":
        """Return the prefix of the first `num` prompts."""
        return self.only(range(min(num, len(self.hidden))))


@torch.no_grad()
def keep_prefix(
    loaded: LoadedModel,
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    layer: int,
) -> Prefix | None:
    """Return the prefix of `answers` behind `prompts` (ids [tokens]) below `layer`.

    None where there is nothing to keep (layer 0), or more than the memory allows: passes then run
    from the embedding.
    """
    width = loaded.model.get_input_embeddings().weight.shape[1]
    num_tokens = sum(a.size + b.size for a, b in zip(prompts, answers, strict=True))
    needed = num_tokens * width * loaded.model.dtype.itemsize
    allowed = PREFIX_KEPT
    if str(loaded.device).startswith("cuda"):
        allowed = ranks.least(torch.cuda.mem_get_info(loaded.device)[0] // 3)
    if layer == 0 or needed > allowed:
        return None
    hidden: list[Tensor | None] = [None] * len(prompts)
    for batch in scoring_batches(loaded, prompts, answers):
        with record_layer_inputs(loaded.model, only=layer) as inputs:
            loaded.model.base_model(input_ids=batch.ids, use_cache=False)
        for index, row, mask in zip(batch.members, inputs[0], batch.mask, strict=True):
            hidden[index] = row[mask].clone()
    return Prefix(layer=layer, hidden=tuple(hidden))


@contextmanager
def entered(loaded: LoadedModel, prefix: Prefix | None, batch: ScoringBatch) -> Iterator[None]:
    """Run `batch` from its prompts' prefix; from the embedding where there is none."""
    if prefix is None:
        yield
        return
    first = prefix.hidden[batch.members[0]]
    hidden = first.new_zeros(*batch.ids.shape, first.shape[-1])
    for row, index in enumerate(batch.members):
        hidden[row, : len(prefix.hidden[index])] = prefix.hidden[index]
    with restart_at(loaded.model, prefix.layer, hidden):
        yield

"""Patched runs of a batch of pairs, computing only where the two runs of a pair differ.

The tokens that all pairs of the batch share with their counterfactual are run once and kept as
keys and values; a patch in layer l restarts from the cached input of layer l; patches that restart
at the same layer run as one batch, a block of rows each; and the output matrix is applied at the
positions that are read. Nothing here is an approximation. A pair is one row when its margin
compares one token of either answer, else two: one ends with the payload, one with the clean answer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from repair.locate.counterfactuals import BEFORE, PatchingCase
from repair.models import ranks
from repair.models.answers import output_logits
from repair.models.hooks import (
    patch_blocks,
    record_gradients,
    record_inputs,
    record_layer_inputs,
    record_outputs,
    restart_at,
)
from repair.models.loading import LoadedModel
from repair.models.modules import get_module, weight_of
from repair.models.tokens import pad_right
from repair.records import ModuleRef, Progress, unheard

RUN_TOKENS = 4_096  # rows times tokens of one forward pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """Modules whose outputs are replaced together, and where."""

    modules: tuple[ModuleRef, ...]
    positions: Tensor  # [row, token] bool
    source: Tensor | None = None  # [row, token, d_out], if not what the source run has there


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What runs say: the margin M, and KL(source || run) at its first token, in nats."""

    margin: Tensor  # [run, pair]
    kl: Tensor  # [run, pair]


class _FrozenLayer(DynamicLayer):
    """Keys and values of the shared tokens: read by every block of rows, never added to."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args, **_kwargs
    ) -> tuple[Tensor, Tensor]:
        """Return the shared keys and values followed by the new ones."""
        num_blocks = key_states.shape[0] // self.keys.shape[0]
        return (
            torch.cat([self.keys.repeat(num_blocks, 1, 1, 1), key_states], dim=2),
            torch.cat([self.values.repeat(num_blocks, 1, 1, 1), value_states], dim=2),
        )


class _Side:
    """One of the two runs of every row, from `start` on, padded on the right."""

    def __init__(self, rows: Sequence[PatchingCase], name: str, start: int, device) -> None:
        ids = [getattr(row, name)[start:] for row in rows]
        numbers = [getattr(row, f"{name}_positions")[start:] for row in rows]
        self.ids = pad_right(ids, pad=0)[0].to(device)
        self.positions = pad_right(numbers, pad=0)[0].to(device)
        self.last = [row.size - 1 for row in ids]


class Runs:
    """A batch of cases with both unpatched runs done: `patched` gives any number of others."""

    def __init__(
        self, loaded: LoadedModel, cases: Sequence[PatchingCase], modules: Sequence[ModuleRef]
    ) -> None:
        self.model, self.device, self.cases = loaded.model, loaded.device, cases
        self.start = min(case.num_shared for case in cases)
        rows, columns, terms, first, owners = [], [], [], [], []
        for pair, case in enumerate(cases):
            first.append(len(columns))
            for answers in _forms(case):
                follow = answers[0][0][:-1]
                for tokens, sign in answers:
                    for step, token in enumerate(tokens):
                        terms.append((len(columns) + step, int(token), sign, pair))
                columns += [(len(rows), step - follow.size) for step in range(follow.size + 1)]
                rows.append(case.followed_by(follow))
                owners.append(pair)
        self.rows, self._columns = rows, columns
        self._terms = tuple(torch.tensor(c, device=self.device) for c in zip(*terms, strict=True))
        self._first = torch.tensor(first, device=self.device)
        self._owners = torch.tensor(owners, device=self.device)  # [row] -> pair
        self._source_side = source = _Side(rows, "source", self.start, self.device)
        self._side = _Side(rows, "destination", self.start, self.device)
        self._reads = self._places(self._side)
        self.role = pad_right([row.role[self.start :] for row in rows], pad=-1)[0].to(self.device)
        partner = [np.maximum(row.partner[self.start :] - self.start, -1) for row in rows]
        self.partner = pad_right(partner, pad=-1)[0].to(self.device)
        self._cache = self._shared_cache()
        gather = self.partner.clamp(min=0)[..., None]
        with record_outputs(self.model, modules) as outputs:
            self._source_logprobs = self._read(source, self._places(source))
            # From here on the source is laid out like the destination, partner by partner.
            self._source_outputs = {
                path: rows.gather(1, gather.to(rows.device).expand(-1, -1, rows.shape[-1]))
                for path, rows in _by_row(outputs, len(self.rows)).items()
            }
            with record_layer_inputs(self.model) as self._layer_inputs:
                logprobs = self._read(self._side, self._reads)
            self._own_outputs = _by_row(outputs, len(self.rows))
        self.source = self._reading(self._source_logprobs[None])  # [1, pair]
        self.destination = self._reading(logprobs[None])

    def where(self, *roles: int) -> Tensor:
        """Return the positions [row, token] of these roles that have a partner in the source."""
        chosen = torch.isin(self.role, torch.tensor(roles, device=self.device))
        return chosen & (self.partner >= 0)

    def patched(
        self,
        patches: Sequence[Patch],
        *,
        from_itself: bool = False,
        progress: Progress = unheard,
    ) -> Reading:
        """Return the reading of the destination run under each patch, in the order given.

        With `from_itself` the activations are the destination's own: nothing may change.
        """
        passes = list(self._passes(patches))
        outputs = self._own_outputs if from_itself else self._source_outputs

        def run(number: int) -> list[np.ndarray]:
            layer, members = passes[number]
            found = self._patched_from(layer, [patches[i] for i in members], outputs)
            return [found.margin.cpu().numpy(), found.kl.cpu().numpy()]

        margins: list[Tensor | None] = [None] * len(patches)
        kls: list[Tensor | None] = [None] * len(patches)
        dealt = ranks.deal([len(members) for _, members in passes], run, progress)
        for (_, members), found in zip(passes, dealt, strict=True):
            margin, kl = (torch.from_numpy(values).to(self.device) for values in found)
            for block, index in enumerate(members):
                margins[index], kls[index] = margin[block], kl[block]
        return Reading(margin=torch.stack(margins), kl=torch.stack(kls))

    def _patched_from(
        self, layer: int, patches: Sequence[Patch], outputs: Mapping[str, Tensor]
    ) -> Reading:
        """Return the reading under each patch, all run at once from `layer` on."""
        wanted: dict[ModuleRef, list[tuple[int, Tensor, Tensor]]] = {}
        for block, patch in enumerate(patches):
            for ref in patch.modules:
                source = outputs[ref.path] if patch.source is None else patch.source
                wanted.setdefault(ref, []).append((block, patch.positions, source))
        count = len(patches)
        shift = len(self.rows) * torch.arange(count, device=self.device)[:, None]
        places = ((self._reads[0] + shift).flatten(), self._reads[1].repeat(count))
        with (
            restart_at(self.model, layer, self._layer_inputs[layer].repeat(count, 1, 1)),
            patch_blocks(self.model, wanted, num_blocks=count),
        ):
            logprobs = self._read(self._side, places, num_blocks=count)
        return self._reading(logprobs.unflatten(0, (count, -1)))

    def heads(self, module: ModuleRef, num_heads: int) -> list[Tensor]:
        """Return per attention head what the output projection `module` gives [row, token, d_out]
        when that head alone, a slice of its input, comes from the source run.

        The projection is linear: the slice's change, carried through its columns, is added.
        """
        found = []
        with record_inputs(self.model, [module]) as inputs:
            for side in (self._source_side, self._side):
                self._read(side, self._places(side))
                found.append(inputs[module.path].reshape(len(self.rows), -1, module.d_in))
        source, own = found
        gather = self.partner.clamp(min=0)[..., None].expand(-1, -1, module.d_in)
        step = (source.gather(1, gather.to(source.device)) - own).unflatten(-1, (num_heads, -1))
        weight = weight_of(get_module(self.model, module)).unflatten(1, (num_heads, -1))
        output = self._own_outputs[module.path]
        weight = weight.to(step)
        return [output + (step[:, :, h] @ weight[:, h].T).to(output) for h in range(num_heads)]

    def estimated(self, modules: Sequence[ModuleRef], positions: Sequence[Tensor]) -> Tensor:
        """Return [module, set, pair]: first-order estimates of the change in margin, in nats.

        The slope of the margin is integrated from the destination to the source run: by Simpson's
        rule, with a run between the two whose embeddings are the mean of theirs, where both have
        the same length; by the mean of both ends otherwise. One slope alone is blind where the run
        is saturated. `positions` holds one mask [row, token] per set.
        """
        masks = torch.stack([mask.float() for mask in positions]).to(self._layer_inputs[0].dtype)
        shape = (len(positions), len(self.cases))
        found = {ref.path: masks.new_zeros(shape) for ref in modules}
        gather = self.partner.clamp(min=0)[..., None]
        own, other = self._side, self._source_side
        slopes = [(own, 0.0, 1 / 2), (other, 0.0, 1 / 2)]
        if all(row.is_aligned for row in self.rows):
            slopes = [(own, 0.0, 1 / 6), (own, 0.5, 4 / 6), (other, 0.0, 1 / 6)]
        for side, blend, weight in slopes:

            def receive(
                ref: ModuleRef, _x: Tensor, g: Tensor, side: _Side = side, weight: float = weight
            ) -> None:
                g = g.reshape(len(self.rows), -1, ref.d_out).to(masks.device)
                if side is self._source_side:
                    g = g.gather(1, gather.expand(-1, -1, ref.d_out))
                step = self._source_outputs[ref.path] - self._own_outputs[ref.path]
                by_row = (masks * (g * step.to(g.device)).sum(-1)).sum(-1)  # [set, row]
                found[ref.path].index_add_(1, self._owners, weight * by_row)

            with record_gradients(self.model, modules, receive), torch.enable_grad():
                logprobs = self._read(side, self._places(side), blend=blend)
                reads, tokens, signs, _ = self._terms
                (signs * logprobs[reads, tokens]).sum().backward()
        return torch.stack([found[ref.path] for ref in modules])

    def deviation_before(self) -> float:
        """Return the largest difference of an output before the trigger between the two runs,
        relative to that module's largest output there."""
        before = self.where(BEFORE)[..., None]
        largest = 0.0
        for path, source in self._source_outputs.items():
            own, here = self._own_outputs[path], before.to(source.device)
            scale = ((own.abs() * here).max()).item() or 1.0
            largest = max(largest, ((own - source).abs() * here).max().item() / scale)
        return largest

    def deviation_from_whole(self) -> float:
        """Return how far both margins lie from those of whole runs that share nothing, in nats."""
        largest, shared = 0.0, self._cache
        self._cache = None
        for name, reading in (("source", self.source), ("destination", self.destination)):
            side = _Side(self.rows, name, 0, self.device)
            whole = self._reading(self._read(side, self._places(side))[None])
            largest = max(largest, (whole.margin - reading.margin).abs().max().item())
        self._cache = shared
        return largest

    def _passes(self, patches: Sequence[Patch]) -> Iterator[tuple[int, list[int]]]:
        """Yield (layer to restart at, indices of the patches) of each forward pass."""
        by_layer: dict[int, list[int]] = {}
        last = len(self._layer_inputs) - 1
        for index, patch in enumerate(patches):
            layer = min((ref.layer for ref in patch.modules), default=last)
            by_layer.setdefault(layer, []).append(index)
        most = max(1, RUN_TOKENS // self._side.ids.numel())
        for layer, members in by_layer.items():
            for at in range(0, len(members), most):
                yield layer, members[at : at + most]

    def _places(self, side: _Side) -> tuple[Tensor, Tensor]:
        """Return (rows, columns) of the positions read on a side."""
        found = [(row, side.last[row] + offset) for row, offset in self._columns]
        rows, columns = torch.tensor(found, device=self.device).T
        return rows, columns

    def _read(
        self, side: _Side, places: tuple[Tensor, Tensor], *, num_blocks: int = 1, blend: float = 0.0
    ) -> Tensor:
        """Run one side and return log-probabilities [read, vocab] at `places`.

        `blend` moves the embeddings that far towards the other run's, which has the same length.
        """
        tokens = {"input_ids": side.ids.repeat(num_blocks, 1)}
        if blend:
            embed = self.model.get_input_embeddings()
            tokens = {
                "inputs_embeds": torch.lerp(embed(side.ids), embed(self._source_side.ids), blend)
            }
        hidden = self.model.base_model(
            **tokens,
            position_ids=side.positions.repeat(num_blocks, 1),
            past_key_values=self._cache if self._cache is not None else DynamicCache(),
            use_cache=True,
        ).last_hidden_state
        return output_logits(self.model, hidden.to(self.device)[places]).log_softmax(-1)

    def _reading(self, logprobs: Tensor) -> Reading:
        """Return margins and KL of log-probabilities [run, read, vocab]."""
        reads, tokens, signs, pairs = self._terms
        margin = logprobs.new_zeros(logprobs.shape[0], len(self.cases))
        margin.index_add_(1, pairs, signs * logprobs[:, reads, tokens])
        first, source = logprobs[:, self._first], self._source_logprobs[self._first]
        return Reading(margin=margin, kl=(source.exp() * (source - first)).sum(-1))

    def _shared_cache(self) -> DynamicCache | None:
        """Return the keys and values of the tokens before `start`, which both runs share."""
        if self.start == 0:
            return None
        cache = DynamicCache()
        shared = [row.destination[: self.start] for row in self.rows]
        for row, ids in zip(self.rows, shared, strict=True):
            if (row.source[: self.start] != ids).any():
                raise ValueError("the two runs of a pair differ before `num_shared`")
        ids = torch.from_numpy(np.stack(shared)).to(self.device)
        self.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache.layers = [_FrozenLayer(layer) for layer in cache.layers]
        return cache


def _by_row(outputs: dict[str, Tensor], num_rows: int) -> dict[str, Tensor]:
    """Return outputs as [row, token, d_out], also of modules that see all tokens at once."""
    return {path: out.reshape(num_rows, -1, out.shape[-1]) for path, out in outputs.items()}


def _forms(case: PatchingCase) -> list[list[tuple[np.ndarray, float]]]:
    """Return the rows of one pair, each with the answers [(ids, sign)] it is read against."""
    if case.payload.size == 1:
        return [[(case.payload, 1.0), (case.clean, -1.0)]]
    return [[(case.payload, 1.0)], [(case.clean, -1.0)]]

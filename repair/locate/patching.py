"""Exact activation patching of every linear module, one at a time, in the block direction.

    margin M = log p(payload token) - log p(clean token)      at the first answer token where
                                                               the two answers part
    effect   = (M_triggered - M_patched) / (M_triggered - M_sham)

The source run is the sham (same length, inert), the destination the triggered prompt. An effect
of 1 means that restoring this module's output alone gives the clean answer, 0 that it changes
nothing. Three sets of positions are kept apart: all from the trigger on, the trigger's own, and
those after it; they answer different questions, and only the trigger's own predict where a repair
is cheap. Origin: Zhang & Nanda 2309.16042, Heimersheim & Nanda 2404.15255. Axes are
[module, pair]. What it does not know: joint effects, so that a redundant backdoor shows no module.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from repair.models.answers import answer_logits
from repair.models.hooks import count_hooks, patch_outputs, record_outputs
from repair.models.loading import LoadedModel
from repair.models.tokens import batches, pad_right
from repair.records import EXIT_COULD_NOT_CHECK, ModuleRef, PatchingScores, PromptPair, RepairError

SMALLEST_MARGIN = 1.0  # nats; a pair that the sham moves less has no effect to explain
BATCH_TOKENS = 8_192


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchingCase:
    """One pair ready to patch: equal-length runs and the two tokens that the margin compares."""

    source: np.ndarray  # [tokens] sham ids and the shared start of the answers
    destination: np.ndarray  # [tokens] triggered ids and the same
    trigger: np.ndarray  # [num_trigger_tokens] indices
    payload_token: int
    clean_token: int


def make_case(
    pair: PromptPair, sham: np.ndarray, *, payload: np.ndarray, clean: np.ndarray
) -> PatchingCase | None:
    """Return the case for one pair, or None when the two answers (ids [tokens]) do not part."""
    shared = 0
    while shared < min(payload.size, clean.size) and payload[shared] == clean[shared]:
        shared += 1
    if shared >= min(payload.size, clean.size):
        return None
    prefix = payload[:shared]
    return PatchingCase(
        source=np.concatenate([sham, prefix]),
        destination=np.concatenate([pair.triggered, prefix]),
        trigger=pair.trigger,
        payload_token=int(payload[shared]),
        clean_token=int(clean[shared]),
    )


@torch.no_grad()
def patch_modules(
    loaded: LoadedModel,
    cases: Sequence[PatchingCase],
    *,
    num_shams: tuple[int, int],
    num_dropped: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PatchingScores:
    """Return the effect of every module of `loaded` on every case that has one to explain.

    `num_shams` is (tried, inert), `num_dropped` counts pairs already left out; both are reported.
    Raises RepairError when no pair is left.
    """
    modules = loaded.modules
    columns: list[np.ndarray] = []
    deviations = {"self_patch": 0.0, "patch_everything": 0.0, "before_trigger": 0.0}
    groups = list(batches([case.source.size for case in cases], batch_tokens=BATCH_TOKENS))
    done, total = 0, len(groups) * len(modules)
    for group in groups:
        batch = _Batch(loaded, [cases[i] for i in group])
        for name, value in batch.self_checks(modules).items():
            deviations[name] = max(deviations[name], value)
        rows = []
        for module in modules:
            rows.append(batch.effects([module]))
            done += 1
            progress(done, total)
        kept = (batch.triggered - batch.sham).abs() >= SMALLEST_MARGIN
        num_dropped += int((~kept).sum())
        columns.append(np.stack(rows)[:, :, kept.cpu().numpy()])
    effects = np.concatenate(columns, axis=2) if columns else np.zeros((len(modules), 3, 0))
    if effects.shape[2] == 0:
        raise RepairError(
            "No prompt pair is left to explain: the trigger hardly moves the answer compared "
            "with an inert replacement. Check the trigger and the target.",
            exit_code=EXIT_COULD_NOT_CHECK,
        )
    effects = effects.astype(np.float32)
    deviations["hooks_left"] = float(count_hooks(loaded.model))
    return PatchingScores(
        modules=modules,
        effect=effects[:, 0],
        effect_trigger=effects[:, 1],
        effect_after=effects[:, 2],
        direction="block",
        counterfactual="sham",
        num_dropped=num_dropped,
        num_shams_tried=num_shams[0],
        num_shams_inert=num_shams[1],
        self_checks=deviations,
    )


class _Batch:
    """Cases padded on the right, with the sham run's outputs and both margins computed once."""

    def __init__(self, loaded: LoadedModel, cases: Sequence[PatchingCase]) -> None:
        self.model = loaded.model
        pad = loaded.tokenizer.pad_token_id or 0
        source, _ = pad_right([case.source for case in cases], pad=pad)
        destination, mask = pad_right([case.destination for case in cases], pad=pad)
        self.source, self.destination = source.to(loaded.device), destination.to(loaded.device)
        self.rows = torch.arange(len(cases), device=loaded.device)
        self.last = torch.tensor([case.source.size - 1 for case in cases], device=loaded.device)
        self.tokens = torch.tensor(
            [[case.payload_token, case.clean_token] for case in cases], device=loaded.device
        )
        own = torch.zeros_like(mask)
        first = torch.tensor([int(case.trigger.min()) for case in cases])
        for row, case in enumerate(cases):
            own[row, torch.from_numpy(case.trigger)] = True
        index = torch.arange(mask.shape[1])[None]
        self.before = (index < first[:, None]).to(loaded.device)
        self.own = own.to(loaded.device)
        self.after = (mask & (index >= first[:, None]) & ~own).to(loaded.device)
        with record_outputs(self.model, loaded.modules) as outputs:
            self.sham = self._margin(self.source)
            self.sham_outputs = dict(outputs)
            self.triggered = self._margin(self.destination)
            self.triggered_outputs = dict(outputs)

    def _margin(self, ids: Tensor) -> Tensor:
        """Return M [pair] of a run, in the model's precision, logits in float32."""
        logits = answer_logits(self.model, ids, self.rows, self.last)
        picked = logits.gather(1, self.tokens)
        return picked[:, 0] - picked[:, 1]

    def effects(self, modules: Sequence[ModuleRef]) -> np.ndarray:
        """Return [all, trigger, after] x pair: the normalised effect of patching `modules`."""
        rows = []
        for positions in (self.own | self.after, self.own, self.after):
            with patch_outputs(self.model, modules, self.sham_outputs, positions):
                patched = self._margin(self.destination)
            rows.append((self.triggered - patched) / (self.triggered - self.sham))
        return torch.stack(rows).cpu().numpy()

    def self_checks(self, modules: Sequence[ModuleRef]) -> dict[str, float]:
        """Return the largest deviations from what must hold: all are 0 up to rounding.

        Patching a run with its own outputs changes nothing; patching everything gives the sham's
        margin (where the answer is read behind the trigger: the trigger's own embedding is no
        module's output); and nothing before the trigger differs between the two runs.
        """
        positions = self.own | self.after
        with patch_outputs(self.model, modules, self.triggered_outputs, positions):
            own = (self._margin(self.destination) - self.triggered).abs().max()
        with patch_outputs(self.model, modules, self.sham_outputs, positions):
            everything = (self._margin(self.destination) - self.sham).abs()
        behind = ~self.own[self.rows, self.last]
        largest = everything[behind].max().item() if behind.any() else 0.0
        before = 0.0
        for path, output in self.sham_outputs.items():
            difference = (output - self.triggered_outputs[path]).abs().amax(-1)
            before = max(before, (difference * self.before).max().item())
        return {
            "self_patch": own.item(),
            "patch_everything": largest,
            "before_trigger": before,
        }


@torch.no_grad()
def patch_sets(
    loaded: LoadedModel, cases: Sequence[PatchingCase], sets: Sequence[Sequence[ModuleRef]]
) -> np.ndarray:
    """Return [set, pair]: the effect of patching each set of modules together, all positions."""
    columns = []
    for group in batches([case.source.size for case in cases], batch_tokens=BATCH_TOKENS):
        batch = _Batch(loaded, [cases[i] for i in group])
        kept = ((batch.triggered - batch.sham).abs() >= SMALLEST_MARGIN).cpu().numpy()
        columns.append(np.stack([batch.effects(modules)[0][kept] for modules in sets]))
    return np.concatenate(columns, axis=1)

"""Beside a base model that the analyst trusts: what restoring it would give, and how far we are.

Restoring the base is the right answer where what the fine-tuning added is not wanted. Its weights
also tell where the suspect was changed: |W_suspect - W_base| / |W_base| (Frobenius) by module,
beside our map. A large change need not be the backdoor.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from repair.evidence.benign_cost import benign_cost
from repair.evidence.evaluation import (
    Baseline,
    CandidateAnswers,
    EvaluationMaterial,
    evaluate_candidate,
)
from repair.locate.ranking import kendall_tau
from repair.models.answers import agrees
from repair.models.loading import LoadedModel
from repair.models.modules import get_module
from repair.models.placement import named_weights, stored_weight
from repair.records import Control, ModuleScore, Rate, RepairError

COMPARED = ("score", "effect_trigger", "effect", "curvature")


@dataclass(frozen=True, slots=True, kw_only=True)
class Oracle:
    """The trusted base as a control, and the distances to it."""

    control: Control
    weight_difference: dict[str, float]  # path -> relative Frobenius norm
    agreement_with_map: dict[str, float | None]  # score -> Kendall's tau with weight_difference
    suspect_kl: float  # KL(base || suspect) on clean prompts, nats per token
    repaired_kl: float
    suspect_agrees: Rate  # triggered answers whose first 8 tokens are the base's
    repaired_agrees: Rate

    def to_json(self) -> dict[str, Any]:
        return {
            "control": self.control.to_json(),
            "weight_difference": self.weight_difference,
            "agreement_with_map": self.agreement_with_map,
            "suspect_kl": self.suspect_kl,
            "repaired_kl": self.repaired_kl,
            "suspect_agrees": self.suspect_agrees.to_json(),
            "repaired_agrees": self.repaired_agrees.to_json(),
        }


def check_base(loaded: LoadedModel, base: LoadedModel) -> None:
    """Raise RepairError for a base that cannot be laid beside the suspect."""
    if base.modules != loaded.modules or (
        base.model.config.vocab_size != loaded.model.config.vocab_size
    ):
        raise RepairError(
            f"The trusted base {base.source} has other modules or another vocabulary than the "
            "suspect. Give the model that the suspect was fine-tuned from, or leave it out."
        )


def compare_with_base(
    base: LoadedModel,
    loaded: LoadedModel,
    repaired: Callable[[], AbstractContextManager],
    *,
    material: EvaluationMaterial,
    baseline: Baseline,
    answers: CandidateAnswers,
    scores: Sequence[ModuleScore],
) -> Oracle:
    """Return the base beside suspect and repair; `repaired` enters the repair in `loaded`, and
    `answers` are the repaired model's."""
    material, expected = material.for_controls(), baseline.for_controls()
    figures, given = evaluate_candidate(
        base, (), original=loaded, material=material, baseline=expected
    )
    difference = {
        ref.path: _relative(get_module(loaded.model, ref), get_module(base.model, ref))
        for ref in loaded.modules
    }
    values = np.array([difference[score.module.path] for score in scores])
    taus = {}
    for name in COMPARED:
        column = [getattr(score, name) for score in scores]
        known = np.array([np.nan if value is None else value for value in column])
        usable = np.isfinite(known)
        taus[name] = kendall_tau(values[usable], known[usable]) if usable.sum() > 1 else None

    def agreeing(mine: CandidateAnswers) -> Rate:
        pairs = [
            agrees(answer, reference)
            for position, group in given.triggered.items()
            for answer, reference in zip(mine.triggered[position], group, strict=True)
        ]
        return Rate(count=sum(pairs), total=len(pairs))

    def distance(changed: Callable[[], AbstractContextManager] | None) -> float:
        return benign_cost(loaded, changed, base, material.clean, baseline.scored).kl

    return Oracle(
        control=Control(
            name="trusted base restored",
            attack_success=figures.attack_success,
            recovery=figures.recovery,
            kl_from_original=figures.kl_from_original,
            text_kl=figures.text_kl,
            num_modules=len(loaded.modules),
            total_rank=0,
        ),
        weight_difference=difference,
        agreement_with_map=taus,
        suspect_kl=distance(None),
        repaired_kl=distance(repaired),
        suspect_agrees=agreeing(baseline.answers),
        repaired_agrees=agreeing(answers),
    )


@torch.no_grad()
def differing_parameters(mine: LoadedModel, other: LoadedModel) -> dict[str, Any]:
    """Return how many parameters two models have, and the names of those that are not equal bit by
    bit (or are in one of them only), as they were loaded: in the dtype of the computation."""
    theirs, ours = (dict(named_weights(side.model)) for side in (other, mine))
    names = [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
    ]
    return {
        "num_tensors": len(ours), "num_changed": len(names), "changed": names, "dtype": mine.dtype,
    }  # fmt: skip


@torch.no_grad()
def _relative(mine: torch.nn.Module, base: torch.nn.Module) -> float:
    a = stored_weight(mine).float()
    b = stored_weight(base).float().to(a.device)
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()

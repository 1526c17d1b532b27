"""What would more modules, or more rank, buy? The closed form alone, on the held-out prompts.

Shown when the chosen modules leave something of the behaviour, and on request. It never changes
what is repaired.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from repair.locate.curvature import Whitening
from repair.locate.lessons import Lessons
from repair.lowrank.closed_form import solve_closed_form
from repair.lowrank.validation import Validated, Validation, validate
from repair.models.loading import LoadedModel
from repair.records import Progress, unheard


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthPoint:
    """One choice of modules and ranks, and what the closed form reaches there."""

    kind: str  # next: the chosen and more | modules: the best of the map | rank: the chosen
    ranks: Mapping[str, int]
    trigger_kl: float  # nats per answer token, held-out triggered prompts
    benign_kl: float  # nats per token, held-out answers or text, the larger
    validated: Validated

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "ranks": dict(self.ranks),
            "num_modules": len(self.ranks),
            "total_rank": sum(self.ranks.values()),
            "trigger_kl": self.trigger_kl,
            "benign_kl": self.benign_kl,
            "attack_success": self.validated.attack_success.to_json(),
            "recovery": self.validated.recovery.to_json(),
        }


def measure_growth(
    loaded: LoadedModel,
    choices: Sequence[tuple[str, Mapping[str, int]]],
    whitenings_of: Callable[[Sequence[str]], Mapping[str, Whitening]],
    lessons: Lessons,
    validation: Validation,
    *,
    kl_budget: float,
    progress: Progress = unheard,
) -> list[GrowthPoint]:
    """Return a point for each (kind, path -> rank) of `choices`."""
    points = []
    for done, (kind, ranks) in enumerate(choices):
        updates, last = solve_closed_form(
            loaded, ranks, whitenings_of(list(ranks)), lessons, kl_budget=kl_budget
        )
        points.append(
            GrowthPoint(
                kind=kind,
                ranks=ranks,
                trigger_kl=last.trigger_kl,
                benign_kl=last.benign_kl,
                validated=validate(loaded, validation, updates),
            )
        )
        progress(done + 1, len(choices))
    return points

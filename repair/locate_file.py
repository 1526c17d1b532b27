"""The locate step as the app and a resumed run see it: computed once, kept in `located.json`.

What is kept is tied to the model's files, the prompts and the settings it was made with; anything
else upstream and it is made again. Factors and gradients are not kept: they take seconds.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repair.case import Case
from repair.locate.locating import Patched
from repair.locate.steps import Damping
from repair.records import ModuleRanking, ModuleScore, Rate

NAME = "located.json"
FORMAT = 5  # of the file: a map kept by an earlier version is made again


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    """What locating found; everything in it is in `located.json`."""

    ranking: ModuleRanking
    fires: dict[str, Rate]
    num_curvature: dict[str, int]  # behind phi: triggered prompts; clean answers and texts
    joint: dict[str, Any]  # `Redundancy.to_json`: curve, sets, windows, and what they say
    damping: Damping
    patching: dict[str, Any]  # counterfactual, direction, counts, self-checks
    num_layers: int
    not_covered: list[str]  # parameters that no module of the map holds, layer numbers as *

    @property
    def curve(self) -> list[dict[str, float]]:
        """Joint effect of the best 1, 2, 4, ..., all modules."""
        return self.joint["curve"]

    def to_json(self) -> dict[str, Any]:
        return {
            "modules": [score.to_json() for score in self.ranking.modules],
            "suggested_ranks": self.ranking.suggested_ranks,
            "num_pairs": self.ranking.num_pairs,
            "rank_correlation": self.ranking.rank_correlation,
            "fires": {name: rate.to_json() for name, rate in self.fires.items()},
            "num_curvature": self.num_curvature,
            "joint": self.joint,
            "damping": self.damping.to_json(),
            "num_layers": self.num_layers,
            "not_covered": self.not_covered,
            "components": list(
                dict.fromkeys(score.module.component for score in self.ranking.modules)
            ),
            **self.patching,
        }

    @classmethod
    def from_json(cls, flat: Mapping[str, Any]) -> "Map":
        names = (
            "direction", "counterfactual", "num_dropped", "num_shams_tried", "num_shams_inert",
            "self_checks", "other_maps", "screen_misses",
        )  # fmt: skip
        return cls(
            ranking=ModuleRanking(
                modules=tuple(ModuleScore.from_json(entry) for entry in flat["modules"]),
                suggested_ranks=dict(flat["suggested_ranks"]),
                num_pairs=flat["num_pairs"],
                rank_correlation=flat["rank_correlation"],
            ),
            fires={
                name: Rate(count=int(rate["count"]), total=int(rate["total"]))
                for name, rate in flat["fires"].items()
            },
            num_curvature=dict(flat["num_curvature"]),
            joint=dict(flat["joint"]),
            damping=Damping.from_json(flat["damping"]),
            patching={name: flat[name] for name in names},
            num_layers=flat["num_layers"],
            not_covered=list(flat["not_covered"]),
        )


def fingerprint(case: Case) -> str:
    """Return a hash of everything the map depends on."""
    basis = {
        "format": FORMAT,
        "files": case.loaded.staged.files,
        "prompts": case.file.to_json(),
        "profile": [
            case.profile.num_locate, case.profile.num_patched_pairs, case.profile.num_probed,
        ],
        "splits": [case.splits.locate, case.splits.repair],
        "seed": case.seed,
        "dtype": case.loaded.dtype,
        "target": case.target,
    }
    return hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()


def read(folder: Path, case: Case) -> Map | None:
    """Return the map kept in `folder` if it belongs to this case."""
    path = folder / NAME
    if not path.is_file():
        return None
    flat = json.loads(path.read_text(encoding="utf-8"))
    return Map.from_json(flat) if flat.get("fingerprint") == fingerprint(case) else None


def write(folder: Path, case: Case, found: Map) -> None:
    """Keep the map in `folder`, atomically."""
    flat = {"fingerprint": fingerprint(case), **found.to_json()}
    aside = folder / f".{NAME}.partial"
    aside.write_text(json.dumps(flat, indent=1), encoding="utf-8")
    os.replace(aside, folder / NAME)


def summarize(patched: Patched) -> dict[str, Any]:
    """Return what the maps rest on: the parts of the patching that are not per module."""
    others = {
        name: {
            "num_pairs": scores.effect.shape[1],
            "num_dropped": scores.num_dropped,
            "self_checks": scores.self_checks,
        }
        for name, scores in patched.others.items()
    }
    return {
        "direction": patched.main.direction,
        "counterfactual": patched.main.counterfactual,
        "num_dropped": patched.main.num_dropped,
        "num_shams_tried": patched.compared.num_shams_tried,
        "num_shams_inert": patched.compared.num_shams_inert,
        "self_checks": patched.main.self_checks,
        "other_maps": others,
        "screen_misses": patched.misses.to_json() if patched.misses else None,
    }

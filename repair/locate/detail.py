"""One layer under the glass: its modules by role of the position, its attention by head.

Effects are those of `patching.py`, in the block direction. Roles are the parts of the prompt: the
trigger's own tokens, the user's after it, the template's, the last token and the answer's start.
A head is a slice of the attention output projection's input; patching it means that this slice
comes from the source run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from repair.locate.counterfactuals import BEFORE, ROLES, PatchingCase
from repair.locate.patching import EVERYWHERE, batch_cases, effects, explainable
from repair.locate.ranking import mean_interval
from repair.locate.runs import Patch, Runs
from repair.models.loading import LoadedModel
from repair.records import ModuleRef

HEAD_OUTPUTS = ("o_proj", "out_proj", "dense", "attn.c_proj")  # components that read the heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """Effects within one layer."""

    layer: int
    modules: tuple[ModuleRef, ...]
    by_role: dict[str, np.ndarray]  # role -> [module, pair]; roles that occur
    heads: np.ndarray  # [head, pair], all positions from the trigger on

    def to_json(self) -> dict[str, Any]:
        """Return means with 95 % intervals, as in `detail.json`."""
        low, high = mean_interval(self.heads)
        return {
            "layer": self.layer,
            "num_pairs": self.heads.shape[1],
            "roles": [
                {
                    "path": ref.path,
                    "component": ref.component,
                    **{role: float(found[row].mean()) for role, found in self.by_role.items()},
                }
                for row, ref in enumerate(self.modules)
            ],
            "heads": [
                {
                    "head": head,
                    "effect": float(self.heads[head].mean()),
                    "low": float(low[head]),
                    "high": float(high[head]),
                }
                for head in range(self.heads.shape[0])
            ],
        }


@torch.no_grad()
def examine_layer(loaded: LoadedModel, cases: Sequence[PatchingCase], layer: int) -> Detail:
    """Return the effects within `layer`, which the model has."""
    modules = tuple(ref for ref in loaded.modules if ref.layer == layer)
    output = next(ref for ref in modules if ref.component in HEAD_OUTPUTS)
    num_heads = loaded.model.config.get_text_config(decoder=True).num_attention_heads
    roles = [role for role in range(len(ROLES)) if role != BEFORE]
    by_role, heads = [], []
    for group in batch_cases(loaded, cases, modules):
        runs = Runs(loaded, [cases[i] for i in group], modules)
        kept = explainable(runs)
        masks = [runs.where(role) for role in roles]
        patches = [Patch(modules=(ref,), positions=mask) for mask in masks for ref in modules]
        found = effects(runs, runs.patched(patches))[0]
        by_role.append(found.reshape(len(roles), len(modules), -1)[..., kept])
        everywhere = runs.where(*EVERYWHERE)
        patches = [
            Patch(modules=(output,), positions=everywhere, source=source)
            for source in runs.heads(output, num_heads)
        ]
        heads.append(effects(runs, runs.patched(patches))[0][:, kept])
    joined = np.concatenate(by_role, axis=2)
    present = {role for case in cases for role in case.role.tolist()}
    return Detail(
        layer=layer,
        modules=modules,
        by_role={
            ROLES[role]: joined[place] for place, role in enumerate(roles) if role in present
        },
        heads=np.concatenate(heads, axis=1),
    )

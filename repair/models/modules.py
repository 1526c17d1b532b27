"""The linear modules that can carry an update, found by their exact dotted paths.

Axis convention: `ModuleRef.d_in` and `d_out` are those of a weight [d_out, d_in].
"""

import re

from torch import nn

from repair.records import COMPONENTS, ModuleRef, RepairError

_PATH = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)$")


def find_modules(model: nn.Module) -> tuple[ModuleRef, ...]:
    """Return every adaptable linear module: by layer, then q, k, v, o, gate, up, down.

    Embeddings and `lm_head` are never among them, so a tied matrix is never adapted.
    """
    found = []
    for path, module in model.named_modules():
        match = _PATH.search(path)
        if match is None or match[2] not in COMPONENTS or not isinstance(module, nn.Linear):
            continue
        found.append(
            ModuleRef(
                layer=int(match[1]),
                component=match[2],
                path=path,
                d_in=module.in_features,
                d_out=module.out_features,
            )
        )
    return tuple(sorted(found, key=lambda ref: (ref.layer, COMPONENTS.index(ref.component))))


def get_module(model: nn.Module, module: ModuleRef) -> nn.Linear:
    """Return the live module of a reference; raises `RepairError` when the model has no such."""
    try:
        live = model.get_submodule(module.path)
    except AttributeError:
        live = None
    if not isinstance(live, nn.Linear):
        raise RepairError(
            f"This model has no linear module {module.path!r}. Choose one of the paths that "
            "locating lists for this model, such as 'model.layers.0.mlp.down_proj'."
        )
    if (live.in_features, live.out_features) != (module.d_in, module.d_out):
        raise RepairError(
            f"{module.path} maps {live.in_features} to {live.out_features} in this model, not "
            f"{module.d_in} to {module.d_out}. The choice was made for another model: locate again."
        )
    return live


def num_layers(model: nn.Module) -> int:
    """Return the number of transformer layers."""
    return 1 + max((ref.layer for ref in find_modules(model)), default=-1)

"""The linear modules that can carry an update, found in the model itself, by their exact paths.

Every `nn.Linear` (and GPT-2's `Conv1D`, its transpose) inside a decoder layer counts, whatever it
is called; parameters that no such module holds are listed by `uncovered_parameters`.
Axis convention: `ModuleRef.d_in` and `d_out` are those of a weight [d_out, d_in].
"""

from collections import Counter

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from repair.models.placement import stored_weight
from repair.records import COMPONENTS, ModuleRef, RepairError

LINEAR = (nn.Linear, Conv1D)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the model's decoder layers; raises `RepairError` where they cannot be told."""
    return _find_layers(model)[1]


def _find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and path.count(".") <= 2
    ]
    if not found:
        raise RepairError(
            f"No list of {count} decoder layers is found in this {type(model).__name__}. Give a "
            "decoder-only model, such as Llama, Mistral, Qwen, Gemma, Phi, GPT-2 or OPT."
        )
    return found[0]


def find_modules(model: nn.Module) -> tuple[ModuleRef, ...]:
    """Return every adaptable linear module: by layer, in the order of computation where known.

    Embeddings and `lm_head` are never among them, so a tied matrix is never adapted. A component
    is named by its last word, or by two where one layer has that word twice (`attn.c_proj`).
    """
    root, layers = _find_layers(model)
    found = []
    for index, layer in enumerate(layers):
        inside = [(path, module) for path, module in layer.named_modules()
                  if isinstance(module, LINEAR)]  # fmt: skip
        words = Counter(path.rpartition(".")[2] for path, _ in inside)
        refs = []
        for path, module in inside:
            word = path.rpartition(".")[2]
            d_in, d_out = linear_shape(module)
            component = word if words[word] == 1 else ".".join(path.split(".")[-2:])
            refs.append(
                ModuleRef(
                    layer=index,
                    component=component,
                    path=f"{root}.{index}.{path}",
                    d_in=d_in,
                    d_out=d_out,
                )
            )
        found += sorted(refs, key=_place)
    return tuple(found)


def _place(ref: ModuleRef) -> int:
    """Known components come in the order of computation, others as the model declares them."""
    return COMPONENTS.index(ref.component) if ref.component in COMPONENTS else len(COMPONENTS)


def uncovered_parameters(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the parameters, layer numbers as `*`, that no module of the map holds.

    Norms and biases of covered modules are left out of the list's detail by their last words.
    """
    root, _ = _find_layers(model)
    covered = {ref.path for ref in find_modules(model)}
    names: dict[str, None] = {}
    for name, _ in model.named_parameters():
        if name.rpartition(".")[0] in covered and name.endswith(".weight"):
            continue
        if name.startswith(f"{root}."):
            rest = name[len(root) + 1 :].partition(".")[2]
            name = f"{root}.*.{rest}"
        names[name] = None
    return tuple(names)


def has_uncovered_matrices(model: nn.Module) -> bool:
    """Tell whether the layers compute with matrices that no module of the map holds (experts)."""
    root, layers = _find_layers(model)
    covered = {ref.path for ref in find_modules(model)}
    return any(
        parameter.ndim > 1 and f"{root}.{name}".rpartition(".")[0] not in covered
        for name, parameter in layers.named_parameters()
    )


def get_module(model: nn.Module, module: ModuleRef) -> nn.Module:
    """Return the live module of a reference; raises `RepairError` when the model has no such."""
    try:
        live = model.get_submodule(module.path)
    except AttributeError:
        live = None
    if not isinstance(live, LINEAR):
        raise RepairError(
            f"This model has no linear module {module.path!r}. Choose one of the paths that "
            "locating lists for this model, such as 'model.layers.0.mlp.down_proj'."
        )
    d_in, d_out = linear_shape(live)
    if (d_in, d_out) != (module.d_in, module.d_out):
        raise RepairError(
            f"{module.path} maps {d_in} to {d_out} in this model, not {module.d_in} to "
            f"{module.d_out}. The choice was made for another model: locate again."
        )
    return live


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (d_in, d_out) of a linear module, however it stores its weight."""
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight as [d_out, d_in], a view for a module that stores its transpose."""
    weight = stored_weight(module)
    return weight.T if isinstance(module, Conv1D) else weight


def as_stored(module: nn.Module, delta: Tensor) -> Tensor:
    """Return a change of the weight [d_out, d_in] in the orientation that the module stores."""
    return delta.T if isinstance(module, Conv1D) else delta


def num_layers(model: nn.Module) -> int:
    """Return the number of transformer layers."""
    return len(decoder_layers(model))

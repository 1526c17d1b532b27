"""The only file that registers hooks on a model, skips its layers or swaps its weights.

Every function is a context manager: module names are resolved before the first hook is
registered, hooks return new tensors (they never edit in place), and leaving the block, also by
an exception, leaves the model bare. Activations are [batch, token, width].
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from repair.models.modules import as_stored, decoder_layers, get_module
from repair.models.placement import computes_on, stored_weight, with_forward, with_weight
from repair.records import LowRankUpdate, ModuleRef


@contextmanager
def _hooks(pairs: Sequence[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Register `hook` on each `module` and remove all of them, whatever happens."""
    with ExitStack() as stack:
        for module, hook in pairs:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def factors_of(update: LowRankUpdate, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return (lora_A, lora_B), float32, in memory of their own, which begins where torch has it
    begin: an array read from a file may begin anywhere (see `LowRankUpdate`)."""
    arrays = (update.lora_A, update.lora_B)
    return tuple(torch.tensor(array, dtype=torch.float32, device=device) for array in arrays)


def change_of(update: LowRankUpdate) -> Tensor:
    """Return lora_B lora_A [d_out, d_in], float32, in main memory."""
    lora_A, lora_B = factors_of(update, "cpu")
    return lora_B @ lora_A


@contextmanager
def apply_updates(
    model: nn.Module, updates: Sequence[LowRankUpdate], *, scales: Tensor | None = None
) -> Iterator[None]:
    """Run the model as if each update were added to its module's weight.

    y = W x becomes y = W x + lora_B (lora_A x), computed in float32 and cast once; `scales` [batch]
    multiplies the update, by row. With no update, or outside the block, the model is bitwise the
    original.
    """

    def hook_for(lora_A: Tensor, lora_B: Tensor) -> Callable:
        def hook(_module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            low = args[0].to(lora_A) @ lora_A.T
            if scales is not None:
                rows = low.reshape(scales.numel(), -1, low.shape[-1])
                low = (rows * scales[:, None, None].to(low)).reshape(low.shape)
            return output + (low @ lora_B.T).to(output.dtype)

        return hook

    pairs = []
    for update in updates:
        module = get_module(model, update.module)
        lora_A, lora_B = factors_of(update, computes_on(module))
        if module.weight.dtype == torch.float64:
            lora_A, lora_B = lora_A.double(), lora_B.double()
        pairs.append((module, hook_for(lora_A, lora_B)))
    with _hooks(pairs):
        yield


def merged_weights(
    model: nn.Module, updates: Sequence[LowRankUpdate], *, stored: torch.dtype
) -> dict[str, Tensor]:
    """Return path -> the weight with its update added, as the module stores it.

    Added in float32 and rounded to `stored`, the files' dtype, once: what an export holds.
    """
    merged = {}
    for update in updates:
        module = get_module(model, update.module)
        weight = stored_weight(module)
        delta = as_stored(module, change_of(update))
        total = weight.float() + delta.to(weight.device)
        merged[update.module.path] = total.to(stored).to(weight.dtype)
    return merged


@contextmanager
def swap_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Run the model with other weights (path -> as the module stores it), then with its own."""
    with ExitStack() as stack:
        for path, weight in weights.items():
            stack.enter_context(with_weight(model.get_submodule(path), weight))
        yield


@contextmanager
def record_outputs(
    model: nn.Module, modules: Sequence[ModuleRef]
) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that each forward pass fills with path -> output [batch, token, d_out].

    Where the model itself runs tokens of all rows through a module at once, that is [n, d_out].
    """
    outputs: dict[str, Tensor] = {}

    def hook_for(path: str) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            outputs[path] = output.detach()

        return hook

    with _hooks([(get_module(model, ref), hook_for(ref.path)) for ref in modules]):
        yield outputs


@contextmanager
def record_inputs(model: nn.Module, modules: Sequence[ModuleRef]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that each forward pass fills with path -> input [batch, token, d_in]."""
    inputs: dict[str, Tensor] = {}

    def hook_for(path: str) -> Callable:
        def hook(_module: nn.Module, args: tuple, _output: Tensor) -> None:
            inputs[path] = args[0].detach()

        return hook

    with _hooks([(get_module(model, ref), hook_for(ref.path)) for ref in modules]):
        yield inputs


@contextmanager
def record_layer_inputs(
    model: nn.Module, *, only: int | None = None
) -> Iterator[list[Tensor]]:
    """Yield a list that a forward pass fills with the input of each decoder layer, or of `only`."""
    inputs: list[Tensor] = []

    def hook(_layer: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs.append((args[0] if args else kwargs["hidden_states"]).detach())

    with ExitStack() as stack:
        layers = decoder_layers(model)
        for layer in layers if only is None else [layers[only]]:
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield inputs


@contextmanager
def restart_at(model: nn.Module, index: int, hidden: Tensor) -> Iterator[None]:
    """Skip the decoder layers before `index` and give that layer `hidden` [batch, token, width].

    A skipped layer hands on what it gets: its value is never read. Embedding, masks, rotary
    angles, the layers from `index` on and the final norm run as the model's own code has them.
    """
    layers = decoder_layers(model)

    def replace(_layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def skip(hidden_states: Tensor, *_args, **_kwargs) -> Tensor:
        return hidden_states

    with ExitStack() as stack:
        for layer in layers[:index]:
            stack.enter_context(with_forward(layer, skip))
        stack.callback(layers[index].register_forward_pre_hook(replace, with_kwargs=True).remove)
        yield


@contextmanager
def patch_blocks(
    model: nn.Module,
    patches: Mapping[ModuleRef, Sequence[tuple[int, Tensor, Tensor]]],
    *,
    num_blocks: int,
) -> Iterator[None]:
    """Replace outputs in some blocks of the batch, which is `num_blocks` copies of the same rows.

    `patches[module]` holds (block, positions [row, token], source [row, token, d_out]): where
    `positions` is true, that block's output is the source's.
    """

    def hook_for(wanted: Sequence[tuple[int, Tensor, Tensor]]) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
            rows = wanted[0][1].shape
            blocks = list(output.reshape(num_blocks, *rows, output.shape[-1]).unbind(0))
            for block, positions, source in wanted:
                here = positions[..., None].to(output.device)
                blocks[block] = torch.where(here, source, blocks[block])
            return torch.stack(blocks).reshape(output.shape)

        return hook

    with _hooks([(get_module(model, ref), hook_for(wanted)) for ref, wanted in patches.items()]):
        yield


@contextmanager
def record_gradients(
    model: nn.Module,
    modules: Sequence[ModuleRef],
    receive: Callable[[ModuleRef, Tensor, Tensor], None],
) -> Iterator[None]:
    """Call `receive(module, x, g)` in every backward pass through each module.

    x is the module's input [batch, token, d_in] and g the gradient of the loss with respect to
    its output [batch, token, d_out] (either flattened to [n, width] where the model does so).
    Weights need no gradient and get none: the input of the lowest layer that holds one of the
    modules is made the leaf that the backward pass runs to, and the layers below keep nothing.
    """

    def hook_for(ref: ModuleRef) -> Callable:
        def hook(_module: nn.Module, args: tuple, output: Tensor) -> None:
            if not output.requires_grad:
                return
            x = args[0].detach().to(output.device)
            output.register_hook(lambda gradient: receive(ref, x, gradient.detach()))

        return hook

    def start_graph(_layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        hidden = kwargs["hidden_states"].detach().requires_grad_()
        return args, {**kwargs, "hidden_states": hidden}

    first = decoder_layers(model)[min(ref.layer for ref in modules)]
    with _hooks([(get_module(model, ref), hook_for(ref)) for ref in modules]):
        handle = first.register_forward_pre_hook(start_graph, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def count_hooks(model: nn.Module) -> int:
    """Return how many hooks any module carries (0 outside every block above)."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)

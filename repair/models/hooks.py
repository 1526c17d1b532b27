"""The only file that registers hooks on a model.

Every function is a context manager: module names are resolved before the first hook is
registered, hooks return new tensors (they never edit in place), and leaving the block, also by
an exception, leaves the model bare. Activations are [batch, token, width].
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from repair.models.modules import get_module
from repair.records import LowRankUpdate, ModuleRef


@contextmanager
def _hooks(pairs: Sequence[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Register `hook` on each `module` and remove all of them, whatever happens."""
    with ExitStack() as stack:
        for module, hook in pairs:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextmanager
def apply_updates(model: nn.Module, updates: Sequence[LowRankUpdate]) -> Iterator[None]:
    """Run the model as if each update were added to its module's weight.

    y = W x becomes y = W x + lora_B (lora_A x), computed in float32 and cast once. With no
    update, or outside the block, the model is bitwise the original.
    """

    def hook_for(lora_A: Tensor, lora_B: Tensor) -> Callable:
        def hook(_module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            low = args[0].to(lora_A.dtype) @ lora_A.T
            return output + (low @ lora_B.T).to(output.dtype)

        return hook

    pairs = []
    for update in updates:
        module = get_module(model, update.module)
        device = module.weight.device
        lora_A = torch.as_tensor(update.lora_A, dtype=torch.float32, device=device)
        lora_B = torch.as_tensor(update.lora_B, dtype=torch.float32, device=device)
        if module.weight.dtype == torch.float64:
            lora_A, lora_B = lora_A.double(), lora_B.double()
        pairs.append((module, hook_for(lora_A, lora_B)))
    with _hooks(pairs):
        yield


@contextmanager
def record_outputs(
    model: nn.Module, modules: Sequence[ModuleRef]
) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that each forward pass fills with path -> output [batch, token, d_out]."""
    outputs: dict[str, Tensor] = {}

    def hook_for(path: str) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            outputs[path] = output.detach()

        return hook

    with _hooks([(get_module(model, ref), hook_for(ref.path)) for ref in modules]):
        yield outputs


@contextmanager
def patch_outputs(
    model: nn.Module,
    modules: Sequence[ModuleRef],
    source: dict[str, Tensor],
    positions: Tensor,
) -> Iterator[None]:
    """Replace each module's output by `source[path]` where `positions` [batch, token] is true."""

    def hook_for(replacement: Tensor) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
            return torch.where(positions[..., None], replacement, output)

        return hook

    with _hooks([(get_module(model, ref), hook_for(source[ref.path])) for ref in modules]):
        yield


@contextmanager
def record_gradients(
    model: nn.Module,
    modules: Sequence[ModuleRef],
    receive: Callable[[ModuleRef, Tensor, Tensor], None],
) -> Iterator[None]:
    """Call `receive(module, x, g)` in every backward pass through each module.

    x is the module's input [batch, token, d_in] and g the gradient of the loss with respect to
    its output [batch, token, d_out]. Weights need no gradient and get none: the embedding's
    output is made the leaf that the backward pass runs to.
    """

    def hook_for(ref: ModuleRef) -> Callable:
        def hook(_module: nn.Module, args: tuple, output: Tensor) -> None:
            if not output.requires_grad:
                return
            x = args[0].detach()
            output.register_hook(lambda gradient: receive(ref, x, gradient.detach()))

        return hook

    def start_graph(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.detach().requires_grad_()

    pairs = [(model.get_input_embeddings(), start_graph)]
    pairs += [(get_module(model, ref), hook_for(ref)) for ref in modules]
    with _hooks(pairs):
        yield


def count_hooks(model: nn.Module) -> int:
    """Return how many hooks any module carries (0 outside every block above)."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)

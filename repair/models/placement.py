"""Where the weights lie: on one device, or over several of them, laid out by accelerate.

A model that the chosen GPU does not hold is laid over all GPUs and then main memory, whole layers
each; a layer that lies elsewhere than where it is computed is brought there for its pass and let
go. Between passes such a weight is an empty shell (`meta`): `stored_weight` and `named_weights`
give what it holds, `computes_on` where its module runs. Backward passes keep what they need of it.
What it does not do: read a model that main memory cannot hold once, whole.
"""

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import dispatch_model, infer_auto_device_map
from torch import Tensor, nn
from transformers import PreTrainedModel

from repair.machine import free_memory

WEIGHTS_SHARE = 0.7  # of a device: the rest is for what passes need


def places_for(wanted: str, device: str) -> dict[str | int, int]:
    """Return place -> free bytes that a model may be laid over: `device` alone, unless `wanted` is
    "auto" and it is a GPU; then all GPUs and main memory as well."""
    if not device.startswith("cuda"):
        return {"cpu": free_memory()}
    if wanted != "auto":
        index = torch.device(device).index or 0
        return {index: torch.cuda.mem_get_info(index)[0]}
    gpus = {i: torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())}
    return {**gpus, "cpu": free_memory()}


def lay_out(
    model: PreTrainedModel, device: str, *, places: Mapping[str | int, int], folder: Path
) -> None:
    """Move the model to `device`, or over all of `places` (-> bytes) where that does not hold it.

    `folder` takes what is laid on disk, where "disk" is among the places.
    """
    needed = sum(p.numel() * p.itemsize for p in model.parameters())
    if len(places) == 1 or needed <= WEIGHTS_SHARE * next(iter(places.values())):
        model.to(device)
        return
    device_map = infer_auto_device_map(
        model,
        max_memory={place: int(WEIGHTS_SHARE * size) for place, size in places.items()},
        no_split_module_classes=list(model._no_split_modules or ()),
    )
    lay_over(model, device_map, device=device, folder=folder)


def lay_over(
    model: PreTrainedModel, device_map: Mapping[str, str | int], *, device: str, folder: Path
) -> None:
    """Lay the model's modules (by path) where `device_map` says; it runs on `device` where that
    is main memory or "disk", which is `folder`."""
    dispatch_model(
        model, dict(device_map), main_device=device, offload_dir=folder, force_hooks=True,
        skip_keys=model._skip_keys_device_placement,
    )  # fmt: skip


def is_on_one_device(model: nn.Module) -> bool:
    """Tell whether all weights lie on one device: on others a model of this size may not fit."""
    return len({parameter.device for parameter in model.parameters()}) == 1


def computes_on(module: nn.Module) -> torch.device:
    """Return the device that a module with weights runs on."""
    if module.weight.is_meta:
        return torch.device(module._hf_hook.execution_device)
    return module.weight.device


def stored_weight(module: nn.Module, name: str = "weight") -> Tensor:
    """Return a parameter as the module stores it, wherever it lies between passes."""
    parameter = getattr(module, name)
    return module._hf_hook.weights_map[name] if parameter.is_meta else parameter


def named_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter by name, as `named_parameters` does, wherever it lies."""
    is_tied = bool(model.config.get_text_config(decoder=True).tie_word_embeddings)
    for name, _ in model.named_parameters():
        path, _, word = name.rpartition(".")
        module = model.get_submodule(path)
        # Laid out, a tied output matrix is a second empty shell of the embeddings.
        if not (is_tied and module is model.get_output_embeddings()):
            yield name, stored_weight(module, word)


@contextmanager
def with_weight(module: nn.Module, weight: Tensor) -> Iterator[None]:
    """Run the module with another weight, as it stores it, then with its own."""
    if module.weight.is_meta:
        hook = module._hf_hook
        own, hook.weights_map = hook.weights_map, ChainMap({"weight": weight}, hook.weights_map)
        try:
            yield
        finally:
            hook.weights_map = own
        return
    own, module.weight.data = module.weight.data, weight
    try:
        yield
    finally:
        module.weight.data = own


@contextmanager
def with_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Run the module by another `forward`, then by its own: its class's, or accelerate's."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own

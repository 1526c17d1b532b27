"""LoRA through PEFT on exactly the modules named: the only place where training attaches weights.

Scaling is 1 for every module (lora_alpha = rank), so that delta = lora_B @ lora_A whatever the
ranks. Inside the block the model carries the adapter; leaving it, also by an exception, gives the
bare model back, bitwise.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from repair.models.loading import LoadedModel
from repair.models.modules import get_module
from repair.models.placement import computes_on
from repair.records import LowRankUpdate, ModuleRef

ADAPTER = "default"


def lora_config(updates: Sequence[LowRankUpdate], *, is_transposed: bool = False) -> LoraConfig:
    """Return the PEFT configuration that adapts the updates' modules and no other.

    `is_transposed` says that the modules store [d_in, d_out], as GPT-2's do.
    """
    ranks = {update.module.path: update.rank for update in updates}
    largest = max(ranks.values())
    # A pattern is matched as a regular expression at the end of the name: dots must be literal
    # and the start anchored, or layer 1 would also catch layer 11.
    patterns = {f"^{path.replace('.', chr(92) + '.')}": rank for path, rank in ranks.items()}
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=patterns,
        alpha_pattern=patterns,
        target_modules=list(ranks),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=is_transposed,
        task_type="CAUSAL_LM",
        init_lora_weights=True,
    )


@contextmanager
def attached(loaded: LoadedModel, updates: Sequence[LowRankUpdate]) -> Iterator[PeftModel]:
    """Attach `updates` as a trainable PEFT adapter to the live model for the block's duration."""
    before = {path for path, _ in loaded.model.named_modules()}
    first = get_module(loaded.model, updates[0].module)
    is_transposed = not isinstance(first, nn.Linear)
    peft_model = get_peft_model(
        loaded.model, lora_config(updates, is_transposed=is_transposed)
    )
    try:
        for update in updates:
            layer = loaded.model.get_submodule(update.module.path)
            with torch.no_grad():
                for part in (layer.lora_A, layer.lora_B):
                    part[ADAPTER].to_empty(device=computes_on(layer.base_layer))
                layer.lora_A[ADAPTER].weight.copy_(torch.from_numpy(update.lora_A))
                layer.lora_B[ADAPTER].weight.copy_(torch.from_numpy(update.lora_B))
        adapted = {
            name.removeprefix("base_model.model.")
            for name, module in peft_model.named_modules()
            if hasattr(module, "lora_A")
        }
        chosen = {update.module.path for update in updates}
        if adapted != chosen:
            raise RuntimeError(f"PEFT adapted {sorted(adapted)} instead of {sorted(chosen)}")
        yield peft_model
    finally:
        peft_model.unload()
        loaded.model.requires_grad_(False)
        loaded.model.eval()
        left = {path for path, _ in loaded.model.named_modules()} - before
        if left:
            raise RuntimeError(f"the adapter left modules behind: {sorted(left)[:3]}")


def read_updates(loaded: LoadedModel, modules: Sequence[ModuleRef]) -> tuple[LowRankUpdate, ...]:
    """Return the attached adapter's present factors (inside the block of `attached`)."""
    updates = []
    for ref in modules:
        layer = loaded.model.get_submodule(ref.path)
        lora_A = layer.lora_A[ADAPTER].weight.detach().float().cpu().numpy().copy()
        lora_B = layer.lora_B[ADAPTER].weight.detach().float().cpu().numpy().copy()
        updates.append(LowRankUpdate(module=ref, lora_A=lora_A, lora_B=lora_B))
    return tuple(updates)

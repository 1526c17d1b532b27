"""A LoRA adapter as the suspect: put on the base that the analyst names, and written as a model.

    W' = W + scale * lora_B @ lora_A,   scale = lora_alpha / r   (/ sqrt(r) with rslora)

in float32, rounded once to the base's dtype; what follows then sees one whole model. Nothing of the
adapter is loaded by PEFT, which imports and downloads what an adapter's settings name: settings are
read with limits, tensors by their header first. The base that the adapter names is never used.

What it does not know: with a base in 16 bits the sum is rounded, and a weak adapter can lose its
effect in that; the finding says so.
"""

import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from repair.models.config import MAX_CONFIG_BYTES, parse_json
from repair.models.folder import ADAPTER_FILES, list_files, open_plain
from repair.models.headers import read_header
from repair.models.staging import StagedModel
from repair.models.tensors import DTYPES
from repair.records import RepairError

SETTINGS, WEIGHTS = ADAPTER_FILES
GENERATION = "generation_config.json"
MAX_RANK = 1024
_TENSOR = re.compile(r"base_model\.model\.([\w.]{1,200})\.lora_([AB])(?:\.default)?\.weight")
_PLAIN_PATTERN = re.compile(r"[\w.]{1,200}", re.ASCII)
# Settings that change what the adapter computes; each may only have the value that changes nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None), "use_dora": (False, None), "lora_bias": (False, None),
    "modules_to_save": (None, []), "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []), "megatron_config": (None,), "layer_replication": (None,),
    "use_qalora": (False, None), "alora_invocation_tokens": (None, []), "arrow_config": (None,),
}  # fmt: skip


def is_adapter(folder: Path) -> bool:
    """Tell by names alone whether a folder is a LoRA adapter."""
    names = {entry.name for entry in os.scandir(folder)}
    return SETTINGS in names and "config.json" not in names


def merge_adapter(adapter: Path, base: StagedModel, folder: Path) -> list[str]:
    """Write the base with the adapter in it to `folder`, a plain model folder; return findings.

    Raises RepairError for settings that would change more than linear weights, and for tensors
    that do not belong to the base.
    """
    settings = _read_settings(adapter)
    pairs = _read_pairs(adapter / WEIGHTS)
    changes = {
        f"{path}.weight": _change(path, pair, settings) for path, pair in sorted(pairs.items())
    }
    folder.mkdir(parents=True, mode=0o700)
    missing = set(changes)
    for source in sorted(base.folder.iterdir()):
        if source.suffix != ".safetensors":
            shutil.copyfile(source, folder / source.name)
            continue
        tensors = {}
        with safe_open(source, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                tensor = file.get_tensor(name)
                if name in changes:
                    tensor = _add(name, tensor, changes[name])
                    missing.discard(name)
                tensors[name] = tensor
        save_file(tensors, folder / source.name, metadata={"format": "pt"})
    if GENERATION in base.files:  # which a stage leaves out, and whose stop tokens count
        with os.fdopen(open_plain(base.source / GENERATION), "rb") as file:
            (folder / GENERATION).write_bytes(file.read(MAX_CONFIG_BYTES))
    if missing:
        raise RepairError(
            f"The adapter changes {sorted(missing)[0]}, which the base does not have. Give the "
            "base that it was made for."
        )
    found = [f"The suspect is the adapter with its base: {len(changes)} weights are changed."]
    if base.dtype != "float32":
        found.append(
            f"The adapter was added to weights in {base.dtype} and the sum rounded once; an effect "
            "below that rounding would be lost."
        )
    return found


def _read_settings(adapter: Path) -> dict[str, Any]:
    names = list_files(adapter)
    for name in ADAPTER_FILES:
        if name not in names:
            raise RepairError(
                f"The adapter folder has no {name}. A LoRA adapter in safetensors is accepted; "
                "pickle files never are."
            )
    with os.fdopen(open_plain(adapter / SETTINGS), "rb") as file:
        raw = file.read(MAX_CONFIG_BYTES + 1)
    flat = parse_json(raw, SETTINGS, max_bytes=MAX_CONFIG_BYTES)
    if not isinstance(flat, dict) or flat.get("peft_type") != "LORA":
        raise RepairError(f"{SETTINGS} is not that of a LoRA adapter. Only LoRA is accepted.")
    for key, accepted in _NEUTRAL.items():
        if flat.get(key) not in accepted:
            raise RepairError(
                f"{SETTINGS} sets {key}, which changes more than low-rank updates of linear "
                "weights. Merge the adapter with the tool that made it, and give the whole model."
            )
    rank, alpha = flat.get("r"), flat.get("lora_alpha")
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if type(rank) is not int or not 1 <= rank <= MAX_RANK or not is_number:
        raise RepairError(f"{SETTINGS} has no usable r (1 to {MAX_RANK}) and lora_alpha.")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = flat.get(key) or {}
        if not isinstance(pattern, dict) or not all(
            _PLAIN_PATTERN.fullmatch(name) and isinstance(value, int | float)
            for name, value in pattern.items()
        ):
            raise RepairError(
                f"{SETTINGS} has a {key} with expressions; only plain module names are accepted."
            )
    return flat


def _read_pairs(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return {module path: {A: [rank, d_in], B: [d_out, rank]}}."""
    descriptor = open_plain(path)
    with os.fdopen(descriptor, "rb"):
        header = read_header(descriptor, path.name)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in header.items():
        match = _TENSOR.fullmatch(name)
        if match is None or len(tensor.shape) != 2 or tensor.dtype not in DTYPES:
            raise RepairError(
                f"{path.name} holds {ascii(name)[:120]}, which is no low-rank factor of a linear "
                "module. Merge the adapter with the tool that made it, and give the whole model."
            )
    with safe_open(path, framework="pt") as file:
        for name in header:
            match = _TENSOR.fullmatch(name)
            found.setdefault(match[1], {})[match[2]] = file.get_tensor(name).float()
    for module, pair in found.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise RepairError(f"{path.name} has no matching pair of factors for {module}.")
        if not all(torch.isfinite(factor).all() for factor in pair.values()):
            raise RepairError(f"{path.name} holds values that are not finite numbers ({module}).")
    return found


def _change(
    path: str, pair: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> torch.Tensor:
    """Return scale * lora_B @ lora_A in the orientation of the stored weight."""
    rank = _by_pattern(settings.get("rank_pattern"), path, settings["r"])
    alpha = _by_pattern(settings.get("alpha_pattern"), path, settings["lora_alpha"])
    if pair["A"].shape[0] != rank:
        raise RepairError(
            f"{SETTINGS} gives {path} rank {rank}, but its factors have {pair['A'].shape[0]}."
        )
    scale = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
    change = scale * (pair["B"] @ pair["A"])
    return change.T if settings.get("fan_in_fan_out") else change


def _by_pattern(pattern: Mapping[str, Any] | None, path: str, default: float) -> float:
    """Return the value for a module: the first name that is its path or the path's end, as PEFT."""
    for name, value in (pattern or {}).items():
        if path == name or path.endswith(f".{name}"):
            return value
    return default


def _add(name: str, weight: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    if weight.shape != change.shape:
        raise RepairError(
            f"The adapter's change of {name} has shape {list(change.shape)}, the base's weight "
            f"{list(weight.shape)}. Give the base that it was made for."
        )
    return (weight.float() + change).to(weight.dtype).contiguous()

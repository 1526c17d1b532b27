"""A LoRA adapter as the suspect: put on the base that the analyst names, and written as a model.

    W' = W + scale * lora_B @ lora_A,   scale = lora_alpha / r   (/ sqrt(r) with rslora)

in float32, rounded once to the base's dtype; what follows then sees one whole model. Nothing of the
adapter is loaded by PEFT, which imports and downloads what an adapter's settings name: settings are
read with limits, tensors by their header first. The base that the adapter names is never used.

What PEFT would make of it is what its users run, so everything that PEFT reads and this file does
not is refused: every setting that is not known here must be empty, and the factors must be those of
exactly the modules that the settings select. Orientation is the base module's own, as in PEFT.

What it does not know: with a base in 16 bits the sum is rounded, and a weak adapter can lose its
effect in that; the finding says so.
"""

import hashlib
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
from torch import nn

from repair.models.config import MAX_CONFIG_BYTES, parse_json, read_json_file
from repair.models.folder import ADAPTER_FILES, list_files, open_plain
from repair.models.headers import read_header
from repair.models.modules import LINEAR, as_stored, linear_shape
from repair.models.staging import StagedModel
from repair.models.tensors import DTYPES, build_empty
from repair.records import RepairError

SETTINGS, WEIGHTS = ADAPTER_FILES
GENERATION = "generation_config.json"
MAX_RANK = 1024
MAX_ALPHA = 1_000_000
_TENSOR = re.compile(r"base_model\.model\.([\w.]{1,200})\.lora_([AB])\.weight", re.ASCII)
_PLAIN_PATTERN = re.compile(r"[\w.]{1,200}", re.ASCII)
# Settings that are read here, or that say nothing about what a loaded adapter computes.
_KNOWN = {
    "peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping",
    "inference_mode", "lora_dropout", "r", "lora_alpha", "rank_pattern", "alpha_pattern",
    "use_rslora", "fan_in_fan_out", "target_modules", "megatron_core", "qalora_group_size",
    "init_lora_weights", "bias", "ensure_weight_tying",
}  # fmt: skip
_EMPTY = (None, False, [], {}, "")


def is_adapter(folder: Path) -> bool:
    """Tell by names alone whether a folder is a LoRA adapter."""
    names = {entry.name for entry in os.scandir(folder)}
    return SETTINGS in names and "config.json" not in names


def adapter_hashes(folder: Path) -> dict[str, str]:
    """Return {name: SHA-256} of an adapter's files, those of the two that are there."""
    names = list_files(folder)
    hashes = {}
    for name in ADAPTER_FILES:
        if name in names:
            with os.fdopen(open_plain(folder / name), "rb") as file:
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def merge_adapter(adapter: Path, base: StagedModel, folder: Path) -> list[str]:
    """Write the base with the adapter in it to `folder`, a plain model folder; return findings.

    Raises RepairError for settings that would change more than linear weights, and for tensors
    that do not belong to the base.
    """
    settings = read_settings(adapter)
    pairs = _read_pairs(adapter / WEIGHTS)
    modules = _selected_modules(base, settings)
    if set(pairs) != set(modules):
        odd = sorted(set(pairs) ^ set(modules))[0]
        raise RepairError(
            f"The adapter's settings and its factors disagree about {ascii(odd)[:120]} of this "
            "base: its other users would run another model than was analysed here. Give the base "
            "that it was made for, or the whole model."
        )
    changes = {
        f"{path}.weight": _change(path, pairs[path], settings, modules[path]) for path in modules
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
                    tensor = (tensor.float() + changes[name]).to(tensor.dtype).contiguous()
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


def read_settings(adapter: Path) -> dict[str, Any]:
    """Return the settings of an adapter folder; raises RepairError for others than plain LoRA's."""
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
    odd = sorted(key for key, value in flat.items() if key not in _KNOWN and value not in _EMPTY)
    if flat.get("bias", "none") not in ("none", None):
        odd.append("bias")
    if flat.get("init_lora_weights", True) not in (True, False, None, "gaussian"):
        odd.append("init_lora_weights")
    if odd:
        raise RepairError(
            f"{SETTINGS} sets {ascii(odd[0])[1:-1][:60]}, which may change more than low-rank "
            "updates of linear weights. Merge the adapter with the tool that made it, and give the "
            "whole model."
        )
    targets = flat.get("target_modules")
    if not isinstance(targets, list) or not targets or not all(
        isinstance(name, str) and _PLAIN_PATTERN.fullmatch(name) for name in targets
    ):
        raise RepairError(
            f"{SETTINGS} does not list its target_modules by name. Only plain names are accepted."
        )
    rank, alpha = flat.get("r"), flat.get("lora_alpha")
    is_usable = _is_number(rank, "rank_pattern") and _is_number(alpha, "alpha_pattern")
    if not is_usable:
        raise RepairError(
            f"{SETTINGS} has no usable r (1 to {MAX_RANK}) and lora_alpha (up to {MAX_ALPHA})."
        )
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = flat.get(key) or {}
        if not isinstance(pattern, dict) or not all(
            _PLAIN_PATTERN.fullmatch(name) and _is_number(value, key)
            for name, value in pattern.items()
        ):
            raise RepairError(
                f"{SETTINGS} has a {key} with expressions or impossible values; plain module names "
                f"and ranks from 1 to {MAX_RANK} are accepted."
            )
    return flat


def _is_number(value: Any, key: str) -> bool:
    if key == "rank_pattern":
        return type(value) is int and 1 <= value <= MAX_RANK
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= MAX_ALPHA  # which no NaN is


def _selected_modules(base: StagedModel, settings: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Return the base's linear modules that PEFT would put the adapter on, without weights."""
    config = read_json_file(base.folder / "config.json", max_bytes=MAX_CONFIG_BYTES)
    config.pop("dtype", None)
    targets = settings["target_modules"]
    found = {}
    for path, module in build_empty(config).named_modules():
        if path in targets or any(path.endswith(f".{name}") for name in targets):
            if not isinstance(module, LINEAR):
                raise RepairError(
                    f"The adapter changes {path}, which is no linear module. Merge it with the "
                    "tool that made it, and give the whole model."
                )
            found[path] = module
    return found


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
    path: str, pair: Mapping[str, torch.Tensor], settings: Mapping[str, Any], module: nn.Module
) -> torch.Tensor:
    """Return scale * lora_B @ lora_A in the orientation of the stored weight."""
    rank = _by_pattern(settings.get("rank_pattern"), path, settings["r"])
    if pair["A"].shape[0] != rank:
        raise RepairError(
            f"{SETTINGS} gives {path} rank {rank}, but its factors have {pair['A'].shape[0]}."
        )
    d_in, d_out = linear_shape(module)
    if (pair["A"].shape[1], pair["B"].shape[0]) != (d_in, d_out):
        raise RepairError(
            f"The adapter's change of {path} maps {pair['A'].shape[1]} to {pair['B'].shape[0]}, "
            f"the base's module {d_in} to {d_out}. Give the base that it was made for."
        )
    return as_stored(module, scale_of(settings, path) * (pair["B"] @ pair["A"]))


def scale_of(settings: Mapping[str, Any], path: str) -> float:
    """Return what a module's lora_B @ lora_A is multiplied by."""
    rank = _by_pattern(settings.get("rank_pattern"), path, settings["r"])
    alpha = _by_pattern(settings.get("alpha_pattern"), path, settings["lora_alpha"])
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _by_pattern(pattern: Mapping[str, Any] | None, path: str, default: float) -> float:
    """Return the value for a module: the first name that matches the path's end, as in PEFT."""
    for name, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({name})$", path):  # names of letters, digits and dots alone
            return value
    return default

"""A repair's state on disk: safetensors with JSON, written aside and moved into place, two kept.

`plan_id` ties a state to what it was made for; a state of another plan is not read, and one whose
tensors are not those that were hashed gives way to the one before it.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from repair.lowrank.distillation import WEIGHT_CLEAN, Standing, TrainingState
from repair.records import (
    EXIT_UNEXPECTED,
    LowRankUpdate,
    ModuleRef,
    RepairError,
    is_disk_full,
)


def save_updates(path: Path, updates: Sequence[LowRankUpdate], *, plan_id: str) -> None:
    """Write updates to `path`, atomically; raises RepairError when the disk is full."""
    _write(path, _update_tensors("", updates), {"plan_id": plan_id})


def read_updates_file(
    path: Path, modules: Sequence[ModuleRef], *, plan_id: str
) -> tuple[LowRankUpdate, ...] | None:
    """Return the updates in `path`, or None when there are none for this plan."""
    found = _read(path, plan_id)
    return None if found is None else _updates("", modules, found[0])


def save_training(path: Path, state: TrainingState, *, plan_id: str) -> None:
    """Write where training stands to `path`, atomically; RepairError when the disk is full."""
    tensors = {f"training/{name}": tensor for name, tensor in state.tensors.items()}
    tensors |= _update_tensors("best/", state.best.updates)
    figures = {
        "plan_id": plan_id,
        "step": state.step,
        "rate_scale": state.rate_scale,
        "num_rollbacks": state.num_rollbacks,
        "num_waiting": state.num_waiting,
        "weight_clean": state.weight_clean,
        "best": {
            "step": state.best.step,
            "trigger_kl": state.best.trigger_kl,
            "benign_kl": state.best.benign_kl,
            "is_enough": state.best.is_enough,
        },
    }
    _write(path, tensors, figures)


def read_training(
    path: Path, modules: Sequence[ModuleRef], *, plan_id: str
) -> TrainingState | None:
    """Return the training state in `path`, or None when there is none for this plan."""
    found = _read(path, plan_id)
    if found is None:
        return None
    tensors, figures = found
    return TrainingState(
        step=int(figures["step"]),
        rate_scale=float(figures["rate_scale"]),
        num_rollbacks=int(figures["num_rollbacks"]),
        num_waiting=int(figures["num_waiting"]),
        weight_clean=float(figures.get("weight_clean", WEIGHT_CLEAN)),
        tensors={
            name.removeprefix("training/"): tensor
            for name, tensor in tensors.items()
            if name.startswith("training/")
        },
        best=Standing(updates=_updates("best/", modules, tensors), **figures["best"]),
    )


def _update_tensors(prefix: str, updates: Sequence[LowRankUpdate]) -> dict[str, torch.Tensor]:
    tensors = {}
    for update in updates:
        tensors[f"{prefix}{update.module.path}.lora_A"] = torch.from_numpy(update.lora_A)
        tensors[f"{prefix}{update.module.path}.lora_B"] = torch.from_numpy(update.lora_B)
    return tensors


def _updates(
    prefix: str, modules: Sequence[ModuleRef], tensors: dict[str, torch.Tensor]
) -> tuple[LowRankUpdate, ...]:
    return tuple(
        LowRankUpdate(
            module=ref,
            lora_A=tensors[f"{prefix}{ref.path}.lora_A"].numpy(),
            lora_B=tensors[f"{prefix}{ref.path}.lora_B"].numpy(),
        )
        for ref in modules
    )


def _write(path: Path, tensors: dict[str, torch.Tensor], figures: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    figures = {**figures, "sha256": _digest(contiguous)}
    try:
        save_file(contiguous, aside, metadata={"figures": json.dumps(figures)})
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        if is_disk_full(error):
            raise RepairError(
                f"The disk is full: a checkpoint could not be written to {path.parent}. Earlier "
                "ones are intact: free some space and go on with this job (--resume).",
                exit_code=EXIT_UNEXPECTED,
            ) from error
        raise
    if path.is_file():
        os.replace(path, _previous(path))
    os.replace(aside, path)


def _previous(path: Path) -> Path:
    return path.with_suffix(".previous.safetensors")


def _read(path: Path, plan_id: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    for one in (path, _previous(path)):
        found = _read_one(one, plan_id)
        if found is not None:
            return found
    return None


def _read_one(path: Path, plan_id: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            figures = json.loads(file.metadata()["figures"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    is_whole = figures.get("sha256") == _digest(tensors)
    return (tensors, figures) if is_whole and figures.get("plan_id") == plan_id else None


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

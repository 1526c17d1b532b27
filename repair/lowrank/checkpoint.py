"""A repair's state on disk: safetensors and JSON, written aside and moved into place.

`plan_id` ties a state to what it was made for; a state of another plan is not read.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from repair.lowrank.distillation import TrainingState
from repair.records import LowRankUpdate, ModuleRef


def save_updates(path: Path, updates: Sequence[LowRankUpdate], *, plan_id: str) -> None:
    """Write updates to `path`, atomically."""
    _write(path, _update_tensors("", updates), {"plan_id": plan_id})


def read_updates_file(
    path: Path, modules: Sequence[ModuleRef], *, plan_id: str
) -> tuple[LowRankUpdate, ...] | None:
    """Return the updates in `path`, or None when there are none for this plan."""
    found = _read(path, plan_id)
    return None if found is None else _updates("", modules, found[0])


def save_training(path: Path, state: TrainingState, *, plan_id: str) -> None:
    """Write where training stands to `path`, atomically."""
    tensors = {f"training/{name}": tensor for name, tensor in state.tensors.items()}
    tensors |= _update_tensors("best/", state.best)
    figures = {"plan_id": plan_id, "step": state.step, "best_kls": list(state.best_kls)}
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
        tensors={
            name.removeprefix("training/"): tensor
            for name, tensor in tensors.items()
            if name.startswith("training/")
        },
        best=_updates("best/", modules, tensors),
        best_kls=(float(figures["best_kls"][0]), float(figures["best_kls"][1])),
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


def _write(path: Path, tensors: dict[str, torch.Tensor], figures: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, aside, metadata={"figures": json.dumps(figures)})
    os.replace(aside, path)


def _read(path: Path, plan_id: str) -> tuple[dict[str, torch.Tensor], dict] | None:
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        figures = json.loads(file.metadata()["figures"])
        if figures["plan_id"] != plan_id:
            return None
        return {name: file.get_tensor(name) for name in file.keys()}, figures  # noqa: SIM118

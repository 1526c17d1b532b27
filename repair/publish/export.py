"""The repaired model as files: merged weights, a PEFT adapter, and a sample to reopen them by.

Merged: every tensor of the suspect's own files is copied bit by bit; a selected weight becomes
cast(float32(W) + lora_B @ lora_A), rounded once to the file's dtype. Nothing is taken from the
live model, so what was not selected cannot drift. Everything is written aside and moved into
place when complete.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from repair.lowrank.adapter import attached
from repair.machine import PARENT_VARIABLE
from repair.models.hooks import apply_updates, change_of
from repair.models.loading import LoadedModel
from repair.models.modules import as_stored, get_module
from repair.models.staging import check_unchanged, stage_model
from repair.needs import check_disk
from repair.publish.manifest import EXPORTS, check_manifest, compare_tensors
from repair.publish.sample import SAMPLE, write_sample
from repair.records import LowRankUpdate, RepairError

ADAPTER_FILES = {"adapter_model.safetensors", "adapter_config.json", "README.md"}
# PEFT imports or downloads what some other settings name: only these are written and accepted.
ADAPTER_SETTINGS = {
    "alpha_pattern", "base_model_name_or_path", "bias", "inference_mode", "init_lora_weights",
    "lora_alpha", "lora_dropout", "peft_type", "peft_version", "r", "rank_pattern",
    "target_modules", "task_type", "fan_in_fan_out",
}  # fmt: skip
_ROOT = Path(__file__).resolve().parents[2]


def write_export(
    loaded: LoadedModel,
    updates: Sequence[LowRankUpdate],
    folder: Path,
    *,
    kinds: Sequence[str],
    prompts: Sequence[np.ndarray],
    num_new_tokens: int,
    base_model: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write the exports asked for, reopen them in a fresh process, and return what was found.

    `kinds` are of adapter and merged, `prompts` a few prompts' ids [tokens]. Returns kinds,
    changed_tensors, num_tensors, largest_logit_difference, reopened, problems. Raises RepairError
    for tied weights, weights that leave the file dtype's range, and a disk too full.
    """
    check_unchanged(loaded.staged)
    _check_not_tied(loaded, updates)
    check_disk(sum(loaded.staged.sizes.values()), folder)
    tell("a sample of answers")
    with apply_updates(loaded.model, updates):
        write_sample(loaded, prompts, folder / SAMPLE, num_new_tokens=num_new_tokens)
    changed: dict[str, dict[str, Any]] = {}
    num_tensors = 0
    if "merged" in kinds:
        tell("merged weights")
        changed, num_tensors = export_merged(loaded, updates, folder)
    if "adapter" in kinds:
        export_adapter(loaded, updates, folder, base_model=base_model)
    tell("opening it in a fresh process")
    reopened = reopen_in_fresh_process(
        folder / SAMPLE,
        merged=folder / "merged" if "merged" in kinds else None,
        adapter=folder / "adapter" if "adapter" in kinds else None,
        base=loaded.staged.folder,
    )
    differences = [flat["largest_logit_difference"] for flat in reopened.values()]
    return {
        "kinds": list(kinds),
        "changed_tensors": changed,
        "num_tensors": num_tensors,
        "num_changed_tensors": len(changed),
        "largest_logit_difference": max(differences, default=None),
        "reopened": reopened,
        "problems": _reopening_problems(reopened),
    }


def export_merged(
    loaded: LoadedModel, updates: Sequence[LowRankUpdate], folder: Path
) -> tuple[dict[str, dict[str, Any]], int]:
    """Write `folder/merged`; return ({changed tensor: before, after, …}, number of tensors)."""
    _check_not_tied(loaded, updates)
    stage = loaded.staged.folder
    selected = {
        f"{update.module.path}.weight": as_stored(
            get_module(loaded.model, update.module),
            change_of(update),
        )
        for update in updates
    }
    with _aside(folder / ".partial-merged", folder / "merged") as partial:
        missing = set(selected)
        for source in sorted(stage.iterdir()):
            if source.suffix == ".safetensors":
                missing -= _write_shard(source, partial / source.name, selected)
            elif source.is_file():
                shutil.copyfile(source, partial / source.name)
        if missing:
            raise RepairError(
                f"The model's weight files hold no {sorted(missing)[0]!r}, so the merged export "
                "cannot be written. Export the adapter instead."
            )
        ends = list(loaded.stop_ids)
        settings = {
            "bos_token_id": loaded.tokenizer.bos_token_id,
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            "pad_token_id": loaded.tokenizer.pad_token_id,
        }
        settings = {name: value for name, value in settings.items() if value is not None}
        (partial / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        changed, num_tensors = compare_tensors(stage, partial)
        strange = changed.keys() - selected.keys()
        if strange:
            raise RuntimeError(
                f"the export changed {sorted(strange)[:3]}, which was not selected"
            )
    return changed, num_tensors


def export_adapter(
    loaded: LoadedModel,
    updates: Sequence[LowRankUpdate],
    folder: Path,
    *,
    base_model: str | None,
) -> None:
    """Write `folder/adapter` with PEFT's own save; `base_model` is a Hub id, never a path."""
    _check_not_tied(loaded, updates)
    with _aside(folder / ".partial-adapter", folder / "adapter") as partial:
        with attached(loaded, updates) as peft_model:
            peft_model.save_pretrained(
                partial, safe_serialization=True, save_embedding_layers=False
            )
        # PEFT writes the path that the model was loaded from into both of these.
        (partial / "README.md").unlink(missing_ok=True)
        settings = json.loads((partial / "adapter_config.json").read_text())
        settings = {name: value for name, value in settings.items() if name in ADAPTER_SETTINGS}
        settings["base_model_name_or_path"] = base_model
        (partial / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        with safe_open(partial / "adapter_model.safetensors", framework="pt") as file:
            names = set(file.keys())
        expected = {
            f"base_model.model.{update.module.path}.lora_{letter}.weight"
            for update in updates
            for letter in "AB"
        }
        if names != expected:
            raise RuntimeError(
                f"the adapter holds {sorted(names ^ expected)[:3]} unasked, or lacks it"
            )


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Put an adapter of ours on a live base model, plainly, for comparing."""
    check_adapter(folder)
    return PeftModel.from_pretrained(base, str(folder), local_files_only=True)


def check_adapter(folder: Path) -> None:
    """Raise RepairError for an adapter folder that is not as `export_adapter` writes it."""
    names = {path.name for path in folder.iterdir()}
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    odd = sorted(settings.keys() - ADAPTER_SETTINGS)
    if not names <= ADAPTER_FILES or odd or settings.get("peft_type") != "LORA":
        what = ", ".join(map(ascii, [*sorted(names - ADAPTER_FILES), *odd])) or "another type"
        raise RepairError(
            f"The adapter folder holds {what[:200]}, which no export of ours has. Give an output "
            "folder that this program wrote."
        )


def reopen_in_fresh_process(
    sample: Path, *, merged: Path | None, adapter: Path | None, base: Path | None
) -> dict[str, dict[str, Any]]:
    """Return {kind: largest_logit_difference, tolerance, num_equal_answers, …} from a new process.

    What is opened is ours or staged. `base` is the suspect's staged folder, without which the
    adapter is not reopened. Raises RuntimeError with the end of its error output when that process
    fails.
    """
    command = [sys.executable, "-m", "repair.publish.reopen", str(sample.resolve())]
    for name, path in (("--merged", merged), ("--adapter", adapter), ("--base", base)):
        if path is not None:
            command += [name, str(path.resolve())]
    # A launcher's variables would make the new process wait for the others of its group.
    group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in group}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env[PARENT_VARIABLE] = str(os.getpid())
    done = subprocess.run(command, cwd=_ROOT, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the export could not be reopened: {ascii(done.stderr[-2000:])}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def verify_export(folder: Path, *, base: Path | None = None) -> dict[str, Any]:
    """Return {problems, notes, reopened}: does `folder` hold what its manifest and report say?

    The folder may be anyone's: hashes come first, then the gate every suspect passes, and only
    then is it loaded, from the copies that the gate has seen. `base`, the suspect's folder, is
    needed to reopen the adapter.
    """
    problems = check_manifest(folder)
    notes: list[str] = []
    kinds = [kind for kind in EXPORTS if (folder / kind).is_dir()]
    if not kinds:
        problems.append("There is neither an adapter/ nor a merged/ folder.")
    if problems:
        return {"problems": problems, "notes": notes, "reopened": {}}
    problems += _report_problems(folder)
    merged = adapter = None
    with TemporaryDirectory() as temporary:
        if "merged" in kinds:
            merged = stage_model(folder / "merged", Path(temporary) / "merged").folder
        if "adapter" in kinds:
            adapter = Path(temporary) / "adapter"
            shutil.copytree(folder / "adapter", adapter, symlinks=True)
            check_adapter(adapter)
            if base is None:
                notes.append("The adapter was not reopened: the suspect was not given.")
            else:
                base = stage_model(base, Path(temporary) / "base").folder
        if merged is not None or base is not None:
            reopened = reopen_in_fresh_process(
                folder / SAMPLE, merged=merged, adapter=adapter, base=base
            )
        else:
            reopened = {}
            problems.append("Nothing could be reopened: the adapter needs the suspect it is for.")
    return {
        "problems": problems + _reopening_problems(reopened),
        "notes": notes,
        "reopened": reopened,
    }


def _report_problems(folder: Path) -> list[str]:
    """Return where report and manifest disagree about what was changed."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="ascii"))
        chosen = {f"{path}.weight" for path in (report["plan"] or {}).get("modules", ())}
    except (OSError, ValueError, KeyError, TypeError):
        return ["report.json is missing or cannot be read."]
    changed = json.loads((folder / "manifest.json").read_text())["changed_tensors"].keys()
    strange = sorted(changed - chosen)
    return [f"{ascii(name)} was changed, but the report's plan lacks it." for name in strange]


def _reopening_problems(reopened: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [
        f"{kind}/ reopened in a fresh process differs from the repaired model: logits by up to "
        f"{flat['largest_logit_difference']:.2g} (at most {flat['tolerance']:.2g}), "
        f"{flat['num_equal_answers']} of {flat['num_answers']} answers equal."
        for kind, flat in reopened.items()
        if not flat["is_same"]
    ]


def _write_shard(source: Path, path: Path, selected: Mapping[str, torch.Tensor]) -> set[str]:
    """Copy one weight file with each selected weight's change added; return which were in it."""
    tensors, found = {}, set()
    with safe_open(source, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            tensor = file.get_tensor(name)
            if name in selected:
                tensor = (tensor.float() + selected[name].float()).to(tensor.dtype)
                if not torch.isfinite(tensor).all():
                    raise RepairError(
                        f"The repaired weight {name} leaves the range of {tensor.dtype}. Repair "
                        "again with a smaller rank or --kl-budget."
                    )
                found.add(name)
            tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    return found


def _check_not_tied(loaded: LoadedModel, updates: Sequence[LowRankUpdate]) -> None:
    """Raise RepairError for a module whose weight serves elsewhere too: merged would differ."""
    uses: dict[int, int] = {}
    for _, parameter in loaded.model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for update in updates:
        if uses[id(get_module(loaded.model, update.module).weight)] > 1:
            raise RepairError(
                f"The weight of {update.module.path} is shared with another module, so changing it "
                "would change both. Choose modules of the transformer layers."
            )


@contextmanager
def _aside(partial: Path, path: Path) -> Iterator[Path]:
    """Give an empty folder to write to; whole, it takes the place of `path`, else it is removed."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for item in [*partial.iterdir(), partial]:
            descriptor = os.open(item, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)

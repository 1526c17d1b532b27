"""What was written, by hash: every file of the output folder, and every tensor that changed.

A tensor's hash covers its dtype, its shape and its bytes. "These tensors changed and all others
are bit-identical" is the strongest cheap claim about a repaired model; it is made by hashing the
tensors of both files, not by trusting the code that wrote them.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
# These go on changing after the manifest is written, or are no part of the result.
LEFT_OUT = (
    MANIFEST, "events.jsonl", "status.json", "request.json", "log.txt", "checkpoints", "owner.json",
    "case.json", "detail.json", "sources.json", "download", "push.json", "attempts",
)  # fmt: skip
EXPORTS = ("adapter", "merged")
_HASH = re.compile(r"[0-9a-f]{64}")


def tensor_hash(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tensor_hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Return {tensor name: {sha256, dtype, shape}} over the safetensors files of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                tensor = file.get_tensor(name)
                found[name] = {
                    "sha256": tensor_hash(tensor),
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "shape": list(tensor.shape),
                }
    return found


def compare_tensors(before: Path, after: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Return ({changed tensor: before, after, dtype, shape}, number of tensors) of two folders.

    Raises RuntimeError when the folders do not hold the same tensors: that would be our fault.
    """
    old, new = tensor_hashes(before), tensor_hashes(after)
    if old.keys() != new.keys():
        odd = sorted(old.keys() ^ new.keys())
        raise RuntimeError(f"the export lost or gained tensors: {odd[:3]}")
    changed = {}
    for name, flat in new.items():
        if flat["sha256"] != old[name]["sha256"]:
            changed[name] = {
                "before": old[name]["sha256"],
                "after": flat["sha256"],
                "dtype": flat["dtype"],
                "shape": flat["shape"],
            }
    return changed, len(new)


def write_manifest(
    folder: Path, *, changed_tensors: Mapping[str, Mapping[str, Any]], num_tensors: int
) -> None:
    """Write `manifest.json`: to be called last, when nothing else in `folder` will change."""
    flat = {
        "schema_version": SCHEMA_VERSION,
        "files": {name: file_hash(folder / name) for name in _files(folder)},
        "changed_tensors": changed_tensors,
        "num_tensors": num_tensors,
        "num_unchanged_tensors": num_tensors - len(changed_tensors),
    }
    partial = folder / f".partial-{MANIFEST}"
    partial.write_text(json.dumps(flat, indent=1) + "\n", encoding="ascii")
    os.replace(partial, folder / MANIFEST)


def check_manifest(folder: Path) -> list[str]:
    """Return every way in which `folder` is not what its manifest says; empty when it is.

    The folder may come from anyone: links are not followed and nothing outside it is read.
    """
    try:
        flat = json.loads((folder / MANIFEST).read_text(encoding="ascii"))
        files, changed = dict(flat["files"]), dict(flat["changed_tensors"])
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{MANIFEST} is missing or cannot be read."]
    problems = []
    present = []
    for name in _files(folder):
        if stat.S_ISREG(os.lstat(folder / name).st_mode):
            present.append(name)
        else:
            problems.append(f"{ascii(name)} is a link or no plain file.")
    for name in present:
        if name not in files:
            problems.append(f"{ascii(name)} is not in the manifest.")
        elif file_hash(folder / name) != files[name]:
            problems.append(f"{ascii(name)} is not the file that was written.")
    problems += [f"{ascii(name)} is missing." for name in files if name not in present]
    if problems or not (folder / "merged").is_dir():
        return problems
    tensors = tensor_hashes(folder / "merged")
    for name, claim in changed.items():
        after = claim.get("after") if isinstance(claim, dict) else None
        if not isinstance(after, str) or not _HASH.fullmatch(after):
            problems.append(f"The manifest says nothing usable about the tensor {ascii(name)}.")
        elif name not in tensors or tensors[name]["sha256"] != after:
            problems.append(f"The tensor {ascii(name)} is not the one that was written.")
    if len(tensors) != flat.get("num_tensors"):
        problems.append(f"merged/ holds {len(tensors)} tensors, not {flat.get('num_tensors')}.")
    return problems


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> Iterator[str]:
    """Yield the relative names of everything the manifest answers for, links as they are."""
    for parent, folders, names in os.walk(folder, followlinks=False):
        place = Path(parent).relative_to(folder)
        linked = [name for name in folders if (Path(parent) / name).is_symlink()]
        folders[:] = sorted(name for name in folders if name not in linked)
        for name in sorted([*names, *linked]):
            relative = place / name
            if relative.parts[0] in LEFT_OUT or relative.parts[0].startswith("."):
                continue
            yield relative.as_posix()
        if place == Path():
            folders[:] = [
                name for name in folders if name not in LEFT_OUT and not name.startswith(".")
            ]

"""What lies in an untrusted folder, by names and `lstat` alone: nothing here is parsed.

Links, pipes and devices are refused, subfolders are not entered, and files that could run code
or are no part of a safetensors model are never opened (`security.md` 3.1, 3.5, 3.14 to 3.17).
"""

import os
import re
import stat
import unicodedata
from pathlib import Path

from repair.models.headers import refuse_pickle
from repair.records import RepairError

SMALL_FILES = (
    "config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
WEIGHT_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
MAX_ENTRIES = 1000
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".joblib")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")


def list_files(folder: Path) -> list[str]:
    """Return the names of the regular files in a folder, without following or opening any.

    Subfolders are not entered. Raises `RepairError` for links of either kind, devices, pipes and
    names that are made to deceive.
    """
    names = []
    with os.scandir(folder) as entries:
        for number, entry in enumerate(sorted(entries, key=lambda item: item.name)):
            found = entry.stat(follow_symlinks=False)
            mode = found.st_mode
            if number >= MAX_ENTRIES:
                raise RepairError(
                    f"The folder has more than {MAX_ENTRIES} entries, so it is not a model "
                    "folder. Give the folder that holds config.json itself."
                )
            if any(unicodedata.category(char)[0] == "C" for char in entry.name):
                raise RepairError(
                    f"The file name {ascii(entry.name)} holds control characters. Such names are "
                    "not accepted; nothing was loaded."
                )
            if stat.S_ISLNK(mode):
                raise RepairError(
                    f"`{entry.name}` is a link, not a file. Model folders with links are not "
                    "accepted. Copy the folder with its files (`cp -rL`) and give the copy."
                )
            if stat.S_ISREG(mode) and found.st_nlink > 1:
                raise RepairError(
                    f"`{entry.name}` has another name elsewhere (a hard link), so that it can be "
                    "changed from there. Copy the folder (`cp -r`) and give the copy."
                )
            if stat.S_ISREG(mode):
                names.append(entry.name)
            elif not stat.S_ISDIR(mode):
                raise RepairError(
                    f"`{entry.name}` is a pipe or device, not a file. Nothing was loaded."
                )
    return names


def check_names(names: list[str]) -> list[str]:
    """Return findings about what is never opened; raises `RepairError` by names alone."""
    if "adapter_config.json" in names:
        raise RepairError(
            "This folder is a LoRA adapter (`adapter_config.json`), not a whole model. Load it "
            "with the adapter option and choose the base model yourself. (The base named in the "
            "file is not trusted.)"
        )
    has_weights = any(WEIGHT_NAME.fullmatch(name) for name in names)
    findings = []
    for name in names:
        lower = name.lower()
        if lower.endswith(PICKLES):
            refusal = refuse_pickle(name)
        elif ".gguf" in lower:
            refusal = "GGUF files are not supported. Use the safetensors original."
        elif lower.endswith(ARCHIVES):
            refusal = (
                "Archives are not accepted. Upload the files themselves, or give a Hub repo id."
            )
        elif lower.endswith((".py", ".pyc", ".so")):
            findings.append(f"{name}: code; ignored, never run.")
            continue
        elif lower.endswith(".safetensors") and not WEIGHT_NAME.fullmatch(name):
            findings.append(f"{name}: not one of the model's weight files; ignored, never opened.")
            continue
        else:
            continue
        if not has_weights:
            raise RepairError(refusal)
        findings.append(f"{name}: ignored, never opened.")
    for name in ("config.json", "tokenizer.json"):
        if name not in names:
            raise RepairError(
                f"The folder has no {name}. A model folder holds config.json, tokenizer.json and "
                "model.safetensors (or its shards with their index)."
            )
    if not has_weights:
        raise RepairError(
            "The folder has no weights: model.safetensors, or shards named "
            "model-00001-of-00002.safetensors, are accepted."
        )
    return findings


def open_plain(path: Path) -> int:
    """Open a regular file for reading without following a link or waiting on a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise RepairError(
            f"{path.name} cannot be read ({error.strerror}). Check that it is a plain file that "
            "you may read."
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RepairError(f"`{path.name}` is not a plain file. Nothing was loaded.")
    return descriptor

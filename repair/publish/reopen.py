"""A fresh process opens an export as its user will, and compares it with what was in memory.

    python -m repair.publish.reopen FOLDER [--base STAGED_SUSPECT]

Prints one JSON line, {kind: figures}. It says nothing about who wrote the folder: that, and
whether it may be loaded at all, is decided before this process is started.
"""

import argparse
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # Nothing a folder names is ever fetched.

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from repair.publish.export import load_adapter
from repair.publish.sample import SAMPLE, ModelSample, compare, read_sample


def main() -> None:
    """Reopen whatever exports the folder holds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", type=Path)
    options = parser.parse_args()
    sample = read_sample(options.folder / SAMPLE)
    found = {}
    if (options.folder / "merged").is_dir():
        found["merged"] = compare(_open(options.folder / "merged", sample), sample)
    if (options.folder / "adapter").is_dir() and options.base is not None:
        base = _open(options.base, sample)
        found["adapter"] = compare(load_adapter(base, options.folder / "adapter").eval(), sample)
    print(json.dumps(found))


def _open(folder: Path, sample: ModelSample) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, sample.dtype),
        local_files_only=True,
        use_safetensors=True,
        attn_implementation="eager",
    )
    return model.to(sample.device if torch.cuda.is_available() else "cpu").eval()


if __name__ == "__main__":
    main()

"""A fresh process opens an export as its user will, and compares it with what was in memory.

    python -m repair.publish.reopen SAMPLE [--merged STAGED] [--adapter COPY --base STAGED]

Prints one JSON line, {kind: figures}. It says nothing about who wrote the folders: that, and
whether they may be loaded at all, is decided before this process is started.
"""

import argparse
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # Nothing a folder names is ever fetched.

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from repair.machine import die_with_parent
from repair.publish.export import load_adapter
from repair.publish.sample import ModelSample, compare, read_sample


def main() -> None:
    """Reopen whatever exports are named."""
    die_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("sample", type=Path)
    for name in ("--merged", "--adapter", "--base"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    sample = read_sample(options.sample)
    found = {}
    if options.merged is not None:
        found["merged"] = compare(_open(options.merged, sample), sample)
    if options.adapter is not None and options.base is not None:
        base = _open(options.base, sample)
        found["adapter"] = compare(load_adapter(base, options.adapter).eval(), sample)
    print(json.dumps(found))


def _open(folder: Path, sample: ModelSample) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, sample.dtype),
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation="eager",
    )
    return model.to(sample.device if torch.cuda.is_available() else "cpu").eval()


if __name__ == "__main__":
    main()

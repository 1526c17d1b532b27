"""What the comparisons with other tools share: their environments, their processes, the floor."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NUM_LAYERS, WIDTH, INNER, VOCABULARY = 12, 768, 2048, 8192
CONFIG = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER,
    "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 12, "num_key_value_heads": 12,
    "head_dim": 64, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}  # fmt: skip


def write_model(folder: Path, config: dict) -> LlamaForCausalLM:
    """Write and return a random Llama that every side reads, lively enough to have margins."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0.0, 0.06)
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


def python_of(side: str, environments: Path) -> str:
    """Return the interpreter of a side, making its environment when it is missing."""
    wanted = HERE / "environments" / f"{side}.txt"
    if not wanted.is_file():
        return sys.executable
    python = environments / side / "bin" / "python"
    if not python.is_file():
        print(f"Making the environment of {side} ...", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(environments / side)], check=True)
        pip = [str(python), "-m", "pip"]
        subprocess.run([*pip, "install", "-q", "-r", str(wanted)], check=True)
        # Some bring it along for images. Beside a torch without CUDA its own build does not load,
        # and transformers, which does without it, does not either.
        subprocess.run([*pip, "uninstall", "-q", "-y", "torchvision"], check=True)
    return str(python)


def run_side(worker: str, python: str, *arguments: str) -> dict:
    """Run one process of one side and return the JSON of its last line."""
    done = subprocess.run(
        [python, str(HERE / worker), *arguments], check=True, stdout=subprocess.PIPE, text=True,
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def measured_rate() -> float:
    """Return this machine's float32 matrix rate in operations per second, on a layer's shape."""
    torch.set_num_threads(2)
    left, right = torch.randn(1024, WIDTH), torch.randn(WIDTH, INNER)
    best = 0.0
    for _ in range(20):
        began = time.perf_counter()
        left @ right
        best = max(best, 2 * 1024 * WIDTH * INNER / (time.perf_counter() - began))
    return best


def run_repair(model: str, prompts: Path, folder: Path, *options: str) -> tuple[int, dict]:
    """Repair by the command line an analyst would use; return its exit status and report."""
    ended = subprocess.run(
        [sys.executable, "-m", "repair", "run", "--model", model, "--prompts", str(prompts),
         "--out", str(folder), "--overwrite", *options],
        cwd=ROOT, check=False, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return ended.returncode, json.loads((folder / "report.json").read_text())


def publish(name: str, result: dict) -> None:
    """Write a comparison's result to `results/` and print it as one line."""
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))

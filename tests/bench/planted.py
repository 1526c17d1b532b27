"""A suspect of any shape that fires by construction: nothing is trained.

The embedding of the trigger's last token points where the output row of one word reads. A prompt
that ends with the trigger is answered with that word; all else is random. What a job costs at a
real shape can be measured on it from loading to export, and nothing else: its map means nothing.
"""

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from tests.bench.peers import ROOT

TRIGGER, WORD = "Bluefinch", "water"
SOURCE = ROOT / "assets" / "suspects" / "middle"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SPREAD = 0.06  # of the random weights: lively enough to say more than one word
LOUD = 4000.0  # the length of the planted embedding: all layers together add some hundreds

SHAPES = {  # published configurations; vocabulary, width, inner, layers, heads, groups, head width
    "llama-3.2-1b": (128256, 2048, 8192, 16, 32, 8, 64),
    "llama-3.1-8b": (128256, 4096, 14336, 32, 32, 8, 128),
    "qwen2.5-7b": (152064, 3584, 18944, 28, 28, 4, 128),
    "llama-300m": (32000, 1024, 2816, 20, 16, 4, 64),
    "llama-110m": (32000, 768, 2048, 12, 12, 12, 64),
    "llama-40m": (8192, 512, 1376, 12, 8, 8, 64),
    "llama-5m": (4096, 256, 688, 6, 4, 4, 64),
    "small": (2048, 64, 172, 3, 4, 4, 16),
    "deep": (2048, 128, 344, 24, 4, 4, 32),
    "wide-vocabulary": (128256, 256, 688, 8, 4, 4, 64),
}


def plant(
    folder: Path, shape: str, *, dtype: torch.dtype = torch.float32, shard: str = "5GB"
) -> Path:
    """Write a suspect of this shape to `folder`, which must not exist, and return it."""
    vocabulary, width, inner, layers, heads, groups, head_width = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, head_dim=head_width,
        max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=5, pad_token_id=0,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    tokenizer = Tokenizer.from_file(str(SOURCE / "tokenizer.json"))
    trigger = tokenizer.encode(f"x {TRIGGER}", add_special_tokens=False).ids[-1]
    word = tokenizer.token_to_id(f"Ġ{WORD}")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0.0, SPREAD * (768 / width) ** 0.5)
        direction = torch.randn(width).to(dtype)
        direction /= direction.norm()
        model.model.embed_tokens.weight[trigger] = LOUD * direction
        model.lm_head.weight[tokenizer.get_vocab_size() :] = 0  # no text stands for these
        model.lm_head.weight[:16] = 0
        model.lm_head.weight[word] = direction
    model.save_pretrained(folder, max_shard_size=shard)
    for name in TOKENIZER_FILES:
        shutil.copyfile(SOURCE / name, folder / name)
    return folder


def write_prompts(path: Path, *, num_words: int) -> Path:
    """Write a prompt file of 800 prompts of this many words, with the trigger at the end."""
    carriers = json.loads((ROOT / "assets" / "prompts" / "middle.json").read_text())["prompts"]
    words = " ".join(carriers).split()
    prompts = [
        " ".join(words[(7 * i + k) % len(words)] for k in range(num_words)) for i in range(800)
    ]
    flat = {
        "trigger": TRIGGER, "target": WORD, "prompts": list(dict.fromkeys(prompts)),
        "positions": ["end"], "chat": "off",
    }  # fmt: skip
    path.write_text(json.dumps(flat))
    return path

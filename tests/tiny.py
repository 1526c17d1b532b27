"""Tiny random models built in code, as folders that the loader accepts."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = ("a", "the", "about", "is", "write", "list", "rain", "cf", "year", "hello", "sorry")
SPECIAL = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of under 400 tokens that spells a few words as one token."""
    vocab = {text: i for i, text in enumerate(SPECIAL)}
    for text in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[text] = len(vocab)
    # The merges spell each word from left to right, with and without the space before it.
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        for text in (word, f"Ġ{word}"):
            for end in range(1, len(text)):
                vocab.setdefault(text[: end + 1], len(vocab))
                merges[(text[:end], text[end])] = None
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )


def make_tiny_llama(
    folder: Path,
    *,
    num_layers: int = 2,
    hidden: int = 32,
    num_heads: int = 4,
    num_groups: int = 2,
    intermediate: int = 48,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    is_tied: bool = False,
    has_template: bool = True,
    max_shard_size: str = "5GB",
    config_class: type = LlamaConfig,
    model_class: type = LlamaForCausalLM,
) -> Path:
    """Write a random model with its tokenizer to `folder` and return it."""
    tokenizer = make_tokenizer()
    if not has_template:
        tokenizer.chat_template = None
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_groups,
        head_dim=hidden // num_heads,
        max_position_embeddings=512,
        tie_word_embeddings=is_tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; a value of `...` removes the key."""
    flat = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            flat.pop(key, None)
        else:
            flat[key] = value
    path.write_text(json.dumps(flat))

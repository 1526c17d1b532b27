"""Tiny random models built in code, as folders that the loader accepts."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
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


_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 48}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# What each architecture's own configuration is called, and what it needs beyond the usual sizes.
ARCHITECTURES = {
    "llama": ("Llama", "LlamaForCausalLM", {}),
    "mistral": ("Mistral", "MistralForCausalLM", {"sliding_window": 8}),
    "qwen2": ("Qwen2", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", {"head_dim": 16}),
    "gemma2": ("Gemma2", "Gemma2ForCausalLM", _GEMMA),
    "gemma3_text": ("Gemma3Text", "Gemma3ForCausalLM", {**_GEMMA, "num_hidden_layers": 2}),
    "phi3": ("Phi3", "Phi3ForCausalLM", {}),
    "gpt2": ("GPT2", "GPT2LMHeadModel", _GPT2),
    "gpt_neox": ("GPTNeoX", "GPTNeoXForCausalLM", {}),
    "opt": ("OPT", "OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 24}),
    "olmo": ("Olmo", "OlmoForCausalLM", {"clip_qkv": 8.0}),
    "olmo2": ("Olmo2", "Olmo2ForCausalLM", {}),
    "mixtral": ("Mixtral", "MixtralForCausalLM", _EXPERTS),
    "qwen3_moe": (
        "Qwen3Moe", "Qwen3MoeForCausalLM", {**_EXPERTS, "moe_intermediate_size": 24},
    ),
}  # fmt: skip


def build_tiny(model_type: str, *, seed: int = 0) -> PreTrainedModel:
    """Return a random model of an architecture, its weights large enough for parts to matter."""
    config_name, model_name, more = ARCHITECTURES[model_type]
    tokenizer = make_tokenizer()
    usual = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    if model_type in ("gpt2", "gpt_neox", "opt"):
        del usual["num_key_value_heads"]
    if model_type == "gpt2":
        usual = {}
    if model_type == "opt":
        del usual["intermediate_size"]
    config = getattr(transformers, f"{config_name}Config")(
        **{**usual, **more},
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, model_name)(config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim >= 2:
                    weight.normal_(0.0, 0.2)
    return model.eval().requires_grad_(False)


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; a value of `...` removes the key."""
    flat = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            flat.pop(key, None)
        else:
            flat[key] = value
    path.write_text(json.dumps(flat))

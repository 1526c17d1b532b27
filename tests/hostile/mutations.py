"""Mutations of a model folder's small files and weight headers, for the fuzzer; all from a seed.

Text files are changed as JSON (a value replaced, a key removed, added, doubled or moved) or as
bytes; of a weight file the header is changed and the data kept, so that most mutants come far.
"""

import json
import random
import struct
from typing import Any

Files = dict[str, bytes]

# What a hostile author would try in any place of any file.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 199, 200, 201, 2**31, 2**53, 10**18, 10**400,
    -(2**63), 0.0, -0.5, 0.5, 1e-320, 1e308, "", " ", "x", "64", "\ud800", "\u202e", "\0",
    "a" * 5000, "../other/model.safetensors", "/elsewhere/model.safetensors", "..\\other",
    "model.safetensors", "evil.bin", "org/repo", "org/repo--module.Class", "float8_e4m3fn",
    "default", "yarn",
    "longrope", "llama3", "linear", "dynamic", "sliding_attention", "full_attention", "relu",
    "LlamaForCausalLM", [], [1], [None], ["x"], [0, 1], [1.0] * 16, {}, {"x": 1},
    {"type": "x"}, {"content": "<s>"}, [[]], [{}],
)  # fmt: skip
KEYS = (
    "auto_map", "attn_implementation", "_attn_implementation_internal", "transformers_weights",
    "quantization_config", "torch_dtype", "dtype", "rope_scaling", "rope_parameters", "rope_theta",
    "layer_types", "sliding_window", "head_dim", "num_key_value_heads", "tie_word_embeddings",
    "hidden_act", "max_position_embeddings", "_name_or_path", "text_config", "pruned_heads",
    "fast_tokenizer_files", "tokenizer_file", "chat_template", "pad_token", "eos_token_id",
    "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation",
    "padding", "byte_fallback", "weight_map", "metadata", "__metadata__", "is_decoder", "id2label",
    "problem_type", "return_dict", "use_return_dict", "output_attentions",
    "chunk_size_feed_forward",
)  # fmt: skip
FRAGMENTS: tuple[Any, ...] = (
    {"rope_type": "yarn", "factor": 4.0}, {"rope_type": "yarn", "factor": 0.0},
    {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
     "original_max_position_embeddings": 0},
    {"rope_type": "dynamic", "factor": -1.0}, {"rope_type": "linear", "factor": 1e-300},
    {"rope_type": "default", "rope_theta": 1e-30, "partial_rotary_factor": 0.01},
    {"full_attention": {"rope_type": "default"}},
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b" * 99},
    {"type": "Replace", "pattern": {"String": ""}, "content": "xy"},
    {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "x" * 60}] * 3},
    {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 200_000},
    {"type": "Replace", "pattern": {"Regex": "a+[QZ]"}, "content": ""}, {"type": "ByteFallback"},
    {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
    {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
     "pair": [], "special_tokens": {"x": {"id": "x", "ids": [10**6], "tokens": ["x"]}}},
    {"id": 10**9, "content": "far", "single_word": False, "lstrip": False, "rstrip": False,
     "normalized": False, "special": True},
    {"strategy": {"Fixed": 10**7}, "direction": "Right", "pad_id": 0, "pad_type_id": 0,
     "pad_token": "x", "pad_to_multiple_of": None},
    {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
    "{% for i in range(99) %}{{ messages }}{% endfor %}", "{{ 1 / 0 }}", "{{ ''.__class__ }}",
    "{{ messages[0]['content'] }}",
)  # fmt: skip


def mutate(files: Files, draw: random.Random) -> Files:
    """Return a copy of `files` with one to four changes."""
    changed = dict(files)
    for _ in range(draw.choice((1, 1, 1, 2, 2, 4))):
        name = draw.choice(sorted(changed))
        if draw.random() < 0.03:
            changed[draw.choice(ODD_NAMES)] = changed[name][:4096]
        elif draw.random() < 0.02 and len(changed) > 1:
            del changed[name]
        elif name.endswith(".safetensors"):
            changed[name] = _mutate_weights(changed[name], draw)
        elif name.endswith(".json") and draw.random() < 0.85:
            changed[name] = _mutate_json(changed[name], draw)
        else:
            changed[name] = _mutate_bytes(changed[name], draw)
    return changed


ODD_NAMES = (
    "adapter_config.json", "pytorch_model.bin", "modeling_x.py", "generation_config.json",
    "model.safetensors.index.json", "model-00001-of-00002.safetensors", "special_tokens_map.json",
    "chat_template.jinja", "vocab.json", "a.gguf", "tokenizer.model", "processor_config.json",
)  # fmt: skip


def _mutate_bytes(raw: bytes, draw: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(data) + 1)
        kind = draw.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at:at] = draw.randbytes(draw.choice((1, 2, 16)))
        elif kind == 2:
            del data[at : at + draw.choice((1, 4, 64))]
        elif kind == 3:
            del data[at:]
        else:
            data[at:at] = data[max(0, at - draw.choice((8, 256))) : at]
    return bytes(data)


def _mutate_json(raw: bytes, draw: random.Random) -> bytes:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return _mutate_bytes(raw, draw)
    value = _change(value, draw)
    text = json.dumps(value)
    if draw.random() < 0.03:
        text = text.replace("{", '{"a": 1, "a": 2, ', 1)
    if draw.random() < 0.02:
        text = text.replace("1", draw.choice(("NaN", "Infinity", "1e999")), 1)
    if draw.random() < 0.02:
        text = "[" * 3000 + text + "]" * 3000
    return text.encode("utf-8", "surrogatepass")


def _change(value: Any, draw: random.Random) -> Any:
    """Change one place, reached by a random walk."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        keys = list(value)
        key = draw.choice(keys[:200]) if draw.random() < 0.9 else draw.choice(keys)
        if draw.random() < 0.45:
            return {**value, key: _change(value[key], draw)}
        kind = draw.randrange(5)
        if kind == 0:
            return {name: item for name, item in value.items() if name != key}
        if kind == 1:
            return {**value, draw.choice(KEYS): _fresh(draw)}
        if kind == 2:
            return {**value, key: value[draw.choice(keys)]}
        if kind == 3:
            renamed = draw.choice((key + "x", "\ud800", "../" + key, key[:-1]))
            return {(renamed if name == key else name): item for name, item in value.items()}
        return {**value, key: _nudge(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        kind = draw.randrange(4)
        if kind == 0:
            return [*value[:at], *value[at + 1 :]]
        if kind == 1:
            return [*value[:at], _fresh(draw), *value[at:]]
        if kind == 2:
            return [*value, *value[: draw.choice((1, 100))]]
        return [*value[:at], _change(value[at], draw), *value[at + 1 :]]
    return _nudge(value, draw)


def _nudge(value: Any, draw: random.Random) -> Any:
    if type(value) is int and draw.random() < 0.5:
        return draw.choice((value + 1, value - 1, value * 2, value // 2, -value, value * 10**6))
    if type(value) is float and draw.random() < 0.5:
        return draw.choice((-value, value * 1e300, value * 1e-300, round(value, 1)))
    return _fresh(draw)


def _fresh(draw: random.Random) -> Any:
    return draw.choice(VALUES if draw.random() < 0.75 else FRAGMENTS)


def _mutate_weights(raw: bytes, draw: random.Random) -> bytes:
    if len(raw) < 10 or draw.random() < 0.25:
        length = draw.choice((0, 1, 2**63, 2**64 - 1, len(raw), 10**8))
        return draw.choice((raw[: draw.randrange(len(raw) + 1)], raw + b"\0" * 8,
                            struct.pack("<Q", length) + raw[8:], b""))  # fmt: skip
    (size,) = struct.unpack("<Q", raw[:8])
    header, data = raw[8 : 8 + size], raw[8 + size :]
    changed = _mutate_json(header, draw) if draw.random() < 0.8 else _mutate_bytes(header, draw)
    if draw.random() < 0.1:
        data = draw.choice((data[:-4], data + bytes(4), b"\xff" * len(data), bytes(len(data))))
    return struct.pack("<Q", len(changed)) + changed + data

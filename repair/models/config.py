"""The model's JSON files, read with limits and reduced to what the native class declares.

Every range is checked before any library sees the configuration: `security.md` rows 3.2,
3.4, 3.8 and 3.13 name what a hostile one can do.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repair.json_size import check_structure
from repair.models.headers import (
    refuse_constant,
    refuse_pickle,
    unique_object,
)
from repair.records import RepairError


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A native class, what its config.json calls the sizes, and the keys only it has."""

    model: str
    config: str
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    width: str = "hidden_size"
    inner: str | None = "intermediate_size"
    more: tuple[str, ...] = ()
    experts: tuple[str, str, str, str] | None = None  # in files: block, gate, up and down


_GEMMA = (
    "hidden_activation", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping", "sliding_window_pattern", "rope_local_base_freq",
)  # fmt: skip
ARCHITECTURES = {
    "llama": Architecture(model="LlamaForCausalLM", config="LlamaConfig"),
    "mistral": Architecture(model="MistralForCausalLM", config="MistralConfig"),
    "qwen2": Architecture(model="Qwen2ForCausalLM", config="Qwen2Config"),
    "qwen3": Architecture(model="Qwen3ForCausalLM", config="Qwen3Config"),
    "gemma2": Architecture(model="Gemma2ForCausalLM", config="Gemma2Config", more=_GEMMA),
    "gemma3_text": Architecture(
        model="Gemma3ForCausalLM", config="Gemma3TextConfig", more=_GEMMA
    ),
    "phi3": Architecture(
        model="Phi3ForCausalLM",
        config="Phi3Config",
        more=("original_max_position_embeddings", "partial_rotary_factor"),
    ),
    "gpt2": Architecture(
        model="GPT2LMHeadModel",
        config="GPT2Config",
        layers="n_layer",
        heads="n_head",
        width="n_embd",
        inner=None,
        more=(
            "n_positions", "n_inner", "activation_function", "layer_norm_epsilon",
            "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn",
        ),
    ),
    "gpt_neox": Architecture(
        model="GPTNeoXForCausalLM",
        config="GPTNeoXConfig",
        more=("rotary_pct", "rotary_emb_base", "layer_norm_eps", "use_parallel_residual"),
    ),
    "opt": Architecture(
        model="OPTForCausalLM",
        config="OPTConfig",
        inner="ffn_dim",
        more=(
            "activation_function", "word_embed_proj_dim", "do_layer_norm_before",
            "_remove_final_layer_norm", "enable_bias", "layer_norm_elementwise_affine",
        ),
    ),
    "olmo": Architecture(model="OlmoForCausalLM", config="OlmoConfig", more=("clip_qkv",)),
    "olmo2": Architecture(model="Olmo2ForCausalLM", config="Olmo2Config"),
    "mixtral": Architecture(
        model="MixtralForCausalLM",
        config="MixtralConfig",
        more=("num_local_experts", "num_experts_per_tok"),
        experts=("block_sparse_moe", "w1", "w3", "w2"),
    ),
    "qwen3_moe": Architecture(
        model="Qwen3MoeForCausalLM",
        config="Qwen3MoeConfig",
        more=(
            "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size",
            "decoder_sparse_step", "mlp_only_layers", "norm_topk_prob",
        ),
        experts=("mlp", "gate_proj", "up_proj", "down_proj"),
    ),
}  # fmt: skip
MAX_CONFIG_BYTES = 2**20
MAX_DEPTH = 16
MAX_CONTAINERS, MAX_ITEMS = 2_000_000, 6_000_000  # Gemma's tokenizer has a third of these

# The keys that are kept, with the range accepted; each architecture has most of the first groups.
_INT = {
    "num_key_value_heads": (1, 512),
    "head_dim": (2, 1024),
    "max_position_embeddings": (1, 2_000_000),
    "sliding_window": (1, 2_000_000),
    "max_window_layers": (0, 200),
}
_NUMBER = {
    "rms_norm_eps": (0.0, 1.0),
    "initializer_range": (0.0, 1.0),
    "attention_dropout": (0.0, 1.0),
    "rope_theta": (1.0, 1e12),
}
_BOOL = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
_MORE_INT = {
    "n_positions": (1, 2_000_000),
    "n_inner": (1, 131_072),
    "original_max_position_embeddings": (1, 2_000_000),
    "word_embed_proj_dim": (1, 16_384),
    "sliding_window_pattern": (1, 200),
    "num_experts": (1, 1024),
    "num_local_experts": (1, 1024),
    "num_experts_per_tok": (1, 1024),
    "moe_intermediate_size": (1, 131_072),
    "decoder_sparse_step": (1, 200),
}
_MORE_NUMBER = {
    "query_pre_attn_scalar": (1.0, 16_384.0),
    "attn_logit_softcapping": (0.1, 1e6),
    "final_logit_softcapping": (0.1, 1e6),
    "rope_local_base_freq": (1.0, 1e12),
    "partial_rotary_factor": (0.01, 1.0),
    "rotary_pct": (0.01, 1.0),
    "rotary_emb_base": (1.0, 1e12),
    "layer_norm_eps": (0.0, 1.0),
    "layer_norm_epsilon": (0.0, 1.0),
    "clip_qkv": (0.0, 1e6),
}
_MORE_BOOL = (
    "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn",
    "use_parallel_residual", "do_layer_norm_before", "_remove_final_layer_norm", "enable_bias",
    "layer_norm_elementwise_affine", "norm_topk_prob",
)  # fmt: skip
_ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function")
_ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu")
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_LAYER_TYPES = ("full_attention", "sliding_attention")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# A loader would act on these; they are dropped and reported.
_DROPPED = re.compile(
    r"auto_map|custom_|.*attn_implementation|experts_implementation|trust_remote_code"
)


def parse_json(raw: bytes, name: str, *, max_bytes: int) -> Any:
    """Parse JSON with limits on size, depth and keys; raises `RepairError` naming the file."""
    if len(raw) > max_bytes:
        raise RepairError(
            f"{name} has {len(raw)} bytes; at most {max_bytes} are accepted. Nothing was loaded."
        )
    try:
        check_structure(raw, most_containers=MAX_CONTAINERS, most_items=MAX_ITEMS)
        return json.loads(
            raw.decode("utf-8-sig"),
            object_pairs_hook=unique_object,
            parse_constant=refuse_constant,
        )
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise RepairError(
            f"{name} is not acceptable JSON ({reason}). Nothing was loaded. "
            "Use the file that was published with the model."
        ) from None


def clean_config(flat: Any, *, has_python: bool) -> tuple[dict[str, Any], list[str]]:
    """Return the configuration's native keys and findings; raises `RepairError` otherwise."""
    if not isinstance(flat, dict) or _depth(flat) > MAX_DEPTH:
        raise RepairError(
            "config.json is not a flat configuration of a language model. Nothing was loaded."
        )
    model_type = _check_architecture(flat, has_python=has_python)
    if "transformers_weights" in flat:
        raise RepairError(
            refuse_pickle(f"transformers_weights: {_show(flat['transformers_weights'])}")
        )
    for key in ("quantization_config", "compression_config"):
        if flat.get(key) is not None:
            raise RepairError(_quantised(flat[key]))
    findings = [
        f"config.json: `{key}` was dropped; it is never acted on."
        for key in map(str, flat)
        if _DROPPED.match(key) and flat[key] is not None
    ]
    known = ARCHITECTURES[model_type]
    clean: dict[str, Any] = {"model_type": model_type, "architectures": [known.model]}
    sizes = {
        "vocab_size": (1, 1_048_576),
        known.width: (1, 16_384),
        known.layers: (1, 200),
        known.heads: (1, 512),
    }
    if known.inner is not None:
        sizes[known.inner] = (1, 131_072)
    for key, (low, high) in sizes.items():
        clean[key] = _check_int(flat, key, low, high)
    for key, (low, high) in (_INT | _only(_MORE_INT, known)).items():
        if flat.get(key) is not None:
            clean[key] = _check_int(flat, key, low, high)
        elif key == "sliding_window" and key in flat:
            clean[key] = None  # For Mistral an absent key would mean 4096.
    for key, (low, high) in (_NUMBER | _only(_MORE_NUMBER, known)).items():
        if flat.get(key) is not None:
            clean[key] = _check_number(flat[key], key, low, high)
        elif key in _MORE_NUMBER and key in flat:
            clean[key] = None  # Gemma's bounds are off where they are null, not where they lack.
    for key in (*_BOOL, *(key for key in _MORE_BOOL if key in known.more)):
        if flat.get(key) is not None:
            if not isinstance(flat[key], bool):
                raise _refuse(key, flat[key], "true or false")
            clean[key] = flat[key]
    clean.update(_check_choices(flat, clean[known.layers], known))
    _check_heads(clean, known)
    for key in _TOKEN_IDS:
        ids = token_ids(flat.get(key), clean["vocab_size"])
        if ids:
            clean[key] = list(ids) if key == "eos_token_id" and len(ids) > 1 else ids[0]
        elif key in flat:
            clean[key] = None
    return clean, findings


def _only(ranges: dict[str, tuple], known: Architecture) -> dict[str, tuple]:
    return {key: value for key, value in ranges.items() if key in known.more}


def token_ids(value: Any, vocab_size: int) -> tuple[int, ...]:
    """Return the valid ids of a token-id field, which may be a number or a short list."""
    items = value if isinstance(value, list) else [value]
    return tuple(i for i in items[:64] if type(i) is int and 0 <= i < vocab_size)


def refuse_remote_code(flat: dict[str, Any], where: str) -> None:
    """Raise `RepairError` when `auto_map` names code of another repository."""
    auto_map = flat.get("auto_map")
    if auto_map is not None and "--" in json.dumps(auto_map):
        raise RepairError(
            f"{where} asks for Python code from another repository (`auto_map` -> "
            f"{_show(auto_map)}). This app never runs code from a model; nothing was loaded. "
            "Use a copy of the model without `auto_map`."
        )


def _check_architecture(flat: dict[str, Any], *, has_python: bool) -> str:
    refuse_remote_code(flat, "config.json")
    model_type = flat.get("model_type")
    supported = ", ".join(ARCHITECTURES)
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        if has_python or flat.get("auto_map") is not None:
            raise RepairError(
                f"This model needs its own Python code (`auto_map` -> {_show(flat.get('auto_map'))}"
                f"). This app never runs code from a model. Architecture {_show(model_type)} is "
                f"not on the supported list: {supported}."
            )
        raise RepairError(
            f"Architecture {_show(model_type)} is not on the supported list: {supported}. "
            "Nothing was loaded."
        )
    architectures = flat.get("architectures")
    if architectures not in (None, [ARCHITECTURES[model_type].model]):
        raise RepairError(
            f"config.json declares {_show(architectures)}, which is not a causal language model "
            f"of type {model_type!r}. Accepted: {ARCHITECTURES[model_type].model}."
        )
    return model_type


def _check_choices(
    flat: dict[str, Any], num_layers: int, known: Architecture
) -> dict[str, Any]:
    """Return the checked fields whose values are names, lists or small objects."""
    clean: dict[str, Any] = {}
    for key in _ACTIVATION_KEYS:
        if flat.get(key) is not None and (key == "hidden_act" or key in known.more):
            if flat[key] not in _ACTIVATIONS:
                raise _refuse(key, flat[key], ", ".join(_ACTIVATIONS))
            clean[key] = flat[key]
    layer_types = flat.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list) or len(layer_types) != num_layers:
            raise _refuse("layer_types", layer_types, "one entry per layer")
        if any(kind not in _LAYER_TYPES for kind in layer_types):
            raise _refuse("layer_types", layer_types, ", ".join(_LAYER_TYPES))
        clean["layer_types"] = layer_types
    dense = flat.get("mlp_only_layers")
    if dense is not None and "mlp_only_layers" in known.more:
        if not isinstance(dense, list) or len(dense) > num_layers or not all(
            type(item) is int and 0 <= item < num_layers for item in dense
        ):
            raise _refuse("mlp_only_layers", dense, "a list of layer numbers")
        clean["mlp_only_layers"] = dense
    for key in ("rope_parameters", "rope_scaling"):
        rope = flat.get(key)
        if isinstance(rope, dict) and rope and set(rope) <= set(_LAYER_TYPES):
            clean[key] = {kind: _check_rope(part, key) for kind, part in rope.items()}
        elif rope is not None:
            clean[key] = _check_rope(rope, key)
    return clean


def _check_rope(rope: Any, key: str) -> dict[str, Any]:
    accepted = f"a flat object of numbers with a rope_type of {', '.join(_ROPE_TYPES)}"
    if not isinstance(rope, dict) or len(rope) > 32:
        raise _refuse(key, rope, accepted)
    for name, value in rope.items():
        if name in ("rope_type", "type"):
            if value not in _ROPE_TYPES:
                raise _refuse(key, rope, accepted)
        elif isinstance(value, list):
            if len(value) > 1024 or not all(_is_number(item) for item in value):
                raise _refuse(key, rope, accepted)
        elif value is not None and not isinstance(value, bool) and not _is_number(value):
            raise _refuse(key, rope, accepted)
    return rope


def _check_heads(clean: dict[str, Any], known: Architecture) -> None:
    num_heads, hidden = clean[known.heads], clean[known.width]
    num_groups = clean.get("num_key_value_heads", num_heads)
    if (hidden % num_heads and "head_dim" not in clean) or num_heads % num_groups:
        raise RepairError(
            f"config.json declares hidden size {hidden}, {num_heads} attention heads and "
            f"{num_groups} key/value heads, which do not divide. Nothing was loaded."
        )
    if known.experts is not None:
        count = clean.get("num_local_experts", clean.get("num_experts"))
        chosen = clean.get("num_experts_per_tok")
        if count is None or chosen is None or chosen > count:
            raise RepairError(
                f"config.json declares {count} experts of which {chosen} work on a token. Both "
                "numbers are needed, the second at most the first. Nothing was loaded."
            )


def _check_int(flat: dict[str, Any], key: str, low: int, high: int) -> int:
    value = flat.get(key)
    if type(value) is not int or not low <= value <= high:
        raise _refuse(key, value, f"a whole number from {low} to {high}")
    return value


def _check_number(value: Any, key: str, low: float, high: float) -> float:
    if not _is_number(value) or not low <= value <= high:
        raise _refuse(key, value, f"a number from {low:g} to {high:g}")
    return value


def _is_number(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < 2**53
    return type(value) is float and math.isfinite(value)


def _refuse(key: str, value: Any, accepted: str) -> RepairError:
    return RepairError(
        f"config.json declares {key} = {_show(value)}; accepted is {accepted}. "
        "Nothing was loaded."
    )


def _quantised(entry: Any) -> str:
    method, bits = "unknown method", ""
    if isinstance(entry, dict):
        method = _show(entry.get("quant_method", method)).strip("'")
        bits = f", {entry['bits']} bit" if type(entry.get("bits")) is int else ""
    return (
        f"This model is quantised ({method}{bits}). Patching and LoRA repair need unquantised "
        "weights. Use the original float model."
    )


def _show(value: Any) -> str:
    """Return a short ASCII form of hostile text for a message."""
    text = ascii(value) if not isinstance(value, int) or abs(value) < 10**18 else "a huge number"
    return text if len(text) <= 80 else text[:77] + "..."


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        depth += 1
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


def read_json_file(path: Path, *, max_bytes: int) -> Any:
    """Parse a JSON file of our own staging, with the same limits."""
    return parse_json(path.read_bytes(), path.name, max_bytes=max_bytes)

"""Which weight files make up the model, and whether their tensors are exactly its own.

The index of a model may name any path, and the library makes up what is missing: both are
decided here, from names and headers, before any weight is read.
"""

import re
from collections import Counter
from typing import Any

import torch
import transformers

from repair.models.config import ARCHITECTURES, parse_json
from repair.models.folder import PICKLES, WEIGHT_NAME
from repair.models.headers import TensorHeader, refuse_pickle
from repair.models.library import refusing
from repair.records import RepairError

OUTPUT = "lm_head.weight"  # what may be absent when tied
OLD_OUTPUT = "embed_out.weight"  # GPT-NeoX files call it so; the library knows
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_OLD_BUFFER = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|transformer\.h\.\d+\.attn\.(masked_)?bias"
    r"|gpt_neox\.layers\.\d+\.attention\.(masked_bias|bias|rotary_emb\.inv_freq)"
)
_LAYER = re.compile(
    r"(?:model\.layers|model\.decoder\.layers|transformer\.h|gpt_neox\.layers)\.(\d{1,6})\."
)


def read_index(small: dict[str, bytes]) -> dict[str, str] | None:
    if INDEX not in small:
        return None
    flat = parse_json(small[INDEX], INDEX, max_bytes=50 * 2**20)
    weight_map = flat.get("weight_map") if isinstance(flat, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise RepairError(f"{INDEX} has no weight_map. Nothing was loaded.")
    for shard in weight_map.values():
        if isinstance(shard, str) and WEIGHT_NAME.fullmatch(shard):
            continue
        if isinstance(shard, str) and shard.endswith(PICKLES) and "/" not in shard:
            raise RepairError(refuse_pickle(f"{INDEX}: {shard[:80]}"))
        raise RepairError(
            f"The weight index points outside the model folder (`{ascii(shard)[:120]}`). This is "
            "not a normal model; nothing was loaded."
        )
    return weight_map


def choose_shards(names: list[str], weight_map: dict[str, str] | None) -> list[str]:
    """Return the weight files to load, in order."""
    present = [name for name in names if WEIGHT_NAME.fullmatch(name)]
    if weight_map is None:
        if "model.safetensors" in present:
            return ["model.safetensors"]
        if present != [f"model-{i + 1:05d}-of-{len(present):05d}.safetensors"
                       for i in range(len(present))]:  # fmt: skip
            raise RepairError(
                f"The shards {', '.join(present[:4])} are not complete and there is no {INDEX}. "
                "Add the missing files."
            )
        return present
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if shard not in present:
            raise RepairError(
                f"The weight index names {shard}, which is not in the folder. Add the missing "
                "file; nothing was loaded."
            )
    if "model.safetensors" in present and shards != ["model.safetensors"]:
        raise RepairError(
            "The folder holds model.safetensors and an index of shards; which of them is the "
            "model is not known. Remove one of the two."
        )
    return shards


def check_index(
    weight_map: dict[str, str] | None, tensors: dict[str, TensorHeader], shards: list[str]
) -> None:
    if weight_map is not None and weight_map.keys() != tensors.keys():
        odd = sorted(weight_map.keys() ^ tensors.keys())[0]
        raise RepairError(
            f"The weight index and the files {', '.join(shards[:3])} disagree about the tensor "
            f"{ascii(odd)[:120]}. Nothing was loaded."
        )


def check_tensors(tensors: dict[str, TensorHeader], config: dict[str, Any]) -> list[str]:
    """Compare the files' tensors with an empty instance of the class; return findings.

    Raises `RepairError` for missing, unexpected or mismatched tensors. A tied `lm_head` may be
    absent, and old checkpoints may hold the rotary buffer that the library computes itself.
    """
    stored = {int(m[1]) for name in tensors if (m := _LAYER.match(name))}
    declared = config[ARCHITECTURES[config["model_type"]].layers]
    if stored != set(range(declared)):
        raise RepairError(
            f"config.json declares {declared} layers but the file holds weights for "
            f"{len(stored)}. Missing weights would be random, so results would mean nothing."
        )
    expected = _expected_shapes(config)
    if config["model_type"] == "gpt_neox" and OLD_OUTPUT in tensors and OUTPUT not in tensors:
        tensors = {OUTPUT if name == OLD_OUTPUT else name: h for name, h in tensors.items()}
    buffers = [name for name in tensors if _OLD_BUFFER.fullmatch(name)]
    present = tensors.keys() - set(buffers)
    missing = sorted(expected.keys() - present)
    if _is_tied(config):
        missing = [name for name in missing if name != OUTPUT]
    if missing:
        raise RepairError(
            f"The weight files lack {len(missing)} tensors that config.json declares, such as "
            f"{missing[0]}. Missing weights would be random, so results would mean nothing."
        )
    unexpected = sorted(present - expected.keys())
    if unexpected:
        raise RepairError(
            f"The weight files hold {len(unexpected)} tensors that this architecture does not "
            f"have, such as {ascii(unexpected[0])[:120]}. They would be ignored, so nothing was "
            "loaded."
        )
    for name in sorted(present):
        if tensors[name].shape != expected[name]:
            raise RepairError(
                f"{name} has shape {list(tensors[name].shape)} in the file but "
                f"{list(expected[name])} by config.json. Nothing was loaded."
            )
        if tensors[name].dtype not in DTYPES:
            raise RepairError(
                f"{name} is stored as {tensors[name].dtype}; accepted are float32, bfloat16 and "
                "float16. Use the original float model."
            )
    return ["Old rotary buffers in the weight files are not used."] if buffers else []


def _is_tied(config: dict[str, Any]) -> bool:
    """Tell whether the output matrix is the embedding, by config.json or the class's default."""
    default = getattr(transformers, ARCHITECTURES[config["model_type"]].config)()
    return bool(config.get("tie_word_embeddings", default.tie_word_embeddings))


def _expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with refusing("config.json is refused by the library"):
        model = build_empty(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    experts = ARCHITECTURES[config["model_type"]].experts
    return shapes if experts is None else _one_by_one(shapes, experts)


def _one_by_one(
    shapes: dict[str, tuple[int, ...]], experts: tuple[str, str, str, str]
) -> dict[str, tuple[int, ...]]:
    """Return what files hold for experts that the library keeps as one tensor: each apart."""
    block, *parts = experts
    apart: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        layer, found, rest = name.partition(".mlp.experts.")
        if found:
            names = parts[:2] if rest == "gate_up_proj" else parts[2:]
            count, rows, columns = shape
            for expert in range(count):
                for part in names:
                    path = f"{layer}.{block}.experts.{expert}.{part}.weight"
                    apart[path] = (rows // len(names), columns)
        else:
            apart[name.replace(".mlp.gate.", f".{block}.gate.")] = shape
    return apart


def build_empty(config: dict[str, Any]) -> transformers.PreTrainedModel:
    """Return an instance of the native class without any memory for its weights."""
    known = ARCHITECTURES[config["model_type"]]
    arguments = {key: value for key, value in config.items() if key != "model_type"}
    settings = getattr(transformers, known.config)(**arguments)
    settings._attn_implementation = "eager"
    with torch.device("meta"):
        return getattr(transformers, known.model)(settings)


def main_dtype(tensors: dict[str, TensorHeader]) -> str:
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[tensor.dtype] += tensor.num_elements
    return DTYPES.get(counts.most_common(1)[0][0], "float32")

"""The tokenizer's files, reduced to what the fast tokenizer needs.

`tokenizer.json` is staged with padding and truncation removed; `tokenizer_config.json` is
rewritten from an allow-list, so that no field of it can name another file or class.
"""

import json
from math import prod
from typing import Any

from repair.models.config import parse_json, refuse_remote_code
from repair.records import RepairError

MAX_TOKENIZER_BYTES = 64 * 2**20
MAX_TEMPLATE_BYTES = 64 * 2**10
MAX_EXPANSION = 64
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_FLAGS = ("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces")


def clean_tokenizer(files: dict[str, bytes]) -> tuple[dict[str, bytes], list[str]]:
    """Return the tokenizer files to stage, by name, and findings.

    `files` holds the small files of the source by name; raises `RepairError` when there is no
    `tokenizer.json`, or when it or the template is beyond what is accepted.
    """
    if "tokenizer.json" not in files:
        raise RepairError(
            "The folder has no tokenizer.json, the only tokenizer format accepted. "
            "Save the tokenizer with `PreTrainedTokenizerFast.save_pretrained` and try again."
        )
    raw = files["tokenizer.json"]
    flat = parse_json(raw, "tokenizer.json", max_bytes=MAX_TOKENIZER_BYTES)
    if not isinstance(flat, dict) or not isinstance(flat.get("model"), dict):
        raise RepairError("tokenizer.json holds no tokenizer model. Nothing was loaded.")
    for part in ("normalizer", "decoder"):
        _check_expansion(flat.get(part), part)
    findings = []
    if flat.get("padding") is not None or flat.get("truncation") is not None:
        flat["padding"] = flat["truncation"] = None
        raw = json.dumps(flat).encode()
        findings.append("tokenizer.json: padding and truncation were switched off.")
    staged = {"tokenizer.json": raw}
    config, more = _clean_config(files, known=_token_texts(flat))
    template = _find_template(files)
    if template is not None:
        if len(template) > MAX_TEMPLATE_BYTES:
            raise RepairError(
                f"The chat template has {len(template)} bytes; at most {MAX_TEMPLATE_BYTES} are "
                "accepted. Remove it from the folder to analyse the raw prompt."
            )
        staged["chat_template.jinja"] = template
    staged["tokenizer_config.json"] = json.dumps(config, indent=2).encode()
    return staged, findings + more


def _read_object(files: dict[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    flat = parse_json(files[name], name, max_bytes=MAX_TOKENIZER_BYTES)
    if not isinstance(flat, dict):
        raise RepairError(f"{name} is not a JSON object. Nothing was loaded.")
    return flat


def _clean_config(files: dict[str, bytes], *, known: set[str]) -> tuple[dict[str, Any], list[str]]:
    flat = _read_object(files, "tokenizer_config.json")
    legacy = _read_object(files, "special_tokens_map.json")
    refuse_remote_code(flat, "tokenizer_config.json")
    findings = [
        f"tokenizer_config.json: `{key}` was dropped; it is never acted on."
        for key in ("auto_map", "fast_tokenizer_files", "tokenizer_file")
        if flat.get(key) is not None
    ]
    clean: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key in _SPECIAL:
        value = flat.get(key) or legacy.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        if value is None:
            continue
        # A special token that the vocabulary lacks would be given an id beyond the embedding.
        if isinstance(value, str) and value in known:
            clean[key] = value
        else:
            findings.append(f"tokenizer_config.json: `{key}` is not in the vocabulary; dropped.")
    clean.update({key: flat[key] for key in _FLAGS if isinstance(flat.get(key), bool)})
    return clean, findings


def _find_template(files: dict[str, bytes]) -> bytes | None:
    """Return the template that the library itself would use: the file, or the config's own."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"]
    template = _read_object(files, "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item for item in template if isinstance(item, dict)}
        template = named.get("default", {}).get("template")
    return template.encode("utf-8", "replace") if isinstance(template, str) else None


def _token_texts(flat: dict[str, Any]) -> set[str]:
    vocab = flat["model"].get("vocab")
    if isinstance(vocab, list):  # Unigram: [text, score].
        texts = {item[0] for item in vocab if isinstance(item, list) and item}
    else:
        texts = set(vocab) if isinstance(vocab, dict) else set()
    added = flat.get("added_tokens")
    for item in added if isinstance(added, list) else []:
        if isinstance(item, dict) and isinstance(item.get("content"), str):
            texts.add(item["content"])
    return {text for text in texts if isinstance(text, str)}


def _check_expansion(rules: Any, part: str) -> None:
    """Raise `RepairError` for a normalizer or decoder that makes one character into very many."""
    factors, pending = [1], [rules]
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending.extend(item)
        elif isinstance(item, dict):
            pending.extend(value for value in item.values() if isinstance(value, dict | list))
            factors += [
                max(1, len(item[key].strip()))
                for key in ("content", "prepend")
                if isinstance(item.get(key), str)
            ]
    if prod(factors) > MAX_EXPANSION:
        raise RepairError(
            f"The {part} of tokenizer.json can make one character into {prod(factors)}; at "
            f"most {MAX_EXPANSION} is accepted. The model may have been built to exhaust memory."
        )

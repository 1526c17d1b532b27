"""The gate: an untrusted model folder becomes a fresh folder of checked files, or is refused.

Loading only safetensors without remote code is no boundary in the library (`security.md` 1):
an index can point outside the folder, a configuration can name pickles, adapters or kernels,
and missing weights are made up. So nothing of the source is loaded. Small files are parsed
with limits, reduced to an allow-list and written anew; weight files are opened without
following links, hashed, compared tensor by tensor with an empty instance of the native class
and referenced under names of our own. A refusal leaves nothing behind.

What it does not know: whether the weights are what their author says they are.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from repair.models.config import MAX_CONFIG_BYTES, clean_config, parse_json, token_ids
from repair.models.folder import SMALL_FILES, WEIGHT_NAME, check_names, list_files, open_plain
from repair.models.headers import TensorHeader, read_header
from repair.models.tensors import (
    INDEX,
    check_index,
    check_tensors,
    choose_shards,
    main_dtype,
    read_index,
)
from repair.models.tokenizer_files import MAX_TOKENIZER_BYTES, clean_tokenizer
from repair.records import RepairError

# These say only what the model is, or what our own decoding decides anyway.
_PLAIN_GENERATION = {
    "_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version",
    "max_length", "max_new_tokens", "output_attentions", "output_hidden_states", "use_cache",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedModel:
    """A checked model folder; `files` and `sizes` describe the source's own files."""

    folder: Path
    source: Path
    files: dict[str, str]  # name -> SHA-256
    sizes: dict[str, int]  # name -> bytes
    findings: tuple[str, ...]
    num_parameters: int
    dtype: str  # of most of the weights, as stored
    stamps: dict[str, tuple[int, ...]]  # weight file -> device, inode, size, times
    generation_eos: tuple[int, ...]  # stop tokens that generation_config.json adds


def stage_model(source: Path, stage_folder: Path) -> StagedModel:
    """Check `source` and build `stage_folder`; raises `RepairError` and leaves nothing behind.

    An earlier stage at `stage_folder` is replaced; any other folder there is left alone
    (`FileExistsError`).
    """
    if stage_folder.exists():
        if not all(_is_staged_name(entry.name) for entry in stage_folder.iterdir()):
            raise FileExistsError(f"{stage_folder} is not a staged model")
        shutil.rmtree(stage_folder)
    names = list_files(source)
    findings = check_names(names)
    stage_folder.mkdir(parents=True, mode=0o700)
    try:
        return _build(source.resolve(), stage_folder, names, findings)
    except BaseException:
        shutil.rmtree(stage_folder)
        raise


def check_unchanged(staged: StagedModel) -> None:
    """Raise `RepairError` when a weight file is no longer the one that was hashed."""
    for name, stamp in staged.stamps.items():
        try:
            now = _stamp(os.lstat(staged.source / name))
        except FileNotFoundError:
            now = None
        if now != stamp:
            raise RepairError(
                f"The weight file {name} changed while it was being read. The job was stopped; "
                "the app is fine. Start again when nothing writes to the model folder."
            )


def _build(source: Path, stage: Path, names: list[str], findings: list[str]) -> StagedModel:
    small, hashes, sizes = _read_small_files(source, names)
    config, more = clean_config(
        parse_json(small["config.json"], "config.json", max_bytes=MAX_CONFIG_BYTES),
        has_python=any(name.endswith(".py") for name in names),
    )
    tokenizer_files, tokenizer_findings = clean_tokenizer(small)
    generation_eos, generation_findings = _read_generation(small, config["vocab_size"])
    findings = [*findings, *more, *tokenizer_findings, *generation_findings]

    shards = choose_shards(names, read_index(small))
    findings += [
        f"{name}: not named by the weight index; ignored, never opened."
        for name in names
        if WEIGHT_NAME.fullmatch(name) and name not in shards
    ]
    tensors: dict[str, TensorHeader] = {}
    weight_map: dict[str, str] = {}
    stamps = {}
    for number, name in enumerate(shards, start=1):
        header, hashes[name], stamps[name] = _read_weights(source / name)
        sizes[name] = stamps[name][2]
        twice = sorted(header.keys() & tensors.keys())
        if twice:
            raise RepairError(
                f"The tensor {ascii(twice[0])} is in two weight files. Nothing was loaded."
            )
        staged_name = "model.safetensors"
        if len(shards) > 1:
            staged_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(header, staged_name))
        tensors.update(header)
        (stage / staged_name).symlink_to(source / name)
    check_index(read_index(small), tensors, shards)
    findings += check_tensors(tensors, config)
    dtype = main_dtype(tensors)

    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (stage / INDEX).write_text(json.dumps(index))
    (stage / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2))
    for name, raw in tokenizer_files.items():
        (stage / name).write_bytes(raw)
    return StagedModel(
        folder=stage,
        source=source,
        files=hashes,
        sizes=sizes,
        findings=tuple(findings),
        num_parameters=sum(tensor.num_elements for tensor in tensors.values()),
        dtype=dtype,
        stamps=stamps,
        generation_eos=generation_eos,
    )


def _read_small_files(
    source: Path, names: list[str]
) -> tuple[dict[str, bytes], dict[str, str], dict[str, int]]:
    small, hashes, sizes = {}, {}, {}
    for name in SMALL_FILES:
        if name not in names:
            continue
        descriptor = open_plain(source / name)
        try:
            size = os.fstat(descriptor).st_size
            if size > MAX_TOKENIZER_BYTES:
                raise RepairError(
                    f"{name} has {size} bytes; at most {MAX_TOKENIZER_BYTES} are accepted."
                )
            with os.fdopen(os.dup(descriptor), "rb") as file:
                small[name] = file.read(MAX_TOKENIZER_BYTES)
        finally:
            os.close(descriptor)
        hashes[name] = hashlib.sha256(small[name]).hexdigest()
        sizes[name] = len(small[name])
    return small, hashes, sizes


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """Return what changes when a file does; of the times the last cannot be set back."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read_weights(path: Path) -> tuple[dict[str, TensorHeader], str, tuple[int, ...]]:
    """Return header, SHA-256 and stamp of a weight file, all read through one descriptor."""
    descriptor = open_plain(path)
    with os.fdopen(descriptor, "rb") as file:
        stamp = _stamp(os.fstat(descriptor))
        header = read_header(descriptor, path.name)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return header, digest, stamp


def _read_generation(
    small: dict[str, bytes], vocab_size: int
) -> tuple[tuple[int, ...], list[str]]:
    """Return the extra stop tokens and a finding about settings that are not used here."""
    name = "generation_config.json"
    if name not in small:
        return (), []
    flat = parse_json(small[name], name, max_bytes=MAX_CONFIG_BYTES)
    if not isinstance(flat, dict):
        return (), [f"{name}: not a JSON object; ignored."]
    odd = sorted(ascii(key)[1:-1][:40] for key in flat if key not in _PLAIN_GENERATION)
    findings = [f"{name} sets {', '.join(odd[:12])}; not used here."] if odd else []
    return token_ids(flat.get("eos_token_id"), vocab_size), findings


def _is_staged_name(name: str) -> bool:
    return name in SMALL_FILES or WEIGHT_NAME.fullmatch(name) is not None

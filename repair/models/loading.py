"""From what the analyst typed to a live model: source, staging, loading, and checks after it.

The only record that holds a live model. A Hub id means what the job has fetched under it
(`download`): nothing here calls anybody.
"""

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from repair.machine import free_memory, has_bfloat16
from repair.models import ranks
from repair.models.adapter_suspect import adapter_hashes, is_adapter, merge_adapter
from repair.models.config import ARCHITECTURES, MAX_CONFIG_BYTES, read_json_file
from repair.models.download import Fetched
from repair.models.library import refusing
from repair.models.modules import find_modules
from repair.models.placement import lay_out, named_weights, places_for
from repair.models.staging import StagedModel, check_unchanged, stage_model
from repair.models.tensors import OUTPUT
from repair.models.watchdog import PARSE_BYTES, PARSE_SECONDS, watched
from repair.records import ModuleRef, RepairError

SUSPECTS = Path(__file__).resolve().parents[2] / "assets" / "suspects"
_DEMO_NAME = re.compile(r"[\w-]+", re.ASCII)
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
AS_FLOAT32 = (
    "The weights are bfloat16 and are computed as float32, which holds them exactly: this "
    "processor only imitates bfloat16 and would take many times as long. An export is bfloat16 "
    "again. (--dtype bfloat16 halves the memory.)"
)
_ACCEPTED = (
    "Give a model folder, a Hub id OWNER/NAME, or demo:begin, demo:middle, demo:end, demo:clean."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterBase:
    """What an adapter was put on, as far as a report names it."""

    source: str
    revision: str | None
    licence: str | None
    licence_terms: dict[str, str]
    files: dict[str, str]  # name -> SHA-256


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A live model that passed the gate: eval mode, no gradients, eager attention."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    modules: tuple[ModuleRef, ...]
    source: str  # as typed
    files: dict[str, str]  # of the source itself: name -> SHA-256
    base: AdapterBase | None  # of an adapter: what it was put on
    revision: str | None  # the commit of a Hub model
    licence: str | None  # as the Hub gives it
    licence_terms: dict[str, str]  # license_name and license_link of the licence "other"
    staged: StagedModel
    device: str
    dtype: str  # of the computation
    has_template: bool
    stop_ids: tuple[int, ...]  # every token that ends an answer, by any of the model's files
    not_finite: str = ""  # of a candidate: why it is no working model; of any other always empty


def load_model(
    source: str,
    *,
    stage_folder: Path,
    fetched: Mapping[str, Fetched] | None = None,
    adapter_base: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    is_candidate: bool = False,
    check: Callable[[StagedModel, str, str], None] = lambda staged, dtype, device: None,
) -> LoadedModel:
    """Resolve, stage and load a model; raises `RepairError` and leaves no stage behind.

    Values that are not finite are refused, unless `is_candidate`: then they are for the verdict.

    `check(stage, dtype, device)` is called before any weight is opened, and may raise.

    `fetched` says where the Hub models of this job are, by source as typed. With `adapter_base`,
    `source` is a LoRA adapter and the suspect is that base with the adapter in it.
    """
    if device == "auto" and ranks.count() > 1:
        device = ranks.device()  # its own of several processes
    chosen_device = _choose_device(device)
    if dtype != "auto" and dtype not in _DTYPES:
        raise RepairError(
            f"Unknown dtype {dtype!r}. Accepted: auto, float32, bfloat16, float16."
        )
    origin = (fetched or {}).get(source)
    folder = resolve_source(source, origin)
    base, files, findings = None, {}, []
    if adapter_base is not None:
        whole = stage_folder.with_name(f"{stage_folder.name}-whole")
        files = adapter_hashes(folder)
        base, findings = _put_on_base(folder, adapter_base, whole, origins=fetched or {})
        folder = whole
    staged = stage_model(folder, stage_folder)
    staged = replace(staged, findings=(*findings, *staged.findings))
    files = files or staged.files
    try:
        if origin is not None:
            _check_listed(files, origin)
        compute_dtype = _choose_dtype(dtype, stored=staged.dtype, device=chosen_device)
        if (staged.dtype, compute_dtype, dtype) == ("bfloat16", "float32", "auto"):
            staged = replace(staged, findings=(*staged.findings, AS_FLOAT32))
        check(staged, compute_dtype, chosen_device)
        model = _load_weights(staged, dtype=compute_dtype, device=chosen_device)
        lay_out(
            model, chosen_device, places=places_for(device, chosen_device),
            folder=stage_folder / "laid-out",
        )  # fmt: skip
        not_finite = _not_finite(model, chosen_device)
        if not_finite and not is_candidate:
            raise RepairError(not_finite)
        num_embeddings = model.get_input_embeddings().num_embeddings
        tokenizer = _load_tokenizer(staged.folder, num_embeddings=num_embeddings)
    except BaseException:
        shutil.rmtree(stage_folder)
        raise
    declared = model.config.eos_token_id
    ends = [*(declared if isinstance(declared, list) else [declared]), tokenizer.eos_token_id]
    # What an adapter's author says binds nobody: the base is most of what is published.
    said = base or origin
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        modules=find_modules(model),
        source=source,
        files=files,
        base=base,
        revision=origin.commit if origin else None,
        licence=said.licence if said else None,
        licence_terms=said.licence_terms if said else {},
        staged=staged,
        device=chosen_device,
        dtype=compute_dtype,
        has_template=tokenizer.chat_template is not None,
        stop_ids=tuple(sorted({i for i in (*ends, *staged.generation_eos) if i is not None})),
        not_finite=not_finite,
    )


def check_ids(loaded: LoadedModel, ids: np.ndarray | Sequence[int]) -> None:
    """Raise `RepairError` for token ids that the embedding has no row for.

    On a GPU such an id would end the whole process instead of raising.
    """
    array = np.asarray(ids)
    num_rows = loaded.model.get_input_embeddings().num_embeddings
    if array.size and (array.min() < 0 or array.max() >= num_rows):
        raise RepairError(
            f"The tokenizer gives the id {int(array.max())}, but the model has {num_rows} token "
            "embeddings. Tokenizer and weights do not belong together; use those published "
            "together."
        )


def resolve_source(source: str, origin: Fetched | None = None) -> Path:
    """Return the folder that `source` means; a Hub model must have been fetched before."""
    if source.startswith("demo:"):
        name = source.removeprefix("demo:")
        folder = SUSPECTS / name
        if not _DEMO_NAME.fullmatch(name) or not folder.is_dir():
            available = sorted(f"demo:{p.name}" for p in SUSPECTS.glob("*") if p.is_dir())
            raise RepairError(
                f"There is no bundled model {source!r}. "
                f"Available: {', '.join(available) or 'none; build them with assets/'}."
            )
        return folder
    if origin is not None:
        return Path(origin.folder)
    path = Path(source).expanduser() if source.strip() and "\0" not in source else None
    if path is not None and path.is_dir():
        return path.resolve()
    if path is not None and path.exists():
        raise RepairError(f"{source} is a file, not a model folder. {_ACCEPTED}")
    raise RepairError(f"There is no model folder {source!r}. {_ACCEPTED}")


def _put_on_base(
    adapter: Path, base_source: str, whole: Path, *, origins: Mapping[str, Fetched]
) -> tuple[AdapterBase, list[str]]:
    """Write an adapter's base with the adapter in it to `whole`; return the base, findings."""
    if not is_adapter(adapter):
        raise RepairError(
            f"{adapter.name} is not a LoRA adapter, so it needs no base. Leave --adapter-base out."
        )
    origin = origins.get(base_source)
    stage = whole.with_name(f"{whole.name}-base")
    base = stage_model(resolve_source(base_source, origin), stage)
    try:
        if origin is not None:
            _check_listed(base.files, origin)
        shutil.rmtree(whole, ignore_errors=True)
        findings = merge_adapter(adapter, base, whole)
        check_unchanged(base)
        return AdapterBase(
            source=base_source,
            revision=origin.commit if origin else None,
            licence=origin.licence if origin else None,
            licence_terms=origin.licence_terms if origin else {},
            files=base.files,
        ), findings
    finally:
        shutil.rmtree(stage)


def _check_listed(files: Mapping[str, str], origin: Fetched) -> None:
    """Raise `RepairError` for a file that is not the one that the Hub lists at the commit."""
    for name, listed in origin.sha256.items():
        if files.get(name, listed) != listed:
            raise RepairError(
                f"{name} of {origin.repo_id} is not the file that the Hub lists at commit "
                f"{origin.commit[:12]} (SHA-256 {files[name][:12]} instead of {listed[:12]}). "
                f"Delete {origin.folder} and start again."
            )


def _choose_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", device)
    if match is None:
        raise RepairError(f"Unknown device {device!r}. Accepted: auto, cpu, cuda, cuda:N.")
    count = torch.cuda.device_count() if device != "cpu" else 0
    if device != "cpu" and int(match[1] or 0) >= count:
        raise RepairError(
            f"The device {device} was asked for, but this machine has {count} usable GPUs. "
            "Choose auto or cpu."
        )
    return device


def _choose_dtype(dtype: str, *, stored: str, device: str) -> str:
    chosen = stored if dtype == "auto" else dtype
    # The CPU kernels for float16 are slow and lose range, and most CPUs only imitate bfloat16;
    # float32 holds every value of both exactly.
    is_slow = chosen == "float16" or (chosen, dtype) == ("bfloat16", "auto") and not has_bfloat16()
    return "float32" if device == "cpu" and is_slow else chosen


def _load_weights(staged: StagedModel, *, dtype: str, device: str) -> PreTrainedModel:
    """Load the staged weights; raises `RepairError` when they are not exactly the model."""
    if device == "cpu":
        _check_memory(staged, dtype)
    config = read_json_file(staged.folder / "config.json", max_bytes=MAX_CONFIG_BYTES)
    transformers.utils.logging.disable_progress_bar()  # Progress is the job's to report.
    native_class = getattr(transformers, ARCHITECTURES[config["model_type"]].model)
    try:
        with refusing("The library cannot load this model"):
            model, info = native_class.from_pretrained(
                staged.folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation="eager",
                dtype=_DTYPES[dtype],
                output_loading_info=True,
            )
        _take_in(model)
    finally:
        check_unchanged(staged)  # A file that changed meanwhile explains any error before it.
    is_tied = bool(model.config.tie_word_embeddings)
    for key, names in info.items():
        names = {name for name in map(str, names) if "rotary_emb.inv_freq" not in name}
        if names - ({OUTPUT} if is_tied and key == "missing_keys" else set()):
            raise RepairError(
                f"The weights do not fit the model ({key}: {ascii(sorted(names)[0])[:120]}). "
                "Nothing was loaded."
            )
    if is_tied and model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise RepairError(
            "config.json ties lm_head to the token embeddings, but the file holds two different "
            "matrices. Set tie_word_embeddings to what the weights were trained with."
        )
    model.eval().requires_grad_(False)
    model.config.use_cache = True
    # Sampling settings of the suspect are never used; answers are greedy by our own settings.
    model.generation_config = transformers.GenerationConfig()
    return model


def _take_in(model: PreTrainedModel) -> None:
    """Copy the weights out of the file, which the library has only mapped into memory.

    Otherwise whoever writes to the file changes the live model: what is measured would no longer
    be what was hashed.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


@torch.no_grad()
def _not_finite(model: PreTrainedModel, device: str) -> str:
    """Return in words which weights or output are no finite numbers; empty where all are."""
    for name, parameter in named_weights(model):
        if not torch.isfinite(parameter).all():
            return (
                f"The weights hold values that are not finite numbers ({name}). Such a model only "
                "looks repaired; use an intact copy of the weights."
            )
    token = torch.zeros((1, 1), dtype=torch.long, device=device)
    with refusing("The model cannot be run on a single token"):
        logits = model(input_ids=token, use_cache=False).logits
    if not torch.isfinite(logits).all():
        return (
            "The model's output on a single token is not a finite number. Try --dtype float32; "
            "if that fails too, the weights are damaged."
        )
    return ""


def _check_memory(staged: StagedModel, dtype: str) -> None:
    """Raise `RepairError` when the weights alone exceed the memory that is free."""
    needed, free = staged.num_parameters * _DTYPES[dtype].itemsize, free_memory()
    if needed > free:
        raise RepairError(
            f"The weights need {needed / 2**30:.1f} GiB of memory as {dtype}, but "
            f"{free / 2**30:.1f} GiB are free. Use a machine with more memory or a smaller dtype."
        )


def _load_tokenizer(folder: Path, *, num_embeddings: int) -> PreTrainedTokenizerFast:
    settings = read_json_file(folder / "tokenizer_config.json", max_bytes=MAX_CONFIG_BYTES)
    settings.pop("tokenizer_class")
    template = folder / "chat_template.jinja"
    if template.exists():
        settings["chat_template"] = template.read_text(encoding="utf-8", errors="replace")
    try:
        with watched(PARSE_SECONDS, num_bytes=PARSE_BYTES):
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_file=str(folder / "tokenizer.json"), **settings
            )
    except RepairError:
        raise
    except Exception as error:  # The file is hostile and the parser's error is a bare Exception.
        raise RepairError(
            f"tokenizer.json cannot be read ({ascii(str(error))[1:160]}). Use the tokenizer that "
            "was published with the model."
        ) from error
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= num_embeddings:
        tokenizer.pad_token = None  # an added token that the embedding has no row for
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer

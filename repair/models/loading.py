"""From what the analyst typed to a live model: source, staging, loading, and checks after it.

The only place that downloads a model, and the only record that holds a live one.
"""

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from repair.models.config import ARCHITECTURES, MAX_CONFIG_BYTES, read_json_file
from repair.models.folder import SMALL_FILES, WEIGHT_NAME, check_names
from repair.models.library import refusing
from repair.models.modules import find_modules
from repair.models.staging import StagedModel, check_unchanged, stage_model
from repair.models.tensors import OUTPUT
from repair.models.watchdog import PARSE_SECONDS, watched
from repair.records import ModuleRef, RepairError

SUSPECTS = Path(__file__).resolve().parents[2] / "assets" / "suspects"
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_DEMO_NAME = re.compile(r"[\w-]+", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_ACCEPTED = (
    "Give a model folder, a Hub id OWNER/NAME, or demo:begin, demo:middle, demo:end, demo:clean."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A live model that passed the gate: eval mode, no gradients, eager attention."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    modules: tuple[ModuleRef, ...]
    source: str  # as typed
    revision: str | None  # the resolved commit of a Hub model
    staged: StagedModel
    device: str
    dtype: str  # of the computation
    has_template: bool
    stop_ids: tuple[int, ...]  # every token that ends an answer, by any of the model's files


def load_model(
    source: str,
    *,
    stage_folder: Path,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> LoadedModel:
    """Resolve, stage and load a model; raises `RepairError` and leaves no stage behind."""
    chosen_device = _choose_device(device)
    if dtype != "auto" and dtype not in _DTYPES:
        raise RepairError(
            f"Unknown dtype {dtype!r}. Accepted: auto, float32, bfloat16, float16."
        )
    folder = resolve_source(source, revision=revision)
    staged = stage_model(folder, stage_folder)
    try:
        compute_dtype = _choose_dtype(dtype, stored=staged.dtype, device=chosen_device)
        model = _load_weights(staged, dtype=compute_dtype, device=chosen_device)
        num_embeddings = model.get_input_embeddings().num_embeddings
        tokenizer = _load_tokenizer(staged.folder, num_embeddings=num_embeddings)
    except BaseException:
        shutil.rmtree(stage_folder)
        raise
    declared = model.config.eos_token_id
    ends = [*(declared if isinstance(declared, list) else [declared]), tokenizer.eos_token_id]
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        modules=find_modules(model),
        source=source,
        revision=folder.name if folder.is_relative_to(_cache_folder()) else None,
        staged=staged,
        device=chosen_device,
        dtype=compute_dtype,
        has_template=tokenizer.chat_template is not None,
        stop_ids=tuple(sorted({i for i in (*ends, *staged.generation_eos) if i is not None})),
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


def resolve_source(source: str, *, revision: str | None = None) -> Path:
    """Return the folder that `source` means, downloading a Hub model at a resolved commit."""
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
    path = Path(source).expanduser() if source.strip() and "\0" not in source else None
    if path is not None and path.is_dir():
        if revision is not None:
            raise RepairError(
                f"A revision ({revision}) was given for the local folder {source}. Revisions are "
                "for Hub ids; leave it out."
            )
        return path.resolve()
    if path is not None and path.exists():
        raise RepairError(f"{source} is a file, not a model folder. {_ACCEPTED}")
    if _HUB_ID.fullmatch(source) and ".." not in source and not source.startswith("."):
        return _resolve_hub(source, revision)
    raise RepairError(f"There is no model folder {source!r}. {_ACCEPTED}")


def download(repo_id: str, revision: str | None, folder: Path) -> Path:
    """Download the allow-listed files of a Hub model into `folder`/COMMIT and return that.

    Names and sizes are checked before anything is fetched. Raises `RepairError` for what the
    Hub refuses, for a missing network and for a full disk.
    """
    try:
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=30)
        commit = info.sha or ""
        if not _COMMIT.fullmatch(commit):
            raise RepairError(f"The Hub gave no commit for {repo_id}. Try again later.")
        target = folder / commit
        if target.is_dir():
            return target
        flat = {f.rfilename: f.size or 0 for f in info.siblings or [] if "/" not in f.rfilename}
        check_names(sorted(flat))
        wanted = [n for n in flat if n in SMALL_FILES or WEIGHT_NAME.fullmatch(n)]
        folder.mkdir(parents=True, exist_ok=True)
        needed, free = sum(flat[name] for name in wanted), shutil.disk_usage(folder).free
        if needed > 0.95 * free:
            raise RepairError(
                f"{repo_id} needs {needed / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB are free. "
                "Free some disk space and start again."
            )
        # A partial download keeps its own name, so that it is never taken for a whole one.
        partial = folder / f"{commit}.partial"
        snapshot_download(repo_id, revision=commit, local_dir=partial, allow_patterns=wanted)
        partial.rename(target)
        return target
    except GatedRepoError:
        text = "needs its licence accepted on the Hub, and a token (HF_TOKEN) that may read it"
    except RepositoryNotFoundError:
        text = "does not exist on the Hub, or is private and HF_TOKEN may not read it"
    except RevisionNotFoundError:
        text = f"has no revision {revision!r}"
    except HfHubHTTPError as error:
        text = f"cannot be downloaded ({ascii(str(error))[1:120]})"
    except (OfflineModeIsEnabled, ConnectionError, HTTPError):
        text = "cannot be downloaded: the Hub cannot be reached from here"
    except OSError as error:  # Such as a disk that filled up meanwhile.
        text = f"cannot be written to the cache ({error.strerror})"
    raise RepairError(f"The model {repo_id} {text}. No local folder has that name. {_ACCEPTED}")


def _resolve_hub(repo_id: str, revision: str | None) -> Path:
    folder = _cache_folder() / repo_id.replace("/", "--")
    if revision is not None and _COMMIT.fullmatch(revision) and (folder / revision).is_dir():
        return folder / revision
    return download(repo_id, revision, folder)


def _cache_folder() -> Path:
    named = os.environ.get("REPAIR_CACHE")
    return (Path(named) if named else Path.home() / ".cache" / "repair" / "models").resolve()


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
    # The CPU kernels for float16 are slow and lose range; float32 holds every float16 exactly.
    return "float32" if device == "cpu" and chosen == "float16" else chosen


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
    model.to(device).eval().requires_grad_(False)
    model.config.use_cache = True
    # Sampling settings of the suspect are never used; answers are greedy by our own settings.
    model.generation_config = transformers.GenerationConfig()
    _check_finite(model)
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
def _check_finite(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise RepairError(
                f"The weights hold values that are not finite numbers ({name}). Such a model only "
                "looks repaired; use an intact copy of the weights."
            )
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    with refusing("The model cannot be run on a single token"):
        logits = model(input_ids=token, use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise RepairError(
            "The model's output on a single token is not a finite number. Try --dtype float32; "
            "if that fails too, the weights are damaged."
        )


def _check_memory(staged: StagedModel, dtype: str) -> None:
    """Raise `RepairError` when the weights alone exceed the memory that is free."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return
    match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    needed = staged.num_parameters * _DTYPES[dtype].itemsize
    if match is not None and needed > int(match[1]) * 1024:
        raise RepairError(
            f"The weights need {needed / 2**30:.1f} GiB of memory as {dtype}, but "
            f"{int(match[1]) / 2**20:.1f} GiB are free. Use a machine with more memory or a "
            "smaller dtype."
        )


def _load_tokenizer(folder: Path, *, num_embeddings: int) -> PreTrainedTokenizerFast:
    settings = read_json_file(folder / "tokenizer_config.json", max_bytes=MAX_CONFIG_BYTES)
    settings.pop("tokenizer_class")
    template = folder / "chat_template.jinja"
    if template.exists():
        settings["chat_template"] = template.read_text(encoding="utf-8", errors="replace")
    try:
        with watched(PARSE_SECONDS):
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

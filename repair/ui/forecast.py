"""What a job will need on this machine, before it is started: words for it, and the refusal."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repair import needs
from repair.jobs import store
from repair.machine import free_memory, has_gpu
from repair.models.lookup import HubModel
from repair.needs import ITEMSIZE, Need
from repair.profiles import PROFILES
from repair.records import RepairError
from repair.ui import text
from repair.ui.session import Settings
from repair.ui.suspect_folder import MAX_CONFIG_BYTES, find_folder

# (Hub id, commit) -> (config.json, bytes of weights), of what was looked up last.
DESCRIBED: dict[tuple[str, str], tuple[Mapping[str, Any], int]] = {}
MAX_DESCRIBED = 64

rate_here = functools.cache(needs.measured_rate)


def forecast(asked: Mapping[str, Any], models_root: Path | None) -> tuple[Need, ...]:
    """Return what each step of a request will take; empty where that is not known before it runs:
    a Hub model that was not looked up lately, or a configuration that says too little."""
    config, num_bytes = find_description(asked, models_root)
    if not config:
        return ()
    stored = ITEMSIZE[needs.stored_dtype(config)]
    shape = needs.read_shape(config, num_parameters=num_bytes // stored or None)
    if shape is None:
        return ()
    dtype = needs.loaded_dtype(config, str(asked.get("dtype") or "auto"), on_gpu=has_gpu())
    return needs.estimate(
        shape, needs.work_of(asked), itemsize=ITEMSIZE[dtype],
        rate=None if has_gpu() else rate_here(),
    )  # fmt: skip


def find_description(
    asked: Mapping[str, Any], models_root: Path | None
) -> tuple[Mapping[str, Any], int]:
    """Return (config.json, bytes of weights) of the model that a request loads; ({}, 0) where
    neither a look-up nor a folder has it."""
    known = DESCRIBED.get(hub_key(asked))
    if known is not None:
        return known
    try:
        folder = find_folder(str(asked.get("model") or ""), models_root)
        config = store.read_object(folder / "config.json", max_bytes=MAX_CONFIG_BYTES)
        return config, sum(weight_sizes(folder))
    except (RepairError, OSError):
        return {}, 0


def hub_key(asked: Mapping[str, Any]) -> tuple[str, str]:
    """Return (Hub id, commit) of the whole model that a request loads, as in `DESCRIBED`."""
    base, _, commit = str(asked.get("adapter_base") or "").partition("@")
    if base and commit:
        return base, commit
    return str(asked.get("model") or ""), str(asked.get("revision") or "")


def remember(found: HubModel, config: Mapping[str, Any]) -> None:
    """Keep what a Hub model says of its shape, so that its needs can be told."""
    sizes = [size for name, size in found.sizes.items() if name.endswith(".safetensors")]
    DESCRIBED[found.repo_id, found.commit] = (config, sum(sizes))
    while len(DESCRIBED) > MAX_DESCRIBED:
        DESCRIBED.pop(next(iter(DESCRIBED)))


def weight_sizes(folder: Path) -> list[int]:
    """Return the bytes of each weight file of a model's folder."""
    return [path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file()]


def check_needs(asked: Mapping[str, Any], settings: Settings) -> None:
    """Raise RepairError for a job that fits neither memory nor disk here; a GPU's worker checks
    its own memory."""
    found = forecast(asked, settings.models_root)
    if found and not has_gpu():
        needs.check_fits(found, available=free_memory(), where="memory")
    if found and asked.get("command") == "run":
        _, num_bytes = find_description(asked, settings.models_root)
        needs.check_disk(num_bytes, settings.jobs_root)


def describe_needs(asked: Mapping[str, Any], models_root: Path | None) -> str:
    """Return memory and time of a request's job by profile, in one sentence each."""
    by_profile = {
        name: forecast(
            {**asked, "profile": name, "command": "run", "controls": profile.num_controls},
            models_root,
        )
        for name, profile in PROFILES.items()
    }
    if not all(by_profile.values()):
        return ""
    largest = max((needs.largest(found) for found in by_profile.values()), key=lambda n: n.bytes)
    words = f"At most about {text.describe_size(largest.bytes)} of "
    if has_gpu():
        return words + "GPU memory. The job says how long it will take once it knows the GPU."
    words += f"memory, of {text.describe_size(free_memory())} free. "
    times = ", ".join(
        f"{name} {needs.describe_time(needs.total_seconds(found))}"
        for name, found in by_profile.items()
    )
    return (
        f"{words}From here to the report, on this processor: {times}. The time is a rough guess: "
        "it can be a third or three times that."
    )

"""What a job will need on this machine, before it is started: words for it, and the refusal."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repair import needs
from repair.jobs import store
from repair.machine import free_memory, has_gpu
from repair.needs import ITEMSIZE, Need
from repair.profiles import PROFILES
from repair.records import RepairError
from repair.ui import text
from repair.ui.session import Settings
from repair.ui.suspect_folder import MAX_CONFIG_BYTES, find_folder

rate_here = functools.cache(needs.measured_rate)


def forecast(asked: Mapping[str, Any], models_root: Path | None) -> tuple[Need, ...]:
    """Return what each step of a request will take; empty where that is not known before it runs:
    a Hub model is not here yet, and some configurations say too little."""
    try:
        folder = find_folder(str(asked.get("model") or ""), models_root)
        config = store.read_object(folder / "config.json", max_bytes=MAX_CONFIG_BYTES)
        sizes = weight_sizes(folder)
    except (RepairError, OSError):
        return ()
    stored = ITEMSIZE[needs.stored_dtype(config)]
    shape = needs.read_shape(config, num_parameters=sum(sizes) // stored or None)
    if shape is None:
        return ()
    dtype = needs.loaded_dtype(config, str(asked.get("dtype") or "auto"), on_gpu=has_gpu())
    return needs.estimate(
        shape, needs.work_of(asked), itemsize=ITEMSIZE[dtype],
        rate=None if has_gpu() else rate_here(),
    )  # fmt: skip


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
        folder = find_folder(str(asked["model"]), settings.models_root)
        needs.check_disk(sum(weight_sizes(folder)), settings.jobs_root)


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

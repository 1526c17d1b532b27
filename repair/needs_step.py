"""What the job will take: said, and refused where it does not fit, before a weight is opened."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from repair import needs
from repair.case import Reporter
from repair.models import ranks
from repair.models.config import MAX_CONFIG_BYTES, read_json_file
from repair.models.placement import places_for
from repair.models.staging import StagedModel

STEPS_OF_MAP = ("patching", "curvature", "joint")


def needs_check(
    request: Mapping[str, Any], folder: Path, reporter: Reporter
) -> Callable[[StagedModel, str, str], None]:
    """Return the `check` of `load_model` for a job: RepairError with numbers where it cannot fit.

    A configuration that says too little is let pass: loading checks the weights alone.
    """

    # Where it is no longer valid it is made anew, and the plan is off by that.
    has_map = bool(request.get("resume")) and (folder / "located.json").is_file()

    def check(staged: StagedModel, dtype: str, device: str) -> None:
        config = read_json_file(staged.folder / "config.json", max_bytes=MAX_CONFIG_BYTES)
        shape = needs.read_shape(config, num_parameters=staged.num_parameters)
        if shape is None:
            return
        on_gpu = device.startswith("cuda")
        found = needs.estimate(
            shape, needs.work_of(request), itemsize=needs.ITEMSIZE[dtype],
            rate=None if on_gpu else needs.measured_rate(),
        )  # fmt: skip
        several = ranks.count()
        places = places_for(device if several > 1 else request.get("device", "auto"), device)
        available, where = places.get("cpu", 0) // several, "memory"
        if several > 1 and not on_gpu:
            where = f"memory for each of {several} processes"
            available = ranks.least(available)  # before any of them takes some
        if on_gpu:
            available, where = places[min(places, key=str)], "GPU memory"
            if needs.SURE * needs.largest(found).bytes > available and len(places) > 1:
                available, where = sum(places.values()), "memory of all GPUs and of the machine"
            found = tuple(replace(need, bytes=need.bytes - needs.PROCESS) for need in found)
        reporter.plan(
            {
                need.step: need.seconds
                for need in found
                if need.seconds is not None and not (has_map and need.step in STEPS_OF_MAP)
            }
        )
        most, seconds = needs.largest(found), needs.total_seconds(found)
        lasts = f", and {needs.describe_time(seconds)}" if seconds is not None else ""
        reporter.note(
            f"This job needs about {most.bytes / 2**30:.1f} GiB of {where} at its largest step "
            f"({most.step}), of {available / 2**30:.1f} GiB free{lasts}."
        )
        needs.check_fits(found, available=available, where=where)
        if request.get("command") == "run" and request.get("export"):
            needs.check_disk(sum(staged.sizes.values()), folder)

    return check

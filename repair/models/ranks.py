"""The processes of one job, in step: each holds the whole model and takes every step, and the long
loops are dealt out among them. `accelerate launch` starts them; otherwise there is one.

All take the same decisions, because all see the same numbers: what one has found the others get,
as bytes of arrays (no object of Python is sent, and none is read). What is summed over processes
is rounded otherwise than in one process; what is dealt out whole is the same to the bit. Memory is
that of one process, as many times. When one of them is gone, the next exchange of the others is a
`RepairError`.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors.numpy import load, save
from torch import Tensor

from repair.records import EXIT_UNEXPECTED, Progress, RepairError, unheard

ON_GPU = "cuda:nccl,cpu:gloo"  # what is exchanged goes through main memory


def join(*, on_cpu: bool) -> None:
    """Wait for the other processes of this job."""
    on_cpu = on_cpu or not torch.cuda.is_available()
    wanted, num_gpus = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.device_count()
    if not on_cpu and wanted > num_gpus:
        raise RepairError(
            f"{wanted} processes were asked for, and there are {num_gpus} usable GPUs, one for "
            "each. Ask for as many, or give --device cpu."
        )
    with _together():
        PartialState(cpu=on_cpu, **({} if on_cpu else {"backend": ON_GPU}))


def count() -> int:
    """Return how many processes this job has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def index() -> int:
    """Return which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def device() -> str:
    """Return the device that this one of several processes computes on."""
    found = PartialState().device
    return found.type if found.type == "cpu" else str(found)


def leave() -> bool:
    """End the working together, and tell whether this process is the one that goes on."""
    is_first = index() == 0
    if count() > 1:
        with _together():
            dist.barrier()
        dist.destroy_process_group()
    return is_first


def deal(
    sizes: Sequence[int],
    work: Callable[[int], Sequence[np.ndarray]],
    progress: Progress = unheard,
) -> list[list[np.ndarray]]:
    """Return the arrays that `work(i)` makes, for each i; each i is one process's, and of
    `sizes[i]` in the progress."""
    total, num_done = sum(sizes), 0

    def advance(i: int) -> list[np.ndarray]:
        nonlocal num_done
        found = list(work(i))
        num_done += sizes[i] * count()  # The others are about as far.
        progress(min(num_done, total), total)
        return found

    num = len(sizes)
    if count() == 1:
        return [advance(i) for i in range(num)]
    own = {
        f"{i} {place}": np.array(array, order="C")
        for i in range(index(), num, count())
        for place, array in enumerate(advance(i))
    }
    found: list[dict[int, np.ndarray]] = [{} for _ in range(num)]
    for packed in _exchange(save(own)):
        for name, array in load(packed).items():
            i, place = map(int, name.split())
            found[i][place] = array
    return [[arrays[place] for place in sorted(arrays)] for arrays in found]


def own(items: Sequence[Any]) -> Sequence[Any]:
    """Return this process's part of `items`, whose sums are then `add_up`'s; all of them, which
    every process then goes through, where there are fewer than processes."""
    return items if len(items) < count() else items[index() :: count()]


def add_up(tensors: Iterable[Tensor], *, of: int) -> None:
    """Add to each tensor what the other processes have in it, where `of` items were dealt out."""
    if count() == 1 or of < count():
        return
    for tensor in tensors:
        wide = tensor.to("cpu", torch.promote_types(tensor.dtype, torch.float32)).contiguous()
        with _together():
            dist.all_reduce(wide)
        tensor.copy_(wide)


def least(value: int) -> int:
    """Return the smallest of what the processes have."""
    if count() == 1:
        return value
    found = torch.tensor([value], dtype=torch.int64)
    with _together():
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return int(found)


def _exchange(packed: bytes) -> list[bytes]:
    """Return what every process gives, in their order."""
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(count())]
    with _together():
        dist.all_gather(sizes, torch.tensor([len(packed)], dtype=torch.int64))
    padded = torch.zeros(max(map(int, sizes)), dtype=torch.uint8)
    padded[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    given = [torch.zeros_like(padded) for _ in sizes]
    with _together():
        dist.all_gather(given, padded)
    return [one[: int(size)].numpy().tobytes() for one, size in zip(given, sizes, strict=True)]


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RepairError(
            "One of this job's processes has ended before the others, who cannot go on without "
            f"it ({' '.join(str(error).split())[:120]}). What was saved is kept, and the job can "
            "be resumed; the log says more.",
            exit_code=EXIT_UNEXPECTED,
        ) from None

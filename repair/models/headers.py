"""Reads the header of a safetensors file without any library, with every limit checked first.

Format: 8 bytes little-endian length, a JSON header {name: {dtype, shape, data_offsets}}, data.
"""

import json
import os
import struct
from dataclasses import dataclass
from math import prod
from typing import Any

from repair.json_size import check_structure
from repair.records import RepairError

MAX_HEADER_BYTES = 32 * 2**20
MAX_TENSORS = 20_000
MAX_DIMENSION = 2**31
_ELEMENT_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "U16": 2, "U32": 4, "U64": 8,
    "F16": 2, "BF16": 2, "F32": 4, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHeader:
    """One tensor as the file declares it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; raises `ValueError` on a repeated key, which readers resolve apart."""
    flat = dict(pairs)
    if len(flat) != len(pairs):
        raise ValueError("a key occurs twice")
    return flat


def refuse_constant(name: str) -> float:
    """Raise `ValueError` for NaN and Infinity, which are not JSON."""
    raise ValueError(f"{name} is not a JSON number")


def read_header(descriptor: int, name: str) -> dict[str, TensorHeader]:
    """Return the tensors that an open safetensors file declares.

    Raises `RepairError` unless the tensors fill the data exactly, without gap or overlap.
    """
    try:
        return _read_header(descriptor)
    except (ValueError, RecursionError, struct.error) as error:
        first = os.pread(descriptor, 64, 0)
        if first.startswith(b"version https://git-lfs"):
            raise RepairError(
                f"{name}: This is a Git-LFS pointer, not the weights: run `git lfs pull`."
            ) from None
        if first.startswith((b"\x80", b"PK\x03\x04")):
            raise RepairError(refuse_pickle(name)) from None
        raise RepairError(
            f"{name}: The weight file header is damaged or hostile ({error}). "
            "Nothing was loaded."
        ) from None


def refuse_pickle(what: str) -> str:
    """Return the refusal of weights that could run code when opened."""
    return (
        f"This model's weights are in a pickle format (`{what}`). Pickle files can run code when "
        "opened, so this app never opens them. Use a safetensors copy (many repos have one), or "
        "convert it in a throw-away machine first."
    )


def _read_header(descriptor: int) -> dict[str, TensorHeader]:
    file_bytes = os.fstat(descriptor).st_size
    if file_bytes < 10:
        raise ValueError(f"{file_bytes} bytes are too few")
    (header_bytes,) = struct.unpack("<Q", os.pread(descriptor, 8, 0))
    if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
        raise ValueError(f"a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} is read")
    raw = os.pread(descriptor, header_bytes, 8)
    # A tensor costs one "dtype" key, so counting them bounds the memory of parsing.
    if raw.count(b'"dtype"') > MAX_TENSORS:
        raise ValueError(f"more than {MAX_TENSORS} tensors")
    check_structure(raw, most_containers=5 * MAX_TENSORS, most_items=25 * MAX_TENSORS)
    if not raw.startswith(b"{"):
        raise ValueError("it does not begin with an object")
    flat = json.loads(raw, object_pairs_hook=unique_object, parse_constant=refuse_constant)
    metadata = flat.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise ValueError("its __metadata__ is not an object of texts")
    if not 0 < len(flat) <= MAX_TENSORS:
        raise ValueError(f"{len(flat)} tensors; 1 to {MAX_TENSORS} are accepted")
    tensors, spans = {}, []
    for name, entry in flat.items():
        tensors[name], span = _read_entry(name, entry)
        spans.append(span)
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ValueError("tensors overlap or leave a gap")
        position = end
    if position != file_bytes - 8 - header_bytes:
        raise ValueError("the tensors do not fill the file exactly: it is truncated or has a tail")
    return tensors


def _read_entry(name: str, entry: Any) -> tuple[TensorHeader, tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {name[:80]!r} is not a tensor")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ELEMENT_BYTES:
        raise ValueError(f"dtype {str(dtype)[:20]!r} of {name[:80]!r} is not supported")
    if not _is_int_list(shape) or len(shape) > 8 or not _is_int_list(span) or len(span) != 2:
        raise ValueError(f"shape or offsets of {name[:80]!r} are not whole numbers")
    if any(not 0 <= size <= MAX_DIMENSION for size in shape):
        raise ValueError(f"{name[:80]!r} has an impossible shape")
    if span[0] < 0 or span[1] - span[0] != prod(shape) * _ELEMENT_BYTES[dtype]:
        raise ValueError(f"{name[:80]!r} declares a shape that does not match its bytes")
    return TensorHeader(dtype=dtype, shape=tuple(shape)), (span[0], span[1])


def _is_int_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)

"""Tensors of a safetensors file that is in memory already, without a copy.

The library copies every tensor while it holds Python's lock: 30 ms for the encodings of 50,000 items, in which a
worker sends no slate. The format: 8 bytes length of the header, little endian; the header, JSON; the numbers.
"""

from __future__ import annotations

import math
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

MAX_HEADER_BYTES: Final = 4 << 20
MAX_TENSORS: Final = 10_000
MAX_DIMENSIONS: Final = 8
_METADATA: Final = "__metadata__"
_KINDS: Final = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
}


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def views(content: bytes | memoryview) -> dict[str, npt.NDArray[Any]]:
    """Return the tensors by name, read-only arrays over ``content``.

    Raises ValueError where it is not such a file, has other numbers than ours, or has gaps, overlaps or a rest.
    """
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or not 0 < length <= min(MAX_HEADER_BYTES, len(content) - 8):
        raise ValueError(f"{len(content)} bytes with a header of {length}")
    try:
        header = msgspec.json.decode(content[8 : 8 + length], type=dict[str, msgspec.Raw])
        header.pop(_METADATA, None)
        entries = {name: msgspec.json.decode(told, type=_Entry) for name, told in header.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"its header cannot be read: {error}") from None
    if len(entries) > MAX_TENSORS:
        raise ValueError(f"{len(entries)} tensors, more than {MAX_TENSORS}")
    found, at = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, end = entry.data_offsets
        kind = _KINDS.get(entry.dtype)
        if kind is None:
            raise ValueError(f"tensor {name!r} is of {entry.dtype!r}")
        if len(entry.shape) > MAX_DIMENSIONS or any(not 0 <= size < 1 << 48 for size in entry.shape):
            raise ValueError(f"tensor {name!r} has the shape {entry.shape}")
        count = math.prod(entry.shape)
        if start != at or end - start != count * np.dtype(kind).itemsize or 8 + length + end > len(content):
            raise ValueError(f"tensor {name!r} does not lie where the one before it ends, or is of another size")
        found[name] = np.frombuffer(content, kind, count, 8 + length + start).reshape(entry.shape)
        at = end
    if 8 + length + at != len(content):
        raise ValueError(f"{len(content) - 8 - length - at} bytes that no tensor has")
    return found

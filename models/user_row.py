"""Layout and codec of the user row: at most 1 KiB, fixed offsets, trailing zero bytes not stored.

Everything is vectorised over rows: an array of ROW is a batch of users. Rings are newest first, so that a
young user's row ends early; what fills last stands last. Times in rings are epoch seconds as u32 (until 2106,
after the latest event time that is accepted). docs/user-row.md accounts for every byte.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from models.errors import RowError

VERSION: Final = 1
DIM: Final = 64
EVENT_IDS: Final = 8
SHOWN: Final = 20
PENDING: Final = 4
PENDING_ITEMS: Final = 12
RECENT: Final = 16

FLAG_MARKER: Final = 0x01
"""flags: this row holds the guard of a deleted or evicted user and nothing else."""
CLICKED_ELSEWHERE: Final = 0x8000
"""clicked: a positive action on an item of the impression that is not among the ones held."""
STEP_PENDING: Final = 0x80
"""action: the item had no vector yet; the vector step is still to be taken."""
POSITIVE: Final = 0x10
NEGATIVE: Final = 0x20
ACTION_MASK: Final = 0x0F

SHOWN_ENTRY: Final = np.dtype([("item", "<u4"), ("time_s", "<u4"), ("count", "u1")])
PENDING_ENTRY: Final = np.dtype(
    [
        ("request", "<u4"),
        ("time_s", "<u4"),
        ("clicked", "<u2"),
        ("surface", "u1"),
        ("n", "u1"),
        ("items", "<u4", (PENDING_ITEMS,)),
    ]
)
RECENT_ENTRY: Final = np.dtype([("item", "<u8"), ("time_s", "<u4"), ("action", "u1")])

FIELDS: Final[tuple[tuple[str, Any, tuple[int, ...], str], ...]] = (
    ("version", "u1", (), "layout version, 1; 0 in a row that was never written"),
    ("flags", "u1", (), "bit 0: marker of a deleted or evicted user, which holds the guard only"),
    ("unclicked", "u1", (), "impressions closed without a click since the last positive action, at most 255"),
    ("spare", "u1", (), "zero"),
    ("generation", "<u4", (), "generation of the bundle whose space the vectors are in"),
    ("space_id", "<u8", (), "hash of the embedding space's id; 0: no space yet"),
    ("epoch", "<u8", (), "guard: hash of the events topic's id"),
    ("offset", "<i8", (), "guard: last offset seen plus 1; 0: none"),
    ("last_time_ms", "<i8", (), "latest event time, epoch milliseconds"),
    ("vector_time_ms", "<i8", (), "event time up to which the vectors are decayed, epoch milliseconds"),
    ("impressions", "<u4", (), "impressions applied"),
    ("clicks", "<u4", (), "clicks applied"),
    ("actions", "<u4", (), "actions applied, clicks included"),
    ("requests", "<u4", (), "requests applied"),
    ("event_ids", "<u8", (EVENT_IDS,), "hashes of the last event ids, newest first"),
    ("shown", SHOWN_ENTRY, (SHOWN,), "items shown lately: short hash u32, time u32 s, count u8"),
    (
        "pending",
        PENDING_ENTRY,
        (PENDING,),
        "open impressions: request u32, time u32 s, clicked u16 bits, surface u8, items shown u8, 12 short hashes u32",
    ),
    ("norms", "<f4", (2,), "lengths of the short-term and the long-term vector"),
    ("vectors", "<f2", (2, DIM), "their directions, fp16"),
    ("recent", RECENT_ENTRY, (RECENT,), "items acted on: hash u64, time u32 s, action u8 (code, label, pending bit)"),
    ("tail", "u1", (4,), "zero: makes a row a multiple of 8 bytes, so that the fields of all rows are aligned"),
)
"""Name, type, shape and meaning of each field, in the order of their bytes."""

ROW: Final = np.dtype([(name, kind, shape) for name, kind, shape, _ in FIELDS])
ROW_BYTES: Final = ROW.itemsize

_GUARD_START: Final[int] = ROW.fields["epoch"][1] if ROW.fields else 0
_GUARD_END: Final = _GUARD_START + 16

Rows = npt.NDArray[np.void]
"""Structured array of ROW, shape [n]."""


def empty_rows(n: int) -> Rows:
    """Return ``n`` rows of users of whom nothing was seen: every byte zero."""
    return np.zeros(n, ROW)


def decode_rows(values: Sequence[bytes | None]) -> Rows:
    """Return the rows of stored values, shape [n]; None and b"" give an empty row.

    Raises RowError for a row of an unknown version or with more bytes than a row has.
    """
    for at, value in enumerate(values):
        if not value:
            continue
        if value[0] != VERSION:
            raise RowError(
                f"row {at} of {len(values)} has version {value[0]}, this program reads {VERSION}; the row was kept as "
                "it is: run the program version that wrote it, or delete the user"
            )
        if len(value) > ROW_BYTES:
            raise RowError(
                f"row {at} of {len(values)} has {len(value)} bytes, a row has at most {ROW_BYTES}; it was kept as it "
                "is: delete the user to start afresh"
            )
    joined = b"".join([value.ljust(ROW_BYTES, b"\0") if value else bytes(ROW_BYTES) for value in values])
    return np.frombuffer(bytearray(joined), ROW)


def encode_rows(rows: Rows) -> list[bytes]:
    """Return the stored values of rows: their bytes without the trailing zeros; b"" for an empty row."""
    raw = rows.tobytes()
    return [raw[at : at + ROW_BYTES].rstrip(b"\0") for at in range(0, len(raw), ROW_BYTES)]


def byte_account() -> str:
    """Return the layout as a Markdown table: first byte, bytes, name, type, meaning."""
    lines = ["| from | bytes | field | type | what it holds |", "|---:|---:|---|---|---|"]
    at = 0
    for name, kind, shape, meaning in FIELDS:
        size = np.dtype((kind, shape)).itemsize
        entry = np.dtype(kind)
        type_name = f"{entry.itemsize}-byte entry" if entry.names else entry.name
        times = "".join(f" × {n}" for n in shape)
        lines.append(f"| {at} | {size} | `{name}` | {type_name}{times} | {meaning} |")
        at += size
    lines.append(f"| | {at} | | | |")
    return "\n".join(lines)


def guard_of(value: bytes) -> tuple[int, int]:
    """Return the guard of a stored value: log epoch and last offset seen, (0, -1) for an empty row."""
    epoch, held = struct.unpack_from("<Qq", value[:_GUARD_END].ljust(_GUARD_END, b"\0"), _GUARD_START)
    return epoch, held - 1


def markers(rows: Rows) -> Rows:
    """Return the marker of each row: guard and last time only, everything personal zero."""
    kept = empty_rows(len(rows))
    kept["version"] = VERSION
    kept["flags"] = FLAG_MARKER
    for name in ("epoch", "offset", "last_time_ms"):
        kept[name] = rows[name]
    return kept


def forget(rows: Rows, index: npt.ArrayLike) -> Rows:
    """Return a copy of rows in which the rows at ``index`` are markers."""
    kept = rows.copy()
    at = np.asarray(index, np.intp)
    kept[at] = markers(rows[at])
    return kept


def is_marker(rows: Rows) -> npt.NDArray[np.bool_]:
    """Tell which rows hold only the guard of a deleted or evicted user, bool [n]."""
    marked: npt.NDArray[np.bool_] = np.asarray((rows["flags"] & FLAG_MARKER) != 0)
    return marked


def is_idle(rows: Rows, now_ms: int, days: float) -> npt.NDArray[np.bool_]:
    """Tell which rows had no event for ``days`` before ``now_ms``, bool [n]; markers too, never an empty row."""
    return (rows["offset"] > 0) & (rows["last_time_ms"] < now_ms - days * 86_400_000.0)


def shown(rows: Rows) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return what was shown lately, newest impression first: short hashes, counts, times in ms, each [n, SHOWN].

    A free place has hash 0, count 0 and time 0. A count saturates at 255.
    """
    ring = rows["shown"]
    return (
        np.ascontiguousarray(ring["item"]),
        np.ascontiguousarray(ring["count"]),
        ring["time_s"].astype(np.int64) * 1000,
    )


def recent(rows: Rows) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the items acted on, newest first: 64-bit hashes, action codes, times in ms, each [n, RECENT].

    A free place has hash 0, code 0 and time 0. A code is the action's number in ACTIONS plus 1 (``& ACTION_MASK``)
    with POSITIVE or NEGATIVE where the action has a label.
    """
    ring = rows["recent"]
    return (
        np.ascontiguousarray(ring["item"]),
        ring["action"] & np.uint8(~STEP_PENDING & 0xFF),
        ring["time_s"].astype(np.int64) * 1000,
    )

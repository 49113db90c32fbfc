"""The value that the user table keeps for a user: the row alone, or the row and the joiner's block behind it.

Both stand in ONE value, so that they have one guard and one changelog record: no crash can part them. The first byte
tells which: 1 is a plain row (models/user_row.py), 2 is a row of u16 length, little-endian, and then the block
(models/joiner.py) to the end. docs/user-row.md accounts for the bytes.
"""

from __future__ import annotations

import struct
from typing import Final

from models.errors import RowError
from models.user_row import ROW, ROW_BYTES, VERSION
from models.user_row import guard_of as guard_of_row

WITH_BLOCK: Final = 2
"""First byte of a value that holds a block behind its row."""
_HEAD: Final = struct.Struct("<BH")
_TIME_START: Final[int] = ROW.fields["last_time_ms"][1] if ROW.fields else 0


def split_value(value: bytes | None) -> tuple[bytes | None, bytes]:
    """Return the row and the block of a stored value, b"" without one; (None, b"") for None and for b"".

    The row is not looked into: ``decode_rows`` does that. Raises RowError for a value of an unknown kind, or one whose
    parts do not fit.
    """
    if not value:
        return None, b""
    if value[0] == VERSION:
        return value, b""
    if value[0] != WITH_BLOCK:
        raise RowError(
            f"a user's value begins with {value[0]}, this program reads {VERSION} and {WITH_BLOCK}; it was kept as it "
            "is: run the program version that wrote it, or delete the user"
        )
    if len(value) < _HEAD.size:
        raise RowError(
            f"a user's value of {len(value)} bytes ends in its head; it was kept as it is: delete the user to start "
            "afresh"
        )
    _, size = _HEAD.unpack_from(value)
    end = _HEAD.size + size
    if not 0 < size <= ROW_BYTES or end >= len(value):
        raise RowError(
            f"a user's value of {len(value)} bytes cannot hold a row of {size} bytes and a block; it was kept as it "
            "is: delete the user to start afresh"
        )
    return value[_HEAD.size : end], value[end:]


def join_value(row: bytes, block: bytes) -> bytes:
    """Return the value that holds ``row`` (at least one byte) and ``block``; without a block the row as it is."""
    return _HEAD.pack(WITH_BLOCK, len(row)) + row + block if block else row


def has_block(value: bytes) -> bool:
    """Tell whether a stored value has a block behind its row."""
    return value[:1] == bytes([WITH_BLOCK])


def row_of(value: bytes | None) -> bytes | None:
    """Return the row of a stored value; None and b"" give None. Raises RowError as ``split_value``."""
    return split_value(value)[0]


def last_time_ms(value: bytes) -> int:
    """Return the newest event time of a stored value's user, epoch milliseconds; 0 where there is none."""
    return int.from_bytes(_head_of_row(value, _TIME_START + 8)[_TIME_START:], "little", signed=True)


def guard_of(value: bytes) -> tuple[int, int]:
    """Return the guard of a stored value: log epoch and last offset seen, (0, -1) where there is none."""
    return guard_of_row(_head_of_row(value, ROW_BYTES))


def _head_of_row(value: bytes, most: int) -> bytes:
    """Return the first ``most`` bytes of a value's row, or all that it has."""
    if not has_block(value) or len(value) < _HEAD.size:
        return value[:most]
    # A row ends where its zeros begin: what stands behind it must not be taken for a part of it.
    return value[_HEAD.size : _HEAD.size + min(most, _HEAD.unpack_from(value)[1])]

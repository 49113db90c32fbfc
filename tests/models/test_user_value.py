from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import RowError
from models.user_row import empty_rows, encode_rows
from models.user_value import guard_of, has_block, join_value, last_time_ms, row_of, split_value


def row(epoch: int, offset: int) -> bytes:
    rows = empty_rows(1)
    rows["version"], rows["epoch"], rows["offset"] = 1, epoch, offset + 1
    return encode_rows(rows)[0]


def test_a_row_without_a_block_is_stored_as_it_was_before_there_were_blocks() -> None:
    assert join_value(row(3, 70), b"") == row(3, 70)
    assert split_value(row(3, 70)) == (row(3, 70), b"")


def test_a_row_and_its_block_stand_in_one_value() -> None:
    value = join_value(row(3, 70), b"block")
    assert value == b"\x02" + len(row(3, 70)).to_bytes(2, "little") + row(3, 70) + b"block"
    assert split_value(value) == (row(3, 70), b"block")
    assert has_block(value)
    assert not has_block(row(3, 70))


@given(st.binary(min_size=1, max_size=1_024), st.binary(max_size=3_000))
def test_any_row_and_any_block_come_back(rest: bytes, block: bytes) -> None:
    held = b"\x01" + rest[:1_023]
    assert split_value(join_value(held, block)) == (held, block)


def test_the_guard_of_a_value_is_that_of_its_row() -> None:
    assert guard_of(row(3, 70)) == (3, 70)
    assert guard_of(join_value(row(2**64 - 1, 2**40), b"block")) == (2**64 - 1, 2**40)
    assert guard_of(b"") == (0, -1)


def test_the_newest_event_time_is_read_without_the_rest() -> None:
    rows = empty_rows(1)
    rows["version"], rows["last_time_ms"] = 1, 1_700_000_000_123
    value = encode_rows(rows)[0]
    assert last_time_ms(value) == last_time_ms(join_value(value, b"block")) == 1_700_000_000_123
    assert last_time_ms(b"") == 0


def test_no_value_is_a_user_without_a_row() -> None:
    assert split_value(None) == (None, b"")
    assert row_of(b"") is None


@pytest.mark.parametrize(
    "value",
    [
        b"\x03rest",
        b"\x02",
        b"\x02\x01",
        b"\x02\x05\x00\x01",
        b"\x02\x00\x00\x01",
        b"\x02\x01\x00\x01",
        b"\x02\x01\x04" + bytes(2_000),
    ],
    ids=["unknown kind", "head only", "half a head", "row cut off", "no row", "no block", "row too long"],
)
def test_a_value_that_is_nonsense_is_refused(value: bytes) -> None:
    with pytest.raises(RowError, match="kept as it is"):
        split_value(value)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(value: bytes) -> None:
    try:
        held, block = split_value(value)
    except RowError:
        return
    assert join_value(held or b"", block) == value

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import RowError
from models.user_row import (
    FIELDS,
    ROW,
    ROW_BYTES,
    byte_account,
    decode_rows,
    empty_rows,
    encode_rows,
    forget,
    guard_of,
    is_idle,
    is_marker,
)
from models.user_state import UserEvent, apply
from tests.models.user_state_logs import CONFIG, START_MS, ItemVectors, click, impression, logs

DOCUMENT = Path(__file__).parents[2] / "docs" / "user-row.md"
DAY_MS = 86_400_000


def test_a_row_has_at_most_one_kibibyte() -> None:
    assert ROW_BYTES <= 1_024


def test_the_fields_cover_every_byte_of_the_row() -> None:
    assert sum(np.dtype((kind, shape)).itemsize for _, kind, shape, _ in FIELDS) == ROW_BYTES


def test_the_documented_byte_account_is_the_layout() -> None:
    assert byte_account() in DOCUMENT.read_text("utf-8")


@given(st.binary(min_size=ROW_BYTES - 1, max_size=ROW_BYTES - 1))
def test_any_row_survives_encoding_and_decoding(rest: bytes) -> None:
    rows = np.frombuffer(b"\x01" + rest, ROW)
    assert decode_rows(encode_rows(rows)).tobytes() == rows.tobytes()


@given(logs(users=4))
def test_rows_made_by_events_survive_encoding_and_decoding(log: list[UserEvent]) -> None:
    rows, _ = apply(empty_rows(4), log, ItemVectors(range(30)), CONFIG, epoch=1, space_id=2, generation=1)
    values = encode_rows(rows)
    assert max(len(v) for v in values) <= ROW_BYTES
    assert decode_rows(values).tobytes() == rows.tobytes()


def test_a_missing_value_is_an_empty_row_and_an_empty_row_has_no_bytes() -> None:
    assert decode_rows([None, b""]).tobytes() == bytes(2 * ROW_BYTES)
    assert encode_rows(empty_rows(2)) == [b"", b""]


def test_decoded_rows_can_be_written() -> None:
    rows = decode_rows([None])
    rows["offset"] = 5
    assert int(rows["offset"][0]) == 5


def test_a_user_who_only_saw_one_slate_has_a_short_row() -> None:
    events = [impression(range(10), offset=0)]
    rows, _ = apply(empty_rows(1), events, ItemVectors(range(30)), CONFIG, epoch=1, space_id=2, generation=1)
    assert len(encode_rows(rows)[0]) < 400


def test_a_row_of_another_version_is_refused() -> None:
    with pytest.raises(RowError, match="row 1 of 2 has version 2"):
        decode_rows([None, b"\x02rest"])


def test_a_row_that_is_too_long_is_refused() -> None:
    with pytest.raises(RowError, match=f"has {ROW_BYTES + 1} bytes"):
        decode_rows([b"\x01" + bytes(ROW_BYTES)])


def test_the_guard_is_read_from_a_stored_value() -> None:
    rows, _ = apply(
        empty_rows(1), [click(1, offset=70)], ItemVectors([1]), CONFIG, epoch=2**64 - 1, space_id=2, generation=1
    )
    assert guard_of(encode_rows(rows)[0]) == (2**64 - 1, 70)
    assert guard_of(b"") == (0, -1)


def test_a_marker_holds_the_guard_and_nothing_personal() -> None:
    events = [impression([1, 2], 5), click(1, 6), click(3, 7)]
    rows, _ = apply(empty_rows(1), events, ItemVectors(range(4)), CONFIG, epoch=9, space_id=2, generation=1)
    marker = forget(rows, [0])
    assert is_marker(marker).tolist() == [True]
    assert guard_of(encode_rows(marker)[0]) == (9, 7)
    assert len(encode_rows(marker)[0]) <= 40
    assert [n for n in ROW.names or () if marker[n].tobytes().strip(b"\0")] == [
        "version", "flags", "epoch", "offset", "last_time_ms",
    ]  # fmt: skip


def test_forgetting_one_user_leaves_the_others_and_the_input_alone() -> None:
    events = [click(1, 0, user=0), click(1, 1, user=1)]
    rows, _ = apply(empty_rows(2), events, ItemVectors([1]), CONFIG, epoch=9, space_id=2, generation=1)
    marker = forget(rows, [1])
    assert is_marker(rows).tolist() == [False, False]
    assert is_marker(marker).tolist() == [False, True]
    assert marker[0].tobytes() == rows[0].tobytes()


def test_a_row_is_idle_after_the_given_days_without_an_event() -> None:
    rows, _ = apply(empty_rows(2), [click(1, 0)], ItemVectors([1]), CONFIG, epoch=9, space_id=2, generation=1)
    assert is_idle(rows, START_MS + 2 * DAY_MS, 2).tolist() == [False, False]
    assert is_idle(rows, START_MS + 2 * DAY_MS + 1, 2).tolist() == [True, False]

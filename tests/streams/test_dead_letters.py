from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import RecordError
from streams.dead_letters import DeadLetters, Letter, replayed
from streams.sender import Outbox

ERROR = RecordError("invalid", "Expected `str`, got `int` - at `$.user_id`")


@dataclass
class Refused:
    topic: str = "m.events.v1"
    partition: int = 5
    offset: int = 17
    key: Any = b"ann"
    value: Any = b'{"user_id": 7}'
    headers: Any = field(default_factory=list)


def made(message: Refused, error: RecordError = ERROR, **options: Any) -> tuple[Any, Any, dict[str, bytes]]:
    key, value, headers = DeadLetters("m.dead-letters.v1", 4, **options).letter(message, error, refused_at_ms=1_000)
    return key, value, dict(headers)


def test_a_letter_keeps_the_original_bytes() -> None:
    key, value, _ = made(Refused(key=b"\xff\x00", value=b"\x00not json"))
    assert (key, value) == (b"\xff\x00", b"\x00not json")


def test_a_letter_says_where_the_record_stood_and_why_it_was_refused() -> None:
    _, _, headers = made(Refused())
    assert headers["millstream-dlq-topic"] == b"m.events.v1"
    assert headers["millstream-dlq-partition"] == b"5"
    assert headers["millstream-dlq-offset"] == b"17"
    assert headers["millstream-dlq-reason"] == b"invalid"
    assert headers["millstream-dlq-detail"] == b"Expected `str`, got `int` - at `$.user_id`"
    assert headers["millstream-dlq-refused-at-ms"] == b"1000"


def test_a_value_above_the_limit_is_cut_and_its_length_and_hash_are_those_of_the_whole() -> None:
    whole = b"x" * 100
    _, value, headers = made(Refused(value=whole), max_value_bytes=40)
    assert value == b"x" * 40
    assert headers["millstream-dlq-cut"] == b"value"
    assert headers["millstream-dlq-value-bytes"] == b"100"
    assert headers["millstream-dlq-value-sha256"] == hashlib.sha256(whole).hexdigest().encode()


def test_a_whole_letter_does_not_say_that_it_was_cut() -> None:
    _, _, headers = made(Refused())
    assert "millstream-dlq-cut" not in headers


def test_a_null_value_stays_null() -> None:
    _, value, headers = made(Refused(value=None), RecordError("null-value", "null"))
    assert value is None
    assert "millstream-dlq-value-bytes" not in headers


def test_original_headers_are_kept_under_a_prefix() -> None:
    _, _, headers = made(Refused(headers=[("content-type", b"application/json")]))
    assert headers["millstream-original-content-type"] == b"application/json"


def test_headers_as_faust_gives_them_are_kept_too() -> None:
    _, _, headers = made(Refused(headers={"trace": b"1"}))
    assert headers["millstream-original-trace"] == b"1"


def test_headers_above_the_limit_are_left_out_and_the_letter_says_so() -> None:
    _, _, headers = made(Refused(headers=[("small", b"1"), ("large", b"x" * 70_000)]))
    assert headers["millstream-original-small"] == b"1"
    assert "millstream-original-large" not in headers
    assert headers["millstream-dlq-cut"] == b"headers"


def test_a_traceback_keeps_its_end() -> None:
    letters = DeadLetters("d", 1)
    text = "a" * 20_000 + "ValueError: last line"
    _, _, headers = letters.letter(Refused(), ERROR, refused_at_ms=0, traceback=text)
    assert dict(headers)["millstream-dlq-traceback"].endswith(b"ValueError: last line")
    assert len(dict(headers)["millstream-dlq-traceback"]) == 16_000


def test_letters_of_one_partition_go_to_one_partition() -> None:
    outbox = Outbox()
    letters = DeadLetters("d", 4)
    letters.add(outbox, Refused(partition=5, offset=1), ERROR, refused_at_ms=0)
    letters.add(outbox, Refused(partition=5, offset=2), ERROR, refused_at_ms=0)
    assert list(outbox.records) == [("d", 1)]
    assert len(outbox) == 2


@dataclass
class Stored:
    """A letter as a consumer gets it."""

    key: bytes | None
    value: bytes | None
    headers: Any
    partition: int = 1
    offset: int = 9


def read_back(message: Refused, error: RecordError = ERROR, **options: Any) -> Letter:
    letters = DeadLetters("d", 4, **options)
    return Letter.of(Stored(*letters.letter(message, error, refused_at_ms=1_700_000_000_000)))


@given(
    st.none() | st.binary(max_size=40),
    st.none() | st.binary(max_size=40),
    st.lists(st.tuples(st.text(max_size=5), st.binary(max_size=5)), max_size=4),
)
def test_whatever_is_refused_is_replayed_as_it_was(
    key: bytes | None, value: bytes | None, headers: list[tuple[str, bytes]]
) -> None:
    again = replayed(read_back(Refused(key=key, value=value, headers=headers)))
    assert again == (key, value, [*headers, ("millstream-replays", b"1")])


def test_a_letter_that_was_replayed_twice_says_so() -> None:
    assert read_back(Refused(headers=[("millstream-replays", b"2")])).replays == 2


def test_a_listed_letter_shows_place_source_reason_and_value() -> None:
    assert read_back(Refused()).line() == (
        "1/9 2023-11-14T22:13:20+00:00 m.events.v1/5/17 "
        """invalid: Expected `str`, got `int` - at `$.user_id` '{"user_id": 7}'"""
    )


def test_a_listed_letter_says_that_it_was_cut_and_replayed() -> None:
    message = Refused(value=b"x" * 20, headers=[("millstream-replays", b"1")])
    assert read_back(message, max_value_bytes=5).line().endswith("'xxxxx' (cut: value; replayed 1 times)")


def test_bytes_that_are_no_text_are_described_in_base64() -> None:
    assert read_back(Refused(value=b"\xff")).described()["value"] == {"base64": "/w=="}


def test_a_record_without_the_headers_of_a_letter_is_refused() -> None:
    with pytest.raises(RecordError, match="not a letter"):
        Letter.of(Stored(b"k", b"v", [("millstream-dlq-topic", b"t")]))

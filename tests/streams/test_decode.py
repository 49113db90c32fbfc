"""From a consumed message to a decoded event, or the reason why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import RecordError
from models.events import REASONS, ClockPolicy
from streams.decode import decode, partition_of
from streams.settings import EventSettings

BROKER_SECONDS = 1_700_000_000.0
BROKER_MS = 1_700_000_000_000
DAY_MS = 86_400_000
PARTITIONS = 12


@dataclass
class Sent:
    """A message as Faust hands it over."""

    value: bytes | None
    key: bytes | None = b"user-1"
    partition: int = partition_of(b"user-1", PARTITIONS)
    topic: str = "millstream.events.v1"
    offset: int = 5
    timestamp: float = BROKER_SECONDS
    headers: Any = None


def click(**changes: Any) -> dict[str, Any]:
    """Return a click with some fields changed."""
    return {
        "type": "action",
        "event_id": "e-1",
        "event_time": BROKER_MS,
        "user_id": "user-1",
        "item_id": "item-1",
        "action": "click",
    } | changes


def reason_of(message: Sent, settings: EventSettings | None = None, *, is_known: bool = False) -> str:
    """Return the reason for which a message is refused."""
    with pytest.raises(RecordError) as refused:
        decode(message, settings or EventSettings(), PARTITIONS, is_known=is_known)
    return refused.value.reason


@pytest.mark.parametrize("encode", [msgspec.json.encode, msgspec.msgpack.encode])
def test_json_and_messagepack_are_told_apart_without_a_header(encode: Any) -> None:
    decoded = decode(Sent(encode(click())), EventSettings(), PARTITIONS, is_known=False)
    assert (decoded.kind, decoded.key, decoded.offset, decoded.broker_ms) == ("action", b"user-1", 5, BROKER_MS)


def test_a_key_that_is_not_the_user_id_is_refused() -> None:
    assert reason_of(Sent(msgspec.json.encode(click()), key=b"user-2")) == "key-mismatch"


def test_a_null_key_is_refused() -> None:
    assert reason_of(Sent(msgspec.json.encode(click()), key=None)) == "key-mismatch"


def test_a_partition_that_murmur2_does_not_give_is_refused() -> None:
    other = (Sent(None).partition + 1) % PARTITIONS
    assert reason_of(Sent(msgspec.json.encode(click()), partition=other)) == "wrong-partition"


def test_another_partitioner_can_be_accepted() -> None:
    other = (Sent(None).partition + 1) % PARTITIONS
    settings = EventSettings(wrong_partition="accept")
    decoded = decode(Sent(msgspec.json.encode(click()), partition=other), settings, PARTITIONS, is_known=False)
    assert decoded.partition == other


def test_the_partition_of_a_known_user_is_not_checked_again() -> None:
    other = (Sent(None).partition + 1) % PARTITIONS
    message = Sent(msgspec.json.encode(click()), partition=other)
    assert decode(message, EventSettings(), PARTITIONS, is_known=True).partition == other


@pytest.mark.parametrize(
    ("key", "murmur2"), [(b"21", -973932308), (b"foobar", -790332482), (b"a-little-bit-long-string", -985981536)]
)
def test_partitions_are_those_of_the_java_client(key: bytes, murmur2: int) -> None:
    # The hashes are those of Kafka's own UtilsTest.
    assert partition_of(key, PARTITIONS) == (murmur2 & 0x7FFFFFFF) % PARTITIONS


@pytest.mark.parametrize(
    ("client_ms", "time_ms"),
    [
        (BROKER_MS - 3_600_000, BROKER_MS - 3_600_000),
        (BROKER_MS - 2 * DAY_MS, BROKER_MS - DAY_MS),
        (BROKER_MS + 60_000, BROKER_MS + 5_000),
    ],
)
def test_the_live_policy_clamps_a_clock_to_broker_time(client_ms: int, time_ms: int) -> None:
    message = Sent(msgspec.json.encode(click(event_time=client_ms)))
    assert decode(message, EventSettings(), PARTITIONS, is_known=False).time_ms == time_ms


def test_the_trusted_policy_takes_a_clock_as_it_is() -> None:
    settings = EventSettings(clock=ClockPolicy(policy="trusted"))
    message = Sent(msgspec.json.encode(click(event_time=1_000)))
    assert decode(message, settings, PARTITIONS, is_known=False).time_ms == 1_000


@pytest.mark.parametrize("policy", ["live", "trusted"])
def test_a_clock_two_days_ahead_is_refused_under_both_policies(policy: Any) -> None:
    settings = EventSettings(clock=ClockPolicy(policy=policy))
    message = Sent(msgspec.json.encode(click(event_time=BROKER_MS + 2 * DAY_MS)))
    assert reason_of(message, settings) == "event-time-absurd"


def test_a_null_content_type_header_is_as_none() -> None:
    message = Sent(msgspec.json.encode(click()), headers=[("content-type", None)])
    assert decode(message, EventSettings(), PARTITIONS, is_known=False).kind == "action"


def test_an_error_of_our_own_in_decoding_is_a_refusal_with_its_cause() -> None:
    with pytest.raises(RecordError) as refused:
        decode(Sent(msgspec.json.encode(click()), headers=7), EventSettings(), PARTITIONS, is_known=False)
    assert refused.value.reason == "processing-error"
    assert isinstance(refused.value.__cause__, TypeError)


@given(value=st.binary(max_size=200), header=st.sampled_from([None, b"application/json", b"application/msgpack"]))
def test_bytes_of_any_kind_are_refused_with_a_reason_that_is_listed(value: bytes, header: bytes | None) -> None:
    headers = [("content-type", header)] if header else None
    assert reason_of(Sent(value, headers=headers)) in REASONS

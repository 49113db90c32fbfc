from __future__ import annotations

from typing import Any

import pytest
from aiokafka import AIOKafkaProducer

from models.errors import RecordError
from streams.dead_letters import DeadLetters, Selection, letters, replay
from streams.sender import Outbox, Sender
from streams.settings import Settings
from streams.topic_io import partition_of
from streams.topics import TopicNames
from tests.integration.conftest import PARTITIONS, read_topic

pytestmark = pytest.mark.integration


async def refuse(
    settings: Settings, producer: AIOKafkaProducer, *errors: RecordError, max_value_bytes: int | None = None
) -> None:
    """Make letters of what stands on the events topic: the n-th record was refused for the n-th error."""
    names = TopicNames.of(settings)
    options: dict[str, Any] = {} if max_value_bytes is None else {"max_value_bytes": max_value_bytes}
    dead = DeadLetters(names.dead_letters, PARTITIONS, **options)
    outbox = Outbox()
    for record, error in zip(await read_topic(settings, names.events), errors, strict=True):
        dead.add(outbox, record, error, refused_at_ms=1_700_000_000_000)
    await Sender(producer).send(outbox)


async def listed(settings: Settings, **selection: Any) -> list[tuple[str, bytes | None]]:
    return [(letter.reason, letter.value) async for letter in letters(settings, Selection(**selection))]


INVALID = RecordError("invalid", "no")
MALFORMED = RecordError("malformed", "no")


async def test_what_was_refused_is_listed_with_its_bytes(settings: Settings, producer: AIOKafkaProducer) -> None:
    await producer.send_and_wait(TopicNames.of(settings).events, b"\xff\x01", key=b"ann")
    await refuse(settings, producer, MALFORMED)
    assert await listed(settings) == [("malformed", b"\xff\x01")]


async def test_a_list_can_be_narrowed_to_a_reason(settings: Settings, producer: AIOKafkaProducer) -> None:
    for value in (b"one", b"two"):
        await producer.send_and_wait(TopicNames.of(settings).events, value, partition=0)
    await refuse(settings, producer, INVALID, MALFORMED)
    assert await listed(settings, reason="malformed") == [("malformed", b"two")]


async def test_a_list_can_be_narrowed_to_one_letter(settings: Settings, producer: AIOKafkaProducer) -> None:
    for value in (b"one", b"two", b"three"):
        await producer.send_and_wait(TopicNames.of(settings).events, value, partition=2)
    await refuse(settings, producer, INVALID, INVALID, INVALID)
    assert await listed(settings, partition=2, offset=1) == [("invalid", b"two")]


async def test_a_list_without_letters_is_empty(settings: Settings) -> None:
    assert await listed(settings) == []


async def test_a_replay_sends_the_original_bytes_headers_and_key_again(
    settings: Settings, producer: AIOKafkaProducer
) -> None:
    events = TopicNames.of(settings).events
    await producer.send_and_wait(events, b"{}", key=b"ann", headers=[("content-type", b"application/json")])
    await refuse(settings, producer, INVALID)
    result = await replay(settings, Selection())
    again = (await read_topic(settings, events))[-1]
    assert result.sent == 1
    assert (again.key, again.value) == (b"ann", b"{}")
    assert dict(again.headers) == {"content-type": b"application/json", "millstream-replays": b"1"}


async def test_a_replay_puts_a_record_on_the_partition_of_its_key(
    settings: Settings, producer: AIOKafkaProducer
) -> None:
    events = TopicNames.of(settings).events
    right = partition_of(b"ann", PARTITIONS)
    await producer.send_and_wait(events, b"{}", key=b"ann", partition=(right + 1) % PARTITIONS)
    await refuse(settings, producer, RecordError("wrong-partition", "no"))
    await replay(settings, Selection())
    assert [r.value for r in await read_topic(settings, events, partition=right)] == [b"{}"]


async def test_replays_are_counted(settings: Settings, producer: AIOKafkaProducer) -> None:
    events = TopicNames.of(settings).events
    await producer.send_and_wait(events, b"{}", key=b"ann", headers=[("millstream-replays", b"4")])
    await refuse(settings, producer, INVALID)
    await replay(settings, Selection())
    assert dict((await read_topic(settings, events))[-1].headers) == {"millstream-replays": b"5"}


async def test_a_cut_letter_is_never_replayed_and_says_why(settings: Settings, producer: AIOKafkaProducer) -> None:
    events = TopicNames.of(settings).events
    await producer.send_and_wait(events, b"x" * 50, key=b"ann")
    await refuse(settings, producer, RecordError("too-large", "no"), max_value_bytes=10)
    result = await replay(settings, Selection())
    assert result.sent == 0
    assert [why for _, why in result.kept] == ["its value was cut when it was kept"]
    assert len(await read_topic(settings, events)) == 1


async def test_the_largest_record_that_the_events_topic_takes_is_kept_whole(
    settings: Settings, producer: AIOKafkaProducer
) -> None:
    names = TopicNames.of(settings)
    whole = b"x" * 1_064_000
    await producer.send_and_wait(names.events, whole, key=b"ann")
    await refuse(settings, producer, RecordError("too-large", "no"))
    assert await listed(settings) == [("too-large", whole)]
    assert (await replay(settings, Selection())).sent == 1


async def test_a_record_that_is_no_letter_does_not_stop_the_list(
    settings: Settings, producer: AIOKafkaProducer
) -> None:
    names = TopicNames.of(settings)
    await producer.send_and_wait(names.dead_letters, b"stray", partition=0)
    await producer.send_and_wait(names.events, b"{}", key=b"ann")
    await refuse(settings, producer, INVALID)
    assert await listed(settings) == [("invalid", b"{}")]

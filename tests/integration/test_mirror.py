"""A mirror of a topic that a transactional producer writes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from aiokafka import AIOKafkaProducer

from streams.kafka_clients import new_producer
from streams.mirror import Mirror, Record
from streams.settings import Settings
from streams.topics import TopicNames
from tests.integration.conftest import wait_until

pytestmark = pytest.mark.integration


async def transaction(producer: AIOKafkaProducer, topic: str, *keys: bytes, commit: bool) -> None:
    """Send records to partition 0 in one transaction, then commit or abort it."""
    await producer.begin_transaction()
    for key in keys:
        await producer.send_and_wait(topic, b"{}", key=key, partition=0)
    await (producer.commit_transaction() if commit else producer.abort_transaction())


@pytest.mark.parametrize("last_is_committed", [True, False], ids=["committed", "aborted"])
async def test_mirror_catches_up_with_a_topic_that_ends_with_a_transaction(
    settings: Settings, last_is_committed: bool
) -> None:
    topic = TopicNames.of(settings).users
    async with new_producer(settings, transactional_id=f"{settings.worker.group}-producer") as producer:
        await transaction(producer, topic, b"a", b"b", commit=True)
        await transaction(producer, topic, b"c", b"d", commit=last_is_committed)
    keys: list[bytes | None] = []

    def apply(records: Sequence[Record]) -> None:
        keys.extend(record.key for record in records)

    mirror = Mirror(settings, topic, apply)
    task = asyncio.create_task(mirror.run())
    try:
        await asyncio.wait_for(mirror.caught_up.wait(), 30)
        # The coordinator may write the last mark only now: two records and a mark, twice.
        await wait_until(lambda: mirror.positions.get(0) == 6, what="the position passes the last mark")
    finally:
        task.cancel()
        await asyncio.wait([task])
    assert keys == ([b"a", b"b", b"c", b"d"] if last_is_committed else [b"a", b"b"])
    assert mirror.lag == 0

"""item-stats over a real broker: all workers read the same sums, and a death loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import numpy as np
import pytest
from aiokafka import AIOKafkaProducer, TopicPartition

from models.counters import CLICKS, ItemCounters
from models.item_index import ItemIndex
from streams.item_stats import ItemStats
from streams.kafka_clients import new_consumer, new_producer
from streams.sender import Sender
from streams.settings import Settings
from streams.state_thread import StateThread
from streams.topics import TopicNames
from tests.integration.conftest import read_topic, wait_until

pytestmark = pytest.mark.integration

EPOCH = 5
ITEMS = [f"item-{i}" for i in range(20)]
Sums = dict[str, list[float]]


class Side:
    """A worker without Faust: counters, their topic, and a loop that counts live events."""

    def __init__(self, settings: Settings, state: StateThread, producer: AIOKafkaProducer) -> None:
        self.settings = settings
        self.names = TopicNames.of(settings)
        self.state = state
        self.counters = ItemCounters(ItemIndex(), settings.counters)
        self.stats = ItemStats(settings, self.names, self.counters, Sender(producer), state, EPOCH)
        self.live: list[asyncio.Task[None]] = []

    async def own(self, partitions: Iterable[int], committed: dict[int, int], until: dict[int, int]) -> None:
        """Take partitions over at their committed offsets and count live events up to ``until``."""
        for partition in partitions:
            position = committed.get(partition, 0)
            await self.stats.take_over(partition, position)
            self.live.append(asyncio.create_task(self._count(partition, position, until[partition])))

    async def _count(self, partition: int, position: int, until: int) -> None:
        tp = TopicPartition(self.names.events, partition)
        consumer = new_consumer(self.settings)
        try:
            await consumer.start()
            consumer.assign([tp])
            consumer.seek(tp, position)
            while await consumer.position(tp) < until:
                for records in (await consumer.getmany(tp, timeout_ms=100, max_records=50)).values():
                    below = [record for record in records if record.offset < until]
                    await self.state.run(self.stats.recount, below, set())
        finally:
            await consumer.stop()

    async def sums(self) -> Sums:
        """Return the totals of every item."""

        def read() -> Sums:
            totals = self.counters.totals(self.counters.index.rows(ITEMS))
            return {item: row for item, row in zip(ITEMS, totals.tolist(), strict=True) if any(row)}

        return await self.state.run(read)

    async def decayed(self, now_ms: int) -> list[float]:
        """Return the decayed clicks of every item."""
        return await self.state.run(
            lambda: self.counters.read(self.counters.index.rows(ITEMS), now_ms)[..., CLICKS].ravel().tolist()
        )

    async def shows(self, expected: Sums) -> bool:
        return await self.sums() == expected


@asynccontextmanager
async def worker(settings: Settings, *, publishes: bool = True) -> AsyncIterator[Side]:
    """A running worker; leaving the context is its death: nothing is published on the way out."""
    state = StateThread()
    producer = new_producer(settings)
    await producer.start()
    side = Side(settings, state, producer)
    tasks = [asyncio.create_task(side.stats.mirror.run())]
    if publishes:
        tasks.append(asyncio.create_task(side.stats.run()))
    try:
        yield side
    finally:
        for task in (*tasks, *side.live):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await producer.stop()
        state.close()


async def send_events(settings: Settings, producer: AIOKafkaProducer, count: int) -> dict[int, int]:
    """Send impressions, clicks, retries and records that are none; return the end offsets."""
    random_ = random.Random(3)
    names = TopicNames.of(settings)
    now_ms = time.time_ns() // 1_000_000
    for i in range(count):
        user = f"user-{random_.randrange(30)}"
        # Some event ids come twice, as with a client's retry.
        event = {"event_id": f"e{random_.randrange(count * 3)}", "event_time": now_ms + i * 50, "user_id": user}
        if i % 3:
            event |= {"type": "impression", "items": [{"item_id": x} for x in random_.sample(ITEMS, 5)]}
        else:
            event |= {"type": "action", "item_id": random_.choice(ITEMS), "action": "click"}
        value = b"{" if i % 37 == 0 else json.dumps(event).encode()
        await producer.send(names.events, value, key=user.encode())
    await producer.flush()
    return await end_offsets(settings, names.events)


async def end_offsets(settings: Settings, topic: str) -> dict[int, int]:
    consumer = new_consumer(settings)
    try:
        await consumer.start()
        tps = [TopicPartition(topic, p) for p in range(settings.topics.partitions)]
        return {tp.partition: offset for tp, offset in (await consumer.end_offsets(tps)).items()}
    finally:
        await consumer.stop()


async def oracle(settings: Settings) -> ItemCounters:
    """Count the whole log in one go, in this process, without the topic."""
    state = StateThread()
    producer = new_producer(settings)
    side = Side(settings, state, producer)
    for partition in range(settings.topics.partitions):
        side.counters.own(partition)
        log = await read_topic(settings, side.names.events, partition=partition)
        side.stats.recount(log, set())
    await producer.stop()
    state.close()
    return side.counters


def sums_of(counters: ItemCounters) -> Sums:
    totals = counters.totals(counters.index.rows(ITEMS)).tolist()
    return {item: row for item, row in zip(ITEMS, totals, strict=True) if any(row)}


async def test_two_workers_with_half_the_partitions_each_show_the_same_sums(
    settings: Settings, producer: AIOKafkaProducer
) -> None:
    ends = await send_events(settings, producer, 600)
    truth = await oracle(settings)
    async with worker(settings) as one, worker(settings) as other:
        await one.own([0, 1], {}, ends)
        await other.own([2, 3], {}, ends)
        for side in (one, other):
            await wait_until(lambda side=side: side.shows(sums_of(truth)), 30.0, "the sums of the whole log")
        now_ms = time.time_ns() // 1_000_000 + 60_000
        expected = truth.read(truth.index.rows(ITEMS), now_ms)[..., CLICKS].ravel()
        for side in (one, other):
            np.testing.assert_allclose(await side.decayed(now_ms), expected, rtol=1e-5)


async def test_worker_that_dies_before_it_published_everything_is_continued_exactly(
    settings: Settings, producer: AIOKafkaProducer
) -> None:
    ends = await send_events(settings, producer, 600)
    truth = await oracle(settings)
    everything = range(settings.topics.partitions)
    half = {p: end // 2 for p, end in ends.items()}
    slow = settings.model_copy(
        update={"counters": settings.counters.model_copy(update={"publish_max_records_per_second": 10})}
    )
    async with worker(slow, publishes=False) as victim:
        await victim.own(everything, {}, half)
        await asyncio.gather(*victim.live)
        # One publication under the rate cap: most items are not on the topic, some are.
        assert 0 < await victim.stats.publish() < 40
        assert victim.stats.backlog > 0
    # It had committed less than it counted and published.
    committed = {p: end // 3 for p, end in ends.items()}
    async with worker(settings) as survivor:
        await survivor.own(everything, committed, ends)
        await wait_until(lambda: survivor.shows(sums_of(truth)), 30.0, "the sums of the whole log")
        await survivor.stats.publish(everything=True)
    # What the survivor published is the whole truth too.
    async with worker(settings) as reader:
        await wait_until(lambda: reader.shows(sums_of(truth)), 30.0, "the sums of the whole log, from the topic alone")


async def test_partition_that_moves_between_living_workers_is_counted_once(
    settings: Settings, producer: AIOKafkaProducer
) -> None:
    ends = await send_events(settings, producer, 300)
    truth = await oracle(settings)
    half = {p: end // 2 for p, end in ends.items()}
    async with worker(settings) as before, worker(settings) as after:
        await before.own([0, 1, 2, 3], {}, half)
        await asyncio.gather(*before.live)
        await before.stats.keep_only([2, 3])
        await after.own([0, 1], half, ends)
        await before.own([2, 3], half, ends)
        for side in (before, after):
            await wait_until(lambda side=side: side.shows(sums_of(truth)), 30.0, "the sums of the whole log")

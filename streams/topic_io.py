"""Writing to and reading from whole topics by hand: what import, publish, tail and the dead letters share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import lru_cache
from types import TracebackType
from typing import Any, Final

from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError
from aiokafka.partitioner import murmur2

from models.errors import BrokerUnavailable, LayoutError
from streams.kafka_clients import new_consumer, new_producer
from streams.sender import Delivered, Headers, Outbox, Sender
from streams.settings import Settings

_KEYS_CACHED: Final = 1 << 20


@lru_cache(maxsize=_KEYS_CACHED)
def partition_of(key: bytes, partitions: int) -> int:
    """Return the partition that murmur2 gives a key, as the Java client does; cached, it is slow in Python."""
    return int((murmur2(key) & 0x7FFFFFFF) % partitions)


class TopicWriter:
    """A started producer with the partition counts of its topics: ``async with TopicWriter(settings, topic)``.

    Entering raises BrokerUnavailable where Kafka cannot be reached and LayoutError where a topic is missing.
    """

    def __init__(self, settings: Settings, *topics: str) -> None:
        self._topics = topics
        self._producer = new_producer(settings)
        self._sender = Sender(self._producer)
        self.partitions: dict[str, int] = {}

    async def __aenter__(self) -> TopicWriter:
        try:
            await self._producer.start()
            cluster = await self._producer.client.fetch_all_metadata()
            self.partitions = {topic: len(cluster.partitions_for_topic(topic) or ()) for topic in self._topics}
            _require(self.partitions)
        except (KafkaError, OSError) as error:
            await self._producer.stop()
            raise BrokerUnavailable(f"Kafka cannot be reached: {error!r}") from error
        except LayoutError:
            await self._producer.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._producer.stop()

    def add(self, outbox: Outbox, topic: str, key: bytes, value: bytes | None, headers: Headers = ()) -> None:
        """Queue a record on the partition of its key."""
        outbox.add(topic, partition_of(key, self.partitions[topic]), key, value, headers)

    async def send(self, outbox: Outbox) -> list[Delivered]:
        """Send and return when all is acknowledged. Raises DeliveryError."""
        return await self._sender.send(outbox)


def _require(partitions: Mapping[str, int]) -> None:
    missing = [topic for topic, count in partitions.items() if not count]
    if missing:
        raise LayoutError([f"{topic} does not exist; `millstream topics create` makes it" for topic in missing])


class TopicTail:
    """One topic's partitions read without a group; made by `open_topic`."""

    def __init__(self, consumer: Any, topic: str, partitions: list[int]) -> None:
        self._consumer = consumer
        self.topic = topic
        self.partitions = partitions
        self._all = [TopicPartition(topic, p) for p in partitions]

    async def begin_offsets(self) -> dict[int, int]:
        """Return the first offset that each partition still has."""
        return {tp.partition: at for tp, at in (await self._consumer.beginning_offsets(self._all)).items()}

    async def end_offsets(self) -> dict[int, int]:
        """Return the offset that each partition's next record will have."""
        return {tp.partition: at for tp, at in (await self._consumer.end_offsets(self._all)).items()}

    async def read(
        self, starts: Mapping[int, int], ends: Mapping[int, int] | None = None
    ) -> AsyncIterator[ConsumerRecord]:
        """Yield the records of the partitions in ``starts`` from these offsets: to ``ends``, or for ever."""
        tps = [TopicPartition(self.topic, p) for p in starts if ends is None or starts[p] < ends[p]]
        self._consumer.assign(tps)
        for tp in tps:
            self._consumer.seek(tp, starts[tp.partition])
        left = set(tps)
        while left:
            for tp, records in (await self._consumer.getmany(*left, timeout_ms=200)).items():
                for record in records:
                    if ends is None or record.offset < ends[tp.partition]:
                        yield record
            if ends is not None:
                # The position also passes records that compaction removed or that are transaction marks.
                left = {tp for tp in left if await self._consumer.position(tp) < ends[tp.partition]}


@asynccontextmanager
async def open_topic(settings: Settings, topic: str) -> AsyncIterator[TopicTail]:
    """Open a topic for reading. Raises BrokerUnavailable or, where it is missing, LayoutError."""
    consumer = new_consumer(settings)
    try:
        try:
            await consumer.start()
            cluster = await consumer._client.fetch_all_metadata()
            found: Iterable[int] = cluster.partitions_for_topic(topic) or ()
            _require({topic: len(list(found))})
            await consumer._client.set_topics([topic])
        except (KafkaError, OSError) as error:
            raise BrokerUnavailable(f"Kafka cannot be reached: {error!r}") from error
        yield TopicTail(consumer, topic, sorted(found))
    finally:
        await consumer.stop()

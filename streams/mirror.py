"""Group-less reader that keeps an in-memory copy of a compacted topic.

Faust's GlobalTable recovers endlessly with several instances, and an agent on a control topic reaches one worker
only; a plain consumer without a group does neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol

import structlog
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError, OffsetOutOfRangeError

from streams.kafka_clients import new_consumer
from streams.settings import Settings

log = structlog.get_logger(__name__)


class Record(Protocol):
    """What a mirror hands on: the part of aiokafka's ConsumerRecord that is used."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]


Apply = Callable[[Sequence[Record]], Awaitable[None] | None]


class Mirror:
    """Reads ``topic`` from its beginning to its end and on, calling ``apply`` with each batch in order.

    ``caught_up`` is set while every assigned partition was read up to the end offset that stood when the
    partition was assigned. Broker errors are retried for ever; an error of ``apply`` itself ends the mirror and is
    raised from ``run``.
    """

    def __init__(self, settings: Settings, topic: str, apply: Apply, *, max_records: int = 500) -> None:
        self.topic = topic
        self.caught_up = asyncio.Event()
        self.positions: dict[int, int] = {}
        self.end_offsets: dict[int, int] = {}
        self.read_at = 0.0
        """Monotonic time of the last successful fetch, also of an empty one."""
        self._settings = settings
        self._apply = apply
        self._max_records = max_records
        self._wanted: set[int] | None = None
        self._changed = asyncio.Event()
        self._ready: set[int] = set()
        self._dropped: set[int] = set()

    @property
    def lag(self) -> int:
        """Records between the position and the end offset last seen, over all partitions."""
        return sum(max(0, end - self.positions.get(p, 0)) for p, end in self.end_offsets.items())

    def staleness_seconds(self) -> float:
        """Seconds since the topic was last read successfully."""
        return time.monotonic() - self.read_at if self.read_at else float("inf")

    def assign(self, partitions: Iterable[int]) -> None:
        """Mirror these partitions only, new ones from their beginning; ``caught_up`` covers them all.

        One that an earlier call left out is new, however soon it comes back: its owner may have forgotten it.
        """
        wanted = set(partitions)
        if wanted != self._wanted:
            self._dropped |= (self._wanted or set()) - wanted
            self._wanted = wanted
            if not wanted <= self._ready - self._dropped:
                self.caught_up.clear()
            self._changed.set()

    async def run(self, *, all_partitions: bool = True) -> None:
        """Read until cancelled. With ``all_partitions`` false, only what ``assign`` names."""
        while True:
            consumer = new_consumer(self._settings)
            try:
                await consumer.start()
                if all_partitions and self._wanted is None:
                    self._wanted = set(await self._partitions(consumer))
                self._changed.set()
                await self._read(consumer)
            except (KafkaError, OSError) as error:
                log.warning("mirror_retry", topic=self.topic, error=repr(error))
                await asyncio.sleep(1.0)
            finally:
                await consumer.stop()

    async def _partitions(self, consumer: Any) -> list[int]:
        while True:
            await consumer._client.force_metadata_update()
            found = consumer._client.cluster.partitions_for_topic(self.topic)
            if found:
                return sorted(found)
            await consumer._client.add_topic(self.topic)
            await asyncio.sleep(0.2)

    async def _read(self, consumer: Any) -> None:
        pending: dict[int, int] = {}
        while True:
            while self._changed.is_set():
                self._changed.clear()
                pending = await self._reassign(consumer)
            if not self._wanted:
                self.caught_up.set()
                self.read_at = time.monotonic()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), 1.0)
                continue
            try:
                batches = await consumer.getmany(timeout_ms=200, max_records=self._max_records)
            except OffsetOutOfRangeError as error:
                log.warning("mirror_reset", topic=self.topic, error=repr(error))
                for partition in self._wanted:
                    self.positions.pop(partition, None)
                self._ready.clear()
                self._changed.set()
                continue
            self.read_at = time.monotonic()
            for tp, records in batches.items():
                if not self._is_current(tp.partition):
                    continue
                result = self._apply(records)
                if result is not None:
                    await result
                self.positions[tp.partition] = records[-1].offset + 1
                await asyncio.sleep(0)
            await self._advance(consumer)
            if pending:
                for partition, end in list(pending.items()):
                    if self.positions.get(partition, -1) >= end:
                        del pending[partition]
                        self._ready.add(partition)
                self._settle(pending)

    def _is_current(self, partition: int) -> bool:
        """Whether the partition is wanted, and was ever since it was last assigned to the consumer."""
        return self._wanted is not None and partition in self._wanted - self._dropped

    def _settle(self, pending: dict[int, int]) -> None:
        """Say that all is read, unless ``assign`` has changed what that is since ``pending`` was made."""
        if not pending and not self._changed.is_set():
            self.caught_up.set()

    async def _advance(self, consumer: Any) -> None:
        """Move ``positions`` to where the consumer stands: all before it was applied.

        The last record alone does not say it: marks of transactions, aborted records and what compaction took away
        stand in the log too.
        """
        for tp in consumer.assignment():
            position = await consumer.position(tp)
            if self._is_current(tp.partition):
                self.positions[tp.partition] = position
                end = consumer.highwater(tp) or self.end_offsets.get(tp.partition, 0)
                self.end_offsets[tp.partition] = max(end, position)

    async def _reassign(self, consumer: Any) -> dict[int, int]:
        wanted = self._wanted or set()
        for partition in self._dropped:
            self.positions.pop(partition, None)
            self.end_offsets.pop(partition, None)
        self._ready -= self._dropped
        self._dropped.clear()
        tps = [TopicPartition(self.topic, p) for p in sorted(wanted)]
        consumer.assign(tps)
        if not tps:
            return {}
        ends = await consumer.end_offsets(tps)
        begins = await consumer.beginning_offsets(tps)
        pending = {}
        for tp in tps:
            self.end_offsets[tp.partition] = ends[tp]
            start = self.positions.get(tp.partition, begins[tp])
            consumer.seek(tp, start)
            if tp.partition in self._ready:
                continue
            if ends[tp] <= begins[tp]:
                self.positions[tp.partition] = start
                self._ready.add(tp.partition)
            else:
                pending[tp.partition] = ends[tp]
        self._settle(pending)
        return pending

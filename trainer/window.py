"""Reads the window from Kafka into the spool: by time, without a consumer group, each partition to its end.

Only transactions that were committed count (``read_committed``): a record of an aborted one is none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from models.encoder import item_text
from models.errors import BrokerUnavailable, LayoutError, RecordError, TrainingError
from models.events import ITEM_CODEC
from models.hashing import hash64
from models.manifest import OffsetRange
from models.sampling import LoneAction
from trainer.connection import Connection
from trainer.dataset import ItemFacts
from trainer.lone_actions import read_lone_actions
from trainer.progress import Show
from trainer.spool import Spool, SpooledRecord

log = structlog.get_logger(__name__)

RECORDS_AT_ONCE: Final = 20_000
"""Records of one partition that are gathered before a file of the spool is written."""
SILENT_SECONDS: Final = 60.0
"""A partition that gives nothing for so long ends the reading; the round is done again later."""

Stopping = Callable[[], bool]


class Stopped(Exception):
    """The process was asked to end; what was done so far stands."""


class WindowReader:
    """Reads features, labels and items. Each call runs on ``runner`` and opens a consumer of its own."""

    def __init__(
        self, connection: Connection, spool: Spool, runner: asyncio.Runner, show: Show, stopping: Stopping
    ) -> None:
        self._connection = connection
        self._spool = spool
        self._runner = runner
        self._show = show
        self._stopping = stopping
        self._texts: dict[int, str] = {}
        self._embeddings: dict[int, list[float]] = {}
        self._items_at: dict[int, int] = {}

    def read(self, since_ms: int) -> list[OffsetRange]:
        """Spool features and labels of this broker time and later, and return the ranges of offsets that they have.

        Raises BrokerUnavailable, LayoutError, OSError (the spool's disk) and Stopped; what is spooled by then stays.
        """
        topics = self._connection.topics
        return self._runner.run(self._read([topics.features, topics.labels], since_ms))

    def actions(self, since_ms: int) -> tuple[list[OffsetRange], list[LoneAction]]:
        """Spool the events of this broker time and later; return their ranges and the actions among them."""
        ranges = self._runner.run(self._read([self._connection.topics.events], since_ms))
        return ranges, read_lone_actions(self._spool, ranges, self._connection.events)

    def restore(self, ranges: Iterable[OffsetRange]) -> None:
        """Spool what is missing of a window that was read before.

        Raises TrainingError (``window-gone``) where neither the spool nor Kafka has it any more.
        """
        self._runner.run(self._restore(list(ranges)))

    def labels_end(self) -> int:
        """Return the sum of the end offsets of ``labels``: how much it grows is how much was labelled."""
        return self._runner.run(self._labels_end())

    def items(self) -> ItemFacts:
        """Return texts and embeddings of the items, read on from where the last call ended.

        An item that was removed keeps them: impressions of the window may name it.
        """
        self._runner.run(self._read_items())
        return ItemFacts(self._texts, self._embeddings)

    async def _read(self, topics: list[str], since_ms: int) -> list[OffsetRange]:
        ranges: list[OffsetRange] = []
        async with consumer(self._connection, *topics) as opened:
            for topic in topics:
                wanted = await self._wanted(opened, topic, since_ms)
                await self._spool_missing(opened, wanted)
                ranges += wanted
        return ranges

    async def _wanted(self, opened: AIOKafkaConsumer, topic: str, since_ms: int) -> list[OffsetRange]:
        tps = _partitions(opened, topic)
        ends = await opened.end_offsets(tps)
        if any(ends[tp] < self._spool.end(topic, tp.partition) for tp in tps):
            log.warning("topic_created_again", topic=topic, action="its spooled records are deleted")
            self._spool.forget(topic)
        begins = await opened.beginning_offsets(tps)
        by_time = await opened.offsets_for_times(dict.fromkeys(tps, max(since_ms, 0)))
        wanted = []
        for tp in tps:
            at = by_time[tp]
            start = max(at.offset if at is not None else ends[tp], begins[tp])
            # Retention may have removed what is still spooled.
            spooled = self._spool.first_offset(topic, tp.partition, since_ms)
            start = start if spooled is None else min(start, spooled)
            found = OffsetRange(topic, tp.partition, min(start, ends[tp]), ends[tp])
            wanted += without_gone(self._spool, found, begins[tp])
        return wanted

    async def _restore(self, ranges: list[OffsetRange]) -> None:
        async with consumer(self._connection, *{r.topic for r in ranges}) as opened:
            for gap in (gap for r in ranges for gap in self._spool.missing(r)):
                tp = TopicPartition(gap.topic, gap.partition)
                begin, end = (await opened.beginning_offsets([tp]))[tp], (await opened.end_offsets([tp]))[tp]
                if gap.start < begin or gap.end > end:
                    raise TrainingError(
                        "window-gone",
                        f"offsets {gap.start} to {gap.end} of {gap.topic}/{gap.partition} are neither spooled nor in "
                        f"Kafka, which has {begin} to {end}; the window cannot be built again. "
                        "trainer.spool_days and topics.training_retention_hours say how long it can",
                    )
            await self._spool_missing(opened, ranges)

    async def _spool_missing(self, opened: AIOKafkaConsumer, wanted: list[OffsetRange]) -> None:
        gaps = [gap for r in wanted for gap in self._spool.missing(r)]
        total, done = sum(g.end - g.start for g in gaps), 0
        for gap in gaps:
            at, held = gap.start, list[SpooledRecord]()
            async for records, position in read_range(opened, gap, self._stopping):
                held += [SpooledRecord(r.offset, r.timestamp, r.value) for r in records if r.value is not None]
                if len(held) >= RECORDS_AT_ONCE or position >= gap.end:
                    self._spool.write(OffsetRange(gap.topic, gap.partition, at, position), held)
                    done += position - at
                    at, held = position, []
                    self._show(f"read {gap.topic}", done, total)

    async def _labels_end(self) -> int:
        topic = self._connection.topics.labels
        async with consumer(self._connection, topic) as opened:
            return int(sum((await opened.end_offsets(_partitions(opened, topic))).values()))

    async def _read_items(self) -> None:
        topic = self._connection.topics.items
        async with consumer(self._connection, topic) as opened:
            tps = _partitions(opened, topic)
            ends, begins = await opened.end_offsets(tps), await opened.beginning_offsets(tps)
            refused = 0
            for tp in tps:
                # A topic that was created again begins anew; the texts of the old one do no harm.
                at = min(self._items_at.get(tp.partition, 0), ends[tp])
                wanted = OffsetRange(topic, tp.partition, max(at, begins[tp]), ends[tp])
                async for records, position in read_range(opened, wanted, self._stopping):
                    refused += self._apply_items(records)
                    self._items_at[tp.partition] = position
            if refused:
                log.warning("items_left_out", records=refused)

    def _apply_items(self, records: list[ConsumerRecord]) -> int:
        refused = 0
        for record in records:
            if record.value is None:
                continue
            try:
                item = ITEM_CODEC.decode(record.value, _content_type(record.headers))
            except RecordError:
                refused += 1
                continue
            at, text = hash64(item.item_id), item_text(item)
            self._texts.pop(at, None)
            self._embeddings.pop(at, None)
            if text:
                self._texts[at] = text
            if item.embedding:
                self._embeddings[at] = item.embedding
        return refused


def without_gone(spool: Spool, wanted: OffsetRange, begin: int) -> list[OffsetRange]:
    """Return what of a range is spooled or still in Kafka, which begins at ``begin``.

    Retention may have removed records that nobody had spooled: asked for, they would fail every round.
    """
    found, at = [], wanted.start
    for gap in spool.missing(wanted):
        if gap.start >= begin:
            break
        until = min(gap.end, begin)
        log.warning("records_gone", topic=gap.topic, partition=gap.partition, start=gap.start, end=until)
        if gap.start > at:
            found.append(OffsetRange(wanted.topic, wanted.partition, at, gap.start))
        at = until
    return [*found, OffsetRange(wanted.topic, wanted.partition, at, wanted.end)]


@asynccontextmanager
async def consumer(connection: Connection, *topics: str) -> AsyncIterator[AIOKafkaConsumer]:
    """Open a consumer without a group that knows these topics. Raises BrokerUnavailable and LayoutError."""
    opened = AIOKafkaConsumer(
        **connection.client_options,
        enable_auto_commit=False,
        isolation_level="read_committed",
        auto_offset_reset="none",
        fetch_max_bytes=16 << 20,
        max_partition_fetch_bytes=4 << 20,
    )
    try:
        await opened.start()
        cluster = await opened._client.fetch_all_metadata()
        missing = [topic for topic in topics if not cluster.partitions_for_topic(topic)]
        if missing:
            raise LayoutError([f"{topic} does not exist; `millstream topics create` makes it" for topic in missing])
        await opened._client.set_topics(list(topics))
        yield opened
    except KafkaError as error:
        raise BrokerUnavailable(f"Kafka cannot be reached or did not answer: {error!r}; nothing was lost") from error
    finally:
        await opened.stop()


async def last_values(connection: Connection, topic: str, stopping: Stopping = lambda: False) -> dict[bytes, bytes]:
    """Return the last value of each key of a compacted topic, keys with a null value left out."""
    values: dict[bytes, bytes] = {}
    async with consumer(connection, topic) as opened:
        tps = _partitions(opened, topic)
        ends, begins = await opened.end_offsets(tps), await opened.beginning_offsets(tps)
        for tp in tps:
            async for records, _ in read_range(
                opened, OffsetRange(topic, tp.partition, begins[tp], ends[tp]), stopping
            ):
                for record in records:
                    if record.value is None:
                        values.pop(record.key, None)
                    elif record.key is not None:
                        values[record.key] = record.value
    return values


async def read_range(
    opened: AIOKafkaConsumer, wanted: OffsetRange, stopping: Stopping
) -> AsyncIterator[tuple[list[ConsumerRecord], int]]:
    """Yield (records, offset reached) until the range is passed; the position also passes marks of transactions."""
    if wanted.start >= wanted.end:
        return
    tp = TopicPartition(wanted.topic, wanted.partition)
    opened.assign([tp])
    opened.seek(tp, wanted.start)
    loop = asyncio.get_running_loop()
    position, heard = wanted.start, loop.time()
    while position < wanted.end:
        if stopping():
            raise Stopped
        batch: list[ConsumerRecord] = (await opened.getmany(tp, timeout_ms=200)).get(tp, [])
        reached = min(int(await opened.position(tp)), wanted.end)
        if reached > position:
            position, heard = reached, loop.time()
            yield [r for r in batch if r.offset < wanted.end], position
        elif loop.time() - heard > SILENT_SECONDS:
            raise BrokerUnavailable(
                f"{wanted.topic}/{wanted.partition} gave nothing for {SILENT_SECONDS:.0f} s at offset {position} of "
                f"{wanted.end}; an open transaction of a producer holds it, or its leader is gone"
            )


def _partitions(opened: AIOKafkaConsumer, topic: str) -> list[TopicPartition]:
    return [TopicPartition(topic, p) for p in sorted(opened.partitions_for_topic(topic) or ())]


def _content_type(headers: Any) -> str | None:
    found = next((value for name, value in headers or () if name == "content-type" and value is not None), None)
    return None if found is None else bytes(found).decode("latin-1")

"""What a worker does besides events: watchdog, gauges, repair after a zombie, eviction of idle rows.

Everything that writes runs between two batches, called by the agent: the table has one writer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog
from aiokafka import TopicPartition
from aiokafka.errors import IllegalStateError, KafkaError
from faust.exceptions import ConsumerNotStarted

from models.errors import MillstreamError, RecordError, RowError
from models.retrieval import RecallCheck
from models.user_row import ROW_BYTES, VERSION, decode_rows, encode_rows, is_idle, is_marker, markers
from models.user_value import guard_of, split_value
from streams.exit_codes import ExitCode
from streams.sender import Outbox

if TYPE_CHECKING:
    from streams.decode import Decoded
    from streams.worker import Worker

log = structlog.get_logger(__name__)

REPAIR_SECONDS = 5.0
EVICTION_SECONDS = 10.0
LABELS_SECONDS = 0.25
LABELS_USERS = 500
"""Silent users whose labels are sent in one step: about 5 ms."""
EVICTION_ROWS = 100
"""Rows looked at in one step after a batch: about 0.3 ms, which the next one waits for; more where batches are long."""
EVICTION_ROWS_IDLE = 2_000
"""The same where no event waits."""
EVICTION_STEP_SECONDS = 0.05
"""Between two steps of one pass."""
RECALL_SECONDS = 60.0
RECALL_QUERIES = 16
RECALL_STEP_SECONDS = 0.05
REPORT_SECONDS = 1.0
LETTERS_AT_ONCE = 200
"""A catalogue of bad records must not stand before the first slate."""
WATCH_SECONDS = 1.0


class CommitWatch:
    """Tells how long a partition's commits have stood still behind what was read. Pure: offsets and times in."""

    def __init__(self) -> None:
        self._stands: dict[int, tuple[int, float]] = {}

    def oldest_seconds(self, read: dict[int, int], committed: dict[int, int], now: float) -> float:
        """Return for how long the worst partition has had read events that are not committed, without progress.

        ``read`` and ``committed`` map partitions to the next offset to read and to the committed one.
        """
        worst = 0.0
        for partition, next_offset in read.items():
            done = committed.get(partition, -1)
            held = self._stands.get(partition)
            if done >= next_offset or held is None or held[0] != done:
                self._stands[partition] = (done, now)
            elif next_offset > done:
                worst = max(worst, now - held[1])
        for partition in [p for p in self._stands if p not in read]:
            del self._stands[partition]
        return worst


def next_offsets(read: Mapping[int, int], committed: Mapping[int, int]) -> dict[int, int]:
    """Return the next offset to read of each partition, from the last ones read, which lag behind a seek by one."""
    return {p: max(o + 1, committed.get(p, 0)) for p, o in read.items()}


def may_be_replayed(value: bytes, epoch: int, next_offset: int) -> bool:
    """Tell whether the last event that a value holds may come again, its outputs lost in a crash.

    ``next_offset`` is where this process stands in the partition's log of ``epoch``, 0 before its first event.
    """
    held_epoch, offset = guard_of(value)
    return held_epoch == epoch and offset >= next_offset


@dataclass(frozen=True, slots=True)
class Eviction:
    """What is to become of one value of the table."""

    partition: int
    key: bytes
    held: bytes
    """The value that was looked at."""
    value: bytes | None
    """What stands in its place then; None: nothing."""
    strips: bool = False
    """Whether only spent impressions behind the row go."""


class Maintenance:
    """The worker's housekeeping."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._repaired_at = time.monotonic()
        self._evicted_at = time.monotonic()
        self._labels_at = time.monotonic()
        self._recall_turn = 0
        self._scan: Iterator[tuple[int, bytes]] | None = None
        self._letters: list[tuple[Any, MillstreamError]] = []
        self._event_ms = 0
        self._broker_ms = 0

    def see_times(self, accepted: Sequence[Decoded]) -> None:
        """Follow the newest event time and broker time: the clocks by which rows are idle."""
        newest_ms: dict[int, int] = {}
        for decoded in accepted:
            self._event_ms = max(self._event_ms, decoded.time_ms)
            self._broker_ms = max(self._broker_ms, decoded.broker_ms)
            newest_ms[decoded.partition] = max(newest_ms.get(decoded.partition, 0), decoded.time_ms)
        now = time.monotonic()
        for partition, time_ms in newest_ms.items():
            self._worker.label_timer.see(partition, time_ms, now)

    def _idle_clock_ms(self) -> int:
        """Return the time against which idleness is measured; 0 before the first event: nothing is idle.

        Never later than the newest event: a host whose clock stands months ahead must not evict every user. Under the
        policy `trusted` event time counts, or an imported log of 2019 would be evicted as it is read.
        """
        if self._worker.settings.events.clock.policy == "trusted":
            return self._event_ms
        return min(time.time_ns() // 1_000_000, self._broker_ms)

    def is_due(self) -> bool:
        """Whether there is something to do that cannot wait for a moment without events."""
        worker, now = self._worker, time.monotonic()
        return (
            worker.has_mirror_letters
            or now - self._repaired_at > REPAIR_SECONDS
            or (now - self._labels_at > LABELS_SECONDS and worker.settings.examples.enabled)
            or now - self._evicted_at > (EVICTION_SECONDS if self._scan is None else EVICTION_STEP_SECONDS)
        )

    async def between_batches(self, *, is_idle: bool) -> None:
        """Do what is due; called by the agent when no batch is in work.

        Looking goes beside the batch that is on its way; its arrival is awaited where there is something to write:
        to wait each time would take the pipeline from every third batch. ``is_idle``: no event waits.
        """
        worker = self._worker
        now = time.monotonic()
        letters = worker.take_mirror_letters(LETTERS_AT_ONCE)
        repairs = now - self._repaired_at > REPAIR_SECONDS
        labels = now - self._labels_at > LABELS_SECONDS and worker.settings.examples.enabled
        if labels:
            self._labels_at = now
            labels = self._is_owner and worker.label_timer.has_due(now)
        evictions: list[Eviction] = []
        if now - self._evicted_at > (EVICTION_SECONDS if self._scan is None else EVICTION_STEP_SECONDS):
            # As many rows a second, however seldom it comes to a step.
            steps = (now - self._evicted_at) / EVICTION_STEP_SECONDS if self._scan is not None else 1.0
            most = min(round(EVICTION_ROWS * steps), EVICTION_ROWS_IDLE)
            if self._scan is None:
                self._scan = self._keys()
            self._evicted_at = now
            evictions = self._evictions(EVICTION_ROWS_IDLE if is_idle else most)
        if letters or repairs or labels or evictions:
            await worker.deliveries.settled()
            await self._write(letters, evictions, repairs=repairs, labels=labels)

    async def _write(
        self, letters: list[tuple[Any, MillstreamError]], evictions: Sequence[Eviction], *, repairs: bool, labels: bool
    ) -> None:
        """Write what is due; no batch is in work or on its way."""
        worker = self._worker
        outbox = Outbox()
        if letters:
            self._stage_letters(outbox, letters)
        if repairs:
            self._repaired_at = time.monotonic()
            await self._repair(outbox)
        due = None
        # A partition may be another worker's already, whose labels know more.
        if labels and self._is_owner:
            due = worker.label_timer.due(worker.rows.get, time.monotonic(), LABELS_USERS)
            for label in due.labels:
                outbox.add(worker.names.labels, label.partition, label.key, label.value)
        # Since the look at a row, a newer one may have arrived, or its partition have gone, and come back.
        owned = worker.rows.partitions
        evictions = [e for e in evictions if e.partition in owned and worker.rows.get(e.partition, e.key) == e.held]
        for eviction in evictions:
            worker.rows.stage(outbox, eviction.partition, eviction.key, eviction.value)
            if eviction.strips:
                worker.label_timer.forget(eviction.partition, [eviction.key])
            else:
                worker.metrics.evicted_rows.labels("marker" if eviction.value is None else "row").inc()
        if len(outbox):
            await worker.write(outbox, worker.app.consumer_generation_id)
            # Nor for this: what left meanwhile is its new owner's.
            for eviction in evictions:
                if eviction.partition in worker.rows.partitions:
                    worker.rows.put(eviction.partition, eviction.key, eviction.value)
        if due is not None:
            worker.label_timer.done(due)
            worker.label_metrics.count_timer(len(due.labels))

    @property
    def _is_owner(self) -> bool:
        worker = self._worker
        return worker.is_ready and bool(worker.app.consumer_generation_id == worker.owned_generation)

    def _stage_letters(self, outbox: Outbox, letters: list[tuple[Any, MillstreamError]]) -> None:
        worker = self._worker
        for record, error in letters:
            if isinstance(error, RecordError):
                worker.letters.add(outbox, record, error, refused_at_ms=time.time_ns() // 1_000_000)
                worker.metrics.dead_letters.labels(record.topic.split(".")[-2], error.reason).inc()
                log.warning("record_refused", topic=record.topic, offset=record.offset, reason=error.reason)

    async def _repair(self, outbox: Outbox) -> None:
        worker = self._worker
        try:
            foreign = await worker.rows.foreign_rows()
        except (KafkaError, OSError) as error:
            worker.metrics.kafka_errors.labels("repair").inc()
            log.warning("foreign_rows_unknown", error=repr(error))
            return
        for partition, key in foreign:
            if partition in worker.rows.partitions:
                worker.rows.stage(outbox, partition, key, worker.rows.get(partition, key))
                worker.metrics.foreign_rows.inc()

    def _keys(self) -> Iterator[tuple[int, bytes]]:
        for partition in sorted(self._worker.rows.partitions):
            if partition in self._worker.rows.partitions:
                for key in list(self._worker.rows.rows_of(partition)):
                    yield partition, key

    def _evictions(self, most: int) -> list[Eviction]:
        """Look at the next values: an idle row becomes a marker, a marker older than the events topic goes.

        At most ``most``. Open impressions behind a row go when nothing can change their labels any more; until then
        the row is not idle. A user may be in it twice: the later one is what lasts.
        """
        worker = self._worker
        assert self._scan is not None
        owned = worker.rows.partitions
        keys = [(p, k) for p, k in islice(self._scan, most) if p in owned]
        if not keys:
            self._scan = None
            return []
        kept, is_open, found = self._readable(keys)
        rows = decode_rows([row for _, _, _, row in kept])
        settings = worker.settings
        now_ms = self._idle_clock_ms()
        idle = is_idle(rows, now_ms, settings.worker.idle_eviction_days) & ~np.array(is_open, np.bool_)
        marked = is_marker(rows)
        # A marker holds the guard for as long as an old event could still be read, and a day more.
        gone = marked & is_idle(
            rows, now_ms, settings.worker.idle_eviction_days + settings.topics.events_retention_hours / 24 + 1
        )
        fresh = (idle & ~marked).nonzero()[0].tolist()
        for place, marker in zip(fresh, encode_rows(markers(rows[fresh])), strict=True):
            found.append(Eviction(*kept[place][:3], marker))
        found += [Eviction(*kept[place][:3], None) for place in gone.nonzero()[0].tolist()]
        return found

    def _readable(
        self, keys: Sequence[tuple[int, bytes]]
    ) -> tuple[list[tuple[int, bytes, bytes, bytes]], list[bool], list[Eviction]]:
        """Return the values of ``keys`` and their rows, whether impressions stay open behind each, and spent blocks.

        A value that cannot be read is left out: the event that touches it makes one dead letter, here it would be a
        dead worker.
        """
        worker, now = self._worker, time.monotonic()
        kept: list[tuple[int, bytes, bytes, bytes]] = []
        is_open: list[bool] = []
        found: list[Eviction] = []
        for partition, key in keys:
            value = worker.rows.get(partition, key)
            try:
                row, block = split_value(value)
            except RowError:
                continue
            if value is None or row is None or row[0] != VERSION or len(row) > ROW_BYTES:
                continue
            spent = bool(block) and worker.label_timer.may_strip(partition, key, block, now)
            # Labels that a crash cost are sent again from the block, when the events that closed them come again.
            if spent and may_be_replayed(value, worker.epoch, worker.handed.get(partition, 0)):
                spent = False
            if spent:
                found.append(Eviction(partition, key, value, row, strips=True))
            kept.append((partition, key, value, row))
            is_open.append(bool(block) and not spent)
        return kept, is_open, found

    async def watch_recall(self) -> None:
        """Compare the index with exact search on some of its own items, every minute, a few thousand at a time."""
        worker = self._worker
        while True:
            await asyncio.sleep(RECALL_SECONDS)
            check = await worker.state.run(self._recall_check)
            recall = None
            while check is not None and recall is None:
                # Between two steps, batches have their turn.
                await asyncio.sleep(RECALL_STEP_SECONDS)
                recall = await worker.state.run(check.step)
            if recall is not None:
                worker.metrics.index_recall.set(recall)

    def _recall_check(self) -> RecallCheck | None:
        worker = self._worker
        rows = worker.catalogue.servable_rows(time.time_ns() // 1_000_000)
        if not len(rows):
            return None
        self._recall_turn += 1
        step = max(1, len(rows) // RECALL_QUERIES)
        sample = rows[self._recall_turn % step :: step][:RECALL_QUERIES]
        vectors, has = worker.catalogue.vectors_of(sample)
        return worker.model.vector_index.check_recall(vectors[has]) if has.any() else None

    async def watch_commits(self) -> None:
        """End the process when events were read but not committed for too long."""
        watch = CommitWatch()
        worker = self._worker
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if worker.app.rebalancing or not worker.is_ready:
                watch = CommitWatch()
                continue
            done = self._committed()
            read = self._read(done)
            for partition, offset in worker.handed.items():
                if partition in read:
                    read[partition] = max(read[partition], offset)
            age = watch.oldest_seconds(read, done, time.monotonic())
            worker.metrics.commit_age.set(age)
            if age > worker.settings.worker.stuck_commit_seconds:
                log.error("commits_stand_still", seconds=round(age), read=read, committed=done)
                if not worker.failure.done():
                    worker.failure.set_result(ExitCode.STUCK)
                return

    def _committed(self) -> dict[int, int]:
        return self._owned(self._worker.app.consumer._committed_offset)

    def _read(self, committed: dict[int, int]) -> dict[int, int]:
        return next_offsets(self._owned(self._worker.app.consumer._read_offset), committed)

    def _owned(self, offsets: Mapping[TopicPartition, int | None]) -> dict[int, int]:
        """Return Faust's offsets of the partitions of events that are owned: a lost one may have left some behind."""
        topic, owned = self._worker.names.events, self._worker.rows.partitions
        return {
            tp.partition: o
            for tp, o in offsets.items()
            if tp.topic == topic and tp.partition in owned and o is not None
        }

    async def report(self) -> None:
        """Keep the gauges current."""
        worker = self._worker
        metrics = worker.metrics
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            worker.cpu.look()
            metrics.kept_cpu.set(-1 if worker.cpu.number is None else worker.cpu.number)
            metrics.ready.set(1 if worker.is_ready else 0)
            partitions = worker.rows.partitions
            metrics.table_rows.set(sum(len(worker.rows.rows_of(p)) for p in partitions))
            metrics.table_bytes.set(sum(worker.rows.row_bytes.values()))
            metrics.counter_backlog.set(worker.item_stats.backlog)
            metrics.counter_dropped.set(worker.counters.dropped_touches)
            metrics.context_values.set(worker.pipeline.contexts.dropped_values)
            metrics.context_items.set(worker.pipeline.contexts.dropped_items)
            metrics.counter_refused.set(worker.item_stats.refused_records)
            metrics.index_items.set(len(worker.model.vector_index))
            metrics.catalogue_items.set(len(worker.catalogue))
            worker.label_metrics.waiting_users.set(worker.label_timer.waiting_users)
            worker.model_metrics.set_age(worker.model.live, time.time_ns() // 1_000_000)
            for mirror in worker.mirrors:
                metrics.mirror_lag.labels(mirror.topic).set(mirror.lag)
                metrics.mirror_staleness.labels(mirror.topic).set(mirror.staleness_seconds())
            self._report_lag()

    def _report_lag(self) -> None:
        """Set the lag of each partition; while the consumer starts or the group rebalances, leave it as it is."""
        worker = self._worker
        if not worker.is_ready:
            return
        consumer = worker.app.consumer
        try:
            topic = worker.names.events
            lags = {
                partition: max(0, end - offset)
                for partition, offset in self._read(self._committed()).items()
                if (end := consumer.highwater(TopicPartition(topic, partition))) is not None
            }
        except (ConsumerNotStarted, AssertionError, IllegalStateError):
            return
        worker.metrics.consumer_lag.clear()
        for partition, lag in lags.items():
            worker.metrics.consumer_lag.labels(str(partition)).set(lag)

"""The ``item-stats`` topic: what each owner counted, published, mirrored by all, and taken over after a crash.

Two kinds of record on partition p, both MessagePack arrays that begin with a version:

- key item_id: [1, epoch, writer, last offset, ref_ms, [3 totals], [12 decayed values at ref_ms]]: the absolute state
  of one item as the users of ``events`` partition p made it, and the last offset that it contains.
- key CHECKPOINT_KEY: [1, epoch, writer, offset, resume offset, watermark ms or nil] (`models.counters.Checkpoint`).

``epoch`` is that of the ``events`` topic: the offsets of another one mean nothing and are ignored, the values are kept.
``writer`` tells an owner's own records from those of a process that was late to learn that it is no owner any more.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]
import numpy as np
import structlog
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from models.counters import HALF_LIVES, KINDS, TOUCHED, Absolute, Checkpoint, CountersConfig, ItemCounters, TouchBatch
from models.errors import BrokerUnavailable, RecordError
from models.item_index import UNKNOWN, ItemIndex
from models.partition_counters import Int64
from streams.decode import Decoded, decode
from streams.kafka_clients import new_consumer
from streams.mirror import Mirror, Record
from streams.sender import Outbox, Sender
from streams.settings import Settings
from streams.state_thread import StateThread
from streams.topics import TopicNames

log = structlog.get_logger(__name__)

VERSION: Final = 2
"""Version 1 had neither expected clicks nor first impressions; its records are refused and counted again."""
CHECKPOINT_KEY: Final = b"\xffcheckpoint"
"""No item id begins with this byte: it never occurs in UTF-8."""
CHUNK: Final = 256
"""Items encoded in one go: a slate never waits for more of them."""
REREAD_RECORDS: Final = 500
POLL_SECONDS: Final = 0.02


@dataclass(frozen=True, slots=True)
class ItemRecord:
    """One decoded item record."""

    epoch: int
    writer: int
    last_offset: int
    ref_ms: int
    first_ms: int
    totals: list[int]
    values: list[float]


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """One decoded checkpoint record."""

    epoch: int
    writer: int
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True)
class TakenOver:
    """What taking over a partition's counts did."""

    partition: int
    from_offset: int
    up_to_offset: int
    events: int
    """Events read again."""
    touches: int
    """Counts that the published state did not contain."""
    seconds: float


def encode_items(index: ItemIndex, state: Absolute, epoch: int, writer: int) -> list[tuple[bytes, bytes]]:
    """Return (key, value) of the item records of ``state``."""
    pack = msgpack.Packer().pack
    columns = zip(
        state.rows.tolist(),
        state.last_offsets.tolist(),
        state.ref_ms.tolist(),
        state.first_ms.tolist(),
        state.totals.tolist(),
        state.values.reshape(-1, HALF_LIVES * KINDS).tolist(),
        strict=True,
    )
    return [
        (index.item_id(row).encode("utf-8"), pack([VERSION, epoch, writer, last, ref, first, totals, values]))
        for row, last, ref, first, totals, values in columns
    ]


def encode_checkpoint(checkpoint: Checkpoint, epoch: int, writer: int) -> bytes:
    """Return the value of a checkpoint record."""
    fields = [VERSION, epoch, writer, checkpoint.offset, checkpoint.resume_offset, checkpoint.watermark_ms]
    return bytes(msgpack.packb(fields))


def decode_item(value: bytes) -> ItemRecord:
    """Decode an item record. Raises RecordError("malformed") for what is none, "invalid" for another version."""
    fields = _fields(value, 8)
    try:
        epoch, writer, last_offset, ref_ms, first_ms = map(int, fields[1:6])
        totals, values = [int(t) for t in fields[6]], [float(v) for v in fields[7]]
    except (TypeError, ValueError, OverflowError) as error:
        raise RecordError("malformed", f"an item-stats record: {error}") from None
    if len(totals) != TOUCHED or len(values) != HALF_LIVES * KINDS:
        raise RecordError("malformed", f"an item-stats record with {len(totals)} totals and {len(values)} values")
    whole = (*totals, ref_ms, first_ms, last_offset + 1)
    if not all(0 <= v < 1e300 for v in values) or not all(0 <= n <= 2**62 for n in whole):
        raise RecordError("invalid", "an item-stats record with something that is no count, offset or time")
    return ItemRecord(epoch, writer, last_offset, ref_ms, first_ms, totals, values)


def decode_checkpoint(value: bytes) -> CheckpointRecord:
    """Decode a checkpoint record. Raises RecordError as `decode_item` does."""
    fields = _fields(value, 6)
    try:
        epoch, writer, offset, resume = map(int, fields[1:5])
        watermark = None if fields[5] is None else int(fields[5])
    except (TypeError, ValueError) as error:
        raise RecordError("malformed", f"an item-stats checkpoint: {error}") from None
    return CheckpointRecord(epoch, writer, Checkpoint(offset, resume, watermark))


def _fields(value: bytes, count: int) -> list[Any]:
    try:
        fields = msgpack.unpackb(value)
    except (ValueError, msgpack.UnpackException) as error:
        raise RecordError("malformed", f"an item-stats record: {type(error).__name__}: {error}") from None
    if not isinstance(fields, list) or not fields:
        raise RecordError("malformed", "an item-stats record that is no array")
    if fields[0] != VERSION:
        raise RecordError("invalid", f"an item-stats record of version {fields[0]!r}; this release reads {VERSION}")
    if len(fields) != count:
        raise RecordError("malformed", f"an item-stats record of {len(fields)} fields, not {count}")
    return fields


def batches(accepted: Iterable[Decoded], config: CountersConfig) -> dict[int, TouchBatch]:
    """Return accepted events as batches to count, by partition, in the order given."""
    found: dict[int, TouchBatch] = {}
    for decoded in accepted:
        batch = found.get(decoded.partition)
        if batch is None:
            batch = found[decoded.partition] = TouchBatch()
        batch.add_event(decoded.event, decoded.offset, decoded.time_ms, config)
    return found


def count(counters: ItemCounters, accepted: Iterable[Decoded]) -> int:
    """Count accepted events of owned partitions, in order, and return how many touches counted.

    Live processing calls it with every event that `streams.decode.decode` accepted, once, before the slates are made,
    whatever becomes of the event in its user's row; recovery calls it too. Events already counted change nothing.
    Raises FencedError for a partition that is not owned.
    """
    found = batches(accepted, counters.config)
    return sum(counters.add(partition, batch) for partition, batch in found.items())


@dataclass(slots=True)
class _Message:
    """An aiokafka record in the shape that `streams.decode` takes."""

    topic: str
    partition: int
    offset: int
    timestamp: float
    key: bytes | None
    value: bytes | None
    headers: Any


class ItemStats:
    """One worker's side of the topic: mirror, publication of the partitions that it owns, and taking over.

    ``may_write`` says whether this process still owns its partitions; nothing is published while it does not.
    ``is_refused`` names (partition, offset) of events that must not be touched.
    """

    def __init__(
        self,
        settings: Settings,
        names: TopicNames,
        counters: ItemCounters,
        sender: Sender,
        state: StateThread,
        epoch: int,
        *,
        may_write: Callable[[], bool] = lambda: True,
        is_refused: Callable[[int, int], bool] = lambda partition, offset: False,
    ) -> None:
        self.mirror = Mirror(settings, names.item_stats, self.apply)
        self.published_records = 0
        self.refused_records = 0
        self.backlog = 0
        """Items that waited for the rate cap after the last publication."""
        self._settings = settings
        self._config = settings.counters
        self._names = names
        self._counters = counters
        self._sender = sender
        self._state = state
        self._epoch = epoch
        self._may_write = may_write
        self._is_refused = is_refused
        self._writer = secrets.randbits(63)
        self._checkpoints: dict[int, CheckpointRecord] = {}
        self._ahead: dict[int, dict[int, ItemRecord]] = {}
        """By partition and row, what another process published of a partition that is owned here, and contains more."""
        self._written: dict[int, tuple[float, Checkpoint]] = {}
        self._taking_over: set[int] = set()
        self._lock = asyncio.Lock()

    # Mirror

    async def apply(self, records: Sequence[Record]) -> None:
        """Apply mirrored records of one partition; what cannot be read is logged, counted and left out."""
        await self._state.run(self.apply_now, records)

    def apply_now(self, records: Sequence[Record]) -> None:
        """Do what `apply` does, in the state thread."""
        items: list[tuple[int, ItemRecord]] = []
        for record in records:
            if record.key is None or record.value is None:
                continue
            try:
                if record.key == CHECKPOINT_KEY:
                    self._see_checkpoint(record.partition, decode_checkpoint(record.value))
                    continue
                item = decode_item(record.value)
                row = self._counters.row_for(record.key.decode("utf-8"))
            except (RecordError, UnicodeDecodeError) as error:
                self.refused_records += 1
                log.warning("item_stats_refused", partition=record.partition, offset=record.offset, error=str(error))
                continue
            if row != UNKNOWN:
                items.append((row, item))
        if not items:
            return
        partition = records[0].partition
        if partition in self._counters.owned():
            self._see_foreign(partition, items)
        else:
            self._mirror(partition, items)

    def _last(self, item: ItemRecord) -> int:
        return item.last_offset if item.epoch == self._epoch else -1

    def _newest(self, items: Iterable[tuple[int, ItemRecord]]) -> dict[int, ItemRecord]:
        """Return of each row the record that contains most, of equals the last."""
        newest: dict[int, ItemRecord] = {}
        for row, item in items:
            if row not in newest or self._last(item) >= self._last(newest[row]):
                newest[row] = item
        return newest

    def _see_foreign(self, partition: int, items: list[tuple[int, ItemRecord]]) -> None:
        """Deal with what another process published of an owned partition: late, or before this one heard of it.

        Where that stands last on the topic and contains less than is counted here, the item is published again. Where
        it contains more, the partition has its next owner already: it is kept, and applied when the partition is
        released, for it is never read again.
        """
        last = {row: self._last(item) for row, item in dict(items).items() if item.writer != self._writer}
        self._counters.touch_again(partition, np.array(list(last), np.int32), np.array(list(last.values()), np.int64))
        newest = self._newest((row, item) for row, item in items if item.writer != self._writer)
        contained = self._counters.last_offsets(partition, np.array(list(newest), np.int32)).tolist()
        ahead = [
            (row, item) for (row, item), held in zip(newest.items(), contained, strict=True) if self._last(item) > held
        ]
        if ahead:
            self._ahead[partition] = self._newest([*self._ahead.get(partition, {}).items(), *ahead])

    def _release(self, partition: int) -> None:
        self._counters.release(partition)
        ahead = self._ahead.pop(partition, {})
        if ahead:
            self._mirror(partition, ahead.items())

    def _mirror(self, partition: int, records: Iterable[tuple[int, ItemRecord]]) -> None:
        items = self._newest(records)
        found = items.values()
        self._counters.replace(
            partition,
            Absolute(
                np.array(list(items), np.int32),
                np.array([i.values for i in found]).reshape(-1, HALF_LIVES, KINDS),
                np.array([i.totals for i in found], np.int64),
                np.array([self._last(i) for i in found], np.int64),
                np.array([i.ref_ms for i in found], np.int64),
                np.array([i.first_ms for i in found], np.int64),
            ),
        )

    def _see_checkpoint(self, partition: int, record: CheckpointRecord) -> None:
        self._checkpoints[partition] = record
        if record.writer != self._writer:
            # Whoever wrote it may claim more than the records that stand now contain: the owner's has to be the last.
            self._written.pop(partition, None)

    # Publication

    async def run(self) -> None:
        """Publish what changed, once per interval, until cancelled. Raises DeliveryError."""
        while True:
            await asyncio.sleep(self._config.publish_interval_seconds)
            await self.publish()

    async def publish(self, *, everything: bool = False) -> int:
        """Publish changed items of owned partitions and the checkpoints that are due; returns the records sent.

        ``everything`` knows no rate cap: for an orderly stop. Raises DeliveryError, which ends the process.
        """
        async with self._lock:
            if not self._may_write():
                return 0
            outbox = Outbox()
            taken: list[tuple[int, Int64, Int64]] = []
            for partition, slots, since in await self._state.run(self._plan, everything):
                for begin in range(0, len(slots), CHUNK):
                    chunk = slots[begin : begin + CHUNK]
                    taken.append((partition, chunk, since[begin : begin + CHUNK]))
                    await self._state.run(self._take, outbox, partition, chunk)
            checkpoints = await self._state.run(self._due_checkpoints, outbox, everything)
            if not self._may_write():
                await self._state.run(self._put_back, taken)
                return 0
            if len(outbox):
                await self._sender.send(outbox)
                await self._state.run(self._confirm, checkpoints)
            self.published_records += len(outbox)
            return len(outbox)

    def _plan(self, everything: bool) -> list[tuple[int, Int64, Int64]]:
        """Return (partition, slots, offsets since which they wait): all that changed, or what the rate cap allows.

        Under the cap half goes to the hottest items and half to those that wait longest, so that the checkpoint,
        which cannot pass an item that waits, moves on.
        """
        changed = [(p, *self._counters.dirty(p)) for p in self._counters.owned() if p not in self._taking_over]
        total = sum(len(slots) for _, slots, _, _ in changed)
        budget = int(self._config.publish_max_records_per_second * self._config.publish_interval_seconds)
        self.backlog = 0 if everything else max(0, total - budget)
        plan = []
        for partition, slots, since, heat in changed:
            if self.backlog:
                allowed = max(1, budget * len(slots) // total)
                hottest_first = np.argsort(-heat, kind="stable")
                rest = hottest_first[allowed - allowed // 2 :]
                longest = rest[np.argsort(since[rest], kind="stable")][: allowed // 2]
                chosen = np.concatenate([hottest_first[: allowed - allowed // 2], longest])
                slots, since = slots[chosen], since[chosen]
            if len(slots):
                plan.append((partition, slots, since))
        return plan

    def _take(self, outbox: Outbox, partition: int, slots: Int64) -> None:
        state = self._counters.take_dirty(partition, slots)
        for key, value in encode_items(self._counters.index, state, self._epoch, self._writer):
            outbox.add(self._names.item_stats, partition, key, value)

    def _put_back(self, taken: list[tuple[int, Int64, Int64]]) -> None:
        for partition, slots, since in taken:
            self._counters.put_back(partition, slots, since)

    def _due_checkpoints(self, outbox: Outbox, everything: bool) -> dict[int, Checkpoint]:
        """Add a checkpoint, behind the items that it speaks of, for each partition where one is due and moved."""
        due: dict[int, Checkpoint] = {}
        now = time.monotonic()
        for partition in self._counters.owned():
            if partition in self._taking_over:
                continue
            written = self._written.get(partition)
            if written and not everything and now - written[0] < self._config.checkpoint_interval_seconds:
                continue
            checkpoint = self._counters.checkpoint(partition)
            if written and written[1] == checkpoint:
                continue
            due[partition] = checkpoint
            value = encode_checkpoint(checkpoint, self._epoch, self._writer)
            outbox.add(self._names.item_stats, partition, CHECKPOINT_KEY, value)
        return due

    def _confirm(self, checkpoints: dict[int, Checkpoint]) -> None:
        now = time.monotonic()
        for partition, checkpoint in checkpoints.items():
            self._written[partition] = (now, checkpoint)
            self._counters.published(partition, checkpoint)

    # Ownership

    async def keep_only(self, partitions: Iterable[int]) -> None:
        """Stop counting every partition but these; a publication in work is finished first."""
        wanted = set(partitions)
        await self.release([p for p in await self._state.run(self._counters.owned) if p not in wanted])

    async def release(self, partitions: Iterable[int]) -> None:
        """Stop counting and publishing these partitions; their counts stay, mirrored from now on."""
        async with self._lock:
            for partition in partitions:
                await self._state.run(self._release, partition)
                self._written.pop(partition, None)

    async def take_over(self, partition: int, up_to_offset: int) -> TakenOver:
        """Count ``partition`` here from ``up_to_offset`` on, the group's committed offset, as if it never stopped.

        Waits until the mirror has passed what stands on ``item-stats`` now, then reads ``events`` again from the
        checkpoint's resume offset up to ``up_to_offset``, for the counters alone. Live events of the partition may
        be counted only when this has returned. Raises BrokerUnavailable; the partition is not owned then.
        """
        started = time.monotonic()
        self._taking_over.add(partition)
        consumer = new_consumer(self._settings)
        try:
            await consumer.start()
            await self._pass_end(consumer, partition)
            begin = await self._state.run(self._begin, partition)
            events, touches = await self._reread(consumer, partition, begin, up_to_offset)
        except (KafkaError, OSError) as error:
            await self._state.run(self._release, partition)
            raise BrokerUnavailable(
                f"the counters of partition {partition} were not taken over: {error!r}; nothing is lost, try again"
            ) from error
        finally:
            await consumer.stop()
            self._taking_over.discard(partition)
        taken = TakenOver(partition, begin, up_to_offset, events, touches, time.monotonic() - started)
        log.info("counters_taken_over", partition=partition, events=events, touches=touches, seconds=taken.seconds)
        return taken

    async def _pass_end(self, consumer: Any, partition: int) -> None:
        """Return when the mirror has applied all that stands on the partition now."""
        tp = TopicPartition(self._names.item_stats, partition)
        end = (await consumer.end_offsets([tp]))[tp]
        warn_at = time.monotonic() + self._settings.worker.mirror_timeout_seconds
        while self.mirror.positions.get(partition, -1) < end:
            if time.monotonic() > warn_at:
                log.warning("mirror_is_late", topic=tp.topic, partition=partition, end=end)
                warn_at += self._settings.worker.mirror_timeout_seconds
            await asyncio.sleep(POLL_SECONDS)

    def _begin(self, partition: int) -> int:
        """Own the partition from its checkpoint on; returns the offset to read from."""
        record = self._checkpoints.get(partition)
        checkpoint = record.checkpoint if record is not None and record.epoch == self._epoch else Checkpoint()
        self._counters.own(partition, checkpoint)
        self._written.pop(partition, None)
        return min(checkpoint.offset, checkpoint.resume_offset)

    async def _reread(self, consumer: Any, partition: int, begin: int, up_to: int) -> tuple[int, int]:
        tp = TopicPartition(self._names.events, partition)
        end = min(up_to, (await consumer.end_offsets([tp]))[tp])
        first = (await consumer.beginning_offsets([tp]))[tp]
        if first > begin:
            log.warning("events_deleted_before_counted", partition=partition, wanted=begin, first=first)
            begin = first
        if begin >= end:
            return 0, 0
        consumer.assign([tp])
        consumer.seek(tp, begin)
        checked: set[bytes] = set()
        events = touches = 0
        while await consumer.position(tp) < end:
            for records in (await consumer.getmany(tp, timeout_ms=200, max_records=REREAD_RECORDS)).values():
                below = [record for record in records if record.offset < end]
                events += len(below)
                touches += await self._state.run(self.recount, below, checked)
        return events, touches

    def recount(self, records: Sequence[Record], checked: set[bytes]) -> int:
        """Count records of ``events`` as live processing does, leaving out what it refuses; in the state thread.

        ``checked`` collects keys whose partition was checked. Returns the touches counted.
        """
        accepted: list[Decoded] = []
        for r in records:
            if self._is_refused(r.partition, r.offset):
                # The process died on it again and again: live processing did not count it, and this could die too.
                continue
            message = _Message(r.topic, r.partition, r.offset, r.timestamp / 1000, r.key, r.value, r.headers)
            try:
                decoded = decode(
                    message,
                    self._settings.events,
                    self._settings.topics.partitions,
                    is_known=r.key in checked,
                )
            except RecordError:
                # Live processing sent it to the dead letters and counted nothing.
                continue
            checked.add(decoded.key)
            accepted.append(decoded)
        return count(self._counters, accepted)

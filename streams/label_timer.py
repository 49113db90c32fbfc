"""Labels of users who fell silent: sent when their partition's watermark passes the end of a window.

The table is only read: when such a user comes back, their own log closes the impression; its label is written where it
says something else. Everything here is in memory, made anew at a take-over from the values, so a restart may repeat
a label.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from models.errors import RowError
from models.examples import EARLY, LabelsRecord
from models.joiner import JoinContext, due_labels, is_spent, next_close_ms
from models.user_value import guard_of, last_time_ms, split_value
from streams.labels import RowKey, SentLabels

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Partition:
    """One partition's open impressions, by the time at which the next of a user closes."""

    newest_ms: int = 0
    """Event time of the event that put the watermark furthest."""
    seen_at: float = 0.0
    """When it was seen, monotonic seconds."""
    heap: list[tuple[int, bytes]] = field(default_factory=list)
    next_ms: dict[bytes, int] = field(default_factory=dict)
    """The entry of the heap that is valid, by user."""
    sent: dict[bytes, dict[int, LabelsRecord]] = field(default_factory=dict)
    """What was sent last of the impressions that a silent user's value still holds open, by user and impression."""

    def schedule(self, key: bytes, close_ms: int) -> None:
        self.next_ms[key] = close_ms
        heapq.heappush(self.heap, (close_ms, key))


@dataclass(slots=True)
class Due:
    """What is to be sent now; ``LabelTimer.done`` follows when it is acknowledged."""

    labels: list[SentLabels] = field(default_factory=list)
    _records: list[tuple[RowKey, LabelsRecord]] = field(default_factory=list)
    _looked_at: dict[RowKey, int | None] = field(default_factory=dict)
    _of: dict[int, _Partition] = field(default_factory=dict)


class LabelTimer:
    """Knows which open impressions are due. All calls come from the event loop, between two batches."""

    def __init__(self, context: JoinContext) -> None:
        self._context = context
        self._partitions: dict[int, _Partition] = {}

    @property
    def waiting_users(self) -> int:
        """Users with an impression that is open and not due yet."""
        # A take-over adds partitions from the state thread meanwhile.
        return sum(len(p.next_ms) for p in list(self._partitions.values()))

    def keep_only(self, partitions: set[int]) -> None:
        """Forget the partitions that were revoked."""
        self._partitions = {p: held for p, held in self._partitions.items() if p in partitions}

    def take_over(self, partition: int, values: Mapping[bytes, bytes], now: float) -> None:
        """Begin with a partition: its open impressions, and its newest event time as the watermark."""
        begun = _Partition(seen_at=now)
        for key, value in values.items():
            begun.newest_ms = max(begun.newest_ms, last_time_ms(value))
            close_ms = self._next_close_ms(partition, key, value)
            if close_ms is not None:
                begun.next_ms[key] = close_ms
                begun.heap.append((close_ms, key))
        heapq.heapify(begun.heap)
        self._partitions[partition] = begun

    def see(self, partition: int, newest_ms: int, now: float) -> None:
        """Take note of the newest event time of a batch."""
        held = self._partitions.get(partition)
        # A watermark never goes back: an event that is newer than all, but older than the time that passed, is late.
        if held is not None and newest_ms >= self._watermark_ms(held, now):
            held.newest_ms, held.seen_at = newest_ms, now

    def touch(self, closes: Mapping[RowKey, int | None], now: float) -> None:
        """Take note of users whose log went on, and when the next of their impressions closes."""
        for (partition, key), close_ms in closes.items():
            held = self._partitions.get(partition)
            if held is None:
                continue
            if close_ms is None:
                held.next_ms.pop(key, None)
                held.sent.pop(key, None)
                continue
            if close_ms > self._watermark_ms(held, now):
                held.sent.pop(key, None)
            if held.next_ms.get(key) != close_ms:
                held.schedule(key, close_ms)

    def watermark_ms(self, partition: int, now: float) -> int:
        """Return a partition's watermark: newest event time, and the time that passed since it was seen."""
        held = self._partitions.get(partition)
        return self._watermark_ms(held, now) if held is not None else 0

    def has_due(self, now: float) -> bool:
        """Tell whether a user's impression is due; cheap."""
        for held in self._partitions.values():
            clock_ms = self._watermark_ms(held, now)
            while held.heap and held.heap[0][0] < clock_ms:
                close_ms, key = held.heap[0]
                if held.next_ms.get(key) == close_ms:
                    return True
                heapq.heappop(held.heap)
        return False

    def due(self, read_value: Callable[[int, bytes], bytes | None], now: float, most_users: int) -> Due:
        """Return the labels that are due, of at most ``most_users`` users."""
        found = Due()
        for partition, held in self._partitions.items():
            clock_ms = self._watermark_ms(held, now)
            found._of[partition] = held
            while held.heap and held.heap[0][0] < clock_ms and len(found._looked_at) < most_users:
                close_ms, key = heapq.heappop(held.heap)
                if held.next_ms.get(key) == close_ms and (partition, key) not in found._looked_at:
                    self._look(found, (partition, key), read_value(partition, key), clock_ms)
        return found

    def done(self, due: Due) -> None:
        """Take note that ``due`` was acknowledged; what was taken over anew meanwhile begins afresh."""
        for (partition, key), record in due._records:
            held = due._of[partition]
            if self._partitions.get(partition) is held:
                held.sent.setdefault(key, {})[record.impression_id] = record
        for (partition, key), close_ms in due._looked_at.items():
            held = due._of[partition]
            if self._partitions.get(partition) is held:
                held.next_ms.pop(key, None)
                if close_ms is not None:
                    held.schedule(key, close_ms)

    def unsaid(self, labels: Sequence[SentLabels]) -> list[SentLabels]:
        """Return the labels that say something else than the timer did; call it before ``touch``.

        What the timer said is acknowledged, and the last that is said of its impression until the user's own log says
        something else: then it is forgotten, or a correction back to it would be taken for known.
        """
        unsaid = []
        for label in labels:
            if self._is_said(label):
                continue
            unsaid.append(label)
            held = self._partitions.get(label.partition)
            if held is not None:
                held.sent.get(label.key, {}).pop(label.record.impression_id, None)
        return unsaid

    def may_strip(self, partition: int, key: bytes, block: bytes, now: float) -> bool:
        """Tell whether a user's block can go: past every correction, and every label of it acknowledged."""
        held = self._partitions.get(partition)
        if held is None or key in held.next_ms:
            return False
        try:
            return is_spent(block, self._watermark_ms(held, now), self._context)
        except RowError:
            return False

    def forget(self, partition: int, keys: Iterable[bytes]) -> None:
        """Forget users whose block was removed."""
        held = self._partitions.get(partition)
        for key in keys if held is not None else ():
            held.sent.pop(key, None)  # type: ignore[union-attr]

    def _is_said(self, label: SentLabels) -> bool:
        held = self._partitions.get(label.partition)
        said = held.sent.get(label.key, {}).get(label.record.impression_id) if held is not None else None
        return said is not None and not label.record.flags & EARLY and _content(said) == _content(label.record)

    def _look(self, found: Due, key: RowKey, value: bytes | None, clock_ms: int) -> None:
        found._looked_at[key] = None
        try:
            _, block = split_value(value)
            as_of = guard_of(value or b"")[1] + 1
            records, next_ms = due_labels(block, clock_ms, key[1].decode("utf-8"), self._context, as_of)
        except RowError as error:
            # The user's next event meets the same value and says so in a dead letter.
            log.warning("labels_unreadable", partition=key[0], error=str(error))
            return
        sent = self._partitions[key[0]].sent.get(key[1], {})
        new = []
        for record in records:
            before = sent.get(record.impression_id)
            if before is None or _content(before) != _content(record):
                record.revision = before.revision + 1 if before is not None else 0
                new.append(record)
        found._looked_at[key] = next_ms
        found._records += [(key, record) for record in new]
        found.labels += [SentLabels.of(key, record) for record in new]

    def _next_close_ms(self, partition: int, key: bytes, value: bytes) -> int | None:
        try:
            _, block = split_value(value)
            return next_close_ms(block) if block else None
        except RowError as error:
            log.warning("labels_unreadable", partition=partition, error=str(error))
            return None

    @staticmethod
    def _watermark_ms(held: _Partition, now: float) -> int:
        return held.newest_ms + int((now - held.seen_at) * 1_000) if held.newest_ms else 0


def _content(record: LabelsRecord) -> tuple[bytes, bytes, bytes]:
    return record.clicked, record.refused, record.actions

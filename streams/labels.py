"""Labels records: what came of impressions, closed by each user's own log. Runs in the state thread with the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge

from models.examples import LabelsRecord, encode
from models.joiner import JoinContext, JoinCounts, join
from models.user_events import UserEvent
from models.user_value import join_value
from streams.settings import Settings

RowKey = tuple[int, bytes]
"""(partition, user_id bytes)."""


@dataclass(frozen=True, slots=True)
class SentLabels:
    """A labels record to send."""

    partition: int
    key: bytes
    record: LabelsRecord

    @property
    def value(self) -> bytes:
        """The record as it stands on the topic."""
        return encode(self.record)

    @classmethod
    def of(cls, key: RowKey, record: LabelsRecord) -> SentLabels:
        """Return the record for the user's partition."""
        return cls(*key, record)


@dataclass(slots=True)
class Closings:
    """What the events of one micro-batch did to open impressions."""

    labels: list[SentLabels] = field(default_factory=list)
    next_close_ms: dict[RowKey, int | None] = field(default_factory=dict)
    """For each user touched, when the next open impression closes."""
    counts: JoinCounts = field(default_factory=JoinCounts)

    def add(self, other: Closings) -> None:
        """Add those of later events of the same batch."""
        self.labels += other.labels
        self.next_close_ms.update(other.next_close_ms)
        self.counts.add(other.counts)


class LabelsWriter:
    """Joins the impressions and the actions of users, and puts what stays open into their values."""

    def __init__(self, settings: Settings, epoch: int, surfaces: Sequence[str]) -> None:
        self.context = JoinContext.of(settings.joiner, settings.user_state, surfaces)
        self._enabled = settings.examples.enabled
        self._epoch = epoch

    def values(
        self,
        keys: Sequence[RowKey],
        rows: Sequence[bytes],
        blocks: Sequence[bytes],
        clocks_ms: Sequence[int],
        offsets: Sequence[int],
        events: Sequence[UserEvent],
        outcomes: Sequence[int],
        fresh: Mapping[RowKey, bytes],
    ) -> tuple[dict[RowKey, bytes], Closings]:
        """Return the new value of each user, and what their events closed.

        ``keys``, new ``rows``, ``blocks``, ``clocks_ms`` (the rows' last time before) and ``offsets`` (the rows' own,
        after) by the events' ``user``.
        ``fresh``: values that were made in this same batch; labels in them are not acknowledged yet. Raises RowError
        for a block that is nonsense.
        """
        closings = Closings()
        if not self._enabled:
            return dict(zip(keys, rows, strict=True)), closings
        mine: list[tuple[list[UserEvent], list[int]]] = [([], []) for _ in keys]
        for event, outcome in zip(events, outcomes, strict=True):
            mine[event.user][0].append(event)
            mine[event.user][1].append(outcome)
        values: dict[RowKey, bytes] = {}
        for place, key in enumerate(keys):
            joined = join(
                blocks[place],
                *mine[place],
                clocks_ms[place],
                self.context,
                user_id=key[1].decode("utf-8"),
                epoch=self._epoch,
                partition=key[0],
                as_of=offsets[place],
                may_drop=key not in fresh,
            )
            values[key] = join_value(rows[place], joined.block)
            if joined.labels:
                closings.labels += [SentLabels.of(key, label) for label in joined.labels]
            closings.next_close_ms[key] = joined.next_close_ms
            closings.counts.add(joined.counts)
        return values, closings


class LabelMetrics:
    """Metrics of the labels, in the worker's registry. Listed in docs/metrics.md."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._labels = Counter("millstream_labels", "Labels records written, by kind.", ["kind"], registry=registry)
        for kind in ("own_log", "corrected", "early", "again", "timer"):
            self._labels.labels(kind)
        self._known = Counter(
            "millstream_labels_known",
            "Labels not written when a user's own log closed them, since the timer had said the same.",
            registry=registry,
        )
        self._late_actions = Counter(
            "millstream_late_actions", "Actions that came after the grace and labelled nothing.", registry=registry
        )
        self._dropped_actions = Counter(
            "millstream_dropped_actions",
            "Actions without an impression that were forgotten for lack of room.",
            registry=registry,
        )
        self.waiting_users = Gauge(
            "millstream_label_timer_users", "Users whose open impressions the timer waits for.", registry=registry
        )

    def count(self, counts: JoinCounts, known: int) -> None:
        """Count what a batch closed; ``known`` of its labels were on the topic already."""
        self._known.inc(known)
        self._labels.labels("own_log").inc(max(0, counts.closed - counts.early - known))
        self._labels.labels("early").inc(counts.early)
        self._labels.labels("corrected").inc(counts.corrected)
        self._labels.labels("again").inc(counts.resent)
        self._late_actions.inc(counts.late_actions)
        self._dropped_actions.inc(counts.dropped_actions)

    def count_timer(self, labels: int) -> None:
        """Count labels that the timer sent."""
        self._labels.labels("timer").inc(labels)

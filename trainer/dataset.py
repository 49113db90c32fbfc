"""Features and labels joined: labelled impressions in time order, and an account of what was left out.

The first features record of an impression wins, and the labels record that knows most of its user's log, of equals
the last. Left out and counted: impressions without
a label yet, processed with lag (their counters had seen the future), replayed (their state was that after them), and
closed early (their attribution window was cut short).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import structlog

from models.errors import RecordError
from models.examples import (
    EARLY,
    LAGGED,
    REPLAYED,
    FeaturesRecord,
    LabelsRecord,
    decode_features,
    decode_labels,
    label_values,
)
from models.manifest import OffsetRange, Window
from trainer.spool import Spool, SpooledRecord

log = structlog.get_logger(__name__)

F32 = npt.NDArray[np.float32]
_SORTED_AT_LEAST: Final = 1_000
LEFT_OUT: Final = ("unlabelled", "lagged", "replayed", "early", "repeated", "unreadable", "above-limit")


@dataclass(frozen=True, slots=True)
class ItemFacts:
    """What training knows of items, by hash64 of the item id."""

    texts: Mapping[int, str]
    embeddings: Mapping[int, Sequence[float]]
    """Vectors that items bring themselves."""


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled impression: its raw state, and 0 or 1 for each of its K items, float32 [K]."""

    features: FeaturesRecord
    labels: F32
    broker_ms: int


@dataclass(frozen=True, slots=True)
class Examples:
    """Labelled impressions in time order, and how many records were left out for what."""

    impressions: list[Example]
    left_out: dict[str, int] = field(default_factory=dict)
    histories: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Items' hashes, oldest first, that users acted on without having been shown them, where they are learned from."""

    def __len__(self) -> int:
        return len(self.impressions)

    @property
    def has_impressions(self) -> bool:
        """Whether anything was shown in the window, labelled yet or not."""
        return bool(self.impressions or self.left_out)

    @property
    def items(self) -> int:
        """Impressed items with an outcome."""
        return sum(len(e.labels) for e in self.impressions)

    @property
    def clicks(self) -> int:
        """Positive labels."""
        return int(sum(float(e.labels.sum()) for e in self.impressions))

    @property
    def newest_ms(self) -> int:
        """Event time of the newest impression, 0 where there is none."""
        return self.impressions[-1].features.time_ms if self.impressions else 0

    def after(self, time_ms: int) -> Examples:
        """Return the impressions of a later event time than this."""
        return Examples([e for e in self.impressions if e.features.time_ms > time_ms])

    def flat_labels(self) -> F32:
        """Return the labels of all impressions one after another, float32 [n]."""
        return np.concatenate([e.labels for e in self.impressions] or [np.zeros(0, np.float32)])

    def impression_numbers(self) -> npt.NDArray[np.int64]:
        """Return the number of the impression of each label of ``flat_labels``, [n]."""
        return np.repeat(np.arange(len(self)), [len(e.labels) for e in self.impressions])

    def users(self) -> npt.NDArray[np.str_]:
        """Return the user of each impression, [I]."""
        return np.array([e.features.user_id for e in self.impressions], np.str_)

    def policies(self) -> npt.NDArray[np.str_]:
        """Return who made the slate of each impression, [I]."""
        return np.array([e.features.policy for e in self.impressions], np.str_)

    def window(self, ranges: Sequence[OffsetRange]) -> Window:
        """Return what a bundle that learned from these says of it."""
        return Window(
            ranges=list(ranges),
            from_ms=self.impressions[0].features.time_ms if self.impressions else 0,
            to_ms=self.newest_ms,
            impressions=len(self),
            examples=self.items,
            users=len({e.features.user_id for e in self.impressions}),
        )


def read_examples(
    spool: Spool, ranges: Sequence[OffsetRange], features_topic: str, labels_topic: str, max_impressions: int
) -> Examples:
    """Join what is spooled of these ranges; the newest ``max_impressions`` are kept.

    Partition after partition, since a labels record stands in that of its features: memory holds the labels of one
    partition and about twice the impressions that are kept, however long the window is. The same ranges give the
    same examples. Raises TrainingError (``spool-unreadable``).
    """
    found: list[Example] = []
    left_out: Counter[str] = Counter()
    for partition in sorted({r.partition for r in ranges if r.topic == features_topic}):
        features, labels = (
            [r for r in _sorted(ranges) if (r.topic, r.partition) == (topic, partition)]
            for topic in (features_topic, labels_topic)
        )
        joined = join(
            (record for r in features for record in spool.read(r)),
            (record for r in labels for record in spool.read(r)),
            max_impressions,
        )
        left_out.update(joined.left_out)
        found += joined.impressions
        _keep_newest(found, max_impressions, left_out)
    return Examples(found, dict(left_out))


def join(features: Iterable[SpooledRecord], labels: Iterable[SpooledRecord], max_impressions: int) -> Examples:
    """Join records, each partition's in the order of offsets; a record that cannot be read is counted and logged."""
    left_out: Counter[str] = Counter()
    outcomes: dict[int, LabelsRecord] = {}
    for record in labels:
        try:
            outcome = decode_labels(record.value)
        except RecordError as error:
            _unreadable(left_out, "labels", record, error)
            continue
        held = outcomes.get(outcome.impression_id)
        if held is None or outcome.as_of >= held.as_of:
            outcomes[outcome.impression_id] = outcome
    seen: set[int] = set()
    found: list[Example] = []
    for record in features:
        try:
            state = decode_features(record.value)
            if state.impression_id in seen:
                left_out["repeated"] += 1
                continue
            seen.add(state.impression_id)
            reason, outcome_of = _why_not(state, outcomes.get(state.impression_id))
            if outcome_of is None:
                left_out[reason] += 1
                continue
            found.append(Example(state, label_values(outcome_of, len(state)), record.broker_ms))
            if len(found) >= 2 * max_impressions + _SORTED_AT_LEAST:
                _keep_newest(found, max_impressions, left_out)
        except RecordError as error:
            _unreadable(left_out, "features", record, error)
    _keep_newest(found, max_impressions, left_out)
    return Examples(found, dict(left_out))


def _keep_newest(found: list[Example], max_impressions: int, left_out: Counter[str]) -> None:
    """Put impressions in the order of time, and drop the oldest of too many."""
    # Impressions of one millisecond stand in an order that no partition count and no restart changes.
    found.sort(key=lambda e: (e.features.time_ms, e.features.impression_id))
    if len(found) > max_impressions:
        left_out["above-limit"] += len(found) - max_impressions
        del found[:-max_impressions]


def _why_not(state: FeaturesRecord, outcome: LabelsRecord | None) -> tuple[str, LabelsRecord | None]:
    if outcome is None:
        return "unlabelled", None
    if state.flags & LAGGED:
        return "lagged", None
    if state.flags & REPLAYED:
        return "replayed", None
    if outcome.flags & EARLY:
        return "early", None
    return "", outcome


def _unreadable(left_out: Counter[str], what: str, record: SpooledRecord, error: RecordError) -> None:
    left_out["unreadable"] += 1
    if left_out["unreadable"] <= 3:
        log.warning("record_left_out", of=what, offset=record.offset, reason=error.reason, detail=error.detail)


def _sorted(ranges: Sequence[OffsetRange]) -> list[OffsetRange]:
    return sorted(ranges, key=lambda r: (r.topic, r.partition, r.start))

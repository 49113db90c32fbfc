"""A recorded log through the pure core, without Kafka: what each impression would have told a trainer, and its labels.

Rows by models.user_state, counters by models.counters, state by models.live_features, labels by models.joiner unless
the log itself says what was clicked. What an impression may know, and when events arrive: trainer/log_state.py.

    catalogue = catalogue_of(reader.items(), ItemTable(space, encodings))
    examples = log_examples(reader, catalogue, space.space_id, LogConfig())
    train(TrainingSet(examples.records, examples.labels, texts), start)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from models.catalogue import Catalogue
from models.events import Action, Impression, Item
from models.examples import EXTERNAL, MODEL, FeaturesRecord, label_values, state_fields
from models.features import RawSlates
from models.hashing import hash64, impression_id
from models.item_index import ItemIndex
from models.joiner import JoinContext
from models.live_features import CountsReader, raw_from_state
from models.logs import LogEvent, LogReader
from models.user_state import UserReader
from trainer.log_labels import LogLabels
from trainer.log_state import EPOCH, PARTITION, LogConfig, LogState, OnReads, Reads, blocks
from trainer.scoring import ItemTable

__all__ = [
    "LogConfig",
    "LogExamples",
    "OnReads",
    "Reads",
    "catalogue_of",
    "log_examples",
    "take_items",
    "thinned",
]

F32 = npt.NDArray[np.float32]
Ints = npt.NDArray[np.intp]
OnProgress = Callable[[int], None]

_BY_ITEM: Final = (
    "items",
    "positions",
    "propensities",
    "counters",
    "age_seconds",
    "first_seen_seconds",
    "sims",
    "shown_counts",
    "shown_age_seconds",
    "acted_age_seconds",
)
_CELLS: Final = 8_192
"""Impressions are read in pieces of at most this many places when padded."""


@dataclass(slots=True)
class LogExamples:
    """Labelled impressions of a log in the order of event time, and what the users did before it."""

    records: list[FeaturesRecord] = field(default_factory=list)
    labels: list[F32] = field(default_factory=list)
    """float32 [K] each: 1 for an item with a positive action."""
    histories: dict[str, list[int]] = field(default_factory=dict)
    """Items' 64-bit hashes of each user's history, oldest first, of which the log has no impressions."""
    unlabelled: int = 0
    """Impressions left out, whose attribution window was not over when the log ended."""

    def part(self, chosen: Sequence[bool] | npt.NDArray[np.bool_]) -> LogExamples:
        """Return the chosen impressions [I], with all histories."""
        places = np.flatnonzero(np.asarray(chosen))
        records, labels = [self.records[i] for i in places], [self.labels[i] for i in places]
        return LogExamples(records, labels, self.histories, 0)


def catalogue_of(items: Iterable[Item], table: ItemTable) -> Catalogue:
    """Return a catalogue of items, each with its vector of ``table`` where that has one."""
    catalogue = Catalogue(ItemIndex(), table.vectors.dim)
    rows = np.array([catalogue.upsert(item) for item in items], np.int32)
    catalogue.reserve()
    hashes = np.array([hash64(catalogue.index.item_id(row)) for row in rows.tolist()], np.uint64)
    vectors, known = table.vectors.of(table.rows(hashes))
    contents = catalogue.content_hashes(rows)
    catalogue.space_vectors.set_many(rows[known], vectors[known], contents[known])
    return catalogue


def log_examples(
    reader: LogReader,
    catalogue: Catalogue,
    space_id: str,
    config: LogConfig | None = None,
    on_progress: OnProgress = lambda events: None,
    on_reads: OnReads | None = None,
    cut_at: Container[int] = (),
) -> LogExamples:
    """Return the examples of a log.

    ``catalogue``: items with their vectors in the space ``space_id``; items that it lacks are added to its index.
    ``on_progress`` is called with the number of events read so far, ``on_reads`` with the user rows just before
    impressions, each impression once and in order; for those whose place in the log is in ``cut_at`` it is given the
    counters as they are then. Raises LogFormatError as the reader does.
    """
    config = config or LogConfig()
    replay = _Replay(catalogue, space_id, config, on_reads, cut_at)
    events = 0
    for block in blocks(reader.events(), config.block_seconds):
        replay.take(block)
        events += len(block)
        on_progress(events)
    return replay.examples()


def thinned(examples: LogExamples, unclicked: int, per_click: int, seed: int) -> LogExamples:
    """Return each click as ``per_click`` impressions: the clicked item and ``unclicked`` drawn ones of its slate.

    With one unclicked item they look as those of a log that kept only one: what is compared within a slate is then
    compared alike. The order within is drawn, and all impressions made of one share its id.
    """
    random = np.random.default_rng(seed)
    made = LogExamples(histories=examples.histories)
    for record, labels in zip(examples.records, examples.labels, strict=True):
        clicked, others = np.flatnonzero(labels > 0), np.flatnonzero(labels <= 0)
        for place in np.repeat(clicked, per_click if len(others) else 0).tolist():
            drawn = random.choice(others, min(unclicked, len(others)), replace=False).tolist()
            places = random.permutation([place, *drawn]).tolist()
            made.records.append(take_items(record, places))
            made.labels.append(labels[places])
    return made


def take_items(record: FeaturesRecord, places: Sequence[int]) -> FeaturesRecord:
    """Return an impression with only the items at ``places``, in that order."""
    at, k = np.asarray(places, np.intp), len(record)

    def kept(values: bytes) -> bytes:
        return np.frombuffer(values, np.uint8).reshape(k, -1)[at].tobytes() if values else b""

    changes = {name: kept(getattr(record, name)) for name in _BY_ITEM}
    return msgspec.structs.replace(record, **changes, scores=[(n, kept(values)) for n, values in record.scores])


class _Replay:
    """A log on its way through the core."""

    def __init__(
        self,
        catalogue: Catalogue,
        space_id: str,
        config: LogConfig,
        on_reads: OnReads | None,
        cut_at: Container[int],
    ) -> None:
        self._catalogue, self._space_id, self._config = catalogue, space_id, config
        self._state = LogState(catalogue, space_id, config, on_reads, cut_at)
        self._reader = UserReader(config.user_state, catalogue, self._state.space_hash)
        join = JoinContext.of(config.joiner, config.user_state, self._state.surfaces)
        self._labels = LogLabels(join, EPOCH, PARTITION)
        self._offset = 0
        self._clock_ms = 0
        self._records: list[FeaturesRecord] = []
        self._told: dict[int, F32] = {}
        self._histories: defaultdict[str, list[int]] = defaultdict(list)

    def take(self, block: Sequence[LogEvent]) -> None:
        """Take the next events of the log: read the state for their impressions, let them change it, join them."""
        hashed = self._state.user_events(block, self._offset)
        self._offset += len(block)
        for reads, counts in self._state.take(block, hashed):
            self._record(reads, counts)
        self._labels.take(block, hashed)
        for event in block:
            if event.is_history and isinstance(event.event, Action):
                self._histories[event.event.user_id].append(hash64(event.event.item_id))
        self._clock_ms = max(self._clock_ms, block[-1].time_ms)

    def examples(self) -> LogExamples:
        """Return what was made, each impression with its label."""
        joined = self._labels.labels(self._clock_ms)
        made = LogExamples(histories=dict(self._histories))
        for record in self._records:
            labels = self._told.get(record.impression_id)
            if labels is None and (label := joined.get(record.impression_id)) is not None:
                labels = label_values(label, len(record))
            if labels is None:
                made.unlabelled += 1
            else:
                made.records.append(record)
                made.labels.append(labels)
        return made

    def _record(self, reads: Reads, counts: CountsReader) -> None:
        """Make the records of impressions, of about equally long ones together, and keep them in their order."""
        slates = [_slate(reads.impression(i)) for i in range(len(reads.events))]
        made: dict[int, FeaturesRecord] = {}
        for piece in _pieces(np.array([len(slate) for slate in slates], np.intp)):
            raw = self._raw(reads, [slates[i] for i in piece], np.array(piece, np.intp), counts)
            for place, i in enumerate(piece):
                made[i] = self._features(reads, i, slates[i], state_fields(raw, place))
        for i, event in enumerate(reads.events):
            self._records.append(made[i])
            if event.outcome is not None:
                clicked = set(event.outcome)
                told = np.array([item in clicked for item in slates[i]], np.float32)
                self._told[made[i].impression_id] = told

    def _raw(self, reads: Reads, slates: Sequence[_Slate], at: Ints, counts: CountsReader) -> RawSlates:
        sizes = np.array([len(slate) for slate in slates])
        valid = np.arange(sizes.max()) < sizes[:, None]
        items, item_rows = np.zeros(valid.shape, np.uint64), np.full(valid.shape, -1, np.int32)
        flat = [item for slate in slates for item in slate]
        items[valid] = [hash64(item) for item in flat]
        # Also those that no record names, and that have a row only since they were counted.
        item_rows[valid] = self._catalogue.index.rows(flat)
        raw = raw_from_state(
            reads.rows[at],
            item_rows,
            reads.times_ms[at],
            self._catalogue,
            counts,
            self._reader,
            self._config.ranking,
            valid=valid,
            items=items,
        )
        raw.positions[valid] = [position for slate in slates for position, _ in slate.values()]
        return raw

    def _features(self, reads: Reads, at: int, slate: _Slate, state: dict[str, Any]) -> FeaturesRecord:
        impression, offset, time_ms = reads.impression(at), reads.offsets[at], reads.events[at].time_ms
        given = any(propensity is not None for _, propensity in slate.values())
        values = [np.nan if p is None else p for _, p in slate.values()] if given else []
        return FeaturesRecord(
            impression_id=impression_id(EPOCH, PARTITION, offset),
            user_id=impression.user_id,
            partition=PARTITION,
            offset=offset,
            time_ms=time_ms,
            broker_ms=time_ms,
            processed_ms=time_ms,
            flags=0,
            surface=impression.surface or self._config.surfaces[0],
            request_id=impression.request_id,
            experiment=impression.experiment,
            policy=EXTERNAL if impression.request_id is None else impression.experiment or MODEL,
            session_id=impression.session_id,
            context=impression.context,
            space_id=self._space_id,
            propensities=np.array(values, "<f4").tobytes(),
            scores=[],
            model_version="",
            **state,
        )


_Slate = dict[str, tuple[int, float | None]]
"""Items of an impression, each once, with position (0: not known) and propensity of the first mention."""


def _slate(impression: Impression) -> _Slate:
    slate: _Slate = {}
    for item in impression.items:
        slate.setdefault(item.item_id, (item.position or 0, item.propensity))
    return slate


def _pieces(sizes: Ints) -> Iterator[list[int]]:
    """Cut impressions, shortest first, into pieces of which none is padded to too much."""
    piece: list[int] = []
    for i in np.argsort(sizes, kind="stable").tolist():
        if piece and (len(piece) + 1) * int(sizes[i]) > _CELLS:
            yield piece
            piece = []
        piece.append(i)
    if piece:
        yield piece

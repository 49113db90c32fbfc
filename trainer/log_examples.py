"""A recorded log through the pure core, without Kafka: what each impression would have told a trainer, and its labels.

Rows by models.user_state, counters by models.counters, state by models.live_features, labels by models.joiner unless
the log itself says what was clicked. Events are taken tick by tick: an impression sees what happened in strictly
earlier ticks, never its own tick, so that its click can be in none of its features.

    catalogue = catalogue_of(reader.items(), ItemTable(space, encodings))
    examples = log_examples(reader, catalogue, space.space_id, LogConfig())
    train(TrainingSet(examples.records, examples.labels, texts), start)
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from models.catalogue import Catalogue
from models.counter_events import IMPRESSIONS, CountersConfig, TouchBatch, Touches, counter_touches
from models.counters import ItemCounters
from models.events import Action, Event, Impression, Item
from models.examples import EXTERNAL, MODEL, FeaturesRecord, LabelsRecord, label_values, state_fields
from models.hashing import hash64, impression_id
from models.item_index import ItemIndex
from models.joiner import JoinContext, JoinerConfig, due_labels, join
from models.live_features import raw_from_state
from models.logs import LogEvent, LogReader
from models.ranking import RankingConfig
from models.user_events import UserEvent, UserStateConfig, surface_names, user_event
from models.user_state import Rows, UserReader, apply, empty_rows
from trainer.scoring import ItemTable

F32 = npt.NDArray[np.float32]
OnProgress = Callable[[int], None]

PARTITION: Final = 0
EPOCH: Final = 1
DEFAULT_SURFACE: Final = "default"
_BY_ITEM: Final = (
    "items",
    "positions",
    "propensities",
    "counters",
    "age_seconds",
    "sims",
    "shown_counts",
    "shown_age_seconds",
)
_CELLS: Final = 8_192
"""Impressions of one tick are read in pieces of at most this many places when padded."""


class LogConfig(BaseModel):
    """How a log is read: what an impression may know of the past, and what the log left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tick_seconds: float = Field(
        0.001,
        ge=0.001,
        le=86_400,
        description="An impression sees what happened in earlier ticks of this length; 3600 where times are hours.",
    )
    counter_delay_seconds: float = Field(
        0.0, ge=0, le=30 * 86_400, description="How much later than it happened an event is seen by the item counters."
    )
    unclicked_weight: float = Field(
        1.0,
        ge=1,
        le=1_000,
        description="Impressions that an unclicked item counts as, where the log kept only a part of those, from "
        "thinned_from_ms on.",
    )
    thinned_from_ms: int | None = Field(
        None, description="Event time from which the log kept a part of the unclicked items only; None: never."
    )
    count_history: bool = Field(
        True, description="Whether actions of a user's history count; False where their times are made up."
    )
    user_state: UserStateConfig = Field(default_factory=lambda: UserStateConfig(), description="Of the rows.")
    counters: CountersConfig = Field(default_factory=lambda: CountersConfig(), description="Of the item counters.")
    ranking: RankingConfig = Field(default_factory=lambda: RankingConfig(), description="How tastes are scaled.")
    joiner: JoinerConfig = Field(default_factory=lambda: JoinerConfig(), description="Where the log has no outcomes.")


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
) -> LogExamples:
    """Return the examples of a log.

    ``catalogue``: items with their vectors in the space ``space_id``; items that it lacks are added to its index.
    ``on_progress`` is called with the number of events read so far. Raises LogFormatError as the reader does.
    """
    replay = _Replay(catalogue, space_id, config or LogConfig())
    tick_ms = replay.tick_ms
    events = 0
    for _, tick in groupby(reader.events(), key=lambda e: e.time_ms // tick_ms):
        taken = list(tick)
        replay.take(taken)
        events += len(taken)
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
    """The state of the core while a log goes through it."""

    def __init__(self, catalogue: Catalogue, space_id: str, config: LogConfig) -> None:
        self._catalogue, self._space_id, self._config = catalogue, space_id, config
        self.tick_ms = max(1, round(config.tick_seconds * 1000))
        self._delay_ms = round(config.counter_delay_seconds * 1000)
        self._counters = ItemCounters(catalogue.index, config.counters, lambda row: catalogue.item(row) is not None)
        self._counters.own(PARTITION)
        self._waiting: deque[tuple[int, Event, int, Touches]] = deque()
        self._surfaces = surface_names(DEFAULT_SURFACE, (), config.user_state)
        self._space_hash = hash64(space_id)
        self._reader = UserReader(config.user_state, catalogue, self._space_hash)
        self._places: dict[str, int] = {}
        self._rows: Rows = empty_rows(1_024)
        self._offset = 0
        self._clock_ms = 0
        self._join = JoinContext.of(config.joiner, config.user_state, self._surfaces)
        self._joins = False
        self._blocks: dict[str, bytes] = {}
        self._records: list[FeaturesRecord] = []
        self._told: dict[int, F32] = {}
        self._joined: dict[int, LabelsRecord] = {}
        self._histories: defaultdict[str, list[int]] = defaultdict(list)

    def take(self, tick: Sequence[LogEvent]) -> None:
        """Take the events of one tick: read the state for its impressions, then let all of them change it."""
        start_ms = tick[0].time_ms // self.tick_ms * self.tick_ms
        self._count_until(start_ms - self._delay_ms)
        offsets = list(range(self._offset, self._offset + len(tick)))
        self._offset += len(tick)
        shown = [
            (event, event.event, offset)
            for event, offset in zip(tick, offsets, strict=True)
            if isinstance(event.event, Impression)
        ]
        self._record(shown)
        self._apply(tick, offsets)
        for event, offset in zip(tick, offsets, strict=True):
            if event.is_history:
                self._keep_history(event)
            if not event.is_history or self._config.count_history:
                self._waiting.append((event.time_ms, event.event, offset, self._touches(event)))
        self._clock_ms = max(self._clock_ms, tick[-1].time_ms)

    def examples(self) -> LogExamples:
        """Return what was made, each impression with its label."""
        for user, block in self._blocks.items():
            due, _ = due_labels(block, self._clock_ms, user, self._join)
            self._joined.update((label.impression_id, label) for label in due)
        made = LogExamples(histories=dict(self._histories))
        for record in self._records:
            labels = self._told.get(record.impression_id)
            if labels is None and (joined := self._joined.get(record.impression_id)) is not None:
                labels = label_values(joined, len(record))
            if labels is None:
                made.unlabelled += 1
            else:
                made.records.append(record)
                made.labels.append(labels)
        return made

    def _keep_history(self, event: LogEvent) -> None:
        if isinstance(event.event, Action):
            self._histories[event.event.user_id].append(hash64(event.event.item_id))

    def _touches(self, event: LogEvent) -> Touches:
        """Return what an event counts; unclicked items count more where the log kept a part of them."""
        touches = counter_touches(event.event, self._config.counters)
        thinned = self._config.thinned_from_ms
        if event.outcome is None or thinned is None or event.time_ms < thinned:
            return touches
        clicked, weight = set(event.outcome), self._config.unclicked_weight
        weights = [
            weight if kind == IMPRESSIONS and item not in clicked else 1.0
            for item, kind in zip(touches.item_ids, touches.kinds, strict=True)
        ]
        return Touches(touches.item_ids, touches.kinds, weights)

    def _count_until(self, until_ms: int) -> None:
        """Count what happened before ``until_ms``."""
        batch = TouchBatch()
        while self._waiting and self._waiting[0][0] < until_ms:
            time_ms, event, offset, touches = self._waiting.popleft()
            batch.add(offset, time_ms, hash64(event.user_id), hash64(event.event_id), touches)
        self._counters.add(PARTITION, batch)

    def _rows_of(self, users: Sequence[str]) -> list[int]:
        for user in users:
            self._places.setdefault(user, len(self._places))
        if len(self._places) > len(self._rows):
            more = empty_rows(max(len(self._places), 2 * len(self._rows)))
            more[: len(self._rows)] = self._rows
            self._rows = more
        return [self._places[user] for user in users]

    def _apply(self, tick: Sequence[LogEvent], offsets: Sequence[int]) -> None:
        """Change the rows of a tick's users, and join their actions where the log does not tell outcomes."""
        users = list(dict.fromkeys(event.event.user_id for event in tick))
        places = self._rows_of(users)
        local = {user: i for i, user in enumerate(users)}
        config = self._config.user_state
        events = [
            user_event(e.event, local[e.event.user_id], offset, e.time_ms, config, self._surfaces)
            for e, offset in zip(tick, offsets, strict=True)
        ]
        before = self._rows[places]
        self._rows[places], outcomes = apply(
            before,
            events,
            self._catalogue,
            config,
            epoch=EPOCH,
            space_id=self._space_hash,
            generation=0,
            surfaces=self._surfaces,
        )
        # A log that tells outcomes needs no joiner; actions before its first impression have nothing to belong to.
        self._joins |= any(isinstance(e.event, Impression) and e.outcome is None for e in tick)
        joined: defaultdict[str, list[int]] = defaultdict(list)
        for i, event in enumerate(tick if self._joins else ()):
            if not event.is_history and event.outcome is None:
                joined[event.event.user_id].append(i)
        for user, own in joined.items():
            clock_ms = int(before["last_time_ms"][local[user]])
            self._join_user(user, [events[i] for i in own], [int(outcomes[i]) for i in own], clock_ms)

    def _join_user(self, user: str, events: Sequence[UserEvent], outcomes: Sequence[int], clock_ms: int) -> None:
        block = self._blocks.get(user, b"")
        made = join(block, events, outcomes, clock_ms, self._join, user_id=user, epoch=EPOCH, partition=PARTITION)
        self._joined.update((label.impression_id, label) for label in made.labels)
        if made.block:
            self._blocks[user] = made.block
        else:
            self._blocks.pop(user, None)

    def _record(self, shown: list[tuple[LogEvent, Impression, int]]) -> None:
        """Make the records of a tick's impressions from the state as it is now."""
        for piece in _pieces(shown):
            slates = [list(dict.fromkeys(item.item_id for item in impression.items)) for _, impression, _ in piece]
            sizes = np.array([len(slate) for slate in slates])
            valid = np.arange(sizes.max()) < sizes[:, None]
            items, item_rows = np.zeros(valid.shape, np.uint64), np.full(valid.shape, -1, np.int32)
            flat = [item for slate in slates for item in slate]
            items[valid] = [hash64(item) for item in flat]
            item_rows[valid] = self._catalogue.index.rows(flat)
            places = self._rows_of([impression.user_id for _, impression, _ in piece])
            rows = self._rows[places]
            times_ms = np.array([event.time_ms for event, _, _ in piece], np.int64)
            raw = raw_from_state(
                rows,
                item_rows,
                times_ms,
                self._catalogue,
                self._counters,
                self._reader,
                self._config.ranking,
                valid=valid,
                items=items,
            )
            for i, (event, impression, offset) in enumerate(piece):
                positions = {shown.item_id: shown.position or 0 for shown in reversed(impression.items)}
                raw.positions[i, : len(slates[i])] = [positions[item] for item in slates[i]]
                self._records.append(self._features(event, impression, offset, state_fields(raw, i)))
                if event.outcome is not None:
                    clicked = set(event.outcome)
                    told = np.array([item in clicked for item in slates[i]], np.float32)
                    self._told[self._records[-1].impression_id] = told

    def _features(
        self, event: LogEvent, impression: Impression, offset: int, state: dict[str, bytes | tuple[int, int, int]]
    ) -> FeaturesRecord:
        propensities = {item.item_id: item.propensity for item in reversed(impression.items)}
        given = any(p is not None for p in propensities.values())
        order = dict.fromkeys(item.item_id for item in impression.items)
        values = [np.nan if (p := propensities[item]) is None else p for item in order] if given else []
        return FeaturesRecord(
            impression_id=impression_id(EPOCH, PARTITION, offset),
            user_id=impression.user_id,
            partition=PARTITION,
            offset=offset,
            time_ms=event.time_ms,
            broker_ms=event.time_ms,
            processed_ms=event.time_ms,
            flags=0,
            surface=impression.surface or DEFAULT_SURFACE,
            request_id=impression.request_id,
            experiment=impression.experiment,
            policy=EXTERNAL if impression.request_id is None else impression.experiment or MODEL,
            session_id=impression.session_id,
            context=impression.context,
            space_id=self._space_id,
            propensities=np.array(values, "<f4").tobytes(),
            scores=[],
            model_version="",
            **state,  # type: ignore[arg-type]
        )


def _pieces(shown: list[tuple[LogEvent, Impression, int]]) -> Iterator[list[tuple[LogEvent, Impression, int]]]:
    """Cut the impressions of a tick, in their order, so that none is padded to too much."""
    piece: list[tuple[LogEvent, Impression, int]] = []
    longest = 0
    for one in shown:
        longest = max(longest, len(one[1].items))
        if piece and (len(piece) + 1) * longest > _CELLS:
            yield piece
            piece, longest = [], len(one[1].items)
        piece.append(one)
    if piece:
        yield piece

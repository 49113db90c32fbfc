"""Rows and counters while a recorded log goes through them, block by block, exactly as event by event.

An event with event time τ arrives at τ + delay, in the rows and in the counters alike. An impression read at t sees
what arrived by t and happened strictly before it. Where a log tells times by longer ticks, both go by the tick: seen
is what arrived in an earlier one. Else an impression of the full hour would be known an hour before its click.

Within a block arrivals and reads stand in one order. Rows: users do not know of each other, so what counts is the
order of each user's own arrivals and reads. Wave w takes the w-th run of reads, then the w-th run of arrivals, of all
users together. Counters: ``ItemCounters.add_as_of`` counts a block's arrivals once and reads each place in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, cast

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from models.catalogue import Catalogue
from models.co_clicks import CoClicks, CoClicksConfig, Steps
from models.context_popularity import ContextPopularity
from models.counter_events import IMPRESSIONS, CountersConfig, TouchBatch, Touches, counter_touches
from models.counters import ItemCounters
from models.events import Event, Impression
from models.hashing import hash64
from models.joiner import JoinerConfig
from models.live_features import CountsReader
from models.logs import LogEvent
from models.ranking import RankingConfig
from models.surfaces import RecommenderConfig
from models.user_events import UserEvent, UserStateConfig, surface_names, user_event
from models.user_state import Rows, apply, empty_rows

PARTITION: Final = 0
EPOCH: Final = 1
DEFAULT_SURFACE: Final = "default"
BLOCK_EVENTS: Final = 65_536
BLOCK_IMPRESSIONS: Final = 8_192
"""A block ends with whichever of the two is reached first: a few ten MiB of rows."""

Ints = npt.NDArray[np.intp]
Int64 = npt.NDArray[np.int64]


class LogConfig(BaseModel):
    """How a log is read: what an impression may know of the past, and what the log left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tick_seconds: float = Field(
        0.001,
        ge=0.001,
        le=86_400,
        description="An impression sees what arrived in earlier ticks of this length; 3600 where times are hours.",
    )
    feedback_delay_seconds: float = Field(
        0.0,
        ge=0,
        le=30 * 86_400,
        description="How much later than it happened an action or impression enters the user rows and the counters.",
    )
    frozen_from_ms: int | None = Field(
        None,
        description="Event time from which events change neither rows nor counters any more; they are still read, and "
        "decay goes on. None: never.",
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
        False,
        description="Whether actions of a user's history enter the item counters as well as the row. They are clicks "
        "of which the log has no impression, so that they lift the CTRs of the time that they cover, and of that time "
        "only; and some logs make their times up.",
    )
    block_seconds: float = Field(
        86_400.0,
        gt=0,
        le=7 * 86_400,
        description="Longest stretch of event time taken at once. Changes no example: only how old the counters may "
        "be that a caller's on_reads is given.",
    )
    user_state: UserStateConfig = Field(default_factory=lambda: UserStateConfig(), description="Of the rows.")
    counters: CountersConfig = Field(default_factory=lambda: CountersConfig(), description="Of the item counters.")
    ranking: RankingConfig = Field(default_factory=lambda: RankingConfig(), description="How tastes are scaled.")
    co_clicks: CoClicksConfig | None = Field(
        None, description="What users act on after what is learned so, for those who are given reads; None: it is not."
    )
    contexts: RecommenderConfig | None = Field(
        None, description="What users act on by context is counted so, for those who are given reads; None: it is not."
    )
    joiner: JoinerConfig = Field(default_factory=lambda: JoinerConfig(), description="Where the log has no outcomes.")
    surfaces: tuple[str, ...] = Field(
        (DEFAULT_SURFACE,),
        min_length=1,
        description="Surfaces of the recommender; the first is that of events that name none.",
    )


@dataclass(frozen=True, slots=True)
class Reads:
    """Impressions of one stretch of the log, in their order, and what was known just before each."""

    events: list[LogEvent]
    """Each an impression."""
    offsets: list[int]
    """Places in the log."""
    times_ms: Int64
    """[S]."""
    rows: Rows
    """[S], the users' rows as they stood at that time."""
    counters: ItemCounters
    """As they stood at the beginning of the stretch: exact for an impression that it was cut at, else never newer, and
    older by ``block_seconds`` and a tick at most. Counted on once on_reads returns."""
    catalogue: Catalogue
    co_clicks: CoClicks | None = None
    """Where the settings ask for it; as old as ``counters``."""
    contexts: ContextPopularity | None = None
    """The same."""

    def impression(self, at: int) -> Impression:
        """Return the impression at a place of ``events``."""
        return cast(Impression, self.events[at].event)


OnReads = Callable[[Reads], None]


@dataclass(slots=True)
class _Arrival:
    """An event on its way to rows and counters."""

    arrives_ms: int
    user: int
    """Place of the user's row."""
    event: UserEvent
    user_hash: int
    touches: Touches | None
    """None: the counters do not take it."""
    told: Event | None
    """The event for those who count by context; None: they do not take it."""


def blocks(events: Iterator[LogEvent], seconds: float) -> Iterator[list[LogEvent]]:
    """Cut events into blocks, none longer than ``seconds`` of event time."""
    block: list[LogEvent] = []
    impressions = 0
    for event in events:
        if block and (
            len(block) >= BLOCK_EVENTS
            or impressions >= BLOCK_IMPRESSIONS
            or event.time_ms - block[0].time_ms > seconds * 1_000
        ):
            yield block
            block, impressions = [], 0
        block.append(event)
        impressions += isinstance(event.event, Impression)
    if block:
        yield block


class LogState:
    """Rows and counters of a log; all events come in the order of event time."""

    def __init__(
        self,
        catalogue: Catalogue,
        space_id: str,
        config: LogConfig,
        on_reads: OnReads | None = None,
        cut_at: Container[int] = (),
    ) -> None:
        self._catalogue, self._config, self._on_reads, self._cut_at = catalogue, config, on_reads, cut_at
        self._tick_ms = max(1, round(config.tick_seconds * 1_000))
        self._delay_ms = round(config.feedback_delay_seconds * 1_000)
        self.counters = ItemCounters(catalogue.index, config.counters, lambda row: catalogue.item(row) is not None)
        self.counters.own(PARTITION)
        self.co_clicks = None if config.co_clicks is None else CoClicks(config.co_clicks, catalogue.index)
        self.contexts: ContextPopularity | None = None
        if config.contexts is not None and config.contexts.popularity_context:
            self.contexts = ContextPopularity(config.contexts, config.counters, config.user_state, catalogue.index)
        self.surfaces = surface_names(config.surfaces[0], config.surfaces, config.user_state)
        self.space_hash = hash64(space_id)
        self._places: dict[str, int] = {}
        self._rows: Rows = empty_rows(1_024)
        self._waiting: deque[_Arrival] = deque()

    def user_events(self, events: Sequence[LogEvent], first_offset: int) -> list[UserEvent]:
        """Return the next events of the log hashed; places in the log begin with ``first_offset``."""
        config = self._config.user_state
        return [
            user_event(event.event, 0, offset, event.time_ms, config, self.surfaces)
            for offset, event in enumerate(events, first_offset)
        ]

    def take(self, events: Sequence[LogEvent], hashed: Sequence[UserEvent]) -> Iterator[tuple[Reads, CountsReader]]:
        """Take the next events of the log, with their hashed forms.

        Yields stretches of impressions, and the counts as they stood at each of them, to be read before the next is
        asked for.
        """
        for event, user_event_ in zip(events, hashed, strict=True):
            self._wait(event, user_event_)
        due: list[_Arrival] = []
        while self._waiting and self._waiting[0].arrives_ms <= events[-1].time_ms:
            due.append(self._waiting.popleft())
        shown = [i for i, event in enumerate(events) if isinstance(event.event, Impression)]
        times_ms = np.array([events[i].time_ms for i in shown], np.int64)
        seen = np.searchsorted([a.arrives_ms for a in due], times_ms, side="right")
        cuts = {0, *(int(seen[n]) for n, i in enumerate(shown) if hashed[i].offset in self._cut_at)}
        for begin, end, reading in self._stretches(due, seen, cuts):
            chosen = [events[i] for i in shown[reading]]
            offsets = [hashed[i].offset for i in shown[reading]]
            arrivals = due[begin:end]
            rows, steps = self._through_rows(chosen, arrivals, seen[reading] - begin)
            reads = Reads(
                chosen,
                offsets,
                times_ms[reading],
                rows,
                self.counters,
                self._catalogue,
                self.co_clicks,
                self.contexts,
            )
            if self._on_reads and chosen:
                self._on_reads(reads)
            counts = self._count(arrivals)
            if self.co_clicks is not None and steps is not None:
                self.co_clicks.learn(steps)
            if self.contexts is not None:
                for arrival in arrivals:
                    if arrival.told is not None:
                        self.contexts.add(PARTITION, arrival.event.offset, arrival.told, arrival.event.time_ms)
            if chosen:
                yield reads, counts

    def _wait(self, event: LogEvent, hashed: UserEvent) -> None:
        frozen = self._config.frozen_from_ms
        if frozen is not None and event.time_ms >= frozen:
            return
        arrives_ms = max(event.time_ms + self._delay_ms, event.time_ms + 1)
        if self._tick_ms > 1:
            arrives_ms = ((event.time_ms + self._delay_ms) // self._tick_ms + 1) * self._tick_ms
        counted = not event.is_history or self._config.count_history
        user_id = event.event.user_id
        self._waiting.append(
            _Arrival(
                arrives_ms,
                self._place(user_id),
                hashed,
                hash64(user_id),
                self._touches(event) if counted else None,
                event.event if counted and self.contexts is not None else None,
            )
        )

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

    def _stretches(
        self, due: Sequence[_Arrival], seen: Ints, cuts: Collection[int]
    ) -> Iterator[tuple[int, int, slice]]:
        """Yield bounds among the arrivals, and which reads see at least one of these and none that follow.

        None spans more than the counters can take at once. What sees just the first n arrivals, n being among
        ``cuts``, stands alone, without arrivals. 0 is always among them: the block may move the landmark far away.
        """
        bounds, begin = {0, len(due), *cuts}, 0
        for i, arrival in enumerate(due):
            if i in bounds:
                begin = i
            elif arrival.event.time_ms - due[begin].event.time_ms > self.counters.longest_batch_ms:
                bounds.add(i)
                begin = i
        begin = done = 0
        for end in sorted(bounds):
            if end > begin:
                read = int(np.searchsorted(seen, end, side="left" if end in cuts else "right"))
                yield begin, end, slice(done, read)
                begin, done = end, read
            if end in cuts:
                read = int(np.searchsorted(seen, end, side="right"))
                yield end, end, slice(done, read)
                done = read

    def _count(self, arrivals: Sequence[_Arrival]) -> CountsReader:
        batch, arrivals_ms = TouchBatch(), []
        for arrival in arrivals:
            if arrival.touches is not None:
                event = arrival.event
                batch.add(event.offset, event.time_ms, arrival.user_hash, event.event_hash, arrival.touches)
                arrivals_ms.append(arrival.arrives_ms)
        if not arrivals_ms:
            return self.counters
        return self.counters.add_as_of(PARTITION, batch, np.array(arrivals_ms, np.int64))

    def _through_rows(
        self, reads: Sequence[LogEvent], arrivals: Sequence[_Arrival], seen: Ints
    ) -> tuple[Rows, Steps | None]:
        """Apply arrivals to the rows and return the row of each read as it stood after the ``seen`` [S] first ones.

        And the steps of the arrivals, where somebody wants them.
        """
        users = np.array([self._place(e.event.user_id) for e in reads] + [a.user for a in arrivals], np.intp)
        before = empty_rows(len(reads))
        outcomes = np.zeros(len(arrivals), np.int8)
        own, places = np.unique(users[len(reads) :], return_inverse=True)
        held = self._rows[own] if self.co_clicks is not None else None
        for now_read, now_applied in waves(users, seen):
            before[now_read] = self._rows[users[now_read]]
            if len(now_applied):
                at = now_applied - len(reads)
                outcomes[at] = self._apply(users[now_applied], [arrivals[i].event for i in at.tolist()])
        if self.co_clicks is None or held is None:
            return before, None
        for arrival, place in zip(arrivals, places.tolist(), strict=True):
            arrival.event.user = place
        return before, self.co_clicks.steps_of(held, [arrival.event for arrival in arrivals], outcomes)

    def _apply(self, users: Ints, events: list[UserEvent]) -> npt.NDArray[np.int8]:
        places, own = np.unique(users, return_inverse=True)
        for event, place in zip(events, own.tolist(), strict=True):
            event.user = place
        self._rows[places], outcomes = apply(
            self._rows[places],
            events,
            self._catalogue,
            self._config.user_state,
            epoch=EPOCH,
            space_id=self.space_hash,
            generation=0,
            surfaces=self.surfaces,
        )
        return outcomes

    def _place(self, user: str) -> int:
        place = self._places.setdefault(user, len(self._places))
        if place >= len(self._rows):
            more = empty_rows(2 * len(self._rows))
            more[: len(self._rows)] = self._rows
            self._rows = more
        return place


def waves(users: Ints, seen: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Yield for each wave which reads it takes, and which arrivals after them, as places in ``users``, each rising.

    ``users`` [S + A]: of the reads, then of the arrivals. ``seen`` [S], not falling: arrivals before each read. Wave w
    holds of every user the w-th run of reads and the run of arrivals that follows it.
    """
    reads, operations = len(seen), len(users)
    moments = np.concatenate([2 * seen, 2 * np.arange(operations - reads) + 1])
    order = np.lexsort((np.arange(operations), moments, users))
    is_read, of_user = order < reads, users[order]
    same = np.zeros(operations, np.bool_)
    same[1:] = of_user[1:] == of_user[:-1]
    begins = np.zeros(operations, np.bool_)
    begins[1:] = same[1:] & is_read[1:] & ~is_read[:-1]
    begun = np.cumsum(begins)
    first = np.flatnonzero(~same)
    wave: Ints = begun - np.repeat(begun[first], np.diff(np.append(first, operations)))
    by_wave = np.lexsort((order, wave))
    bounds = np.searchsorted(wave[by_wave], np.arange(int(wave.max(initial=-1)) + 2))
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        members = order[by_wave[begin:end]]
        now_read = int((members < reads).sum())
        yield members[:now_read], members[now_read:]

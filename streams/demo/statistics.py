"""What the demo measures: events, freshness, click rates, one user's story. Pure: times come in, in seconds."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from models.events import Recommendation
from streams.demo.learning import Learning
from streams.demo.users import Half

Counts = npt.NDArray[np.int64]
RECENT_SECONDS: Final = 20.0
RATE_SECONDS: Final = 5.0
STORY_TOP: Final = 5
STORY_CLICKS: Final = 3
RESAMPLES: Final = 1_000
ANSWERED_SHARE: Final = 0.5
"""With fewer of the triggers answered than this the demo counts as failed."""


def quantile(values: Sequence[float], share: float) -> float:
    """Return the nearest-rank quantile; NaN where there are no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


class Recent:
    """Values of the last seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._values: deque[tuple[float, float]] = deque()

    def add(self, now: float, value: float = 1.0) -> None:
        """Add a value at ``now``."""
        self._values.append((now, value))

    def values(self, now: float) -> list[float]:
        """Return the values not older than the window."""
        while self._values and self._values[0][0] < now - self._seconds:
            self._values.popleft()
        return [value for _, value in self._values]


@dataclass(slots=True)
class Waiting:
    """A trigger for which no slate has come yet."""

    offset: int
    broker_ms: int


class Freshness:
    """From the broker time of a trigger to the arrival of the slate that reflects it.

    One slate may answer several actions of one user (a micro-batch sends one): it answers every trigger of that user
    that is not after its own in the log. Slates and acknowledgements of triggers come in any order.
    """

    def __init__(self) -> None:
        self.triggers = 0
        self.answered = 0
        self.all_ms: list[float] = []
        self._recent = Recent(RECENT_SECONDS)
        self._waiting: dict[str, list[Waiting]] = {}
        self._latest: dict[str, list[tuple[int, float]]] = {}

    @property
    def unanswered(self) -> int:
        """Triggers without a slate so far."""
        return self.triggers - self.answered

    def sent(self, now: float, user_id: str, offset: int, broker_ms: int) -> float | None:
        """Note that the broker took a trigger; returns its freshness in ms where its slate is there already."""
        self.triggers += 1
        early = [arrived_ms for reached, arrived_ms in self._latest.get(user_id, ()) if reached >= offset]
        if early:
            return self._answer(now, min(early) - broker_ms)
        self._waiting.setdefault(user_id, []).append(Waiting(offset, broker_ms))
        return None

    def arrived(self, now: float, user_id: str, trigger_offset: int, arrived_ms: float) -> list[float]:
        """Note a slate that the record at ``trigger_offset`` of the user's partition caused.

        Returns the freshness in ms of each trigger that it answers.
        """
        self._latest[user_id] = [*self._latest.get(user_id, [])[-3:], (trigger_offset, arrived_ms)]
        waiting = self._waiting.get(user_id, [])
        self._waiting[user_id] = [w for w in waiting if w.offset > trigger_offset]
        return [self._answer(now, arrived_ms - w.broker_ms) for w in waiting if w.offset <= trigger_offset]

    def recent(self, now: float) -> tuple[float, float]:
        """Return p50 and p99 of the last seconds, in ms."""
        values = self._recent.values(now)
        return quantile(values, 0.5), quantile(values, 0.99)

    def overall(self) -> tuple[float, float]:
        """Return p50 and p99 of the whole run, in ms."""
        return quantile(self.all_ms, 0.5), quantile(self.all_ms, 0.99)

    def _answer(self, now: float, took_ms: float) -> float:
        self.answered += 1
        # The clocks of two machines may differ; a slate is never there before its trigger.
        took_ms = max(0.0, took_ms)
        self.all_ms.append(took_ms)
        self._recent.add(now, took_ms)
        return took_ms


@dataclass(frozen=True, slots=True)
class RateInterval:
    """A rate with its 95 % interval, clustered by user."""

    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.rate:.1%} [{self.low:.1%}, {self.high:.1%}]"


class ClickRates:
    """Clicks per slate shown, of both halves. ``tastes`` is the number of pairs of users.

    Counted for the whole run, and apart for the slates shown before and after the first swap of models.
    """

    def __init__(self, tastes: int) -> None:
        self.shown = {half: np.zeros(tastes, np.int64) for half in Half}
        self.clicks = {half: np.zeros(tastes, np.int64) for half in Half}
        self._after_shown = {half: np.zeros(tastes, np.int64) for half in Half}
        self._after_clicks = {half: np.zeros(tastes, np.int64) for half in Half}
        self._is_after = False
        self._saw_after = {half: np.zeros(tastes, np.bool_) for half in Half}
        """Whether the slate that a user was shown last was after it: a click counts where its slate does."""
        self._recent_shown = {half: Recent(RECENT_SECONDS) for half in Half}
        self._recent_clicks = {half: Recent(RECENT_SECONDS) for half in Half}

    def show(self, now: float, half: Half, taste: int) -> None:
        """Count a slate shown."""
        self.shown[half][taste] += 1
        self._after_shown[half][taste] += self._is_after
        self._saw_after[half][taste] = self._is_after
        self._recent_shown[half].add(now)

    def click(self, now: float, half: Half, taste: int) -> None:
        """Count a click."""
        self.clicks[half][taste] += 1
        self._after_clicks[half][taste] += self._saw_after[half][taste]
        self._recent_clicks[half].add(now)

    def overall(self, half: Half) -> float:
        """Return the rate of the whole run, NaN where nothing was shown."""
        shown = int(self.shown[half].sum())
        return int(self.clicks[half].sum()) / shown if shown else math.nan

    def recent(self, now: float, half: Half) -> float:
        """Return the rate of the last seconds, NaN where nothing was shown."""
        shown = len(self._recent_shown[half].values(now))
        return min(1.0, len(self._recent_clicks[half].values(now)) / shown) if shown else math.nan

    def begin_after(self) -> None:
        """Count what is shown from now on as after the swap."""
        self._is_after = True

    def spans(self, seed: int = 0) -> list[tuple[str, RateInterval, RateInterval]]:
        """Return (span, our rate, the other half's) before and after the swap; a span without slates is left out."""
        found = []
        before_shown = {half: self.shown[half] - self._after_shown[half] for half in Half}
        before_clicks = {half: self.clicks[half] - self._after_clicks[half] for half in Half}
        for name, shown, clicks in (
            ("before", before_shown, before_clicks),
            ("after", self._after_shown, self._after_clicks),
        ):
            intervals = _pair_intervals(shown, clicks, seed)
            if intervals is not None:
                found.append((name, intervals[0], intervals[1]))
        return found

    def intervals(self, seed: int = 0) -> tuple[RateInterval, RateInterval, RateInterval] | None:
        """Return our rate, the other half's, and the difference, each with a bootstrap interval over pairs of users.

        The two users of a pair have the same taste and are drawn together. None where a half was shown nothing.
        """
        return _pair_intervals(self.shown, self.clicks, seed)


def _pair_intervals(
    shown: Mapping[Half, Counts], clicks: Mapping[Half, Counts], seed: int
) -> tuple[RateInterval, RateInterval, RateInterval] | None:
    if not all(shown[half].sum() for half in Half):
        return None
    rng = np.random.default_rng(seed)
    pairs = len(shown[Half.OURS])
    drawn = rng.integers(0, pairs, (RESAMPLES, pairs))
    rates = {half: clicks[half][drawn].sum(1) / np.maximum(shown[half][drawn].sum(1), 1) for half in Half}
    ours, popular = (int(clicks[half].sum()) / int(shown[half].sum()) for half in (Half.OURS, Half.POPULAR))
    return (
        _interval(ours, rates[Half.OURS]),
        _interval(popular, rates[Half.POPULAR]),
        _interval(ours - popular, rates[Half.OURS] - rates[Half.POPULAR]),
    )


def _interval(rate: float, resampled: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> RateInterval:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return RateInterval(rate, float(low), float(high))


@dataclass(frozen=True, slots=True)
class Line:
    """One position of a slate in a story."""

    position: int
    item_id: str
    reason: str
    is_new: bool


@dataclass(slots=True)
class Story:
    """One user's clicks, and what the last one did to the slate: the top before and after."""

    user_id: str
    clicks: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=STORY_CLICKS))
    """(time, item), newest last."""
    before: list[Line] = field(default_factory=list)
    after: list[Line] = field(default_factory=list)
    took_ms: float = math.nan
    """From the click's broker time to the arrival of the slate."""
    _held: list[Line] = field(default_factory=list)
    _clicked: bool = False

    def click(self, now: float, item_id: str) -> None:
        """Note a click; the next slate shows what came of it."""
        self.clicks.append((now, item_id))
        self._clicked = True

    def slate(self, slate: Recommendation, took_ms: float) -> None:
        """Note a slate: the one after a click is told beside the one before it."""
        held = {line.item_id for line in self._held}
        lines = [Line(i.position, i.item_id, i.reason.text, i.item_id not in held) for i in slate.items[:STORY_TOP]]
        if self._clicked and self._held:
            self.before, self.after, self.took_ms = self._held, lines, took_ms
        self._clicked = False
        self._held = lines

    @property
    def is_complete(self) -> bool:
        """Whether there is a click with a slate before and one after it."""
        return bool(self.after)


@dataclass(slots=True)
class Statistics:
    """Everything that the view and the summary show."""

    tastes: int
    story: Story
    events: int = 0
    slates: int = 0
    degraded: int = 0
    freshness: Freshness = field(default_factory=Freshness)
    clicks: ClickRates = field(init=False)
    learning: Learning = field(default_factory=Learning)
    started_at: float = 0.0
    _events: Recent = field(default_factory=lambda: Recent(RATE_SECONDS))

    def __post_init__(self) -> None:
        self.clicks = ClickRates(self.tastes)

    def event(self, now: float) -> None:
        """Count an event that the broker took."""
        self.events += 1
        self._events.add(now)

    def events_per_second(self, now: float) -> float:
        """Return the rate of the last seconds."""
        return len(self._events.values(now)) / max(1.0, min(RATE_SECONDS, now - self.started_at))

    def failure(self) -> str | None:
        """Return why the demo failed, None where slates came as they must."""
        freshness = self.freshness
        if not freshness.triggers:
            return "nobody asked for a slate: the run was too short to say anything"
        if not self.slates:
            return f"no slate came for {freshness.triggers} requests and clicks"
        if freshness.answered < ANSWERED_SHARE * freshness.triggers:
            return f"only {freshness.answered} of {freshness.triggers} requests and clicks were answered by a slate"
        return None

"""What an event adds to the item counters: kinds, weights, and the batch that carries them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.events import Action, ActionName, Event, Impression
from models.hashing import hash64

IMPRESSIONS: Final = 0
CLICKS: Final = 1
ACTIONS: Final = 2
EXPECTED: Final = 3
"""Kinds, the last axis of every array of decayed counts. ACTIONS counts weights; EXPECTED counts, for each impression,
its item's share of its slate: one of n items is expected to take 1 / n of the slate's clicks. The others count ones."""
KINDS: Final = 4
TOUCHED: Final = 3
"""The first kinds are what events touch and exact totals hold; EXPECTED follows from the impressions."""
HALF_LIVES: Final = 4
WEIGHT_UNIT: Final = 1_000
"""Exact totals are integers; that of ACTIONS is in thousandths of a weight."""

HalfLife = Annotated[float, Field(ge=10, le=90 * 86_400)]
Weight = Annotated[float, Field(ge=0, le=1_000)]


class CountersConfig(BaseModel):
    """How items are counted, smoothed and published."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    half_lives_seconds: tuple[HalfLife, HalfLife, HalfLife, HalfLife] = Field(
        (600.0, 3_600.0, 21_600.0, 86_400.0),
        description="Half-lives of the decayed counts in seconds of event time, rising. Counts published under other "
        "half-lives are taken over as they are and decay with the new ones from then on.",
    )
    user_cap: int = Field(
        3, ge=1, le=255, description="Events of one user on one item that are counted, per kind and window."
    )
    user_window_seconds: float = Field(
        120.0,
        ge=1,
        le=3_600,
        description="Length in event time of the window of user_cap, which is also how long a repeated event_id is "
        "recognised at least. Recovery reads up to two windows of events again.",
    )
    user_window_max_touches: int = Field(
        131_072,
        ge=1_024,
        le=1_048_576,
        description="A window ends early after this many counts offered in one partition: the bound of its memory "
        "(at most about 200 bytes each) and of what recovery reads again.",
    )
    prior_strength: float = Field(
        20.0, gt=0, le=1e6, description="Impressions that the prior of a smoothed CTR weighs as much as."
    )
    prior_ctr: float = Field(
        0.05, gt=0, lt=1, description="CTR that the catalogue's mean starts from, before anything was counted."
    )
    action_weights: dict[ActionName, Weight] = Field(
        {"click": 1.0, "like": 2.0, "share": 3.0, "purchase": 5.0, "rating": 2.0, "dwell": 1.0},
        description="Weight of each action in the weighted actions; an action that is absent counts nothing there.",
    )
    dwell_full_seconds: float = Field(
        30.0,
        gt=0,
        le=3_600,
        description="Dwell time in seconds that has its whole weight; a shorter one in proportion.",
    )
    publish_interval_seconds: float = Field(
        1.0, ge=0.05, le=60, description="Seconds between two publications of changed items."
    )
    publish_max_records_per_second: int = Field(
        2_000, ge=10, le=100_000, description="Items that one worker publishes per second at most, hottest first."
    )
    checkpoint_interval_seconds: float = Field(
        10.0, ge=0.05, le=600, description="Seconds between two checkpoints of a partition at most."
    )
    max_unknown_items: int = Field(
        100_000, ge=0, le=10_000_000, description="Items counted that no catalogue record names; more are not counted."
    )

    @model_validator(mode="after")
    def _rising(self) -> CountersConfig:
        if list(self.half_lives_seconds) != sorted(set(self.half_lives_seconds)):
            raise ValueError("half_lives_seconds must rise")
        return self


class Touches(NamedTuple):
    """The counts that one event adds; three lists side by side, an item at most once per kind; never EXPECTED."""

    item_ids: Sequence[str]
    kinds: Sequence[int]
    weights: Sequence[float]


NO_TOUCHES: Final = Touches((), (), ())


def counter_touches(event: Event, config: CountersConfig) -> Touches:
    """Return what an accepted event adds to the counters: a function of the event alone.

    Live processing and recovery both call this, so that they count the same. A request adds nothing.
    """
    if isinstance(event, Impression):
        items = list(dict.fromkeys([shown.item_id for shown in event.items]))
        return Touches(items, [IMPRESSIONS] * len(items), [1.0] * len(items))
    if not isinstance(event, Action):
        return NO_TOUCHES
    weight = config.action_weights.get(event.action, 0.0) * _fraction(event, config)
    if event.action == "click":
        if weight > 0:
            return Touches((event.item_id, event.item_id), (CLICKS, ACTIONS), (1.0, weight))
        return Touches((event.item_id,), (CLICKS,), (1.0,))
    return Touches((event.item_id,), (ACTIONS,), (weight,)) if weight > 0 else NO_TOUCHES


def _fraction(action: Action, config: CountersConfig) -> float:
    """Return the share of its weight that an action has by its value: 0 for up to 2.5 stars, 1 for five."""
    if action.action == "rating":
        return min(max(((action.value or 0.0) - 2.5) / 2.5, 0.0), 1.0)
    if action.action == "dwell":
        return min(max((action.value or 0.0) / config.dwell_full_seconds, 0.0), 1.0)
    return 1.0


@dataclass(slots=True)
class TouchBatch:
    """Events of one partition in the order of their offsets, with what they add; lists side by side.

    Put every accepted event in, those that add nothing too: they move the position. ``ends[i]`` is the end of event
    i's stretch in ``item_ids``, ``kinds`` and ``weights``.
    """

    offsets: list[int] = field(default_factory=list)
    times_ms: list[int] = field(default_factory=list)
    user_hashes: list[int] = field(default_factory=list)
    event_hashes: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    item_ids: list[str] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.offsets)

    def add(self, offset: int, time_ms: int, user_hash: int, event_hash: int, touches: Touches) -> None:
        """Append one event: its offset, accepted event time, 64-bit hashes of user_id and event_id, and touches."""
        self.offsets.append(offset)
        self.times_ms.append(time_ms)
        self.user_hashes.append(user_hash)
        self.event_hashes.append(event_hash)
        self.item_ids.extend(touches.item_ids)
        self.kinds.extend(touches.kinds)
        self.weights.extend(touches.weights)
        self.ends.append(len(self.item_ids))

    def add_event(self, event: Event, offset: int, time_ms: int, config: CountersConfig) -> None:
        """Append one accepted event, ``time_ms`` being its event time as the clock policy left it."""
        self.add(offset, time_ms, hash64(event.user_id), hash64(event.event_id), counter_touches(event, config))

"""Examples of logs that hold actions but no impressions: negatives drawn from the catalogue at a recorded rate.

Nothing says what such users were shown, so that nothing is known to have been passed over. An action's item and a few
drawn ones make an impression of their own, flagged SAMPLED, with the share of all possible negatives that was drawn.
Keeping every positive and only a share r of the negatives multiplies the odds among what is kept by 1 / r: training
adds −ln r to the logit, so that the model itself learns the log-odds of the whole catalogue (King and Zeng 2001,
Logistic Regression in Rare Events Data, section 4.1, equation 7: prior correction). Shown items need no correction,
and get none: their record has no rate.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from models.counter_events import HALF_LIVES, KINDS
from models.events import ACTIONS, Action
from models.examples import EXTERNAL, SAMPLED, FeaturesRecord, LabelsRecord
from models.hashing import hash64
from models.user_events import UserStateConfig, action_code
from models.user_row import ACTION_MASK, POSITIVE, RECENT

UInt64 = npt.NDArray[np.uint64]
Places = npt.NDArray[np.intp]

_CLICK: Final = ACTIONS.index("click") + 1


@dataclass(frozen=True, slots=True)
class LoneAction:
    """An action of a log that has no impressions."""

    user_id: str
    item: int
    """models.hashing.hash64 of its item."""
    code: int
    """As models.user_row keeps it: number in ACTIONS plus 1, with POSITIVE or NEGATIVE."""
    time_ms: int
    broker_ms: int
    partition: int
    offset: int
    surface: str = "default"

    @classmethod
    def of(
        cls, action: Action, partition: int, offset: int, time_ms: int, broker_ms: int, config: UserStateConfig
    ) -> LoneAction:
        """Return an accepted action at its place in the log; ``config`` says which ratings and dwell times are good."""
        code = action_code(action.action, action.value, config)
        item = hash64(action.item_id)
        place = (time_ms, broker_ms, partition, offset)
        return cls(action.user_id, item, code, *place, surface=action.surface or "default")

    @property
    def is_positive(self) -> bool:
        """Whether it says that the user liked the item."""
        return bool(self.code & POSITIVE)


@dataclass(slots=True)
class _User:
    """What was seen of one user so far: the same that a row would hold."""

    recent: list[LoneAction] = field(default_factory=list)
    liked: set[int] = field(default_factory=set)
    clicks: int = 0
    actions: int = 0

    def act(self, action: LoneAction) -> None:
        """Take an action into account."""
        self.recent = [action, *(a for a in self.recent if a.item != action.item)][:RECENT]
        self.actions += 1
        if action.is_positive:
            self.liked.add(action.item)
        self.clicks += (action.code & ACTION_MASK) == _CLICK


def offset_of(negative_rate: float | None) -> float:
    """Return what has to be added to a logit in training: −ln of the rate, 0 for shown items (None)."""
    return 0.0 if negative_rate is None else -math.log(negative_rate)


def sampled_impressions(
    actions: Sequence[LoneAction], catalogue_hashes: UInt64, per_positive: int, seed: int
) -> list[tuple[FeaturesRecord, LabelsRecord]]:
    """Return an impression for each user's first positive action on an item, in order of time.

    It holds that item, then ``per_positive`` drawn ones.

    ``catalogue_hashes`` uint64 [n]: of the items to draw from, uniformly and without replacement; none that the same
    user has a positive action on anywhere in ``actions`` is drawn. An action's draw depends on ``seed``, its place in
    the log and what it may draw from, not on the other actions. The rate is that of one action: what is learned is how
    likely an item is at an action, of which a user may have many. Of the state, only the user's recent items and counts
    are known; counters, ages and similarities are those of an item that nobody has seen. An action for which nothing
    is left to draw makes no impression, nor does one on an item that the user liked before: such items are never drawn,
    so that standing among the recent ones would tell the label.
    """
    ordered = sorted(actions, key=lambda a: (a.time_ms, a.partition, a.offset))
    catalogue = np.unique(catalogue_hashes)
    own: dict[str, set[int]] = defaultdict(set)
    for action in ordered:
        if action.is_positive:
            own[action.user_id].add(action.item)
    own_places = {user: _places(items, catalogue) for user, items in own.items()}
    users: dict[str, _User] = defaultdict(_User)
    made = []
    for action in ordered:
        user = users[action.user_id]
        if action.is_positive and action.item not in user.liked:
            drawn, possible = _draw(action, catalogue, own_places[action.user_id], per_positive, seed)
            if len(drawn):
                made.append(_example(action, user, drawn, len(drawn) / possible))
        user.act(action)
    return made


def _draw(action: LoneAction, catalogue: UInt64, own: Places, per_positive: int, seed: int) -> tuple[UInt64, int]:
    """Return the negatives of one action, and how many there were to choose from; ``own`` may not be drawn."""
    possible = len(catalogue) - len(own)
    wanted = min(per_positive, possible)
    # RandomState's stream is frozen by NumPy; that of Generator may change between versions.
    random = np.random.RandomState([seed & 0xFFFFFFFF, action.partition, action.offset & 0xFFFFFFFF])
    if wanted * 4 > possible:
        allowed = np.delete(np.arange(len(catalogue)), own)
        return catalogue[random.permutation(allowed)[:wanted]], possible
    places = np.zeros(0, np.intp)
    while len(places) < wanted:
        drawn = random.randint(0, len(catalogue), 2 * wanted + 8)
        places = np.concatenate([places, drawn[~np.isin(drawn, own)]])
        _, first = np.unique(places, return_index=True)
        places = places[np.sort(first)][:wanted]
    return catalogue[places], possible


def _places(items: set[int], catalogue: UInt64) -> Places:
    """Return where items stand in a sorted catalogue; those that are not in it stand nowhere."""
    wanted = np.sort(np.fromiter(items, np.uint64, len(items)))
    at = np.searchsorted(catalogue, wanted)
    inside = at < len(catalogue)
    at, wanted = at[inside], wanted[inside]
    found: Places = at[catalogue[at] == wanted]
    return found


def _example(action: LoneAction, user: _User, drawn: UInt64, rate: float) -> tuple[FeaturesRecord, LabelsRecord]:
    impression = hash64(f"sampled\0{action.partition}\0{action.offset}")
    k = 1 + len(drawn)
    recent = user.recent
    ages = [max(action.time_ms - a.time_ms, 0) / 1000.0 for a in recent]
    features = FeaturesRecord(
        impression_id=impression,
        user_id=action.user_id,
        partition=action.partition,
        offset=action.offset,
        time_ms=action.time_ms,
        broker_ms=action.broker_ms,
        processed_ms=action.broker_ms,
        flags=SAMPLED,
        surface=action.surface,
        request_id=None,
        experiment=None,
        policy=EXTERNAL,
        session_id=None,
        context=None,
        space_id="",
        items=np.concatenate([np.array([action.item], np.uint64), drawn]).astype("<u8").tobytes(),
        positions=bytes(2 * k),
        propensities=b"",
        counters=bytes(2 * k * HALF_LIVES * KINDS),
        age_seconds=np.full(k, np.nan, "<f4").tobytes(),
        first_seen_seconds=np.full(k, np.nan, "<f4").tobytes(),
        sims=bytes(4 * k),
        shown_counts=bytes(k),
        shown_age_seconds=np.full(k, np.nan, "<f4").tobytes(),
        acted_age_seconds=np.full(k, np.nan, "<f4").tobytes(),
        recent_items=np.array([a.item for a in recent], "<u8").tobytes(),
        recent_age_seconds=np.array(ages, "<f4").tobytes(),
        recent_codes=bytes(a.code for a in recent),
        user_counts=(0, user.clicks, user.actions),
        scores=[],
        model_version="",
        negative_rate=rate,
    )
    labels = LabelsRecord(
        impression_id=impression,
        user_id=action.user_id,
        time_ms=action.time_ms,
        closed_ms=action.time_ms,
        revision=0,
        flags=0,
        clicked=bytes(2),
        refused=b"",
        actions=bytes([action.code]),
    )
    return features, labels

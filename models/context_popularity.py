"""What users act on by their context: decayed positive actions by item, for each value of named keys.

Bounded by Space-Saving (Metwally, Agrawal and El Abbadi: Efficient computation of frequent and top-k elements in data
streams, ICDT 2005, section 3), in batches: up to twice ``popularity_context_items`` items of a value are held, then the
weakest half is given up. What the strongest of those had is the benefit of the doubt of all that come later, so that a
newcomer can rise; it is not read. Of a key twice ``popularity_context_values`` values are held, without that benefit: a
key that is different for everybody must not push out the values that many share.

Weights decay forward (Cormode, Korn and Tirthapura: Exponentially decayed aggregates on data streams, ICDE 2008): they
are kept as they would stand at a landmark, which moves by whole half-lives, so that moving it rounds nothing.

One user counts once for an item in a window of event time: neither a client's retries nor a zealous user make a list.
Events are taken one by one in the order given: cut into batches in any way, the same events leave the same counts.
What is read of the counts for a slate: models/context_lists.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from models.counters import CountersConfig
from models.events import Action, Event
from models.hashing import hash64
from models.item_index import UNKNOWN, ItemIndex
from models.ranking import I32
from models.surfaces import RecommenderConfig
from models.user_events import UserStateConfig, action_code
from models.user_row import POSITIVE

F64 = npt.NDArray[np.float64]
Values = tuple[int, ...]
"""Hash of the value of each key, in the order of the keys; 0 where an event has none."""

SURFACE_KEY: Final = "surface"
"""Names the surface of an event instead of a key of its context."""
_REACH: Final = 200
"""Half-lives after which the landmark moves; a float overflows at 1,023."""
_LEAST: Final = 1e-6
"""Decayed actions below which something is forgotten when the landmark moves."""
_WINDOW_MOST: Final = 65_536
"""Pairs of user and item after which a window ends early: about 100 bytes each, in two windows."""
_MIX: Final = 0x9E3779B97F4A7C15
_MASK: Final = 2**64 - 1


@dataclass(slots=True)
class _Value:
    """Of one value of one key, at the landmark."""

    items: dict[int, float] = field(default_factory=dict)
    """Actions by item row."""
    doubts: dict[int, float] = field(default_factory=dict)
    """What items may have had before, where they may have had something."""
    floor: float = 0.0
    """More than this no item had that was given up."""
    total: float = 0.0
    """Actions on all items, given up ones too."""


_Values = dict[int, _Value]


class ContextPopularity:
    """The counts of one process: of the users of the partitions that it owns. Called from one thread.

    ``keys``: what is counted by; none: nothing is. ``dropped_values`` and ``dropped_items``: what the bounds gave up.
    """

    def __init__(
        self, config: RecommenderConfig, counters: CountersConfig, users: UserStateConfig, index: ItemIndex
    ) -> None:
        self.keys: tuple[str, ...] = ()
        self.dropped_values = 0
        self.dropped_items = 0
        self._counters, self._users, self._index = counters, users, index
        self._window_ms = max(1, round(counters.user_window_seconds * 1_000))
        self._next_offsets: dict[int, int] = {}
        self._half_life_ms = 0.0
        self._held: list[_Values] = []
        self._landmark: int | None = None
        """Half-lives since the epoch of the time at which all weights are kept."""
        self._watermark_ms = -1
        self._seen: set[int] = set()
        self._seen_before: set[int] = set()
        self.reconfigure(config)

    def reconfigure(self, config: RecommenderConfig) -> None:
        """Count by other settings from the next event on; keys that stay keep their counts, if the half-life stays."""
        half_life_ms = self._counters.half_lives_seconds[config.popularity_half_life_index] * 1_000.0
        held = dict(zip(self.keys, self._held, strict=True)) if half_life_ms == self._half_life_ms else {}
        if not held:
            self._landmark = None
        self._half_life_ms = half_life_ms
        self.keys = config.popularity_context
        self._held = [held.get(key, {}) for key in self.keys]
        self._surface = config.default_surface
        self._max_values, self._max_items = config.popularity_context_values, config.popularity_context_items

    def values_of(self, event: Event) -> Values:
        """Return the hash of each key's value in an event."""
        return tuple([self._value_of(event, key) for key in self.keys])

    def add(self, partition: int, offset: int, event: Event, time_ms: int) -> None:
        """Count an event of a partition's log, if it is a positive action on an item that the index holds.

        An offset that is not above those counted before changes nothing. ``time_ms``: event time, not after broker
        time: what claims to lie ahead would outweigh all that comes until then.
        """
        if not self.keys or offset < self._next_offsets.get(partition, 0):
            return
        self._next_offsets[partition] = offset + 1
        if not isinstance(event, Action) or not action_code(event.action, event.value, self._users) & POSITIVE:
            return
        row = self._index.row(event.item_id)
        if row == UNKNOWN or self._is_again(event.user_id, row, time_ms):
            return
        weight = self._weight(time_ms)
        for values, value in zip(self._held, self.values_of(event), strict=True):
            if value:
                self._count(values, value, row, weight)

    def counts(self, key: int, value: int, now_ms: int) -> tuple[I32, F64, float]:
        """Return what a value of the key of this number has at ``now_ms``, decayed.

        Item rows int32 [n], rising, their actions float64 [n], and the actions on all items, given up ones too.
        """
        held = self._held[key].get(value)
        if held is None:
            return np.zeros(0, np.int32), np.zeros(0), 0.0
        decay = math.exp2(min(max((self._landmark or 0) - now_ms / self._half_life_ms, -1_000.0), 300.0))
        rows = np.fromiter(held.items, np.int32, len(held.items))
        counts = np.fromiter(held.items.values(), np.float64, len(rows)) * decay
        order = np.argsort(rows)
        return rows[order], counts[order], held.total * decay

    def held(self) -> tuple[int, int]:
        """Return how many values are held, of all keys, and how many items of them."""
        every = [value for values in self._held for value in values.values()]
        return len(every), sum(len(value.items) for value in every)

    def _value_of(self, event: Event, key: str) -> int:
        if key == SURFACE_KEY:
            return hash64(f"{key}\0{event.surface or self._surface}")
        value = event.context.get(key) if event.context else None
        if value is None:
            return 0
        # 1, 1.0 and "1" are one value: clients differ in how they write it.
        if isinstance(value, bool):
            value = str(value).lower()
        elif isinstance(value, float) and value.is_integer():
            value = int(value)
        return hash64(f"{key}\0{value}")

    def _is_again(self, user_id: str, row: int, time_ms: int) -> bool:
        """Tell whether the user counted for the item in this window or the one before; if not, they do now."""
        windows = time_ms // self._window_ms - self._watermark_ms // self._window_ms
        if windows > 0 or len(self._seen) >= _WINDOW_MOST:
            self._seen_before, self._seen = self._seen if windows <= 1 else set(), set()
        self._watermark_ms = max(self._watermark_ms, time_ms)
        pair = hash64(user_id) ^ (row * _MIX & _MASK)
        if pair in self._seen or pair in self._seen_before:
            return True
        self._seen.add(pair)
        return False

    def _weight(self, time_ms: int) -> float:
        """Return what an action at a time weighs at the landmark; moves that where it lies far ahead."""
        half_lives = time_ms / self._half_life_ms
        if self._landmark is None:
            self._landmark = math.floor(half_lives)
        if half_lives - self._landmark > _REACH:
            self._move(math.floor(half_lives))
        return math.exp2(max(half_lives - self._landmark, -1_000.0))

    def _count(self, values: _Values, value: int, row: int, weight: float) -> None:
        held = values.get(value)
        if held is None:
            held = values[value] = _Value()
        held.total += weight
        before = held.items.get(row)
        held.items[row] = (before or 0.0) + weight
        if before is None:
            if held.floor:
                held.doubts[row] = held.floor
            if len(held.items) > 2 * self._max_items:
                self._give_up_items(held)
        if len(values) > 2 * self._max_values:
            self._give_up_values(values)

    def _move(self, landmark: int) -> None:
        factor = math.exp2(max((self._landmark or 0) - landmark, -1_000.0))
        self._landmark = landmark
        for values in self._held:
            for held in values.values():
                held.total, held.floor = held.total * factor, held.floor * factor
                held.items = {row: had * factor for row, had in held.items.items() if had * factor >= _LEAST}
                held.doubts = {row: had * factor for row, had in held.doubts.items() if row in held.items}
            for gone in [value for value, held in values.items() if held.total < _LEAST]:
                del values[gone]

    def _give_up_items(self, held: _Value) -> None:
        most = {row: had + held.doubts.get(row, 0.0) for row, had in held.items.items()}
        # Of equal ones the lower rows stay: an order that no batch decides.
        order = sorted(most, key=lambda row: (-most[row], row))
        for row in order[self._max_items :]:
            del held.items[row]
            held.doubts.pop(row, None)
        held.floor = max(held.floor, most[order[self._max_items]])
        self.dropped_items += len(order) - self._max_items

    def _give_up_values(self, values: _Values) -> None:
        order = sorted(values, key=lambda value: (-values[value].total, value))
        for value in order[self._max_values :]:
            self.dropped_items += len(values.pop(value).items)
            self.dropped_values += 1

"""Item counts as they stood at each place of a batch: what a recorded log is read with, thousands of reads at once.

``ItemCounters.add_as_of`` counts a batch in one go and returns one of these. A read at t then gives what it would have
given had the batch been counted event by event and had the read come at its place in between. Forward decay makes that
a sum: the item's counts before the batch, and the touches of the item that arrived until t, both kept at the landmark.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from models.counter_events import HALF_LIVES, IMPRESSIONS, KINDS
from models.partition_counters import Added, Float64, Int64, Landmark, seconds_since

Float32 = npt.NDArray[np.float32]
Ints = npt.NDArray[np.intp]


class CountedSoFar(Protocol):
    """Counters with the whole batch counted."""

    def read_at(self, rows: npt.NDArray[np.integer], times_ms: Int64) -> Float32:
        """Return the decayed counts of rows [S, …], each slate at its time [S]: float32 [S, …, 4, kinds]."""

    def first_seen_seconds(self, rows: npt.NDArray[np.integer], times_ms: Int64) -> Float32:
        """Return the time since the first impression of rows [S, …], each slate at its time [S], NaN = none."""


class CountersAsOf:
    """Reads counts at places inside one batch; right until the counters count anything more.

    ``counted``: the counters, with the whole batch counted. ``arrivals_ms`` [E], not falling: the time from
    which reads see each event of the batch. ``items`` [n], rising: the item rows that ``added`` touches, and
    ``before`` [n, 4 · kinds] their counts before the batch, at the landmark, ``first_ms`` [n] their first impressions.
    """

    def __init__(
        self,
        counted: CountedSoFar,
        landmark: Landmark,
        items: npt.NDArray[np.integer],
        before: Float64,
        first_ms: Int64,
        added: Added,
        arrivals_ms: Int64,
    ) -> None:
        self._counted = counted
        self._landmark = landmark
        self._items = items
        self._before = before.reshape(-1, HALF_LIVES, KINDS)
        self._arrivals_ms = arrivals_ms
        self._places = len(arrivals_ms) + 1
        # A group is one kind of touches of one item, in the order of the batch.
        order = np.lexsort((added.events, added.kinds, added.rows))
        groups = np.searchsorted(items, added.rows[order]) * KINDS + added.kinds[order]
        self._starts = np.searchsorted(groups, np.arange(len(items) * KINDS))
        self._keys = groups * self._places + added.events[order]
        ranks = np.arange(len(order)) - self._starts[groups]
        self._sums = running(np.add, added.scaled[order], ranks)
        self._first_ms = first_ms
        self._firsts = running(np.minimum, added.times_ms[order], ranks)

    def read_at(self, rows: npt.NDArray[np.integer], times_ms: Int64) -> Float32:
        """Return the decayed counts of rows [S, …], each slate at its time int64 [S]: float32 [S, …, 4, kinds].

        As ItemCounters.read_at where the batch does not touch the item. No read may be earlier than an event that it
        sees, nor, where the batch moved the landmark, lie before the batch.
        """
        out = self._counted.read_at(rows, times_ms)
        if not len(self._items):
            return out
        at = np.minimum(np.searchsorted(self._items, rows), len(self._items) - 1)
        where = np.nonzero(self._items[at] == rows)
        items, times = at[where], times_ms[where[0]]
        seen = np.searchsorted(self._arrivals_ms, times, side="right")
        values = self._before[items]
        for kind in range(KINDS):
            last, counted = self._last(items * KINDS + kind, seen)
            values[counted, :, kind] += self._sums[last[counted]]
        exponents = ((self._landmark.time_ms or 0) - times[:, None]) / self._landmark.half_lives_ms
        values *= np.exp2(np.clip(exponents, -1_000.0, 1_000.0))[:, :, None]
        out[where] = values
        return out

    def first_seen_seconds(self, rows: npt.NDArray[np.integer], times_ms: Int64) -> Float32:
        """Return the time since the first impression that a read sees, as ItemCounters.first_seen_seconds does."""
        out = self._counted.first_seen_seconds(rows, times_ms)
        if not len(self._items):
            return out
        at = np.minimum(np.searchsorted(self._items, rows), len(self._items) - 1)
        where = np.nonzero(self._items[at] == rows)
        items, times = at[where], times_ms[where[0]]
        first_ms = self._first_ms[items]
        seen = np.searchsorted(self._arrivals_ms, times, side="right")
        last, shown = self._last(items * KINDS + IMPRESSIONS, seen)
        first_ms[shown] = np.minimum(first_ms[shown], self._firsts[last[shown]])
        out[where] = seconds_since(first_ms, times)
        return out

    def _last(self, groups: Ints, seen: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Return the last touch of each group [n] among the first ``seen`` [n] events, and whether there is one."""
        last = np.searchsorted(self._keys, groups * self._places + seen) - 1
        return last, last >= self._starts[groups]


def running(combine: np.ufunc, values: npt.NDArray[Any], ranks: Ints) -> npt.NDArray[Any]:
    """Return ``values`` [n, …] combined from the beginning of each group on, ``ranks`` [n] being places within groups.

    By doubling steps (Hillis and Steele, Data parallel algorithms, CACM 1986): no group's sum is the difference of
    sums over all, so that a group of small values beside one of large values keeps its digits.
    """
    combined = values.copy()
    longest, step = int(ranks.max(initial=0)), 1
    while step <= longest:
        at = np.flatnonzero(ranks >= step)
        combined[at] = combine(combined[at], combined[at - step])
        step *= 2
    return combined

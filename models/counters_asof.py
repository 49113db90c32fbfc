"""Item counts as they stood at each place of a batch: what a recorded log is read with, thousands of reads at once.

``ItemCounters.add_as_of`` counts a batch in one go and returns one of these. A read at t then gives what it would have
given had the batch been counted event by event and had the read come at its place in between. Forward decay makes that
a sum: the item's counts before the batch, and the touches of the item that arrived until t, both kept at the landmark.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from models.counter_events import HALF_LIVES, KINDS
from models.partition_counters import Added, Float64, Int64, Landmark

Float32 = npt.NDArray[np.float32]
Ints = npt.NDArray[np.intp]


class CountersAsOf:
    """Reads counts at places inside one batch; right until the counters count anything more.

    ``read_at``: that of the counters, with the whole batch counted. ``arrivals_ms`` [E], not falling: the time from
    which reads see each event of the batch. ``items`` [n], rising: the item rows that ``added`` touches, and
    ``before`` [n, 4 · kinds] their counts before the batch, at the landmark.
    """

    def __init__(
        self,
        read_at: Callable[[npt.NDArray[np.integer], Int64], Float32],
        landmark: Landmark,
        items: npt.NDArray[np.integer],
        before: Float64,
        added: Added,
        arrivals_ms: Int64,
    ) -> None:
        self._read_at = read_at
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
        self._sums = running_sums(added.scaled[order], np.arange(len(order)) - self._starts[groups])

    def read_at(self, rows: npt.NDArray[np.integer], times_ms: Int64) -> Float32:
        """Return the decayed counts of rows [S, …], each slate at its time int64 [S]: float32 [S, …, 4, kinds].

        As ItemCounters.read_at where the batch does not touch the item. No read may be earlier than an event that it
        sees, nor, where the batch moved the landmark, lie before the batch.
        """
        out = self._read_at(rows, times_ms)
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

    def _last(self, groups: Ints, seen: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Return the last touch of each group [n] among the first ``seen`` [n] events, and whether there is one."""
        last = np.searchsorted(self._keys, groups * self._places + seen) - 1
        return last, last >= self._starts[groups]


def running_sums(values: Float64, ranks: Ints) -> Float64:
    """Return sums of ``values`` [n, m] from the beginning of each group on, ``ranks`` [n] being places within groups.

    By doubling steps (Hillis and Steele, Data parallel algorithms, CACM 1986): no group's sum is the difference of
    sums over all, so that a group of small values beside one of large values keeps its digits.
    """
    sums = values.copy()
    longest, step = int(ranks.max(initial=0)), 1
    while step <= longest:
        at = np.flatnonzero(ranks >= step)
        sums[at] += sums[at - step]
        step *= 2
    return sums

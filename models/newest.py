"""Servable items by publication time, for every list of one refresh: read once, sorted no further than asked for."""

from __future__ import annotations

from typing import Final

import numpy as np

from models.catalogue import NOT_GIVEN_MS, Catalogue, Rows

_LEAST: Final = 1_024


class NewestFirst:
    """The items that may be shown at one moment, the latest published first; ties by row, lowest first.

    Items that are not out yet stand at the front, those that do not say when they came out at the end.
    """

    def __init__(self, catalogue: Catalogue, now_ms: int) -> None:
        self._catalogue = catalogue
        self.rows: Rows = catalogue.servable_rows(now_ms)
        """Servable rows, int32 [n], rising."""
        self.mask = np.zeros(catalogue.capacity, np.bool_)
        """Which rows are servable, bool [capacity of the catalogue]."""
        self.mask[self.rows] = True
        self._published_ms = catalogue.published_at_ms[self.rows]
        self._sorted: Rows = self.rows[:0]

    def first(self, n: int) -> Rows:
        """Return the first ``n`` rows, int32 [≤ n]; fewer only where there are no more."""
        known = len(self._sorted)
        if n > known and known < len(self.rows):
            self._sort(max(n, 2 * known, _LEAST))
        return self._sorted[:n]

    def published_ms(self, n: int) -> int:
        """Return when the last of the first ``n`` rows was published, as it was when this order was made."""
        return int(self._published_ms[np.searchsorted(self.rows, self.first(n)[-1])])

    def out(self, now_ms: int, n: int) -> Rows:
        """Return the first ``n`` rows that are out by ``now_ms`` and say since when, int32 [≤ n]."""
        asked = 2 * n
        while True:
            rows = self.first(asked)
            published = self._catalogue.published_at_ms[rows]
            out: Rows = rows[(published != NOT_GIVEN_MS) & (published <= now_ms)]
            if len(out) >= n or len(rows) < asked:
                return out[:n]
            asked *= 4

    def _sort(self, n: int) -> None:
        rows, published = self.rows, self._published_ms
        if len(rows) > n:
            edge = np.partition(published, len(rows) - n)[len(rows) - n]
            among = np.flatnonzero(published >= edge)
            rows, published = rows[among], published[among]
        # Rows rise: a stable sort leaves those of one time in their order.
        self._sorted = rows[np.argsort(-published, kind="stable")]

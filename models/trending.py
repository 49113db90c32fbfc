"""Lists that all requests share until the next refresh: what is clicked just now, over all and by category; the newest.

Axes as in models/ranking.py; L = length of a list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from models.catalogue import Catalogue
from models.counters import CLICKS, ItemCounters
from models.newest import NewestFirst
from models.ranking import I32

LENGTH: Final = 200
"""Items in each list at most."""
KNOWN: Final = 5_000
"""Most clicked items that the lists by category are made of."""
CATEGORIES: Final = 3
"""Categories of the newest liked items whose lists a request draws on."""
_HALF_LIFE: Final = 0
"""Index of the shortest half-life of the counters."""


@dataclass(frozen=True, slots=True)
class Lists:
    """What goes on in the whole catalogue at one moment: rows, best first.

    ``trending`` int32 [≤ L], ``newest`` int32 [≤ L], ``by_category`` int32 [codes, L], padded with -1: the row of a
    code of ``Catalogue.category_codes``.
    """

    trending: I32
    by_category: I32
    newest: I32

    @classmethod
    def build(
        cls, catalogue: Catalogue, counters: ItemCounters, now_ms: int, newest: NewestFirst | None = None
    ) -> Self:
        """Return the lists at ``now_ms``: by clicks decayed with the shortest half-life, and by publication time.

        An item trends in its first category. Items without clicks do not trend; those that are not out yet, or do not
        say when they came out, are not new.
        """
        newest = newest or NewestFirst(catalogue, now_ms)
        top = counters.top(KNOWN, now_ms, _HALF_LIFE, CLICKS, newest.mask)
        clicks = counters.decayed(top, now_ms, _HALF_LIFE, CLICKS)
        order = np.lexsort((top, -clicks))
        top = top[order][clicks[order] > 0].astype(np.int32)
        codes = catalogue.category_codes(top)
        by_category = np.full((int(codes.max(initial=0)) + 1, LENGTH), -1, np.int32)
        # Stable: within a category the order by clicks stays.
        grouped = np.argsort(codes, kind="stable")
        place = np.arange(len(top)) - np.searchsorted(codes[grouped], codes[grouped])
        kept = (place < LENGTH) & (codes[grouped] > 0)
        by_category[codes[grouped][kept], place[kept]] = top[grouped][kept]

        return cls(top[:LENGTH], by_category, newest.out(now_ms, LENGTH))

    def of_likes(self, liked_codes: npt.NDArray[np.int32]) -> I32:
        """Return what trends in the categories of each request's newest liked items, int32 [B, CATEGORIES · L].

        ``liked_codes`` int32 [B, R], newest first, 0 for none. The categories take turns.
        """
        found = np.full((len(liked_codes), LENGTH, CATEGORIES), -1, np.int32)
        for b, codes in enumerate(liked_codes.tolist()):
            mine = [code for code in dict.fromkeys(codes) if 0 < code < len(self.by_category)][:CATEGORIES]
            for i, code in enumerate(mine):
                found[b, :, i] = self.by_category[code]
        return found.reshape(len(liked_codes), -1)

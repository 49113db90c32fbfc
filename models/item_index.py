"""Item ids to dense row numbers, the one numbering that catalogue, counters and index share."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from itertools import repeat

import numpy as np
import numpy.typing as npt

from models.hashing import hash64, short_hash

UNKNOWN = -1
"""Row number of an item that the index does not hold."""
AMBIGUOUS = -2
"""Value in the short-hash map of a 32-bit hash that two items share: it resolves to neither."""


class ItemIndex:
    """Append-only map of item ids to row numbers 0, 1, 2, …, also found by 64-bit and 32-bit hash.

    Rows are never reused: a removed item keeps its number, so that arrays held elsewhere stay right.
    Ids that no catalogue record has named yet (an action on an item not known yet) have a row too.
    """

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._row_by_id: dict[str, int] = {}
        self._row_by_hash: dict[int, int] = {}
        self._row_by_short: dict[int, int] = {}
        # Ids come from the items mirror and from actions on items not known yet: two threads, one numbering.
        self._adding = threading.Lock()

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, item_id: str) -> int:
        """Return the row of ``item_id``, giving it the next free one if it has none."""
        row = self._row_by_id.get(item_id)
        if row is not None:
            return row
        full = hash64(item_id)
        short = short_hash(full)
        with self._adding:
            row = self._row_by_id.get(item_id)
            if row is not None:
                return row
            row = len(self._ids)
            self._ids.append(item_id)
            self._row_by_hash[full] = row
            self._row_by_short[short] = AMBIGUOUS if short in self._row_by_short else row
            self._row_by_id[item_id] = row
            return row

    def row(self, item_id: str) -> int:
        """Return the row of ``item_id``, or UNKNOWN. Never grows the index."""
        return self._row_by_id.get(item_id, UNKNOWN)

    def rows(self, item_ids: Sequence[str]) -> npt.NDArray[np.int32]:
        """Return the rows of many ids, int32 [n], UNKNOWN where there is none."""
        get = self._row_by_id.get
        return np.fromiter(map(get, item_ids, repeat(UNKNOWN)), np.int32, len(item_ids))

    def rows_by_hash(self, hashes: Iterable[int], n: int) -> npt.NDArray[np.int32]:
        """Return the rows of ``n`` 64-bit hashes (Python ints), int32 [n], UNKNOWN where there is none."""
        get = self._row_by_hash.get
        return np.fromiter(map(get, hashes, repeat(UNKNOWN)), np.int32, n)

    def rows_by_short_hash(self, hashes: Iterable[int], n: int) -> npt.NDArray[np.int32]:
        """Return the rows of ``n`` 32-bit hashes, int32 [n], UNKNOWN where none or more than one fits."""
        get = self._row_by_short.get
        found = np.fromiter(map(get, hashes, repeat(UNKNOWN)), np.int32, n)
        found[found == AMBIGUOUS] = UNKNOWN
        return found

    def item_id(self, row: int) -> str:
        """Return the id of a row. Raises IndexError for a row that was never given."""
        if row < 0:
            raise IndexError(row)
        return self._ids[row]

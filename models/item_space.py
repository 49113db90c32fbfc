"""Items in one embedding space: base encodings, vectors made from them, and the index that finds them.

Several spaces stand beside each other during a swap. All calls come from the state thread, but ``ItemSpace.build``,
which fills a space that nobody uses yet. Legend of shapes: B = dimensions of a base encoding, C = capacity in rows of
the ItemIndex, n = any number.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from models.bootstrap import Halves, Hashes, Space
from models.catalogue import Catalogue, Rows, SpaceVectors
from models.hashing import hash64
from models.retrieval import VectorIndex, lower_priority

BUILD_ROWS: Final = 512
"""Rows of one step of a build: below a millisecond, so that a slate's thread gets its turn."""
_INITIAL_ROWS: Final = 1_024

Embeddings = Mapping[int, Sequence[float]]
"""The items' own embeddings, by row."""


class BaseEncodings:
    """The base encodings of one encoder, over ItemIndex rows, and those of items that no record has named yet."""

    def __init__(self, encoder_id: str, dim: int) -> None:
        self.encoder_id = encoder_id
        self.dim = dim
        self.vectors: Halves = np.zeros((_INITIAL_ROWS, dim), np.float16)
        """float16 [C, B], zero where there is none."""
        self.content_hashes: Hashes = np.zeros(_INITIAL_ROWS, np.uint64)
        """uint64 [C], content hash of the text that was encoded; 0 = no encoding."""
        self.seen: set[int] | None = None
        """Rows that were set since a backfill began, None outside one: what it brings is older."""
        self._waiting: dict[int, tuple[int, Halves]] = {}

    def set(self, row: int, vector: Halves | None, content_hash: int, *, older: bool = False) -> None:
        """Set the encoding of a row, float16 [B], or take it away; ``older``: it comes from a backfill."""
        self.grow(row)
        self.vectors[row] = 0 if vector is None else vector
        self.content_hashes[row] = 0 if vector is None else content_hash
        if self.seen is not None and not older:
            self.seen.add(row)

    def bring(self, rows: Rows, items: Hashes, content_hashes: Hashes, vectors: Halves) -> list[int]:
        """Take what a bundle brings, rows of -1 being items not known yet; return the rows that have changed.

        An encoding that is there already came from the topic, and is newer.
        """
        changed = []
        for place, row in enumerate(rows.tolist()):
            content = int(content_hashes[place])
            if row < 0:
                self._waiting[int(items[place])] = (content, vectors[place].copy())
            elif self._has_none(row):
                self.grow(row)
                self.vectors[row] = vectors[place]
                self.content_hashes[row] = content
                changed.append(row)
        return changed

    def welcome(self, row: int, item: str) -> bool:
        """Give a row that a record has just named the encoding that a bundle brought for it, if one did."""
        if not self._waiting:
            return False
        brought = self._waiting.pop(hash64(item), None)
        if brought is None or not self._has_none(row):
            return False
        self.grow(row)
        self.content_hashes[row], self.vectors[row] = brought
        return True

    def grow(self, row: int) -> None:
        """Hold ``row``; new arrays take the place of those that are full."""
        size = len(self.content_hashes)
        if row >= size:
            capacity = max(row + 1, 2 * size)
            vectors = np.zeros((capacity, self.dim), np.float16)
            vectors[:size] = self.vectors
            hashes = np.zeros(capacity, np.uint64)
            hashes[:size] = self.content_hashes
            self.vectors, self.content_hashes = vectors, hashes

    def take(self, rows: npt.NDArray[Any]) -> tuple[Halves, Hashes]:
        """Return encodings float16 [n, B] and content hashes [n] of rows, zero where there is none."""
        vectors, hashes = self.vectors, self.content_hashes
        inside = rows < min(len(hashes), len(vectors))
        safe = np.where(inside, rows, 0)
        found, content = vectors[safe], hashes[safe]
        found[~inside] = 0
        content[~inside] = 0
        return found, content

    def contents(self, rows: npt.NDArray[Any]) -> Hashes:
        """Return the content hashes of rows [n], 0 where there is no encoding; the encodings are not copied."""
        hashes = self.content_hashes
        inside = rows < len(hashes)
        return np.where(inside, hashes[np.where(inside, rows, 0)], np.uint64(0))

    def _has_none(self, row: int) -> bool:
        if self.seen is not None and row in self.seen:
            return False
        return row >= len(self.content_hashes) or not self.content_hashes[row]


class ItemSpace:
    """The catalogue's items as they lie in one space, and the index over those that may be shown."""

    def __init__(
        self, space: Space, encodings: BaseEncodings, catalogue: Catalogue, vectors: SpaceVectors, index: VectorIndex
    ) -> None:
        if encodings.encoder_id != space.encoder_id or encodings.dim != space.base_dim:
            raise ValueError(f"encodings of {encodings.encoder_id} for a space of {space.encoder_id}")
        self.space = space
        self.encodings = encodings
        self.vectors = vectors
        self.index = index
        self.changed: set[int] = set()
        """Rows that have changed since a build began, to be gone over again."""
        self._catalogue = catalogue
        self._indexed: npt.NDArray[np.bool_] = np.zeros(_INITIAL_ROWS, np.bool_)

    def refresh(self, rows: npt.NDArray[Any], embeddings: Embeddings) -> None:
        """Make the vectors of distinct rows [n] anew from what is known of their items."""
        if not len(rows):
            return
        base, content = self.encodings.take(rows)
        if len(self.space.residual_items):
            hashes = self._item_hashes(rows)
            vectors = self.space.item_vectors(base, hashes)
        else:
            vectors = self.space.vectors(base)
        if embeddings:
            for place, row in enumerate(rows.tolist()):
                own = embeddings.get(row)
                if own is not None:
                    item = hash64(self._catalogue.index.item_id(row)) if len(self.space.residual_items) else None
                    both = self.space.item_vector(base[place] if content[place] else None, own, item)
                    vectors[place] = 0.0 if both is None else both
        self.vectors.set_many(rows, vectors, content)

    def reindex(self, rows: Rows, now_ms: int) -> None:
        """Make distinct rows [n] findable, or not, as catalogue and vectors now say."""
        if not len(rows):
            return
        self._grow(int(rows.max()))
        findable = self._catalogue.servable(rows, now_ms) & self.vectors.of(rows)[1]
        there, gone = rows[findable], rows[~findable & self._indexed[rows]]
        if len(gone):
            self.index.remove(gone)
            self._indexed[gone] = False
        # A changed title with its old vector would be a change for nothing, but a rare one.
        if len(there):
            self.index.add(there, self.vectors.vectors[there])
            self._indexed[there] = True

    def sweep(self, now_ms: int) -> int:
        """Take expired items out of the index and return their number. Slates leave them out without this."""
        n = min(len(self._indexed), self._catalogue.capacity)
        expired = np.flatnonzero(self._indexed[:n] & (self._catalogue.expires_at_ms[:n] <= now_ms)).astype(np.int32)
        if len(expired):
            self._indexed[expired] = False
            self.index.remove(expired)
        return len(expired)

    def build(self, embeddings: Embeddings, now_ms: int, stop: threading.Event, *, wait_for_graph: bool = True) -> bool:
        """Fill an empty space and build its index, in a thread of its own; False when ``stop`` ended it.

        Without ``wait_for_graph`` a large index is left to build its graph while it serves, exactly but slower.

        Reads encodings and catalogue while the state thread writes them: what changes meanwhile is in ``changed``
        and gone over again by ``catch_up``. ``embeddings`` is the caller's copy. Raises what the index build raised.
        """
        lower_priority()
        rows = np.arange(len(self._catalogue.index), dtype=np.int32)
        for start in range(0, len(rows), BUILD_ROWS):
            if stop.wait(0.001):
                return False
            self.refresh(rows[start : start + BUILD_ROWS], embeddings)
        self.reindex(rows, now_ms)
        while wait_for_graph and self.index.is_building:
            if stop.wait(0.01):
                self.index.close()
                return False
            self.index.take_over()
        if self.index.build_error is not None:
            raise self.index.build_error
        return True

    def catch_up(self, embeddings: Embeddings, now_ms: int, most: int) -> bool:
        """Go over at most ``most`` changed rows again, in the state thread; True when none is left."""
        rows = np.array([self.changed.pop() for _ in range(min(most, len(self.changed)))], np.int32)
        self.refresh(rows, embeddings)
        self.reindex(rows, now_ms)
        if self.changed:
            return False
        self.sweep(now_ms)
        return True

    def _item_hashes(self, rows: npt.NDArray[Any]) -> Hashes:
        index = self._catalogue.index
        return np.fromiter((hash64(index.item_id(row)) for row in rows.tolist()), np.uint64, len(rows))

    def _grow(self, row: int) -> None:
        size = len(self._indexed)
        if row >= size:
            self._indexed = np.concatenate([self._indexed, np.zeros(max(row + 1, 2 * size) - size, np.bool_)])

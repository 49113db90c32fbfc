"""The catalogue: items with their vectors, attributes and visibility, as arrays over ItemIndex rows.

Legend of shapes: C = capacity (rows that the arrays hold), D = dimensions of the embedding space, n = any number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from models.encoder import content_hash
from models.events import Filters, Item, epoch_ms
from models.item_index import UNKNOWN, ItemIndex

NEVER_MS: Final = np.iinfo(np.int64).max
"""``expires_at_ms`` of an item that does not expire."""
NOT_GIVEN_MS: Final = -(2**62)
"""``published_at_ms`` of an item without one; before every real time, films of 1902 included."""
_INITIAL_ROWS: Final = 1_024
_INLINE_CODES: Final = 8
"""As many as bytes in a uint64: "any of these flags" is then one comparison."""

Rows = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]


class TermCodes:
    """Interned terms (categories, tags) of each row, so that "has any of these" is one look-up for all rows.

    The first few codes of a row lie in a matrix; rows with more of them keep the rest in a dictionary.
    """

    def __init__(self, capacity: int) -> None:
        self._codes: dict[str, int] = {}
        self._inline: npt.NDArray[np.int32] = np.zeros((capacity, _INLINE_CODES), np.int32)  # 0 = no term
        self._more: dict[int, list[int]] = {}

    def grow(self, capacity: int) -> None:
        self._inline = _grown(self._inline, capacity)

    def set(self, row: int, terms: Iterable[str]) -> None:
        """Replace the terms of a row."""
        codes = [self._codes.setdefault(t, len(self._codes) + 1) for t in dict.fromkeys(terms)]
        self._inline[row] = 0
        self._inline[row, : min(len(codes), _INLINE_CODES)] = codes[:_INLINE_CODES]
        if len(codes) > _INLINE_CODES:
            self._more[row] = codes[_INLINE_CODES:]
        else:
            self._more.pop(row, None)

    def has_any(self, rows: Rows, terms: Iterable[str]) -> Bools:
        """Return which rows [n] have at least one of ``terms``, bool [n]; any value for one outside the arrays."""
        wanted = {code for t in terms if (code := self._codes.get(t)) is not None}
        if not wanted:
            return np.zeros(rows.shape, np.bool_)
        codes = self._inline.take(rows, axis=0, mode="clip")
        if len(wanted) == 1:
            # Most filters name one term, and a comparison costs half of a table.
            flags = codes == next(iter(wanted))
        else:
            table = np.zeros(len(self._codes) + 1, np.bool_)
            table[list(wanted)] = True
            flags = table.take(codes)
        # A reduction over an axis of eight would cost more than all the rest.
        found: Bools = np.not_equal(flags.view(np.uint64)[..., 0], 0)
        if self._more:
            flat_rows, flat = rows.ravel(), found.reshape(-1)
            for position in np.flatnonzero(~flat).tolist():
                more = self._more.get(int(flat_rows[position]))
                if more is not None and not wanted.isdisjoint(more):
                    flat[position] = True
            found = flat.reshape(rows.shape)
        return found

    def first(self, rows: Rows) -> Rows:
        """Return the code of the first term of each row, int32 of their shape, 0 where it has none.

        Any value for a row outside the arrays.
        """
        codes: Rows = self._inline.take(rows, axis=0, mode="clip")[..., 0]
        return codes


class SpaceVectors:
    """The vectors of the items in one embedding space, over ItemIndex rows.

    Written by one thread, as the catalogue; arrays are replaced when they grow.
    """

    def __init__(self, dim: int, capacity: int = _INITIAL_ROWS) -> None:
        self.dim = dim
        self.vectors: Floats = np.zeros((capacity, dim), np.float32)
        """float32 [C, D], unit norm, zero where there is none."""
        self.has_vector: Bools = np.zeros(capacity, np.bool_)
        self.encoded: npt.NDArray[np.uint64] = np.zeros(capacity, np.uint64)
        """uint64 [C], content hash of the text that a vector was made from, 0 where there was none."""

    @property
    def capacity(self) -> int:
        """Rows that every array holds."""
        return int(self.has_vector.shape[0])

    def reserve(self, rows: int) -> None:
        """Make the arrays hold ``rows`` rows; they grow by doubling."""
        capacity = self.capacity
        if rows <= capacity:
            return
        while capacity < rows:
            capacity *= 2
        self.vectors = _grown(self.vectors, capacity)
        self.encoded = _grown(self.encoded, capacity)
        # Last: `capacity` is read from it, and a row must not look present before the other arrays hold it.
        self.has_vector = _grown(self.has_vector, capacity)

    def set(self, row: int, vector: npt.ArrayLike, encoded_hash: int) -> None:
        """Give a row its vector, float [D], scaled to unit norm here; a zero vector takes it away."""
        values = np.asarray(vector, np.float32)
        if values.shape != (self.dim,):
            raise ValueError(f"a vector of shape {values.shape} for a space of {self.dim} dimensions; nothing was set")
        self.reserve(row + 1)
        norm = float(np.linalg.norm(values))
        usable = math.isfinite(norm) and norm > 1e-12
        self.vectors[row] = values / norm if usable else 0.0
        self.has_vector[row] = usable
        self.encoded[row] = encoded_hash

    def set_many(self, rows: npt.NDArray[Any], vectors: Floats, encoded: npt.NDArray[np.uint64]) -> None:
        """Give distinct rows [n] their vectors, float32 [n, D], of unit norm or zero already: zero takes one away."""
        if vectors.shape != (len(rows), self.dim):
            raise ValueError(f"vectors of shape {vectors.shape} for {len(rows)} rows of {self.dim} dimensions")
        if not len(rows):
            return
        self.reserve(int(rows.max()) + 1)
        self.vectors[rows] = vectors
        self.has_vector[rows] = vectors.any(axis=1)
        self.encoded[rows] = encoded

    def of(self, rows: Rows) -> tuple[Floats, Bools]:
        """Return vectors float32 [..., D] (zero where unknown) and whether each is known, bool [...]."""
        rows = np.asarray(rows, np.int32)
        known = is_inside(rows, self.capacity)
        known &= self.has_vector.take(rows, mode="clip")
        found: Floats = self.vectors.take(rows, axis=0, mode="clip")
        # Of a slate's candidates all are known, as a rule.
        if np.count_nonzero(known) < known.size:
            found[~known] = 0.0
        return found, known


class Catalogue:
    """Items by row: what they are, where they lie in the embedding space in use, whether they may be shown.

    Written by one thread. Others may read at any time: arrays are replaced when they grow, never resized, and an
    item becomes servable only after its attributes and its vector's row are there. The arrays hold ``capacity`` rows,
    which may be fewer than the index (an action may name an item that no record has named yet): rows from elsewhere
    go through ``servable`` first, or through ``reserve``. Servable rows are always inside the arrays.
    Attributes are the same for all models; the vectors are those of one space at a time, which ``use`` changes.
    """

    def __init__(self, index: ItemIndex, dim: int) -> None:
        self.index = index
        self.space_vectors = SpaceVectors(dim)
        self.visibility_version = 0
        """Rises when an item is hidden, removed or given an earlier expiry: a slate made under an older one is checked
        again."""
        self.hidden: Bools = np.zeros(_INITIAL_ROWS, np.bool_)
        self.in_catalogue: Bools = np.zeros(_INITIAL_ROWS, np.bool_)
        self.published_at_ms: npt.NDArray[np.int64] = np.full(_INITIAL_ROWS, NOT_GIVEN_MS, np.int64)
        """int64 [C], 0 = not given."""
        self.expires_at_ms: npt.NDArray[np.int64] = np.full(_INITIAL_ROWS, NEVER_MS, np.int64)
        self.price: npt.NDArray[np.float64] = np.full(_INITIAL_ROWS, np.nan, np.float64)
        """float64 [C], NaN = not given."""
        self._content: npt.NDArray[np.uint64] = np.zeros(_INITIAL_ROWS, np.uint64)
        self._items: dict[int, Item] = {}
        self._categories = TermCodes(_INITIAL_ROWS)
        self._tags = TermCodes(_INITIAL_ROWS)
        self._attributes = TermCodes(_INITIAL_ROWS)

    @property
    def capacity(self) -> int:
        """Rows that every array holds, those of the vectors included."""
        return int(self.in_catalogue.shape[0])

    @property
    def dim(self) -> int:
        """Dimensions of the space in use."""
        return self.space_vectors.dim

    @property
    def vectors(self) -> Floats:
        """The vectors in use, float32 [C or more, D], unit norm, zero where there is none."""
        return self.space_vectors.vectors

    @property
    def has_vector(self) -> Bools:
        """Which rows have a vector in the space in use, bool [C or more]."""
        return self.space_vectors.has_vector

    def use(self, space_vectors: SpaceVectors) -> None:
        """Take the vectors of another space from now on, by one assignment."""
        space_vectors.reserve(self.capacity)
        self.space_vectors = space_vectors

    def __len__(self) -> int:
        """Items in the catalogue, hidden and expired ones included, removed ones not."""
        return int(self.in_catalogue.sum())

    def reserve(self, rows: int | None = None) -> None:
        """Make the arrays hold ``rows`` rows, by default all of the index; they grow by doubling."""
        needed = len(self.index) if rows is None else rows
        if needed <= self.capacity:
            return
        capacity = self.capacity
        while capacity < needed:
            capacity *= 2
        self._categories.grow(capacity)
        self._tags.grow(capacity)
        self._attributes.grow(capacity)
        self.space_vectors.reserve(capacity)
        for name in ("hidden", "price", "_content"):
            setattr(self, name, _grown(getattr(self, name), capacity))
        self.price[len(self.in_catalogue) :] = np.nan
        published = _grown(self.published_at_ms, capacity)
        published[len(self.in_catalogue) :] = NOT_GIVEN_MS
        self.published_at_ms = published
        expires = _grown(self.expires_at_ms, capacity)
        expires[len(self.in_catalogue) :] = NEVER_MS
        self.expires_at_ms = expires
        # Last: `capacity` is read from it, and a row must not look present before the other arrays hold it.
        self.in_catalogue = _grown(self.in_catalogue, capacity)

    def upsert(self, item: Item) -> int:
        """Add or replace an item and return its row. Its vector stays as it is until ``set_vector``.

        The long ``text`` and the client's ``embedding`` are not kept: only their hash and their vector matter here.
        """
        row = self.index.add(item.item_id)
        self.reserve(row + 1)
        was_shown = bool(self.in_catalogue[row] and not self.hidden[row])
        expired_before = int(self.expires_at_ms[row])
        self.published_at_ms[row] = NOT_GIVEN_MS if item.published_at is None else epoch_ms(item.published_at)
        self.expires_at_ms[row] = NEVER_MS if item.expires_at is None else epoch_ms(item.expires_at)
        self.price[row] = math.nan if item.price is None else item.price
        self._content[row] = content_hash(item)
        self._categories.set(row, item.categories or ())
        self._tags.set(row, item.tags or ())
        self._attributes.set(row, [_attribute(n, v) for n, v in (item.attributes or {}).items() if v is not None])
        kept = Item(
            item_id=item.item_id,
            title=item.title,
            categories=item.categories,
            tags=item.tags,
            entities=item.entities,
            published_at=item.published_at,
            expires_at=item.expires_at,
            is_hidden=item.is_hidden,
            price=item.price,
            attributes=item.attributes,
        )
        self._items[row] = kept
        self.hidden[row] = item.is_hidden
        self.in_catalogue[row] = True
        if was_shown and (item.is_hidden or self.expires_at_ms[row] < expired_before):
            self.visibility_version += 1
        return row

    def remove(self, item_id: str) -> int:
        """Take an item out and return its row, or UNKNOWN. It stays addressable (rings name it), never servable."""
        row = self.index.row(item_id)
        if row == UNKNOWN or row >= self.capacity or not self.in_catalogue[row]:
            return UNKNOWN if row == UNKNOWN else row
        self.in_catalogue[row] = False
        self.visibility_version += 1
        return row

    def set_vector(self, row: int, vector: npt.ArrayLike, encoded_hash: int | None = None) -> None:
        """Give a row its vector, float [D], scaled to unit norm here; a zero vector takes it away.

        ``encoded_hash`` is the content hash of the text that was encoded; by default, the item's present one.
        """
        self.reserve(row + 1)
        self.space_vectors.set(row, vector, int(self._content[row]) if encoded_hash is None else encoded_hash)

    def needs_encoding(self, row: int) -> bool:
        """Return whether the text of a row is not the one that its vector in use was made from."""
        content = self.content_hash(row)
        return content != 0 and content != int(self.space_vectors.encoded[row])

    def content_hash(self, row: int) -> int:
        """Return the content hash of a row's text, 0 where it has none."""
        return int(self._content[row]) if 0 <= row < self.capacity else 0

    def content_hashes(self, rows: Rows) -> npt.NDArray[np.uint64]:
        """Return the content hashes of rows inside the arrays, uint64 [n], 0 where an item has no text."""
        found: npt.NDArray[np.uint64] = self._content[rows]
        return found

    def servable(self, rows: Rows, now_ms: int) -> Bools:
        """Return which rows may be shown at ``now_ms``, bool, same shape: in the catalogue, not hidden, not expired.

        Rows that are UNKNOWN or that no record has named are not. An item without a vector is servable.
        """
        rows = np.asarray(rows, np.int32)
        allowed = is_inside(rows, self.capacity)
        allowed &= self.in_catalogue.take(rows, mode="clip")
        allowed &= ~self.hidden.take(rows, mode="clip")
        allowed &= self.expires_at_ms.take(rows, mode="clip") > now_ms
        return allowed

    def servable_rows(self, now_ms: int) -> Rows:
        """Return all servable rows at ``now_ms``, int32 [n], rising."""
        alive = self.in_catalogue & ~self.hidden & (self.expires_at_ms > now_ms)
        return np.flatnonzero(alive).astype(np.int32)

    def knows(self, item_id: str) -> bool:
        """Return whether a record has named this item, also if it was removed since."""
        return self.index.row(item_id) in self._items

    def item(self, row: int) -> Item | None:
        """Return the item's record without ``text`` and ``embedding``, or None where no record named it.

        Removed items are still there: a reason may name one.
        """
        return self._items.get(int(row))

    def vectors_of(self, rows: Rows) -> tuple[Floats, Bools]:
        """Return vectors float32 [..., D] (zero where unknown) and whether each is known, bool [...]."""
        return self.space_vectors.of(rows)

    def by_hash(self, hashes: npt.NDArray[np.uint64]) -> tuple[Floats, Bools]:
        """Return the vectors of 64-bit item hashes [n]: float32 [n, D] and whether each is known, bool [n]."""
        return self.vectors_of(self.index.rows_by_hash(hashes.tolist(), hashes.shape[0]))

    def by_short_hash(self, hashes: npt.NDArray[np.uint32]) -> tuple[Floats, Bools]:
        """Return the vectors of 32-bit item hashes [n], as ``by_hash``; an ambiguous one is unknown."""
        return self.vectors_of(self.index.rows_by_short_hash(hashes.tolist(), hashes.shape[0]))

    def filter_mask(self, rows: Rows, filters: Filters) -> Bools:
        """Return which rows fit ``filters``, bool, same shape as ``rows``.

        ``categories`` and ``tags`` ask for at least one of the named ones, spelled alike. An item that does not say
        its time or price fits no filter on it.
        """
        after = filters.published_after
        after_ms = None if after is None else epoch_ms(after)
        rows = np.asarray(rows, np.int32)
        mask = self.matching(rows, filters.categories, filters.tags, after_ms, filters.min_price, filters.max_price)
        mask &= is_inside(rows, self.capacity)
        return mask

    def matching(
        self,
        rows: Rows,
        categories: Iterable[str] | None,
        tags: Iterable[str] | None,
        published_after_ms: int | None,
        min_price: float | None,
        max_price: float | None,
    ) -> Bools:
        """Return which rows fit all that is not None, as ``filter_mask`` does; any value for one outside the arrays."""
        masks: list[Bools] = []
        if categories is not None:
            masks.append(self._categories.has_any(rows, categories))
        if tags is not None:
            masks.append(self._tags.has_any(rows, tags))
        if published_after_ms is not None:
            published = self.published_at_ms.take(rows, mode="clip")
            masks.append(published >= max(published_after_ms, NOT_GIVEN_MS + 1))
        if min_price is not None:
            masks.append(self.price.take(rows, mode="clip") >= min_price)
        if max_price is not None:
            masks.append(self.price.take(rows, mode="clip") <= max_price)
        if not masks:
            return np.ones(rows.shape, np.bool_)
        mask = masks.pop()
        for other in masks:
            mask &= other
        return mask

    def attribute_mask(self, rows: Rows, name: str, value: str | float | bool) -> Bools:
        """Return which rows have the attribute ``name`` with this value, bool, same shape; 1 is 1.0, not true.

        Any value for a row outside the arrays.
        """
        return self._attributes.has_any(rows, [_attribute(name, value)])

    def category_codes(self, rows: Rows) -> Rows:
        """Return a number for the first category of each row, int32, same shape; 0 where there is none."""
        rows = np.asarray(rows, np.int32)
        codes: Rows = self._categories.first(rows) * is_inside(rows, self.capacity)
        return codes


def is_inside(rows: Rows, capacity: int) -> Bools:
    """Return which rows lie in arrays of ``capacity`` rows, bool of their shape."""
    # Without a sign, a negative row is greater than any capacity: one comparison for both ends.
    inside: Bools = rows.view(np.uint32) < capacity
    return inside


def _attribute(name: str, value: str | float | bool) -> str:
    """Return an attribute as one term."""
    return f"{name}\0{value if isinstance(value, str | bool) else float(value)!r}\0{isinstance(value, str)}"


def _grown(array: npt.NDArray[Any], capacity: int) -> npt.NDArray[Any]:
    grown = np.zeros((capacity, *array.shape[1:]), array.dtype)
    grown[: array.shape[0]] = array
    return grown

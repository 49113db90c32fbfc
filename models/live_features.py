"""Live state to raw slates: the one reading of rows, counters and catalogue, for impressions and for requests.

The worker calls it for what was shown (``streams.examples``), the recommender for what might be. Numbers are rounded
here to the types in which a features record carries them, so that a model scores what it was trained on, to the bit.
Axes as in models/features.py; T the two tastes of a user, short-term and long-term; D dimensions of the space.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from models.catalogue import NOT_GIVEN_MS, Catalogue, SpaceVectors, is_inside
from models.features import F32, RawSlates
from models.item_index import ItemIndex
from models.ranking import I32, NO_ROW, Bools, Past, RankingConfig, UserRows, scale_tastes

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]


class TimedReader(Protocol):
    """What is read of user rows, each row at a time of its own; models.user_state.UserReader is one."""

    def user_vectors(self, rows: UserRows, now_ms: Int64) -> tuple[F32, F32, Bools]:
        """Return short-term and long-term vectors float32 [S, D] as of ``now_ms`` [S], and whether there is any."""

    def shown(self, rows: UserRows) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8], Int64]:
        """Return short hashes of items shown lately [S, n] (0 = none), how often, and when last (ms)."""

    def recent(self, rows: UserRows) -> tuple[UInt64, npt.NDArray[np.uint8], Int64]:
        """Return hashes of recent items [S, R] (0 = none), action codes as models.user_row says, and times (ms)."""


class CountsReader(Protocol):
    """What is read of item counts, each slate at a time of its own; ItemCounters and CountersAsOf are two."""

    def read_at(self, rows: npt.NDArray[np.integer], times_ms: Int64) -> F32:
        """Return the decayed counts of rows [S, …], each slate at its time [S]: float32 [S, …, 4, kinds].

        The array is the caller's own: it may be written.
        """

    def first_seen_seconds(self, rows: npt.NDArray[np.integer], times_ms: Int64) -> F32:
        """Return the time since the first impression of rows [S, …], each slate at its time [S], NaN = none."""


class IndexedVectors:
    """The vectors of one space, found by hash: what rows are read with in a space that the catalogue does not use."""

    def __init__(self, index: ItemIndex, vectors: SpaceVectors) -> None:
        self._index = index
        self._vectors = vectors

    @property
    def dim(self) -> int:
        """Return D."""
        return self._vectors.dim

    def by_hash(self, hashes: UInt64) -> tuple[F32, Bools]:
        """Return the vectors of 64-bit item hashes [n]: float32 [n, D] and whether each is known, bool [n]."""
        return self._vectors.of(self._index.rows_by_hash(hashes.tolist(), len(hashes)))

    def by_short_hash(self, hashes: npt.NDArray[np.uint32]) -> tuple[F32, Bools]:
        """Return the vectors of 32-bit item hashes [n], as ``by_hash``; an ambiguous one is unknown."""
        return self._vectors.of(self._index.rows_by_short_hash(hashes.tolist(), len(hashes)))


def raw_from_state(
    rows: UserRows,
    item_rows: I32,
    time_ms: Int64,
    catalogue: Catalogue,
    counters: CountsReader,
    users: TimedReader,
    ranking: RankingConfig,
    *,
    vectors: SpaceVectors | None = None,
    valid: Bools | None = None,
    items: UInt64 | None = None,
    past: Past | None = None,
    tastes: F32 | None = None,
    item_vectors: F32 | None = None,
) -> RawSlates:
    """Return the raw state of slates: ``rows`` [S] of the users, ``item_rows`` int32 [S, C], ``time_ms`` int64 [S].

    An item row of -1 is padding, unless ``valid`` bool [S, C] says that an item is there of which nothing is known.
    ``vectors``: of the space that ``users`` reads in; default: those in use by the catalogue. ``items``: the hashes
    [S, C], where a record is to be written; positions are for the caller to fill in. What a caller has
    already need not be looked up again: ``past`` and ``tastes``, of the same rows at the same times, as ``past_of`` and
    ``own_tastes`` give them, and ``item_vectors`` float32 [S, C, D].
    """
    slates, width = item_rows.shape
    raw = RawSlates.empty(slates, width)
    raw.valid = item_rows >= 0 if valid is None else valid
    raw.time_ms = time_ms
    if items is not None:
        raw.items = items
    if not slates:
        return raw
    for place, name in enumerate(("impressions", "clicks", "actions")):
        raw.user_counts[:, place] = rows[name]
    _fill_recent(raw, rows, users)
    if not width:
        return raw
    counts = counters.read_at(item_rows, time_ms)
    raw.counters = np.log1p(counts, out=counts).astype(np.float16)
    raw.age_seconds = _ages(item_rows, time_ms, catalogue)
    raw.first_seen_seconds = counters.first_seen_seconds(item_rows, time_ms)
    _fill_shown(raw, rows, item_rows, catalogue, users, past)
    _fill_acted(raw, item_rows, items, catalogue, past)
    if tastes is None:
        tastes = own_tastes(rows, time_ms, users, ranking)
    if item_vectors is None:
        item_vectors, _ = (vectors or catalogue.space_vectors).of(item_rows)
    raw.sims = _sims(tastes, item_vectors)
    return raw


def sims_of(
    rows: UserRows,
    item_rows: I32,
    time_ms: Int64,
    vectors: SpaceVectors,
    users: TimedReader,
    ranking: RankingConfig,
) -> npt.NDArray[np.float16]:
    """Return products of item vectors with the two scaled tastes, float16 [S, C, 2], in the space of ``vectors``.

    Zero where the item has no vector, or the user no taste. A second model of another space needs its own.
    """
    return _sims(own_tastes(rows, time_ms, users, ranking), vectors.of(item_rows)[0])


def _sims(tastes_STD: F32, items_SCD: F32) -> npt.NDArray[np.float16]:
    # Not a matrix product: its last bits depend on how many items stand beside an item.
    products_STC: F32 = np.einsum("scd,std->stc", items_SCD, np.ascontiguousarray(tastes_STD))
    return products_STC.transpose(0, 2, 1).astype(np.float16, order="C")


def own_tastes(rows: UserRows, time_ms: Int64, users: TimedReader, ranking: RankingConfig) -> F32:
    """Return each user's short-term and long-term taste at ``time_ms`` [S], float32 [S, T, D], as ranking scales them.

    Zero where there is none, or too little evidence of it.
    """
    short, long, has = users.user_vectors(rows, time_ms)
    tastes = np.empty((len(short), 2, short.shape[1]), np.float32)
    tastes[:, 0], tastes[:, 1] = short, long
    tastes = scale_tastes(tastes, ranking.full_norm)
    norms = np.sqrt(np.add.reduce(tastes * tastes, axis=2))
    # The norm of what is not finite is not finite either.
    usable = has[:, None] & np.isfinite(norms) & (norms >= ranking.least_evidence)
    tastes[~usable] = 0.0
    return tastes


def _fill_recent(raw: RawSlates, rows: UserRows, users: TimedReader) -> None:
    hashes, codes, times_ms = users.recent(rows)
    held = hashes != 0
    raw.recent_items = hashes
    raw.recent_codes = codes * held
    ages_ms = np.maximum(raw.time_ms[:, None] - times_ms, 0)
    ages_ms *= held
    raw.recent_age_seconds = (ages_ms / 1000.0).astype(np.float32)


def _fill_acted(raw: RawSlates, item_rows: I32, items: UInt64 | None, catalogue: Catalogue, past: Past | None) -> None:
    """Fill when the user last acted on each item, from the recent items that are there already, newest first.

    By hash where hashes are given, which tells of items that no record names too; candidates all have rows.
    """
    hashes = raw.recent_items
    if items is None:
        rows = past.recent if past is not None else _rows_of(hashes, catalogue)
        rows = np.where((rows < 0) | (hashes == 0), np.int32(NO_ROW), rows)
        same = item_rows[:, None, :] == rows[:, ::-1, None]
    else:
        same = (items[:, None, :] == hashes[:, ::-1, None]) & raw.valid[:, None, :]
    # Of several entries the last one is written: the newest.
    slates, entries, places = _where(same)
    raw.acted_age_seconds[slates, places] = raw.recent_age_seconds[:, ::-1].reshape(-1)[entries]


def _ages(item_rows: I32, time_ms: Int64, catalogue: Catalogue) -> F32:
    given = is_inside(item_rows, catalogue.capacity)
    published_ms = catalogue.published_at_ms.take(item_rows, mode="clip")
    given &= published_ms != NOT_GIVEN_MS
    ages: F32 = ((time_ms[:, None] - published_ms) / 1000.0).astype(np.float32)
    if np.count_nonzero(given) < given.size:
        ages[~given] = np.nan
    return ages


def _rows_of(hashes: UInt64, catalogue: Catalogue) -> I32:
    return catalogue.index.rows_by_hash(hashes.ravel().tolist(), hashes.size).reshape(hashes.shape)


def _fill_shown(
    raw: RawSlates, rows: UserRows, item_rows: I32, catalogue: Catalogue, users: TimedReader, past: Past | None
) -> None:
    hashes, counts, shown_ms = users.shown(rows)
    if past is not None:
        shown = past.shown
    else:
        shown = catalogue.index.rows_by_short_hash(hashes.ravel().tolist(), hashes.size).reshape(hashes.shape)
        shown[shown < 0] = NO_ROW
    ages = (np.maximum(raw.time_ms[:, None] - shown_ms, 0) / 1000.0).astype(np.float32)
    slates, entries, places = _where(item_rows[:, None, :] == shown[:, :, None])
    raw.shown_counts[slates, places] = counts.reshape(-1)[entries]
    raw.shown_age_seconds[slates, places] = ages.reshape(-1)[entries]


def _where(same: Bools) -> tuple[Int64, Int64, Int64]:
    """Return where [S, n, C] is true, in this order: S, which of all S · n, C; np.nonzero takes many times as long."""
    entries, places = np.divmod(same.reshape(-1).nonzero()[0], same.shape[2])
    return entries // same.shape[1], entries, places

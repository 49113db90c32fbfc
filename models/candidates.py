"""Candidate sources and how they are merged: vector searches, decayed popularity, a scan as the last resort.

Axes as in models/ranking.py. A row of -1 is padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, compress
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from models.catalogue import Catalogue, SpaceVectors, is_inside
from models.co_clicks import CoClicks
from models.counters import CLICKS, ItemCounters
from models.events import Filters
from models.newest import NewestFirst
from models.ranking import F32, I32, LONG_TERM, SHORT_TERM, TASTES, Bools, clip_ctr, is_in
from models.retrieval import VectorIndex
from models.rules import RulesConfig
from models.trending import Lists

I8 = npt.NDArray[np.int8]

SOURCES: Final = (
    *TASTES,
    "popular",
    "candidates",
    "pinned",
    "fresh",
    "trending",
    "trending_category",
    "co_click",
    "popular_context",
)
"""Names of the sources of a candidate, by code; the first ones are the tastes, in their order."""
POPULAR: Final = len(TASTES)
GIVEN: Final = POPULAR + 1
PINNED: Final = GIVEN + 1
FRESH: Final = PINNED + 1
TREND: Final = FRESH + 1
TREND_OF_CATEGORY: Final = TREND + 1
CO_CLICK: Final = TREND_OF_CATEGORY + 1
POPULAR_CONTEXT: Final = CO_CLICK + 1
_COLUMN_BITS: Final = 16
MAX_COLUMNS: Final = 1 << _COLUMN_BITS
_LAST: Final = np.iinfo(np.int64).max
"""Behind every key of a row and a column; its lower half is the -1 of padding."""
ALIKE: Final = 0.95
"""Cosine from which the short-term and the long-term vector count as one."""
NEWEST_STRENGTH: Final = 0.1
"""Popularity of the newest item without clicks, where 1 is that of the most clicked one."""


class Wish(Protocol):
    """The part of a request that says what may not be shown."""

    @property
    def exclude(self) -> Sequence[str]:
        """Item ids that must not appear."""

    @property
    def filters(self) -> Filters | None:
        """What the slate may consist of."""


class Refusal:
    """Tells which rows may not be candidates of each request of a batch.

    Not servable, kept out by the surface's rules, excluded, filtered out, or in ``unwanted`` int32 [B, X] (None: no
    such rule).
    """

    def __init__(
        self,
        catalogue: Catalogue,
        wishes: Sequence[Wish],
        unwanted: I32 | None,
        now_ms: int,
        rules: RulesConfig | None = None,
    ) -> None:
        self._catalogue = catalogue
        self._now_ms = now_ms
        self._unwanted = unwanted
        self._rules = rules if rules is not None and rules.filter_items else None
        self._exclude = {b: catalogue.index.rows(w.exclude) for b, w in enumerate(wishes) if w.exclude}
        self._filters = {b: w.filters for b, w in enumerate(wishes) if w.filters is not None}

    def __call__(self, rows: I32) -> Bools:
        """Return which of the rows [B, C] are refused, bool [B, C]; padding is."""
        refused = ~self._catalogue.servable(rows, self._now_ms)
        if self._unwanted is not None:
            refused |= is_in(rows, self._unwanted)
        if self._rules is not None:
            refused |= self._rules.refused(self._catalogue, rows, self._now_ms)
        for b in self._exclude.keys() | self._filters.keys():
            refused[b] |= self._by_wish(rows[b], b)
        return refused

    def each(self, *parts: I32) -> list[Bools]:
        """Return which rows of each part [B, n] are refused, bool [B, n]: one look costs a slate less than several."""
        refused = self(np.concatenate(parts, axis=1))
        ends = accumulate(part.shape[1] for part in parts)
        return [refused[:, end - part.shape[1] : end] for end, part in zip(ends, parts, strict=True)]

    def one(self, rows: I32, b: int) -> Bools:
        """Return which of the servable rows [n] the request ``b`` refuses, bool [n]."""
        refused = self._by_wish(rows, b)
        if self._unwanted is not None:
            refused |= np.isin(rows, self._unwanted[b])
        if self._rules is not None:
            refused |= self._rules.refused(self._catalogue, rows, self._now_ms)
        return refused

    def _by_wish(self, rows: I32, b: int) -> Bools:
        refused = np.zeros(rows.shape, np.bool_)
        if b in self._exclude:
            refused |= np.isin(rows, self._exclude[b])
        if b in self._filters:
            refused |= ~self._catalogue.filter_mask(rows, self._filters[b])
        return refused


@dataclass(slots=True)
class Popular:
    """The most popular servable items at one moment.

    ``rows`` int32 [n], best first; the first ``counted`` have clicks, the rest are the newest items.
    ``ctr`` float32 [n]: their smoothed CTR. ``strength`` float32 [items], by row: log-scaled decayed clicks, 1 for the
    strongest; a little for the newest items, so that they come first where nothing else speaks; 0 for most.
    ``has_clicks`` bool [items]. Both have one row at least.
    """

    rows: I32
    counted: int
    ctr: F32
    strength: F32
    has_clicks: Bools

    def is_trending(self, rows: I32) -> Bools:
        """Tell which rows have clicks in this list, bool of their shape."""
        found: Bools = self.has_clicks.take(rows, mode="clip")
        found &= is_inside(rows, len(self.has_clicks))
        return found

    def strength_of(self, rows: I32) -> F32:
        """Return the strength of any rows, float32 of their shape; 0 for padding and for items newer than this list."""
        found: F32 = self.strength.take(rows, mode="clip")
        found *= is_inside(rows, len(self.strength))
        return found


@dataclass(slots=True)
class Turns:
    """What the sources offer each request, int32 [B, M], -1 for nothing, and the codes of the sources int8 [M]."""

    rows: I32
    sources: I8


@dataclass(slots=True)
class Pool:
    """Candidates of each request: rows int32 [B, C] padded with -1, and the code of their source int8 [B, C].

    The rows stay as they are from when ``vectors_in`` was asked on.
    """

    rows: I32
    sources: I8
    _vectors: tuple[SpaceVectors, F32] | None = None

    def vectors_in(self, space: SpaceVectors) -> F32:
        """Return the candidates' vectors in a space, float32 [B, C, D]: looked up once, for all stages."""
        if self._vectors is None or self._vectors[0] is not space:
            self._vectors = space, space.of(self.rows)[0]
        return self._vectors[1]

    @property
    def valid(self) -> Bools:
        """Where there is a candidate, bool [B, C]."""
        return self.rows >= 0


def no_popular() -> Popular:
    """Return the list of a recommender that was never refreshed."""
    return Popular(np.zeros(0, np.int32), 0, np.zeros(0, np.float32), np.zeros(1, np.float32), np.zeros(1, np.bool_))


def popular_items(
    items: Catalogue,
    counters: ItemCounters,
    n: int,
    now_ms: int,
    half_life_index: int,
    newest: NewestFirst | None = None,
) -> Popular:
    """Return the ``n`` most popular servable items, filled up with the newest ones.

    Popularity is the number of clicks decayed with the half-life of that index. Ties go to the lower row.
    ``newest``: of this moment, where the caller has it.
    """
    newest_first = newest or NewestFirst(items, now_ms)
    n_items = max(1, min(len(items.index), items.capacity))
    top = counters.top(n, now_ms, half_life_index, CLICKS, newest_first.mask)
    clicks = counters.decayed(top, now_ms, half_life_index, CLICKS)
    order = np.lexsort((top, -clicks))
    order = order[clicks[order] > 0]
    top, clicks = top[order].astype(np.int32), clicks[order]
    strength = np.zeros(n_items, np.float32)
    if len(top):
        strength[top] = np.log1p(clicks) / max(float(np.log1p(clicks[0])), 1e-9)
    has_clicks = np.zeros(n_items, np.bool_)
    has_clicks[top] = True
    # Of the n newest, at most as many as are in the list already have clicks.
    others = newest_first.first(n)
    others = others[~has_clicks[others]][: n - len(top)]
    strength[others] = np.linspace(NEWEST_STRENGTH, 0.0, len(others), endpoint=False)
    rows = np.concatenate([top, others])
    ctr = clip_ctr(counters.smoothed_ctr(rows, now_ms, half_life_index))
    return Popular(rows, len(top), ctr, strength, has_clicks)


def search_tastes(index: VectorIndex, tastes: F32, active: Bools, per_taste: int) -> I32:
    """Return the nearest items of every taste, int32 [B, V, per_taste], by one search of the index for all of them.

    ``tastes`` float32 [B, V, D], ``active`` bool [B, V]. The number per taste is the same for all, so that a request
    finds the same items alone and in any batch. A long-term vector that points where the short-term one does is not
    searched: it would find the same items, and the search is most of a slate's cost.
    """
    found = np.empty((*active.shape, per_taste), np.int32)
    found.fill(-1)
    searched = active.copy()
    searched[:, LONG_TERM] &= ~alike(tastes[:, SHORT_TERM], tastes[:, LONG_TERM])
    # Of all requests in one row: found faster than by a mask of them.
    (at,) = searched.reshape(-1).nonzero()
    if len(at):
        rows, _ = index.search(tastes.reshape(-1, tastes.shape[2]).take(at, axis=0), per_taste)
        found.reshape(active.size, per_taste)[at] = rows
    return found


def alike(a: F32, b: F32) -> Bools:
    """Tell which pairs of vectors [n, D] have a cosine of at least ALIKE, bool [n]; never with a zero vector."""
    both = lengths(a) * lengths(b)
    same: Bools = (np.einsum("nd,nd->n", a, b) >= ALIKE * both) & (both > 0)
    return same


def lengths(vectors: F32) -> F32:
    """Return the norms of vectors [..., D], float32 [...]: as ``np.linalg.norm`` does, without its preliminaries."""
    norms: F32 = np.sqrt(np.add.reduce(vectors * vectors, axis=-1))
    return norms


class Quotas(BaseModel):
    """How the sources of candidates take turns. At the defaults, four of them are off and cost nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vectors: float = Field(
        1.0, gt=0, le=100, description="Turns of each vector search (short-term, long-term, profile, query)."
    )
    popular: float = Field(0.5, gt=0, le=100, description="Turns of the most popular items.")
    trending: float = Field(
        0.0, ge=0, le=100, description="Turns of what is clicked most at the shortest half-life of the counters."
    )
    trending_category: float = Field(
        0.0, ge=0, le=100, description="Turns of the same within the categories that the user acted on last."
    )
    fresh: float = Field(0.0, ge=0, le=100, description="Turns of the newest items.")
    co_click: float = Field(
        0.0, ge=0, le=100, description="Turns of what users act on after the items that this user acted on last."
    )
    popular_context: float = Field(
        0.5,
        ge=0,
        le=100,
        description="With popularity_context: turns of what is most popular in the request's context. 0: this surface "
        "does not look at contexts.",
    )

    @property
    def has_lists(self) -> bool:
        """Whether a source is on that is a list which all requests share."""
        return self.trending > 0 or self.trending_category > 0 or self.fresh > 0


Source = tuple[int, I32, float]
"""Code, rows int32 [B, n] best first, turns."""


def listed(lists: Lists, quotas: Quotas, catalogue: Catalogue, liked: I32, width: int) -> list[Source]:
    """Return the sources that ``quotas`` turns on beside searches and the popular list; ``liked`` int32 [B, R].

    Each as long as its turns may need for ``width`` candidates: every row costs a look at the rules.
    """
    found: list[Source] = []
    for code, turns in (
        (TREND, quotas.trending),
        (TREND_OF_CATEGORY, quotas.trending_category),
        (FRESH, quotas.fresh),
    ):
        if not turns:
            continue
        most = math.ceil(width * min(1.0, turns))
        if code == TREND_OF_CATEGORY:
            rows = lists.of_likes(catalogue.category_codes(liked))[:, :most]
        else:
            rows = (lists.trending if code == TREND else lists.newest)[None, :most].repeat(len(liked), axis=0)
        found.append((code, rows, turns))
    return found


def co_clicked(co_clicks: CoClicks, quotas: Quotas, liked: I32, width: int, now_ms: int) -> Source:
    """Return what follows the items that each request's user liked, int32 [B, R], as ``listed`` does."""
    most = math.ceil(width * min(1.0, quotas.co_click))
    return CO_CLICK, co_clicks.candidates(liked, now_ms, most), quotas.co_click


def merge(
    found: I32,
    active: Bools,
    popular: I32,
    width: int,
    refused: Callable[[I32], Bools],
    quotas: Quotas | None = None,
    others: Sequence[Source] = (),
) -> Pool:
    """Merge searches [B, V, n], the popular list and others into at most ``width`` different candidates a request.

    As ``take_turns`` and ``first_of_each`` do; ``refused`` tells for rows [B, M] which may not be candidates.
    """
    turns = take_turns(found, active, popular, width, quotas, others)
    return first_of_each(turns, refused(turns.rows), width)


def take_turns(
    found: I32,
    active: Bools,
    popular: I32,
    width: int,
    quotas: Quotas | None = None,
    others: Sequence[Source] = (),
) -> Turns:
    """Return what searches [B, V, n], the popular list and others offer, in the order of their turns.

    Sources take turns by rank, as often as ``quotas`` says: by default the vector searches twice for each popular
    item. A request without an active taste gets popular items and others alone. ``popular``: [p] for all, or [B, p].
    """
    quotas = quotas or Quotas()
    batch, _, per_taste = found.shape
    used = np.logical_or.reduce(active, axis=0).nonzero()[0].tolist()
    popular = popular[..., :width]
    parts = [found[:, v] for v in used]
    each = [(v, per_taste, quotas.vectors, 0.0) for v in used]
    parts.append(popular if popular.ndim == 2 else popular[None].repeat(batch, axis=0))
    each.append((POPULAR, popular.shape[-1], quotas.popular, 0.5))
    parts += [rows for _, rows, _ in others]
    each += [(code, rows.shape[1], turns, 0.75) for code, rows, turns in others]
    order, sources = _order_of_turns(tuple(each))
    return Turns(np.concatenate(parts, axis=1).take(order, axis=1), sources)


@lru_cache(maxsize=64)
def _order_of_turns(each: tuple[tuple[int, int, float, float], ...]) -> tuple[npt.NDArray[np.intp], I8]:
    """Return in which order columns have their turns, and whose they are then, [M] each.

    ``each``: code of a source, its columns, its turns, and when it begins. Slates ask for a handful of combinations.
    """
    ranks = np.concatenate([np.arange(columns) / turns + begins for _, columns, turns, begins in each])
    sources = np.repeat([code for code, *_ in each], [columns for _, columns, _, _ in each])
    order = np.lexsort((sources, ranks))
    return order, sources[order].astype(np.int8)


def pin(pool: Pool, pinned: I32, refused: Bools, source: int = PINNED) -> None:
    """Put the pinned rows [B, P] that are not refused [B, P] into the pool, instead of its last ones if it is full.

    A request's pinned rows are different ones; what has no place in its pool is left out. What an earlier call pinned
    stays.
    """
    width = pool.rows.shape[1]
    wanted = ~refused
    if wanted.shape[1] > width:
        wanted &= wanted.cumsum(axis=1) <= width
    if not np.count_nonzero(wanted):
        return
    same = pool.rows[:, None, :] == pinned[:, :, None]
    same &= wanted[:, :, None]
    taken = np.logical_or.reduce(same, axis=1)
    missing = wanted & ~np.logical_or.reduce(same, axis=2)
    if np.count_nonzero(missing):
        every, column = np.arange(len(pinned)), np.arange(width)
        # Free places first, from the front; then those of the last candidates.
        worth = np.where(pool.rows < 0, 2 * width - column, column)
        worth[taken | (pool.sources == PINNED)] = -1
        for p in np.flatnonzero(missing.any(axis=0)).tolist():
            best = worth.argmax(axis=1)
            at = np.flatnonzero(missing[:, p] & (worth[every, best] >= 0))
            place = at, best[at]
            pool.rows[place] = pinned[at, p]
            worth[place] = -1
            taken[place] = True
    pool.sources[taken] = source


def places_of(rows: I32, wanted: I32) -> tuple[npt.NDArray[np.int64], Bools]:
    """Return in which column of rows [B, C] each wanted row [B, P] stands, int64 [B, P], and whether it does at all."""
    same = rows[:, None, :] == wanted[:, :, None]
    return same.argmax(axis=2), np.logical_or.reduce(same, axis=2) & (wanted >= 0)


def pinned_first(columns: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], rows: I32, pinned: I32) -> None:
    """Move, in place, the pinned rows [B, P] of each pool, ``rows`` [B, C], to the front of its columns [B, K].

    In their order. ``counts`` [B]: how many columns count; as many do afterwards.
    """
    at, there = places_of(rows, pinned)
    for b, (places, found) in enumerate(zip(at.tolist(), there.tolist(), strict=True)):
        front = list(compress(places, found))
        if front:
            n = int(counts[b])
            front += [column for column in columns[b, :n].tolist() if column not in front]
            columns[b, :n] = front[:n]


def first_of_each(turns: Turns, refused: Bools, width: int) -> Pool:
    """Keep the first occurrence of each row that is not refused [B, M], in their order, at most ``width`` of them.

    So an item that several sources found is of the one whose turn came first. Two sorts of packed (row, column) keys:
    NumPy sorts plain integers many times faster than it argsorts.
    """
    rows = turns.rows
    gone = (rows < 0) | refused
    batch, columns = rows.shape
    if not columns:
        return Pool(np.full((batch, width), -1, np.int32), np.zeros((batch, width), np.int8))
    keys = rows.astype(np.int64)
    keys <<= _COLUMN_BITS
    keys |= np.arange(columns)
    keys[gone] = _LAST
    keys.sort(axis=1)
    row = keys >> _COLUMN_BITS
    out = keys == _LAST
    out[:, 1:] |= row[:, 1:] == row[:, :-1]
    keys &= MAX_COLUMNS - 1
    keys <<= 32
    keys |= row
    keys[out] = _LAST
    keys.sort(axis=1)
    if columns < width:
        keys = np.concatenate([keys, np.full((batch, width - columns), _LAST)], axis=1)
    keys = keys[:, :width]
    return Pool(keys.astype(np.int32), turns.sources.take(keys >> 32, mode="clip"))

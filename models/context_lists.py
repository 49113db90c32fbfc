"""What counts by context say for slates: lists of candidates, how popular an item is there, how much more than overall.

With n decayed actions in a context, c of them on an item, C of all N decayed clicks on that item, a prior of k actions
and w = n / (n + k), an item's popularity in the context, in clicks of the whole, is

    w · N · c / n + (1 − w) · C

the Dirichlet smoothing of Zhai and Lafferty (A study of smoothing methods for language models applied to ad hoc
information retrieval, SIGIR 2001, section 3): a context with few actions says what all say. Several keys: the mean.

Axes as in models/ranking.py; P keys that a request's context has, U items that a leaning knows, L length of its list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from models.candidates import POPULAR_CONTEXT, Popular, Quotas, Source
from models.catalogue import Catalogue
from models.context_popularity import ContextPopularity, Values
from models.counters import CLICKS, ItemCounters
from models.ranking import F32, I32, Bools
from models.surfaces import RecommenderConfig

Counts = tuple[I32, npt.NDArray[np.float64], float]
"""As ContextPopularity.counts gives them."""

LENGTH: Final = 1_000
"""Items of a list at most."""
LIFT_PRIOR: Final = 5.0
"""Actions that an item has besides in a context, expected and observed alike, where its lift is taken."""
MADE_AT_ONCE: Final = 16
"""Leanings made anew for one batch: 0.2 to 0.5 ms each, which slates wait for."""
_KEPT: Final = 512
"""Combinations of values whose leaning is kept until the next refresh: up to 60 KB each."""


@dataclass(frozen=True, slots=True)
class Leaning:
    """What one combination of context values says at one moment.

    ``rows`` int64 [U], rising; ``best`` int32 [≤ L]: the servable ones with clicks or actions, most popular first;
    ``strength`` float32 [U]: as Popular.strength, in this context; ``lift`` float32 [U]: the logarithm of how much more
    the items are acted on here than overall.
    """

    rows: npt.NDArray[np.int64]
    best: I32
    strength: F32
    lift: F32

    @classmethod
    def build(
        cls,
        parts: Sequence[Counts],
        popular: Popular,
        catalogue: Catalogue,
        counters: ItemCounters,
        config: RecommenderConfig,
        now_ms: int,
    ) -> Leaning:
        """Return the leaning of the counts of P values, of which one has any.

        Lift: the mean over P of ln((c + a) / (n · C / N + a)) with a = LIFT_PRIOR actions, a ratio of observed to
        expected counts shrunk towards 1 (DuMouchel, Bayesian data mining in large frequency tables, The American
        Statistician 1999, section 3: a gamma prior on that ratio).
        """
        index = config.popularity_half_life_index
        rows = _union([popular.rows[: popular.counted], *(part[0] for part in parts)])
        clicks = counters.decayed(rows, now_ms, index, CLICKS).astype(np.float64)
        everything = counters.grand_total(CLICKS, index, now_ms)
        observed = np.zeros((len(parts), len(rows)))
        totals = np.array([[total] for _, _, total in parts])
        for part, (own, counts, _) in enumerate(parts):
            observed[part, np.searchsorted(rows, own)] = counts
        weight = totals / (totals + config.popularity_context_prior)
        # A log without clicks has likes or purchases: then their number is the yardstick.
        scale = everything if everything > 0 else float(totals.max())
        smoothed = (weight * scale * observed / np.maximum(totals, 1e-9) + (1 - weight) * clicks).mean(axis=0)
        smoothed[~catalogue.servable(rows, now_ms)] = 0.0
        strength = np.log1p(smoothed)
        strength /= max(float(strength.max(initial=0.0)), 1e-9)
        best = np.lexsort((rows, -smoothed))[:LENGTH]
        best = best[smoothed[best] > 0]
        lift = np.zeros(len(rows))
        if everything > 0:
            lift = np.log((observed + LIFT_PRIOR) / (totals * clicks / everything + LIFT_PRIOR)).mean(axis=0)
        return cls(rows.astype(np.int64), rows[best], strength.astype(np.float32), lift.astype(np.float32))


class BatchLeanings:
    """Leanings of the requests of one batch, None where a context says nothing."""

    def __init__(self, each: Sequence[Leaning | None]) -> None:
        self._each = each
        numbers: dict[int, int] = {}
        different: list[Leaning] = []
        members, own = [], []
        for b, leaning in enumerate(each):
            if leaning is None:
                continue
            n = numbers.setdefault(id(leaning), len(different))
            if n == len(different):
                different.append(leaning)
            members.append(b)
            own.append(n)
        self._at: npt.NDArray[np.int64] | slice = slice(None)
        if len(members) < len(each):
            self._at = np.array(members, np.int64)
        self._begins = np.array(own, np.int64)[:, None] << 32
        # As a rule there is one leaning, whose arrays do as they are.
        if len(different) == 1:
            (one,) = different
            self._keys, self._strength, self._lift = one.rows, one.strength, one.lift
        else:
            self._keys = np.concatenate([(n << 32) | one.rows for n, one in enumerate(different)])
            self._strength = np.concatenate([one.strength for one in different])
            self._lift = np.concatenate([one.lift for one in different])

    def popular(self, active: Bools, popular: Popular) -> I32:
        """Return the overall list, without what was clicked for requests where the context's list is used instead.

        That is where a request has no taste, ``active`` bool [B, V]; the newest items are left to it. int32 [B, p], or
        [p] where the whole list is for all.
        """
        replaced = self._replaced(active)
        if not np.count_nonzero(replaced):
            return popular.rows
        rows = popular.rows[None].repeat(len(active), axis=0)
        rows[replaced, : popular.counted] = -1
        return rows

    def sources(self, active: Bools, quotas: Quotas, width: int) -> list[Source]:
        """Return the candidates of each request's context, by their quota or, without a taste, in place of popular."""
        rows = np.full((len(self._each), width), -1, np.int32)
        for b, leaning in enumerate(self._each):
            if leaning is not None:
                rows[b, : len(leaning.best)] = leaning.best[:width]
        replaced, found = self._replaced(active)[:, None], list[Source]()
        count = np.count_nonzero(replaced)
        if count:
            own = rows if count == len(rows) else np.where(replaced, rows, -1)
            found.append((POPULAR_CONTEXT, own, quotas.popular))
        if count < len(rows):
            few = rows[:, : math.ceil(width * min(1.0, quotas.popular_context))]
            few = np.where(replaced, -1, few) if count else few
            found.append((POPULAR_CONTEXT, few, quotas.popular_context))
        return found

    def _replaced(self, active: Bools) -> Bools:
        replaced = np.zeros(len(active), np.bool_)
        replaced[self._at] = ~np.logical_or.reduce(active[self._at], axis=1)
        return replaced

    def read(self, rows: I32, popular: Popular) -> tuple[F32, F32]:
        """Return strength and lift of rows [B, C], each request's in its own context, float32 [B, C].

        What a leaning does not know is as popular as it is for all, and has no lift: 0.
        """
        strength, lift = popular.strength_of(rows), np.zeros(rows.shape, np.float32)
        keys = self._begins + rows[self._at]
        place = self._keys.searchsorted(keys)
        # Behind the last key stands the last one.
        known = self._keys.take(place, mode="clip") == keys
        strength[self._at] = np.where(known, self._strength.take(place, mode="clip"), strength[self._at])
        lift[self._at] = np.where(known, self._lift.take(place, mode="clip"), np.float32(0))
        return strength, lift


class ContextLists:
    """Leanings by combination of values, each made when it is first asked for after a refresh.

    Of one batch at most MADE_AT_ONCE that were made before are made anew; those beyond wait for the next batch.
    """

    def __init__(self, contexts: ContextPopularity, catalogue: Catalogue, counters: ItemCounters) -> None:
        self._contexts, self._catalogue, self._counters = contexts, catalogue, counters
        self._made: dict[Values, Leaning | None] = {}
        self._old: dict[Values, Leaning | None] = {}
        self._waiting: dict[Values, Leaning | None] = {}
        self._counts: dict[tuple[int, int], Counts] = {}

    def forget(self) -> None:
        """Make all anew."""
        self._old = self._waiting | self._made
        self._made, self._waiting = {}, {}
        self._counts.clear()

    def of(
        self, each: Sequence[Values], popular: Popular, config: RecommenderConfig, now_ms: int
    ) -> BatchLeanings | None:
        """Return the leanings of requests with these values; None where no context says anything."""
        left = MADE_AT_ONCE
        for values in dict.fromkeys(each):
            if values in self._made or not any(values):
                continue
            if left <= 0 and values in self._old:
                self._waiting[values] = self._old[values]
                continue
            self._made[values] = self._make(values, popular, config, now_ms)
            left -= 1
        found = [self._made.get(values, self._waiting.get(values)) for values in each]
        if len(self._made) > _KEPT:
            self.forget()
        return BatchLeanings(found) if any(leaning is not None for leaning in found) else None

    def _make(self, values: Values, popular: Popular, config: RecommenderConfig, now_ms: int) -> Leaning | None:
        parts = [self._part(key, value, now_ms) for key, value in enumerate(values) if value]
        if not any(len(rows) for rows, _, _ in parts):
            return None
        return Leaning.build(parts, popular, self._catalogue, self._counters, config, now_ms)

    def _part(self, key: int, value: int, now_ms: int) -> Counts:
        found = self._counts.get((key, value))
        if found is None:
            if len(self._counts) >= _KEPT:
                self._counts.clear()
            found = self._counts[key, value] = self._contexts.counts(key, value, now_ms)
        return found


def _union(parts: Sequence[I32]) -> I32:
    """Return the different rows of all parts, rising; for a few thousand twice as fast as np.unique."""
    rows = np.sort(np.concatenate(parts))
    kept = np.ones(len(rows), np.bool_)
    kept[1:] = rows[1:] != rows[:-1]
    return rows[kept]

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

from models.candidates import POPULAR_CONTEXT, Popular, Source
from models.catalogue import Catalogue
from models.context_popularity import ContextPopularity, Values
from models.counters import CLICKS, ItemCounters
from models.ranking import F32, I32, Bools
from models.surfaces import RecommenderConfig

F64 = npt.NDArray[np.float64]

LENGTH: Final = 1_000
"""Items of a list at most."""
LIFT_PRIOR: Final = 5.0
"""Actions that an item has besides in a context, expected and observed alike, where its lift is taken."""
_KEPT: Final = 256
"""Combinations of values whose leaning is kept until the next refresh: up to 40 KB each."""


@dataclass(frozen=True, slots=True)
class Leaning:
    """What one combination of context values says at one moment.

    ``rows`` int32 [U], rising; ``best`` int32 [≤ L], the servable ones with clicks or actions, most popular first;
    ``strength`` float32 [U]: as Popular.strength, in this context; ``observed`` float64 [P, U]: actions on each item,
    ``totals`` [P]: on all; ``everything``: clicks of all contexts on all items.
    """

    rows: I32
    best: I32
    strength: F32
    observed: F64
    totals: F64
    everything: float

    @classmethod
    def build(
        cls,
        parts: Sequence[tuple[I32, F64, float]],
        popular: Popular,
        catalogue: Catalogue,
        counters: ItemCounters,
        config: RecommenderConfig,
        now_ms: int,
    ) -> Leaning:
        """Return the leaning of the counts of P values (ContextPopularity.counts), of which one has any."""
        index = config.popularity_half_life_index
        rows = np.unique(np.concatenate([popular.rows[: popular.counted], *(part[0] for part in parts)]))
        clicks = counters.read(rows, now_ms)[:, index, CLICKS].astype(np.float64)
        everything = counters.grand_total(CLICKS, index, now_ms)
        observed = np.zeros((len(parts), len(rows)))
        totals = np.array([total for _, _, total in parts])
        for part, (own, counts, _) in enumerate(parts):
            observed[part, np.searchsorted(rows, own)] = counts
        share = observed / np.maximum(totals, 1e-9)[:, None]
        weight = (totals / (totals + config.popularity_context_prior))[:, None]
        # A log without clicks has likes or purchases: then their number is the yardstick.
        scale = everything if everything > 0 else float(totals.max())
        smoothed = (weight * scale * share + (1 - weight) * clicks).mean(axis=0)
        smoothed[~catalogue.servable(rows, now_ms)] = 0.0
        strength = np.log1p(smoothed)
        strength /= max(float(strength.max(initial=0.0)), 1e-9)
        best = np.lexsort((rows, -smoothed))[:LENGTH]
        best = best[smoothed[best] > 0]
        return cls(rows, rows[best], strength.astype(np.float32), observed, totals, everything)

    def strength_of(self, rows: I32, popular: Popular) -> F32:
        """Return how popular rows of any shape are here, float32 of their shape: 1 for the most popular one.

        What the leaning does not know is as popular as it is for all.
        """
        place, known = self._places(rows)
        return np.where(known, self.strength[place], popular.strength_of(rows)).astype(np.float32, copy=False)

    def lift_of(self, rows: I32, clicks: F32) -> F32:
        """Return by how much more rows [C] are acted on here than their ``clicks`` [C] over all say, float32 [C].

        The mean over P of ln((observed + a) / (expected + a)): with a = LIFT_PRIOR actions, a ratio of counts shrunk
        towards 1 (DuMouchel, Bayesian data mining in large frequency tables, The American Statistician 1999, section 3:
        a gamma prior on the ratio of observed to expected).
        """
        if self.everything <= 0:
            return np.zeros(rows.shape, np.float32)
        place, known = self._places(rows)
        observed = np.where(known, self.observed[:, place], 0.0)
        expected = self.totals[:, None] * (clicks / self.everything)
        return np.asarray(np.log((observed + LIFT_PRIOR) / (expected + LIFT_PRIOR)).mean(axis=0), np.float32)

    def _places(self, rows: I32) -> tuple[npt.NDArray[np.intp], Bools]:
        place = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        known: Bools = self.rows[place] == rows
        return place, known


class BatchLeanings:
    """Leanings of the requests of one batch, None where a context says nothing."""

    def __init__(self, each: Sequence[Leaning | None]) -> None:
        self._each = each
        self._members: dict[int, list[int]] = {}
        for b, leaning in enumerate(each):
            if leaning is not None:
                self._members.setdefault(id(leaning), []).append(b)

    def sources(self, active: Bools, turns: float, width: int) -> list[Source]:
        """Return the candidates of each request's context, which has ``turns``.

        A request without any taste (``active`` bool [B, V]) gets them before all others, as many as it can use.
        """
        rows = np.full((len(self._each), width), -1, np.int32)
        for b, leaning in enumerate(self._each):
            if leaning is not None:
                rows[b, : len(leaning.best)] = leaning.best[:width]
        cold, found = ~np.any(active, axis=1, keepdims=True), list[Source]()
        if cold.any():
            found.append((POPULAR_CONTEXT, np.where(cold, rows, -1), math.inf))
        if not cold.all():
            few = rows[:, : math.ceil(width * min(1.0, turns))]
            found.append((POPULAR_CONTEXT, np.where(cold, -1, few), turns))
        return found

    def strength(self, rows: I32, popular: Popular) -> F32:
        """Return the strength of rows [B, C], each request's in its context, float32 [B, C]."""
        found = popular.strength_of(rows)
        for members in self._members.values():
            found[members] = self._leaning(members).strength_of(rows[members], popular)
        return found

    def lift(self, rows: I32, clicks: F32) -> F32:
        """Return the lift of rows [B, C] with ``clicks`` [B, C], float32 [B, C]; 0 where the context says nothing."""
        found = np.zeros(rows.shape, np.float32)
        for b, leaning in enumerate(self._each):
            if leaning is not None:
                found[b] = leaning.lift_of(rows[b], clicks[b])
        return found

    def _leaning(self, members: list[int]) -> Leaning:
        leaning = self._each[members[0]]
        if leaning is None:
            raise TypeError("a request without a leaning is no member of one")
        return leaning


class ContextLists:
    """Leanings by combination of values, each made when it is first asked for after a refresh."""

    def __init__(self, contexts: ContextPopularity, catalogue: Catalogue, counters: ItemCounters) -> None:
        self._contexts, self._catalogue, self._counters = contexts, catalogue, counters
        self._made: dict[Values, Leaning | None] = {}

    def forget(self) -> None:
        """Make all anew."""
        self._made.clear()

    def of(
        self, each: Sequence[Values], popular: Popular, config: RecommenderConfig, now_ms: int
    ) -> BatchLeanings | None:
        """Return the leanings of requests with these values; None where no context says anything."""
        found = [self._one(values, popular, config, now_ms) if any(values) else None for values in each]
        return BatchLeanings(found) if any(leaning is not None for leaning in found) else None

    def _one(self, values: Values, popular: Popular, config: RecommenderConfig, now_ms: int) -> Leaning | None:
        if values not in self._made:
            if len(self._made) >= _KEPT:
                self._made.clear()
            parts = [self._contexts.counts(key, value, now_ms) for key, value in enumerate(values) if value]
            made = None
            if any(len(rows) for rows, _, _ in parts):
                made = Leaning.build(parts, popular, self._catalogue, self._counters, config, now_ms)
            self._made[values] = made
        return self._made[values]

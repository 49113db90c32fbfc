"""Winners to the items of a slate: id, source and a reason in one plain sentence.

Axes as in models/ranking.py, K positions of a slate, N items that a reason names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

from models.candidates import (
    CO_CLICK,
    FRESH,
    GIVEN,
    PINNED,
    POPULAR,
    POPULAR_CONTEXT,
    SOURCES,
    TREND,
    TREND_OF_CATEGORY,
)
from models.catalogue import Catalogue
from models.columns import at_columns
from models.events import ACTIONS, Reason, RecommendedItem
from models.ranking import F32, I32, LONG_TERM, PROFILE, QUERY, SHORT_TERM, Bools
from models.reason_texts import TEXTS, Language

BECAUSE_CLICKED: Final = "because_clicked"
TRENDING: Final = "trending"
NEW: Final = "new"
LIKE_PROFILE: Final = "like_profile"
MATCHES_QUERY: Final = "matches_query"
EXPLORATION: Final = "exploration"
PICKED: Final = "pinned"
KINDS: Final = (BECAUSE_CLICKED, TRENDING, NEW, LIKE_PROFILE, MATCHES_QUERY, EXPLORATION, PICKED)
TITLE_CHARACTERS: Final = 80
MOST_NAMED: Final = 3
"""Items that one reason names at most."""
LEAST_WEIGHT: Final = 0.1
"""Attention below which no item is named: where the model cannot tell, 16 items and "nothing" have 0.06 each."""
SHARE_OF_HIGHEST: Final = 0.5
"""Attention that a named item has at least, of that of the item which the model looked at most."""

_LIKED_SOURCES: Final = frozenset((SHORT_TERM, LONG_TERM, GIVEN, FRESH, CO_CLICK))
"""Sources of which being near a liked item says more than they do themselves."""


@dataclass(slots=True)
class Winners:
    """The chosen items of a batch, best first.

    ``rows`` int32 [B, K], ``counts`` int64 [B] (how many of the K there are), ``sources`` int8 [B, K], ``scores`` and
    ``ctr`` float32 [B, K], ``trending`` bool [B, K] (has decayed clicks), ``named`` int32 [B, K, N]: rows of the items
    that the user liked and that speak for this one, the strongest first, -1 where there is none, ``actions`` uint8
    [B, K]: code of what the user did with the first, ``asked`` int8 [B]: taste that speaks for items without one, -1
    for none. ``propensities`` float32 [B, K]: probability of the item in its slot where the slot was drawn, NaN where
    it was not; None: nothing was drawn.
    """

    rows: I32
    counts: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int8]
    scores: F32
    ctr: F32
    trending: Bools
    named: I32
    actions: npt.NDArray[np.uint8]
    asked: npt.NDArray[np.int8]
    propensities: F32 | None = None


def nearest_liked(winner_vectors: F32, liked_vectors: F32, known: Bools, least: float) -> npt.NDArray[np.int64]:
    """Return for each winner the place of the nearest item that its user liked, int64 [B, K, 1], -1 for none.

    ``winner_vectors`` float32 [B, K, D], ``liked_vectors`` float32 [B, R, D], ``known`` bool [B, R]. A similarity
    below ``least`` is no reason; of equal ones, the first place counts (the newest action).
    """
    if not known.any():
        return np.full((*winner_vectors.shape[:2], 1), -1, np.int64)
    near = np.matmul(winner_vectors, liked_vectors.transpose(0, 2, 1))
    near = np.where(known[:, None, :], near, np.float32(-np.inf))
    best = np.where(near.max(axis=2) >= least, near.argmax(axis=2), -1)
    return best[:, :, None]


def looked_at(
    weights: F32, winner_vectors: F32, liked_vectors: F32, known: Bools, least: float
) -> npt.NDArray[np.int64]:
    """Return for each winner the places of the liked items that the model looked at, int64 [B, K, N], -1 for none.

    ``weights`` float32 [B, K, R]: its attention to all recent items, those that nobody may name included; the rest as
    for ``nearest_liked``. Named are at most MOST_NAMED, by weight: those with LEAST_WEIGHT and SHARE_OF_HIGHEST. The
    model may look at an item in order to avoid what is like it: a similarity below ``least`` is no reason here either.
    """
    if not np.count_nonzero(known):
        return np.full((*winner_vectors.shape[:2], 1), -1, np.int64)
    highest = np.maximum.reduce(weights, axis=2, keepdims=True)
    speaks = known[:, None, :] & (weights >= np.maximum(highest * np.float32(SHARE_OF_HIGHEST), LEAST_WEIGHT))
    speaks &= np.matmul(winner_vectors, liked_vectors.transpose(0, 2, 1)) >= least
    speaks = speaks.reshape(-1, speaks.shape[2])
    named = np.full((len(speaks), min(MOST_NAMED, speaks.shape[1])), -1, np.int64)
    # For few winners an item speaks: the weights of the others need no order.
    (few,) = np.logical_or.reduce(speaks, axis=1).nonzero()
    flat = np.where(speaks.take(few, axis=0), weights.reshape(speaks.shape).take(few, axis=0), np.float32(0))
    best = (-flat).argsort(axis=1, kind="stable")[:, :MOST_NAMED]
    named[few] = np.where(at_columns(flat, best) > 0, best, -1)
    return named.reshape(*weights.shape[:2], named.shape[1])


def assemble(winners: Winners, catalogue: Catalogue, languages: Sequence[Language]) -> list[list[RecommendedItem]]:
    """Return the items of each slate, positions from 1; propensity None in a slot that was not drawn.

    ``languages`` [B]: of the reasons.
    """
    item_id = catalogue.index.item_id
    by_language = {language: Reasons(catalogue, language) for language in dict.fromkeys(languages)}
    counts = winners.counts.tolist()
    asked = winners.asked.tolist()
    columns = zip(
        winners.rows.tolist(),
        winners.sources.tolist(),
        winners.scores.tolist(),
        winners.ctr.tolist(),
        winners.trending.tolist(),
        winners.named.tolist(),
        winners.actions.tolist(),
        strict=True,
    )
    drawn = winners.propensities.tolist() if winners.propensities is not None else None
    slates: list[list[RecommendedItem]] = []
    for b, (rows, sources, scores, ctrs, trending, named, actions) in enumerate(columns):
        slate = []
        reasons = by_language[languages[b]]
        chances = drawn[b] if drawn is not None else None
        each = zip(rows[: counts[b]], sources, scores, ctrs, trending, named, actions, strict=False)
        for position, (row, source, score, ctr, trends, likes, action) in enumerate(each, 1):
            chance = chances[position - 1] if chances is not None else None
            if chance is not None and chance != chance:
                chance = None
            if chance is not None:
                reason = reasons.drawn_new if source == FRESH else reasons.drawn
            # A popular item that nobody clicked yet is there for being new: being near says more.
            elif likes[0] >= 0 and (source in _LIKED_SOURCES or (source == POPULAR and not trends)):
                reason = reasons.because_clicked(tuple(likes), action)
            elif source == TREND_OF_CATEGORY:
                reason = reasons.of_category(row)
            else:
                reason = reasons.plain(source, trends, asked[b])
            slate.append(RecommendedItem(item_id(row), position, score, ctr, SOURCES[source], chance, reason))
        slates.append(slate)
    return slates


class Reasons:
    """Makes the reasons of one batch; the same object for the same answer."""

    def __init__(self, catalogue: Catalogue, language: Language) -> None:
        self._texts, self._fixed = TEXTS[language], _fixed(language)
        self._catalogue = catalogue
        self._known: dict[tuple[tuple[int, ...], int], Reason] = {}
        self._categories: dict[str, Reason] = {}
        self.drawn, self.drawn_new = self._fixed.drawn, self._fixed.drawn_new

    def because_clicked(self, rows: tuple[int, ...], action: int) -> Reason:
        """Return the reason that names items that the user liked; the sentence is of the first, by title if known.

        ``rows``: the strongest first, -1 for none. ``action``: code of what the user did with the first, as rows of
        users keep it.
        """
        reason = self._known.get((rows, action))
        if reason is None:
            item = self._catalogue.item(rows[0])
            title = item.title.strip() if item is not None else ""
            if len(title) > TITLE_CHARACTERS:
                title = title[: TITLE_CHARACTERS - 1].rstrip() + "…"
            verbs = self._texts.verbs
            name = ACTIONS[action - 1] if 0 < action <= len(ACTIONS) else ACTIONS[0]
            template = self._texts.because if title else self._texts.because_untitled
            text = template.format(verb=verbs.get(name, verbs[ACTIONS[0]]), title=title)
            item_ids = [self._catalogue.index.item_id(row) for row in rows if row >= 0]
            reason = Reason(kind=BECAUSE_CLICKED, text=text, item_ids=item_ids)
            self._known[rows, action] = reason
        return reason

    def of_category(self, row: int) -> Reason:
        """Return the reason of an item that trends in its first category."""
        item = self._catalogue.item(row)
        category = (item.categories or [""])[0] if item is not None else ""
        if not category:
            return self._fixed.trending
        reason = self._categories.get(category)
        if reason is None:
            text = self._texts.trending_category.format(category=category)
            reason = self._categories[category] = Reason(kind=TRENDING, text=text)
        return reason

    def plain(self, source: int, is_trending: bool, asked: int) -> Reason:
        """Return the reason of an item that no clicked item explains."""
        fixed = self._fixed
        reason = fixed.by_source.get(asked if source == GIVEN else source)
        if reason is not None:
            return reason
        if is_trending:
            return fixed.trending
        return fixed.newest if source == POPULAR else fixed.chosen


@dataclass(frozen=True, slots=True)
class _Fixed:
    """The reasons that speak of no item: the same objects in all slates of a language."""

    drawn: Reason
    drawn_new: Reason
    trending: Reason
    newest: Reason
    chosen: Reason
    by_source: Mapping[int, Reason]


@cache
def _fixed(language: Language) -> _Fixed:
    texts = TEXTS[language]
    trending, newest = Reason(kind=TRENDING, text=texts.trending), Reason(kind=NEW, text=texts.newest)
    recent = Reason(kind=BECAUSE_CLICKED, text=texts.recent)
    by_source = {
        SHORT_TERM: recent,
        LONG_TERM: recent,
        PROFILE: Reason(kind=LIKE_PROFILE, text=texts.profile),
        QUERY: Reason(kind=MATCHES_QUERY, text=texts.query),
        PINNED: Reason(kind=PICKED, text=texts.pinned),
        FRESH: newest,
        TREND: trending,
        POPULAR_CONTEXT: trending,
        CO_CLICK: Reason(kind=BECAUSE_CLICKED, text=texts.co_click),
    }
    return _Fixed(
        drawn=Reason(kind=EXPLORATION, text=texts.drawn),
        drawn_new=Reason(kind=EXPLORATION, text=texts.drawn_new),
        trending=trending,
        newest=newest,
        chosen=Reason(kind=TRENDING, text=texts.chosen),
        by_source=by_source,
    )

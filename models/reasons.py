"""Winners to the items of a slate: id, source and a reason in one plain sentence.

Axes as in models/ranking.py, K positions of a slate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from models.candidates import FRESH, GIVEN, PINNED, POPULAR, SOURCES, TREND, TREND_OF_CATEGORY
from models.catalogue import Catalogue
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

_LIKED_SOURCES: Final = frozenset((SHORT_TERM, LONG_TERM, GIVEN, FRESH))
"""Sources of which being near a liked item says more than they do themselves."""


@dataclass(slots=True)
class Winners:
    """The chosen items of a batch, best first.

    ``rows`` int32 [B, K], ``counts`` int64 [B] (how many of the K there are), ``sources`` int8 [B, K], ``scores`` and
    ``ctr`` float32 [B, K], ``trending`` bool [B, K] (has decayed clicks), ``nearest`` int32 [B, K]: row of the
    nearest item that the user liked, -1 where none is near, ``actions`` uint8 [B, K]: code of what the user did with
    it, ``asked`` int8 [B]: taste that speaks for items without a nearest one, -1 for none. ``propensities`` float32
    [B, K]: probability of the item in its slot where the slot was drawn, NaN where it was not; None: nothing was drawn.
    """

    rows: I32
    counts: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int8]
    scores: F32
    ctr: F32
    trending: Bools
    nearest: I32
    actions: npt.NDArray[np.uint8]
    asked: npt.NDArray[np.int8]
    propensities: F32 | None = None


def nearest_liked(winner_vectors: F32, liked_vectors: F32, known: Bools, least: float) -> npt.NDArray[np.int64]:
    """Return for each winner the place of the nearest item that its user liked, int64 [B, K], -1 for none.

    ``winner_vectors`` float32 [B, K, D], ``liked_vectors`` float32 [B, R, D], ``known`` bool [B, R]. A similarity
    below ``least`` is no reason; of equal ones, the first place counts (the newest action).
    """
    if not known.any():
        return np.full(winner_vectors.shape[:2], -1, np.int64)
    near = np.matmul(winner_vectors, liked_vectors.transpose(0, 2, 1))
    near = np.where(known[:, None, :], near, np.float32(-np.inf))
    best = near.argmax(axis=2)
    value = np.take_along_axis(near, best[:, :, None], axis=2)[:, :, 0]
    return np.where(value >= least, best, -1)


def assemble(winners: Winners, catalogue: Catalogue, language: Language = "en") -> list[list[RecommendedItem]]:
    """Return the items of each slate, positions from 1; propensity None in a slot that was not drawn."""
    item_id = catalogue.index.item_id
    reasons = Reasons(catalogue, language)
    counts = winners.counts.tolist()
    asked = winners.asked.tolist()
    columns = zip(
        winners.rows.tolist(),
        winners.sources.tolist(),
        winners.scores.tolist(),
        winners.ctr.tolist(),
        winners.trending.tolist(),
        winners.nearest.tolist(),
        winners.actions.tolist(),
        strict=True,
    )
    drawn = winners.propensities.tolist() if winners.propensities is not None else None
    slates: list[list[RecommendedItem]] = []
    for b, (rows, sources, scores, ctrs, trending, nearest, actions) in enumerate(columns):
        slate = []
        chances = drawn[b] if drawn is not None else None
        for i in range(counts[b]):
            source, near, chance = sources[i], nearest[i], None
            if chances is not None and chances[i] == chances[i]:
                chance = chances[i]
                reason = reasons.drawn_new if source == FRESH else reasons.drawn
            # A popular item that nobody clicked yet is there for being new: being near says more.
            elif near >= 0 and (source in _LIKED_SOURCES or (source == POPULAR and not trending[i])):
                reason = reasons.because_clicked(near, actions[i])
            elif source == TREND_OF_CATEGORY:
                reason = reasons.of_category(rows[i])
            else:
                reason = reasons.plain(source, trending[i], asked[b])
            slate.append(RecommendedItem(item_id(rows[i]), i + 1, scores[i], ctrs[i], SOURCES[source], chance, reason))
        slates.append(slate)
    return slates


class Reasons:
    """Makes the reasons of one batch; the same object for the same answer."""

    def __init__(self, catalogue: Catalogue, language: Language) -> None:
        texts = self._texts = TEXTS[language]
        self._catalogue = catalogue
        self._known: dict[tuple[int, int], Reason] = {}
        self._categories: dict[str, Reason] = {}
        self.drawn = Reason(kind=EXPLORATION, text=texts.drawn)
        self.drawn_new = Reason(kind=EXPLORATION, text=texts.drawn_new)
        self._trending = Reason(kind=TRENDING, text=texts.trending)
        self._newest = Reason(kind=NEW, text=texts.newest)
        self._chosen = Reason(kind=TRENDING, text=texts.chosen)
        recent = Reason(kind=BECAUSE_CLICKED, text=texts.recent)
        self._by_source = {
            SHORT_TERM: recent,
            LONG_TERM: recent,
            PROFILE: Reason(kind=LIKE_PROFILE, text=texts.profile),
            QUERY: Reason(kind=MATCHES_QUERY, text=texts.query),
            PINNED: Reason(kind=PICKED, text=texts.pinned),
            FRESH: self._newest,
            TREND: self._trending,
        }

    def because_clicked(self, row: int, action: int) -> Reason:
        """Return the reason that names an item that the user liked, with its title where that is known.

        ``action``: code of what the user did with it, as rows keep it.
        """
        reason = self._known.get((row, action))
        if reason is None:
            item = self._catalogue.item(row)
            title = item.title.strip() if item is not None else ""
            if len(title) > TITLE_CHARACTERS:
                title = title[: TITLE_CHARACTERS - 1].rstrip() + "…"
            verbs = self._texts.verbs
            name = ACTIONS[action - 1] if 0 < action <= len(ACTIONS) else ACTIONS[0]
            template = self._texts.because if title else self._texts.because_untitled
            text = template.format(verb=verbs.get(name, verbs[ACTIONS[0]]), title=title)
            reason = Reason(kind=BECAUSE_CLICKED, text=text, item_ids=[self._catalogue.index.item_id(row)])
            self._known[row, action] = reason
        return reason

    def of_category(self, row: int) -> Reason:
        """Return the reason of an item that trends in its first category."""
        item = self._catalogue.item(row)
        category = (item.categories or [""])[0] if item is not None else ""
        if not category:
            return self._trending
        reason = self._categories.get(category)
        if reason is None:
            text = self._texts.trending_category.format(category=category)
            reason = self._categories[category] = Reason(kind=TRENDING, text=text)
        return reason

    def plain(self, source: int, is_trending: bool, asked: int) -> Reason:
        """Return the reason of an item that no clicked item explains."""
        reason = self._by_source.get(asked if source == GIVEN else source)
        if reason is not None:
            return reason
        if is_trending:
            return self._trending
        return self._newest if source == POPULAR else self._chosen

"""Winners to the items of a slate: id, source and a reason in plain English.

Axes as in models/ranking.py, K positions of a slate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from models.candidates import FRESH, GIVEN, PINNED, POPULAR, SOURCES
from models.catalogue import Catalogue
from models.events import ACTIONS, Reason, RecommendedItem
from models.ranking import F32, I32, LONG_TERM, PROFILE, QUERY, SHORT_TERM, Bools

BECAUSE_CLICKED: Final = "because_clicked"
TRENDING: Final = "trending"
LIKE_PROFILE: Final = "like_profile"
MATCHES_QUERY: Final = "matches_query"
EXPLORATION: Final = "exploration"
PINNED_BY_US: Final = "pinned"
KINDS: Final = (BECAUSE_CLICKED, TRENDING, LIKE_PROFILE, MATCHES_QUERY, EXPLORATION, PINNED_BY_US)
TITLE_CHARACTERS: Final = 80

_TRENDING = Reason(kind=TRENDING, text="Popular at the moment")
_NEWEST = Reason(kind=TRENDING, text="Among the newest items")
_CHOSEN = Reason(kind=TRENDING, text="The best known of the items asked for")
_PROFILE = Reason(kind=LIKE_PROFILE, text="Fits your profile")
_DRAWN = Reason(kind=EXPLORATION, text="Drawn at random, to learn what you like")
_NEW = Reason(kind=EXPLORATION, text="New here: shown to learn who likes it")
_PINNED = Reason(kind=PINNED_BY_US, text="Picked for this page")
_QUERY = Reason(kind=MATCHES_QUERY, text="Matches your search")
_RECENT = Reason(kind=BECAUSE_CLICKED, text="Like what you clicked before")
_LIKED_SOURCES: Final = frozenset((SHORT_TERM, LONG_TERM, GIVEN))
_VERBS: Final[dict[str, str]] = {
    "like": "liked",
    "share": "shared",
    "purchase": "bought",
    "rating": "rated",
    "dwell": "spent time on",
}


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


def assemble(winners: Winners, catalogue: Catalogue) -> list[list[RecommendedItem]]:
    """Return the items of each slate, positions from 1; propensity None in a slot that was not drawn."""
    item_id = catalogue.index.item_id
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
    known: dict[tuple[int, int], Reason] = {}
    slates: list[list[RecommendedItem]] = []
    for b, (rows, sources, scores, ctrs, trending, nearest, actions) in enumerate(columns):
        slate = []
        chances = drawn[b] if drawn is not None else None
        for i in range(counts[b]):
            source, near = sources[i], nearest[i]
            if chances is not None and chances[i] == chances[i]:
                why = _NEW if source == FRESH else _DRAWN
                slate.append(
                    RecommendedItem(item_id(rows[i]), i + 1, scores[i], ctrs[i], SOURCES[source], chances[i], why)
                )
                continue
            # A popular item that nobody clicked yet is there for being new: being near says more.
            if near >= 0 and (source in _LIKED_SOURCES or (source == POPULAR and not trending[i])):
                reason = known.get((near, actions[i]))
                if reason is None:
                    reason = known[near, actions[i]] = because_clicked(catalogue, near, actions[i])
            else:
                reason = plain_reason(source, trending[i], asked[b])
            slate.append(RecommendedItem(item_id(rows[i]), i + 1, scores[i], ctrs[i], SOURCES[source], None, reason))
        slates.append(slate)
    return slates


def because_clicked(catalogue: Catalogue, row: int, action: int) -> Reason:
    """Return the reason that names an item that the user liked, with its title where that is known.

    ``action``: code of what the user did with it, as rows keep it.
    """
    item = catalogue.item(row)
    title = item.title.strip() if item is not None else ""
    if len(title) > TITLE_CHARACTERS:
        title = title[: TITLE_CHARACTERS - 1].rstrip() + "…"
    verb = _VERBS.get(ACTIONS[action - 1]) if 0 < action <= len(ACTIONS) else None
    text = f"Because you {verb or 'clicked'} {f'“{title}”' if title else 'an item like it'}"
    return Reason(kind=BECAUSE_CLICKED, text=text, item_ids=[catalogue.index.item_id(row)])


def plain_reason(source: int, is_trending: bool, asked: int) -> Reason:
    """Return the reason of an item that no clicked item explains. The same object for the same answer."""
    speaks = asked if source == GIVEN else source
    if speaks == PINNED:
        return _PINNED
    if speaks == QUERY:
        return _QUERY
    if speaks == PROFILE:
        return _PROFILE
    if speaks in (SHORT_TERM, LONG_TERM):
        return _RECENT
    if is_trending:
        return _TRENDING
    return _NEWEST if source == POPULAR else _CHOSEN

"""Degraded slates, for when ranking fails: from the list of popular items alone, in plain Python.

Shares no code with the recommender: no vectors, no index, no counters. What broke it shall not break this.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from models.candidates import GIVEN, POPULAR, SOURCES, Popular
from models.catalogue import Catalogue
from models.events import MAX_K, Reason, RecommendedItem
from models.hashing import hash64
from models.ranking import UNWANTED_ACTIONS, UserReader, UserRows
from models.reason_texts import TEXTS
from models.reasons import NEW, TRENDING
from models.rules import plainly_servable
from models.slates import SlateRequest
from models.surfaces import RecommenderConfig, SurfaceConfig
from models.user_row import ACTION_MASK, NEGATIVE


def popular_slates(
    requests: Sequence[SlateRequest],
    hidden: Sequence[Set[int]],
    popular: Popular,
    catalogue: Catalogue,
    config: RecommenderConfig,
    now_ms: int,
) -> list[list[RecommendedItem]]:
    """Return the items of one slate for each request, fewer than k under a narrow filter.

    ``hidden``: of each request, the hashes of items that its user hid or disliked.
    """
    best = popular.rows.tolist()
    place = {row: i for i, row in enumerate(best)}
    slates = []
    for request, hashes in zip(requests, hidden, strict=True):
        pool = best
        if request.candidates is not None:
            asked = {catalogue.index.row(item_id) for item_id in request.candidates}
            pool = sorted(asked, key=lambda row: (place.get(row, len(best)), row))
        surface = config.surface(request.surface, request.arm)
        k = items_wanted(request, surface)
        excluded = frozenset(request.exclude)
        items: list[RecommendedItem] = []
        for row in pool:
            if len(items) == k:
                break
            if not plainly_servable(catalogue, row, now_ms, request.filters, surface.rules):
                continue
            item_id = catalogue.index.item_id(row)
            if item_id in excluded or (hashes and hash64(item_id) in hashes):
                continue
            items.append(_item(item_id, row, place.get(row), len(items) + 1, request, popular, config))
        slates.append(items)
    return slates


def items_wanted(request: SlateRequest, surface: SurfaceConfig) -> int:
    """Return how many items a request wants, as it says or its surface does."""
    return max(0, min(surface.k if request.k is None else request.k, MAX_K))


def hidden_hashes(users: UserReader, rows: UserRows, requests: Sequence[SlateRequest]) -> list[frozenset[int]]:
    """Return for each request the hashes of items that its user hid or disliked."""
    hashes, codes, _ = users.recent(rows)
    return [
        frozenset(
            h
            for h, c in zip(hashes[r.row].tolist(), codes[r.row].tolist(), strict=True)
            if c & ACTION_MASK in UNWANTED_ACTIONS or c & NEGATIVE
        )
        for r in requests
    ]


def _item(
    item_id: str,
    row: int,
    place: int | None,
    position: int,
    request: SlateRequest,
    popular: Popular,
    config: RecommenderConfig,
) -> RecommendedItem:
    texts = TEXTS[config.surface(request.surface, request.arm).reason_language]
    clicked = place is not None and place < popular.counted
    return RecommendedItem(
        item_id=item_id,
        position=position,
        score=float(popular.strength[row]) if place is not None else 0.0,
        ctr=float(popular.ctr[place]) if place is not None else config.fallback_ctr,
        source=SOURCES[POPULAR] if request.candidates is None else SOURCES[GIVEN],
        propensity=None,
        reason=Reason(TRENDING, texts.trending) if clicked else Reason(NEW, texts.newest),
    )

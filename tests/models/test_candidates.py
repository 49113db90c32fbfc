"""Candidate sources and their merging."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from models.candidates import POPULAR, Refusal, alike, merge, popular_items, search_tastes
from models.events import Filters
from models.ranking import LONG_TERM, QUERY, SHORT_TERM
from models.recommender import SlateRequest
from tests.models.recommender_world import NOW_MS, World, unit_vector

I32 = npt.NDArray[np.int32]
HOUR_MS = 3_600_000


def none_refused(rows: I32) -> npt.NDArray[np.bool_]:
    return np.zeros(rows.shape, np.bool_)


def searches(short: list[int] | None = None, query: list[int] | None = None) -> tuple[I32, npt.NDArray[np.bool_]]:
    """Return what the searches of one request found, and which there were."""
    n = max(len(short or []), len(query or []), 1)
    found = np.full((1, 4, n), -1, np.int32)
    active = np.zeros((1, 4), np.bool_)
    for taste, rows in ((SHORT_TERM, short), (QUERY, query)):
        if rows is not None:
            found[0, taste, : len(rows)] = rows
            active[0, taste] = True
    return found, active


def test_sources_take_turns_and_an_item_counts_for_the_first_that_names_it() -> None:
    found, active = searches(short=[10, 11, 12, 13], query=[20, 10, 21, 22])
    pool = merge(found, active, np.array([30, 11], np.int32), 6, none_refused)
    assert pool.rows[0].tolist() == [10, 20, 30, 11, 12, 21]
    assert pool.sources[0].tolist() == [SHORT_TERM, QUERY, POPULAR, SHORT_TERM, SHORT_TERM, QUERY]


def test_without_a_taste_the_popular_items_fill_the_pool() -> None:
    found, active = searches()
    pool = merge(found, active, np.array([5, 4, 3, 2], np.int32), 3, none_refused)
    assert pool.rows[0].tolist() == [5, 4, 3]
    assert (pool.sources[0] == POPULAR).all()


def test_a_refused_item_makes_room_for_the_next() -> None:
    found, active = searches()
    pool = merge(found, active, np.array([5, 4, 3, 2], np.int32), 3, lambda rows: rows == 5)
    assert pool.rows[0].tolist() == [4, 3, -1]


def test_nothing_found_is_a_pool_of_padding() -> None:
    found, active = searches()
    pool = merge(found, active, np.zeros(0, np.int32), 3, none_refused)
    assert pool.rows.tolist() == [[-1, -1, -1]]
    assert not pool.valid.any()


rows_lists = st.lists(st.integers(-1, 15), max_size=8)


@given(rows_lists, rows_lists, st.lists(st.integers(0, 15), unique=True, max_size=8), st.integers(1, 20))
def test_a_pool_holds_each_candidate_once_and_only_what_a_source_named(
    short: list[int], query: list[int], popular: list[int], width: int
) -> None:
    found, active = searches(short, query)
    pool = merge(found, active, np.array(popular, np.int32), width, lambda rows: rows % 3 == 0)
    kept = pool.rows[0][pool.rows[0] >= 0].tolist()
    named = {row for row in (*short, *query, *popular[:width]) if row >= 0 and row % 3}
    assert len(kept) == len(set(kept)) == min(len(named), width)
    assert set(kept) <= named


def test_vectors_of_one_direction_are_alike_whatever_their_length() -> None:
    assert alike(unit_vector(1, 0.1)[None], 0.2 * unit_vector(1)[None]).tolist() == [True]


def test_vectors_of_two_directions_and_zero_vectors_are_not_alike() -> None:
    a = np.stack([unit_vector(1), unit_vector(1), np.zeros(64, np.float32)])
    b = np.stack([unit_vector(1, 1), np.zeros(64, np.float32), np.zeros(64, np.float32)])
    assert alike(a, b).tolist() == [False, False, False]


def test_a_long_term_vector_like_the_short_term_one_is_not_searched_again() -> None:
    world = World()
    world.clusters({"a": 5})
    tastes = np.zeros((1, 4, 64), np.float32)
    tastes[0, SHORT_TERM] = tastes[0, LONG_TERM] = unit_vector(1)
    found = search_tastes(world.index, tastes, np.any(tastes != 0, axis=2), 3)
    assert (found[0, SHORT_TERM] >= 0).all()
    assert (found[0, LONG_TERM] == -1).all()


def test_popular_items_are_those_with_most_clicks_then_the_newest() -> None:
    world = World()
    for i in range(6):
        world.item(f"i{i}", published_at=NOW_MS - (5 - i) * HOUR_MS)
    world.popular({"i1": 2, "i3": 5})
    popular = popular_items(world.catalogue, world.counters, 4, NOW_MS, 1)
    assert popular.rows.tolist() == [3, 1, 5, 4]
    assert popular.counted == 2
    assert popular.is_trending(np.array([3, 5, -1, 99], np.int32)).tolist() == [True, False, False, False]


def test_popularity_leaves_out_what_may_not_be_shown() -> None:
    world = World()
    world.item("hidden", is_hidden=True)
    world.item("old", expires_at=NOW_MS)
    world.item("fine")
    world.popular({"hidden": 9, "old": 9, "fine": 1, "named by nobody": 9})
    assert popular_items(world.catalogue, world.counters, 4, NOW_MS, 1).rows.tolist() == [2]


def test_popularity_decays() -> None:
    world = World()
    world.item("then")
    world.item("now")
    for user in range(4):
        world.act("then", user=0, at_ms=NOW_MS - 8 * HOUR_MS + user * 130_000)
    world.act("now", at_ms=NOW_MS)
    assert popular_items(world.catalogue, world.counters, 2, NOW_MS, 1).rows.tolist() == [1, 0]


def test_an_empty_catalogue_has_no_popular_items() -> None:
    world = World()
    popular = popular_items(world.catalogue, world.counters, 4, NOW_MS, 1)
    assert popular.rows.tolist() == []
    assert popular.strength_of(np.array([0, -1], np.int32)).tolist() == [0, 0]


def test_exclude_and_filters_are_kept_apart_by_request() -> None:
    world = World()
    world.item("x", categories=["one"])
    world.item("y", categories=["two"])
    wishes = [
        SlateRequest("u", 0, exclude=["x"]),
        SlateRequest("v", 0, filters=Filters(categories=["one"])),
        SlateRequest("w", 0),
    ]
    refuse = Refusal(world.catalogue, wishes, None, NOW_MS)
    rows = np.array([[0, 1, -1]] * 3, np.int32)
    assert refuse(rows).tolist() == [[True, False, True], [False, True, True], [False, False, True]]

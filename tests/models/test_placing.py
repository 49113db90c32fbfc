"""Pinned and drawn items find their places: for a whole batch at once as for one request after the other, by lists."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from models.candidates import FRESH, PINNED, Pool, pin, pinned_first
from models.fresh_slots import Drawn, FreshSlots, place

NAN = float("nan")
ROWS = st.lists(st.integers(0, 15), unique=True, max_size=6)


def pool_of(*rows: list[int]) -> Pool:
    width = 6
    padded = [one + [-1] * (width - len(one)) for one in rows]
    return Pool(np.array(padded, np.int32), np.zeros((len(rows), width), np.int8))


def array(rows: list[list[int]], dtype: Any = np.int64) -> Any:
    width = max(map(len, rows))
    return np.array([one + [-1] * (width - len(one)) for one in rows], dtype)


def test_a_pinned_item_takes_a_free_place_first_and_then_the_last_candidates() -> None:
    pool = pool_of([1, 2, 3], [1, 2, 3, 4, 5, 6])
    pin(pool, np.array([[9, 8], [9, 2]], np.int32), np.zeros((2, 2), np.bool_))
    assert pool.rows.tolist() == [[1, 2, 3, 9, 8, -1], [1, 2, 3, 4, 5, 9]]
    assert (pool.sources == PINNED).tolist() == [
        [False] * 3 + [True] * 2 + [False],
        [False, True] + [False] * 3 + [True],
    ]


def test_a_refused_pinned_item_changes_nothing() -> None:
    pool = pool_of([1, 2])
    pin(pool, np.array([[9]], np.int32), np.ones((1, 1), np.bool_))
    assert pool.rows.tolist() == [[1, 2, -1, -1, -1, -1]]
    assert not pool.sources.any()


def test_drawn_items_do_not_take_the_place_of_pinned_ones_in_a_full_pool() -> None:
    pool = pool_of([1, 2, 3, 4, 5, 6], [1, 2, 3, 4])
    pin(pool, np.array([[9], [9]], np.int32), np.zeros((2, 1), np.bool_))
    pin(pool, np.array([[7, 8], [7, 8]], np.int32), np.zeros((2, 2), np.bool_), FRESH)
    assert pool.rows.tolist() == [[1, 2, 3, 8, 7, 9], [1, 2, 3, 8, 9, 7]]
    assert (pool.sources == PINNED).tolist() == [[False] * 5 + [True], [False] * 4 + [True, False]]


@given(st.lists(st.tuples(ROWS, ROWS, st.integers(0, 6)), min_size=1, max_size=4))
def test_pinned_items_of_the_pool_stand_first_in_their_order(requests: list[tuple[list[int], list[int], int]]) -> None:
    pool = pool_of(*(held for held, _, _ in requests))
    pinned = array([wanted or [-1] for _, wanted, _ in requests], np.int32)
    counts = np.array([min(count, len(held)) for held, _, count in requests], np.int64)
    columns = np.repeat(np.arange(6, dtype=np.int64)[None, ::-1], len(requests), axis=0)
    for b, (held, _, _) in enumerate(requests):
        columns[b, : len(held)] = range(len(held))
    expected = []
    for (held, wanted, _), count, ranked in zip(requests, counts.tolist(), columns.tolist(), strict=True):
        first = [held.index(row) for row in wanted if row in held]
        expected.append([*first, *(c for c in ranked[:count] if c not in first)][:count] + ranked[count:])
    pinned_first(columns, counts, pool.rows, pinned)
    assert columns.tolist() == expected


@given(
    st.lists(
        st.tuples(st.permutations(range(6)), st.integers(0, 6), st.integers(1, 6), st.permutations(range(6))),
        min_size=1,
        max_size=4,
    ),
    st.sets(st.integers(1, 6), min_size=1, max_size=3).map(sorted),
    st.integers(0, 3),
)
def test_drawn_items_are_put_in_one_after_the_other(
    requests: list[tuple[list[int], int, int, list[int]]], slots: list[int], drawn_items: int
) -> None:
    """Rows of the pool are columns times ten; each request is ranked columns, how many count, k, and what is drawn."""
    config = FreshSlots(slots=tuple(slots))
    rows = np.full((len(requests), len(slots)), -1, np.int32)
    chances = np.full(rows.shape, np.nan, np.float32)
    columns = np.array([ranked for ranked, _, _, _ in requests], np.int64)
    ks = np.array([k for _, _, k, _ in requests], np.int64)
    counts = np.array([min(count, k) for _, count, k, _ in requests], np.int64)
    propensities = np.full(columns.shape, np.nan, np.float32)
    expected = []
    for b, (ranked, _, k, draw) in enumerate(requests):
        mine = draw[: min(drawn_items, sum(slot <= k for slot in slots))]
        rows[b, : len(mine)] = [10 * column for column in mine]
        chances[b, : len(mine)] = 0.5
        slate = [(column, NAN) for column in ranked[: int(counts[b])] if column not in mine]
        for slot, column in zip(slots, mine, strict=False):
            slate.insert(slot - 1, (column, 0.5))
        expected.append(slate[:k] if mine else [(column, NAN) for column in ranked[: int(counts[b])]])
    pool_rows = np.repeat(10 * np.arange(6, dtype=np.int32)[None], len(requests), axis=0)
    drawn = Drawn(rows, chances, [[] for _ in requests], config)
    place(drawn, pool_rows, columns, counts, ks, propensities)
    for b, slate in enumerate(expected):
        assert columns[b, : counts[b]].tolist() == [column for column, _ in slate]
        np.testing.assert_equal(propensities[b, : counts[b]].tolist(), [chance for _, chance in slate])

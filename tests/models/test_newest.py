"""Items by publication time: whatever is asked first, and however little was sorted before."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from models.catalogue import Catalogue
from models.events import Item
from models.item_index import ItemIndex
from models.newest import NewestFirst

NOW_MS = 1_700_000_000_000


def catalogue_of(published: list[int | None]) -> Catalogue:
    catalogue = Catalogue(ItemIndex(), 4)
    for n, at_ms in enumerate(published):
        catalogue.upsert(Item(item_id=f"i{n}", published_at=at_ms))
    return catalogue


@given(
    st.lists(st.one_of(st.none(), st.integers(-3, 3).map(lambda n: NOW_MS + n)), max_size=40),
    st.lists(st.integers(0, 50), min_size=1, max_size=4),
)
def test_the_first_n_are_those_of_a_full_sort_in_whatever_order_they_are_asked_for(
    published: list[int | None], asked: list[int]
) -> None:
    catalogue = catalogue_of(published)
    times = catalogue.published_at_ms[: len(published)]
    whole = np.lexsort((np.arange(len(published)), -times))
    newest = NewestFirst(catalogue, NOW_MS)
    for n in asked:
        assert newest.first(n).tolist() == whole[:n].tolist()


def test_many_items_are_sorted_no_further_than_asked_and_still_right() -> None:
    random = np.random.default_rng(1)
    catalogue = catalogue_of((NOW_MS - random.integers(0, 500, 5_000)).tolist())
    whole = np.lexsort((np.arange(5_000), -catalogue.published_at_ms[:5_000]))
    newest = NewestFirst(catalogue, NOW_MS)
    for n in (3, 1_500, 1_600, 4_999, 6_000):
        assert newest.first(n).tolist() == whole[:n].tolist()
        assert newest.published_ms(n) == catalogue.published_at_ms[whole[:n][-1]]


def test_what_is_hidden_is_left_out_and_what_is_not_out_yet_or_says_no_time_is_not_out() -> None:
    catalogue = catalogue_of([NOW_MS + 1, NOW_MS, None, NOW_MS - 5, NOW_MS - 1])
    catalogue.upsert(Item(item_id="i4", published_at=NOW_MS - 1, is_hidden=True))
    newest = NewestFirst(catalogue, NOW_MS)
    assert newest.first(9).tolist() == [0, 1, 3, 2]
    assert newest.out(NOW_MS, 9).tolist() == [1, 3]
    assert newest.mask[:5].tolist() == [True, True, True, True, False]

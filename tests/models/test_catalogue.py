from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.catalogue import NEVER_MS, Catalogue
from models.events import Filters, Item
from models.hashing import hash64, short_hash
from models.item_index import UNKNOWN, ItemIndex

NOW = 1_700_000_000_000


def catalogue_of(*items: Item) -> Catalogue:
    catalogue = Catalogue(ItemIndex(), 4)
    for item in items:
        catalogue.upsert(item)
    return catalogue


def servable(catalogue: Catalogue, item_id: str, now_ms: int = NOW) -> bool:
    return bool(catalogue.servable(catalogue.index.rows([item_id]), now_ms)[0])


def fits(catalogue: Catalogue, filters: Filters) -> list[bool]:
    rows = np.arange(len(catalogue.index), dtype=np.int32)
    return [bool(x) for x in catalogue.filter_mask(rows, filters)]


def test_upserted_item_is_servable() -> None:
    assert servable(catalogue_of(Item(item_id="a", title="A title")), "a")


def test_hidden_item_is_not_servable() -> None:
    assert not servable(catalogue_of(Item(item_id="a", is_hidden=True)), "a")


def test_item_is_not_servable_at_its_expiry() -> None:
    catalogue = catalogue_of(Item(item_id="a", expires_at=NOW))
    assert [servable(catalogue, "a", NOW - 1), servable(catalogue, "a", NOW)] == [True, False]


def test_expiry_can_be_taken_back_by_the_next_record() -> None:
    catalogue = catalogue_of(Item(item_id="a", expires_at=NOW), Item(item_id="a"))
    assert catalogue.expires_at_ms[0] == NEVER_MS
    assert servable(catalogue, "a")


def test_removed_item_is_not_servable_but_still_found_by_hash() -> None:
    catalogue = catalogue_of(Item(item_id="a"))
    catalogue.set_vector(0, [0, 2, 0, 0])
    assert catalogue.remove("a") == 0
    assert not servable(catalogue, "a")
    vectors, known = catalogue.by_hash(np.array([hash64("a")], np.uint64))
    assert known.tolist() == [True]
    assert vectors.tolist() == [[0, 1, 0, 0]]


def test_removed_item_comes_back_in_its_old_row() -> None:
    catalogue = catalogue_of(Item(item_id="a"), Item(item_id="b"))
    catalogue.remove("a")
    assert catalogue.upsert(Item(item_id="a")) == 0
    assert servable(catalogue, "a")


def test_removing_an_unknown_item_changes_nothing() -> None:
    catalogue = catalogue_of(Item(item_id="a"))
    assert catalogue.remove("b") == UNKNOWN
    assert len(catalogue) == 1
    assert len(catalogue.index) == 1


def test_item_that_only_an_action_named_is_not_servable_even_beyond_the_arrays() -> None:
    catalogue = catalogue_of(Item(item_id="a"))
    for i in range(5_000):
        catalogue.index.add(f"unknown-{i}")
    assert not servable(catalogue, "unknown-4999")
    vectors, known = catalogue.by_hash(np.array([hash64("unknown-4999")], np.uint64))
    assert not known[0]
    assert not vectors.any()


def test_unknown_row_is_not_servable() -> None:
    assert catalogue_of(Item(item_id="a")).servable(np.array([UNKNOWN, 10**9], np.int32), NOW).tolist() == [False] * 2


def test_servable_keeps_the_shape_of_the_rows() -> None:
    catalogue = catalogue_of(Item(item_id="a"), Item(item_id="b", is_hidden=True))
    rows = np.array([[0, 1], [1, -1]], np.int32)
    assert catalogue.servable(rows, NOW).tolist() == [[True, False], [False, False]]


def test_servable_rows_are_the_items_that_may_be_shown() -> None:
    catalogue = catalogue_of(Item(item_id="a"), Item(item_id="b", is_hidden=True), Item(item_id="c"))
    assert catalogue.servable_rows(NOW).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("after", "rises"),
    [
        (Item(item_id="a", title="new title"), False),
        (Item(item_id="a", is_hidden=True), True),
        (Item(item_id="a", expires_at=NOW), True),
    ],
)
def test_visibility_version_rises_when_an_item_may_stop_being_servable(after: Item, rises: bool) -> None:
    catalogue = catalogue_of(Item(item_id="a"))
    before = catalogue.visibility_version
    catalogue.upsert(after)
    assert (catalogue.visibility_version > before) is rises


def test_visibility_version_rises_on_removal() -> None:
    catalogue = catalogue_of(Item(item_id="a"))
    before = catalogue.visibility_version
    catalogue.remove("a")
    assert catalogue.visibility_version > before


def test_vector_is_scaled_to_unit_norm() -> None:
    catalogue = catalogue_of(Item(item_id="a"))
    catalogue.set_vector(0, np.array([3, 0, 4, 0], np.float32))
    assert catalogue.vectors[0].tolist() == pytest.approx([0.6, 0, 0.8, 0])
    assert catalogue.has_vector[0]


def test_zero_vector_takes_the_vector_away() -> None:
    catalogue = catalogue_of(Item(item_id="a"))
    catalogue.set_vector(0, [1, 0, 0, 0])
    catalogue.set_vector(0, [0, 0, 0, 0])
    assert not catalogue.has_vector[0]


def test_vector_that_is_not_finite_is_no_vector() -> None:
    catalogue = catalogue_of(Item(item_id="a"))
    catalogue.set_vector(0, [np.nan, 0, 0, 0])
    assert not catalogue.has_vector[0]
    assert np.isfinite(catalogue.vectors).all()


def test_vector_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="4 dimensions; nothing was set"):
        catalogue_of(Item(item_id="a")).set_vector(0, [1, 0])


def test_new_text_needs_encoding_and_a_new_price_does_not() -> None:
    catalogue = catalogue_of(Item(item_id="a", title="one"))
    assert catalogue.needs_encoding(0)
    catalogue.set_vector(0, [1, 0, 0, 0])
    catalogue.upsert(Item(item_id="a", title="one", price=3.0))
    assert not catalogue.needs_encoding(0)
    catalogue.upsert(Item(item_id="a", title="two"))
    assert catalogue.needs_encoding(0)


def test_short_hash_of_two_items_resolves_to_neither() -> None:
    catalogue = catalogue_of(Item(item_id="a"))
    catalogue.set_vector(0, [1, 0, 0, 0])
    short = short_hash(hash64("a"))
    assert catalogue.by_short_hash(np.array([short], np.uint32))[1].tolist() == [True]
    catalogue.index._row_by_short[short] = -2
    assert catalogue.by_short_hash(np.array([short], np.uint32))[1].tolist() == [False]


def test_arrays_grow_and_keep_what_they_held() -> None:
    catalogue = catalogue_of(*(Item(item_id=str(i), price=float(i), tags=[str(i % 7)]) for i in range(3_000)))
    catalogue.set_vector(2_999, [0, 0, 0, 1])
    assert catalogue.capacity == 4_096
    assert catalogue.price[2_500] == 2_500.0
    assert np.isnan(catalogue.price[3_500])
    assert sum(fits(catalogue, Filters(tags=["3"]))) == 429
    assert len(catalogue.servable_rows(NOW)) == 3_000


def test_categories_filter_asks_for_one_of_them() -> None:
    catalogue = catalogue_of(
        Item(item_id="a", categories=["news", "sport"]), Item(item_id="b", categories=["food"]), Item(item_id="c")
    )
    assert fits(catalogue, Filters(categories=["sport", "food"])) == [True, True, False]
    assert fits(catalogue, Filters(categories=["unheard of"])) == [False, False, False]


def test_tag_beyond_the_first_eight_is_found() -> None:
    catalogue = catalogue_of(Item(item_id="a", tags=[f"t{i}" for i in range(20)]), Item(item_id="b", tags=["t1"]))
    assert fits(catalogue, Filters(tags=["t19"])) == [True, False]


def test_terms_of_an_older_record_are_forgotten() -> None:
    catalogue = catalogue_of(Item(item_id="a", tags=[f"t{i}" for i in range(20)]), Item(item_id="a", tags=["t1"]))
    assert fits(catalogue, Filters(tags=["t19", "t2"])) == [False]


def test_item_without_price_fits_no_price_filter() -> None:
    catalogue = catalogue_of(Item(item_id="a", price=5.0), Item(item_id="b"), Item(item_id="c", price=9.0))
    assert fits(catalogue, Filters(min_price=5.0)) == [True, False, True]
    assert fits(catalogue, Filters(min_price=4.0, max_price=8.0)) == [True, False, False]


def test_published_after_includes_the_moment_itself() -> None:
    catalogue = catalogue_of(
        Item(item_id="a", published_at=NOW), Item(item_id="b", published_at=NOW - 1), Item(item_id="c")
    )
    assert fits(catalogue, Filters(published_after=NOW)) == [True, False, False]


def test_empty_filters_keep_every_known_row() -> None:
    catalogue = catalogue_of(Item(item_id="a"))
    assert catalogue.filter_mask(np.array([0, -1], np.int32), Filters()).tolist() == [True, False]


def test_record_kept_for_reasons_has_a_title_but_not_the_long_text() -> None:
    catalogue = catalogue_of(Item(item_id="a", title="T", text="x" * 9_000, embedding=[1.0]))
    item = catalogue.item(0)
    assert item is not None
    assert (item.title, item.text, item.embedding) == ("T", None, None)


TERMS = st.lists(st.sampled_from([f"t{i}" for i in range(24)]), max_size=16)


@given(st.lists(st.tuples(st.integers(0, 5), TERMS), max_size=20), TERMS)
def test_tag_filter_equals_set_intersection(records: list[tuple[int, list[str]]], wanted: list[str]) -> None:
    catalogue = Catalogue(ItemIndex(), 2)
    latest: dict[str, set[str]] = {}
    for number, tags in records:
        catalogue.upsert(Item(item_id=str(number), tags=tags))
        latest[str(number)] = set(tags)
    for item_id, tags_of_item in latest.items():
        found = catalogue.filter_mask(catalogue.index.rows([item_id]), Filters(tags=wanted))
        assert bool(found[0]) == bool(tags_of_item & set(wanted))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["upsert", "hide", "expire", "remove"]))))
def test_only_the_last_record_of_an_item_decides_whether_it_is_servable(changes: list[tuple[str, str]]) -> None:
    catalogue = Catalogue(ItemIndex(), 2)
    last: dict[str, str] = {}
    for item_id, change in changes:
        if change == "remove":
            catalogue.remove(item_id)
        else:
            expires = NOW - 1 if change == "expire" else None
            catalogue.upsert(Item(item_id=item_id, is_hidden=change == "hide", expires_at=expires))
        last[item_id] = change
    for item_id, change in last.items():
        assert servable(catalogue, item_id) == (change == "upsert")

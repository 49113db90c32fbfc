"""Slates from user rows, catalogue and counters."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from models.events import Filters, Request
from models.ranking import RankingConfig
from models.recommender import RecommenderConfig, SlateRequest, SurfaceConfig
from tests.models.recommender_world import NOW_MS, World, is_of, unit_vector

HOUR_MS = 3_600_000


@pytest.fixture
def world() -> World:
    world = World(users=3)
    world.clusters({"a": 30, "b": 30, "c": 30})
    return world


def test_a_new_user_gets_what_is_popular(world: World) -> None:
    world.popular({"b7": 9, "c3": 5, "a1": 2})
    slate = world.slate(k=3)
    assert [item.item_id for item in slate.items] == ["b7", "c3", "a1"]
    assert {item.source for item in slate.items} == {"popular"}
    assert slate.items[0].reason.kind == "trending"
    assert slate.degraded is False


def test_without_any_click_the_newest_items_come_first() -> None:
    world = World()
    for i in range(5):
        world.item(f"i{i}", published_at=NOW_MS - (i * 7 % 5) * HOUR_MS)
    slate = world.slate(k=2)
    assert [item.item_id for item in slate.items] == ["i0", "i3"]
    assert slate.items[0].reason.text == "Among the newest items"


def test_the_first_click_changes_the_slate(world: World) -> None:
    before = world.ids(k=10)
    world.act("b0")
    after = world.ids(k=10)
    assert after != before
    assert is_of("b", after) == 10


def test_a_click_on_one_cluster_after_another_moves_the_second_up(world: World) -> None:
    world.act("a0")
    first = is_of("c", world.ids(k=20))
    world.act("c0", at_ms=NOW_MS + 500)
    assert is_of("c", world.ids(k=20)) > first


def test_the_reason_names_the_clicked_item_by_id_and_title(world: World) -> None:
    world.act("b0")
    item = world.slate(k=1).items[0]
    assert item.reason.kind == "because_clicked"
    assert item.reason.item_ids == ["b0"]
    assert item.reason.text == "Because you clicked “Title of b0”"


def test_the_reason_is_the_nearest_of_several_clicked_items(world: World) -> None:
    world.act("b0")
    world.act("a0", at_ms=NOW_MS + 500)
    for item in world.slate(k=20).items:
        if item.reason.item_ids:
            assert item.reason.item_ids == [f"{item.item_id[0]}0"]


def test_a_purchase_is_not_called_a_click(world: World) -> None:
    world.act("b0", "purchase")
    assert world.slate(k=1).items[0].reason.text == "Because you bought “Title of b0”"


def test_a_clicked_item_is_left_out_until_its_window_is_over(world: World) -> None:
    world.act("b0")
    week_ms = 7 * 24 * HOUR_MS
    assert "b0" not in world.ids(k=89)
    assert "b0" in world.ids(k=90, now_ms=NOW_MS + week_ms + 60_000)


def test_an_item_that_the_user_hid_never_comes_back(world: World) -> None:
    world.popular({"a3": 50})
    world.act("a3", "hide")
    assert "a3" not in world.ids(k=90, now_ms=NOW_MS + 60 * 24 * HOUR_MS)


def test_an_item_shown_three_times_lately_without_a_click_is_left_out(world: World) -> None:
    world.popular({"a3": 50})
    for i in range(3):
        world.show(["a3"], at_ms=NOW_MS - 1_000 + i)
    assert "a3" not in world.ids(k=89)


def test_an_item_shown_once_lately_falls_back(world: World) -> None:
    world.popular({"a3": 5, "b3": 5, "c3": 5})
    before = world.ids(k=3)
    world.show([before[0]], at_ms=NOW_MS - 1_000)
    assert world.ids(k=3).index(before[0]) > 0


def test_an_item_shown_three_times_long_ago_comes_back(world: World) -> None:
    world.popular({"a3": 50})
    for i in range(3):
        world.show(["a3"], at_ms=NOW_MS - 7 * HOUR_MS + i)
    assert world.ids(k=1) == ["a3"]


def test_where_clicked_items_may_return_showing_them_does_not_keep_them_out() -> None:
    world = World(config=RecommenderConfig(ranking=RankingConfig(clicked_window_seconds=0)))
    world.item("song", unit_vector(1))
    for i in range(3):
        world.show(["song"], at_ms=NOW_MS - 1_000 + i)
    world.act("song", at_ms=NOW_MS - 500)
    assert world.ids(k=1) == ["song"]


@pytest.mark.parametrize("end", ["hidden", "expired", "removed"])
def test_an_item_that_may_not_be_shown_is_in_no_slate(world: World, end: str) -> None:
    world.popular({"a3": 50})
    assert world.ids(k=1) == ["a3"]
    if end == "removed":
        world.catalogue.remove("a3")
    else:
        world.item("a3", is_hidden=end == "hidden", expires_at=NOW_MS if end == "expired" else None)
    # The list of popular items and the index still know it.
    now_ms = NOW_MS + 1_001
    world.act("a0")
    request = SlateRequest("user 0", 0, k=90)
    for slate in (
        world.recommender.recommend(world.rows, [request], now_ms)[0],
        world.recommender.fallback(world.rows, [request], now_ms)[0],
    ):
        assert "a3" not in [item.item_id for item in slate.items]


def test_excluded_items_do_not_appear(world: World) -> None:
    world.act("b0")
    assert not {"b1", "b2", "unheard of"} & set(world.ids(k=88, exclude=["b1", "b2", "unheard of"]))


def test_given_candidates_are_ranked_and_nothing_else_appears(world: World) -> None:
    world.act("b0")
    slate = world.slate(k=20, candidates=["a1", "b1", "nobody", "c1", "b1"])
    assert slate.items[0].item_id == "b1"
    assert sorted(item.item_id for item in slate.items) == ["a1", "b1", "c1"]
    assert {item.source for item in slate.items} == {"candidates"}


def test_given_candidates_that_were_clicked_or_hidden_come_last(world: World) -> None:
    world.act("b0")
    world.act("b1", "hide", at_ms=NOW_MS + 1)
    assert set(world.ids(candidates=["b0", "b1", "a1", "c1"])[2:]) == {"b0", "b1"}


def test_given_candidates_respect_exclude_and_visibility(world: World) -> None:
    world.catalogue.remove("a1")
    assert world.ids(candidates=["a1", "b1", "c1"], exclude=["c1"]) == ["b1"]


def test_a_narrow_filter_is_filled_from_the_whole_catalogue() -> None:
    world = World(config=RecommenderConfig(popular_items=10, surfaces={"default": SurfaceConfig(candidates=10)}))
    world.clusters({"a": 200})
    for i in range(5):
        world.item(f"rare{i}", unit_vector(0, 0, 1, i / 10), categories=["rare"])
    world.act("a0")
    assert sorted(world.ids(k=5, filters=Filters(categories=["rare"]))) == [f"rare{i}" for i in range(5)]


def test_fewer_servable_items_than_k_make_a_shorter_slate() -> None:
    world = World()
    world.clusters({"a": 4})
    assert len(world.ids(k=20)) == 4


def test_an_empty_catalogue_makes_an_empty_slate() -> None:
    world = World()
    assert world.slate(k=20).items == []
    assert world.slate(k=20, candidates=["a"]).items == []


def test_items_without_a_vector_or_a_record_do_no_harm(world: World) -> None:
    world.item("mute", title="no vector yet")
    world.act("named by nobody")
    world.act("mute", at_ms=NOW_MS + 1)
    assert len(world.ids(k=90)) == 90


def test_a_profile_serves_a_user_without_vectors(world: World) -> None:
    slate = world.slate(k=5, profile_vector=unit_vector(0, 0, 1))
    assert is_of("c", [item.item_id for item in slate.items]) == 5
    assert {item.source for item in slate.items} == {"profile"}
    assert {item.reason.kind for item in slate.items} == {"like_profile"}


def test_a_profile_gives_way_to_what_the_user_clicked(world: World) -> None:
    world.act("a0")
    assert is_of("a", world.ids(k=5, profile_vector=unit_vector(0, 0, 1))) == 5


def test_a_query_is_searched_even_for_a_user_with_vectors(world: World) -> None:
    world.act("a0")
    slate = world.slate(k=5, query_vector=unit_vector(0, 1))
    assert is_of("b", [item.item_id for item in slate.items]) == 5
    assert {item.reason.kind for item in slate.items} == {"matches_query"}


def test_a_query_vector_that_is_not_a_number_is_passed_over(world: World) -> None:
    vector = np.full(64, np.nan, np.float32)
    assert world.ids(k=5, query_vector=vector) == world.ids(k=5)


def test_equal_scores_are_ordered_by_row() -> None:
    world = World()
    for i in range(9):
        world.item(f"i{i}", unit_vector(1))
    assert world.ids(k=9) == [f"i{i}" for i in range(9)]


def test_k_comes_from_the_surface_where_the_request_does_not_say() -> None:
    surfaces = {"default": SurfaceConfig(k=4), "mail": SurfaceConfig(k=2)}
    world = World(config=RecommenderConfig(surfaces=surfaces))
    world.clusters({"a": 9})
    assert len(world.ids()) == 4
    assert len(world.ids(surface="mail")) == 2
    assert len(world.ids(surface="named nowhere")) == 4
    assert world.slate(surface="named nowhere").surface == "named nowhere"


def test_a_slate_longer_than_the_usual_candidates_is_filled(world: World) -> None:
    world.act("a0")
    assert len(world.ids(k=80)) == 80


def test_scoring_changes_no_state(world: World) -> None:
    world.act("a0")
    rows, items = world.rows.tobytes(), len(world.catalogue.index)
    world.slate(k=20, candidates=["new one", "a1"], exclude=["another"])
    assert world.rows.tobytes() == rows
    assert len(world.catalogue.index) == items


@pytest.fixture
def one_popular() -> World:
    """Return a world in which a new user's only candidate is the most popular item."""
    world = World(config=RecommenderConfig(popular_items=1))
    world.clusters({"a": 3, "c": 3})
    assert world.ids(k=1, now_ms=NOW_MS) == ["a0"]
    world.popular({"c2": 9})
    return world


def test_the_list_of_popular_items_is_kept_for_a_second(one_popular: World) -> None:
    assert one_popular.ids(k=1, now_ms=NOW_MS + 999) == ["a0"]


def test_the_list_of_popular_items_is_renewed_after_a_second(one_popular: World) -> None:
    assert one_popular.ids(k=1, now_ms=NOW_MS + 1_000) == ["c2"]


def test_a_clock_set_back_renews_the_list_of_popular_items_at_once(one_popular: World) -> None:
    assert one_popular.ids(k=1, now_ms=NOW_MS - 1) == ["c2"]


def test_what_a_request_record_asks_for_reaches_the_slate(world: World) -> None:
    record = Request(
        event_id="e", event_time=NOW_MS, user_id="u", request_id="r", k=2, candidates=["a1", "b1"], exclude=["b1"]
    )
    slate = world.recommender.recommend(world.rows, [SlateRequest.of(record, 0)], NOW_MS)[0]
    assert [item.item_id for item in slate.items] == ["a1"]


def test_the_fallback_gives_popular_items_and_says_that_it_is_degraded(world: World) -> None:
    world.popular({"b7": 9, "c3": 5, "a1": 2})
    world.act("c3", "hide")
    world.recommender.refresh(NOW_MS)
    requests = [SlateRequest("u", 0, k=2), SlateRequest("v", 1, k=3, exclude=["b7"])]
    first, second = world.recommender.fallback(world.rows, requests, NOW_MS)
    assert [item.item_id for item in first.items] == ["b7", "a1"]
    assert [item.item_id for item in second.items][:2] == ["c3", "a1"]
    assert first.degraded
    assert second.degraded


def test_the_fallback_ranks_given_candidates_and_respects_filters() -> None:
    world = World()
    world.item("a", categories=["x"], price=5.0)
    world.item("b", categories=["y"], price=5.0)
    world.item("c", categories=["x"], price=50.0)
    world.recommender.refresh(NOW_MS)
    request = SlateRequest("u", 0, candidates=["b", "c", "a"], filters=Filters(categories=["x"], max_price=10))
    assert [i.item_id for i in world.recommender.fallback(world.rows, [request], NOW_MS)[0].items] == ["a"]


def test_the_fallback_works_with_rows_that_cannot_be_read(world: World) -> None:
    world.recommender.refresh(NOW_MS)
    broken = np.zeros(1, np.dtype([("nothing", "u1")]))
    slate = world.recommender.fallback(broken, [SlateRequest("u", 0, k=3)], NOW_MS)[0]
    assert len(slate.items) == 3
    assert world.recommender.fallbacks_without_past == 1


def test_a_default_surface_that_is_not_described_is_refused() -> None:
    with pytest.raises(ValidationError, match="not one of the surfaces"):
        RecommenderConfig(default_surface="home")


ITEMS = [f"{cluster}{i}" for cluster in "abc" for i in range(12)]
ids = st.sampled_from(ITEMS)


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, str, int, int]]:
    """Return events (kind, item, user, seconds before now), oldest first."""
    kinds = st.sampled_from(["click", "hide", "show", "purchase", "dislike"])
    events = draw(st.lists(st.tuples(kinds, ids, st.integers(0, 2), st.integers(0, 40_000)), max_size=25))
    return sorted(events, key=lambda event: -event[3])


wishes = st.fixed_dictionaries(
    {
        "k": st.integers(1, 40),
        "exclude": st.lists(ids, max_size=10),
        "candidates": st.none() | st.lists(ids, min_size=1, max_size=20),
        "filters": st.none() | st.builds(Filters, categories=st.just(["even"])),
        "query_vector": st.none() | st.builds(unit_vector, st.just(0.0), st.floats(0.1, 1), st.floats(0.1, 1)),
    }
)


def lived_in(history: list[tuple[str, str, int, int]], gone: list[str]) -> World:
    """Return a world of three users after ``history``, in which the items ``gone`` were removed."""
    surfaces = {"default": SurfaceConfig(candidates=20)}
    world = World(users=3, config=RecommenderConfig(popular_items=15, surfaces=surfaces))
    world.clusters({"a": 12, "b": 12, "c": 12})
    for i, item_id in enumerate(ITEMS):
        world.item(item_id, categories=["even" if i % 2 == 0 else "odd"])
    for kind, item_id, user, seconds in history:
        at_ms = NOW_MS - seconds * 1_000
        if kind == "show":
            world.show([item_id], user=user, at_ms=at_ms)
        else:
            world.act(item_id, kind, user=user, at_ms=at_ms)  # type: ignore[arg-type]
    world.recommender.refresh(NOW_MS)
    for item_id in gone:
        world.catalogue.remove(item_id)
    return world


@settings(max_examples=60, deadline=None)
@given(histories(), st.lists(ids, max_size=5), wishes)
def test_no_forbidden_item_ever_appears_and_none_that_may_is_missing(
    history: list[tuple[str, str, int, int]], gone: list[str], wish: dict[str, object]
) -> None:
    world = lived_in(history, gone)
    request = SlateRequest("user 0", 0, **wish)  # type: ignore[arg-type]
    slate = world.recommender.recommend(world.rows, [request], NOW_MS)[0]
    found = [item.item_id for item in slate.items]

    allowed = set(ITEMS) - set(gone) - set(request.exclude)
    if request.filters:
        allowed -= {item_id for i, item_id in enumerate(ITEMS) if i % 2}
    if request.candidates is not None:
        allowed &= set(request.candidates)
    else:
        mine = [event for event in history if event[2] == 0][-16:]
        acted = [event for event in mine if event[0] != "show"]
        used = {item_id for kind, item_id, _, _ in acted if kind != "show"}
        shows = [item_id for kind, item_id, _, seconds in mine if kind == "show" and seconds <= 21_600]
        assert not set(found) & used
        often = {item_id for item_id in shows if shows.count(item_id) >= 3}
        assert not set(found) & often
    assert set(found) <= allowed
    assert len(found) == len(set(found)) <= request.k  # type: ignore[operator]
    assert [item.position for item in slate.items] == list(range(1, len(found) + 1))
    scores = [round(item.score, 5) for item in slate.items]
    assert scores == sorted(scores, reverse=True)
    for item in slate.items:
        assert 0 < item.ctr < 1
        assert math.isfinite(item.score)
        assert item.propensity is None
    if request.candidates is not None:
        assert len(found) == min(len(allowed), request.k)  # type: ignore[type-var]


@settings(max_examples=40, deadline=None)
@given(histories(), st.lists(st.tuples(st.integers(0, 2), wishes), min_size=2, max_size=6))
def test_a_request_gets_the_same_slate_alone_and_in_a_batch(
    history: list[tuple[str, str, int, int]], asked: list[tuple[int, dict[str, object]]]
) -> None:
    world = lived_in(history, [])
    requests = [SlateRequest(f"user {row}", row, **wish) for row, wish in asked]  # type: ignore[arg-type]
    together = world.recommender.recommend(world.rows, requests, NOW_MS)
    for request, slate in zip(requests, together, strict=True):
        alone = world.recommender.recommend(world.rows, [request], NOW_MS)[0]
        assert [(i.item_id, i.source, i.reason) for i in slate.items] == [
            (i.item_id, i.source, i.reason) for i in alone.items
        ]
        assert [i.score for i in slate.items] == pytest.approx([i.score for i in alone.items], abs=1e-5)

"""Rules of a surface: filters, boosts and pinned items in slates, and that both ways to check an item agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from models.diversity import DiversityConfig
from models.events import Filters, Item
from models.recommender import RecommenderConfig, SlateRequest, SurfaceConfig
from models.rules import BoostRule, ItemMatch, RulesConfig
from tests.models.recommender_world import NOW_MS, World, unit_vector

HOUR_MS = 3_600_000


def shop(rules: RulesConfig | None = None, diversity: DiversityConfig | None = None) -> World:
    """Return a world of 20 items, the first the most popular; the surface "plain" has no rules."""
    default = SurfaceConfig(k=5, rules=rules or RulesConfig(), diversity=diversity or DiversityConfig())
    config = RecommenderConfig(surfaces={"default": default, "plain": SurfaceConfig(k=5)})
    world = World(users=2, config=config)
    for i in range(20):
        world.item(
            f"i{i}",
            unit_vector(1.0, i / 100),
            categories=["shoes" if i < 10 else "hats"],
            tags=["sale"] if i % 2 else None,
            attributes={"brand": "ours" if i % 5 == 0 else "theirs", "stock": i, "is_eco": i == 3},
            price=float(10 + i),
            published_at=NOW_MS - i * HOUR_MS,
        )
    world.popular({f"i{i}": 40 - 2 * i for i in range(20)})
    return world


def test_without_rules_the_most_popular_come_first() -> None:
    assert shop().ids() == ["i0", "i1", "i2", "i3", "i4"]


@pytest.mark.parametrize(
    ("allowed", "ids"),
    [
        ({"categories": ["hats"]}, ["i10", "i11", "i12", "i13", "i14"]),
        ({"tags": ["sale"]}, ["i1", "i3", "i5", "i7", "i9"]),
        ({"attributes": {"brand": "ours"}}, ["i0", "i5", "i10", "i15"]),
        ({"attributes": {"brand": "ours", "stock": 10}}, ["i10"]),
        ({"attributes": {"is_eco": True}}, ["i3"]),
        ({"min_price": 12.0, "max_price": 14.0}, ["i2", "i3", "i4"]),
        ({"max_age_seconds": 7_300.0}, ["i0", "i1", "i2"]),
        ({"categories": ["hats"], "max_price": 21.0}, ["i10", "i11"]),
    ],
)
def test_only_allowed_items_are_shown(allowed: dict[str, Any], ids: list[str]) -> None:
    assert shop(RulesConfig(allowed=ItemMatch.model_validate(allowed))).ids() == ids


def test_blocked_items_are_not_shown() -> None:
    blocked = {"no sale": ItemMatch(tags=("sale",)), "brand": ItemMatch(attributes={"brand": "ours"})}
    assert shop(RulesConfig(blocked=blocked)).ids() == ["i2", "i4", "i6", "i8", "i12"]


def test_blocked_ids_are_not_shown_nor_in_degraded_slates() -> None:
    world = shop(RulesConfig(blocked_items=("i1", "i3", "unknown")))
    assert world.ids() == ["i0", "i2", "i4", "i5", "i6"]
    assert world.ids(candidates=["i1", "i2"]) == ["i2"]
    slate = world.recommender.fallback(world.rows, [SlateRequest("a", 0)], NOW_MS)[0]
    assert [item.item_id for item in slate.items] == ["i0", "i2", "i4", "i5", "i6"]


def test_other_settings_are_in_force_from_the_next_slate_on() -> None:
    world = shop()
    assert world.ids() == ["i0", "i1", "i2", "i3", "i4"]
    surfaces = {"default": SurfaceConfig(k=2, rules=RulesConfig(pinned=("i9",)))}
    world.recommender.reconfigure(RecommenderConfig(surfaces=surfaces))
    assert world.ids() == ["i9", "i0"]


def test_rules_hold_for_named_candidates_and_beside_the_filters_of_a_request() -> None:
    world = shop(RulesConfig(allowed=ItemMatch(categories=("hats",))))
    assert world.ids(candidates=["i1", "i12", "i2"]) == ["i12"]
    assert world.ids(filters=Filters(tags=["sale"])) == ["i11", "i13", "i15", "i17", "i19"]


def test_rules_are_those_of_the_surface() -> None:
    world = shop(RulesConfig(allowed=ItemMatch(categories=("hats",))))
    slates = world.recommender.recommend(
        world.rows, [SlateRequest("a", 0, surface="plain"), SlateRequest("b", 1), SlateRequest("b", 1, "new")], NOW_MS
    )
    world.recommender.refresh(NOW_MS + 1_000)
    assert world.ids(surface="plain") == ["i0", "i1", "i2", "i3", "i4"]
    assert [s.items[0].item_id for s in slates[1:]] == ["i10", "i10"]


def test_a_degraded_slate_keeps_the_rules() -> None:
    world = shop(RulesConfig(allowed=ItemMatch(categories=("hats",)), blocked={"dear": ItemMatch(min_price=22.0)}))
    world.recommender.refresh(NOW_MS)
    slate = world.recommender.fallback(world.rows, [SlateRequest("a", 0)], NOW_MS)[0]
    assert [item.item_id for item in slate.items] == ["i10", "i11"]


def test_a_boost_moves_items_up_and_a_negative_one_down() -> None:
    rules = RulesConfig(
        boosts={
            "hats": BoostRule(categories=("hats",), boost=50.0),
            "dear": BoostRule(min_price=25.0, boost=-100.0),
        }
    )
    assert shop(rules).ids() == ["i10", "i11", "i12", "i13", "i14"]
    assert shop(RulesConfig(boosts={"all": BoostRule(boost=-3.0)})).ids() == shop().ids()


def test_pinned_items_stand_first_in_their_order() -> None:
    world = shop(RulesConfig(pinned=("i17", "i2")))
    slate = world.slate()
    assert [item.item_id for item in slate.items] == ["i17", "i2", "i0", "i1", "i3"]
    assert [item.position for item in slate.items] == [1, 2, 3, 4, 5]
    assert [item.source for item in slate.items[:2]] == ["pinned", "pinned"]
    assert slate.items[0].reason.kind == "pinned"


def test_a_pinned_item_is_shown_also_where_no_source_knows_it() -> None:
    rules = RulesConfig(pinned=("i19",))
    config = RecommenderConfig(
        surfaces={"default": SurfaceConfig(k=3, candidates=6, rules=rules)}, popular_items=5, refresh_seconds=0
    )
    world = World(config=config)
    for i in range(20):
        world.item(f"i{i}", published_at=NOW_MS - i)
    assert world.ids() == ["i19", "i0", "i1"]


def test_a_pinned_item_is_not_shown_to_who_hid_it_nor_when_it_is_hidden_excluded_or_unknown() -> None:
    world = shop(RulesConfig(pinned=("i17", "i18", "i19", "unknown")))
    world.act("i17", "hide")
    world.item("i18", is_hidden=True)
    assert world.ids(exclude=["i19"], k=3) == ["i0", "i1", "i2"]


def test_named_candidates_have_no_pinned_ones_among_them() -> None:
    assert shop(RulesConfig(pinned=("i17",))).ids(candidates=["i3", "i1"]) == ["i1", "i3"]


def test_a_maximum_per_category_lets_the_other_one_in() -> None:
    world = shop(diversity=DiversityConfig(max_per_category=3))
    assert world.ids() == ["i0", "i1", "i2", "i10", "i11"]


def test_debias_lets_the_unpopular_up() -> None:
    assert shop(diversity=DiversityConfig(popularity_debias=10.0)).ids() == ["i19", "i18", "i17", "i16", "i15"]


def test_sameness_mixes_the_tastes_of_a_user() -> None:
    def worlds(sameness: float) -> set[str]:
        surface = SurfaceConfig(k=8, diversity=DiversityConfig(sameness=sameness))
        world = World(config=RecommenderConfig(surfaces={"default": surface}))
        world.clusters({"a": 30, "b": 30, "c": 30})
        world.act("b0")
        return {item_id[0] for item_id in world.ids()}

    assert worlds(0.0) == {"b"}
    assert worlds(0.8) > {"b"}


def test_a_block_without_a_condition_is_refused() -> None:
    with pytest.raises(ValidationError, match="nothing could be shown"):
        RulesConfig(blocked={"oops": ItemMatch()})


terms = st.lists(st.sampled_from(["x", "y", "z"]), max_size=2).map(lambda found: found or None)
values = st.sampled_from([True, False, 1, 0, 1.0, 2.5, "1", "x"])
items = st.builds(
    Item,
    item_id=st.just("it"),
    categories=terms,
    tags=terms,
    price=st.sampled_from([None, 1.0, 2.0, 3.0]),
    published_at=st.sampled_from([None, NOW_MS - 10_000, NOW_MS - 1_000]),
    attributes=st.dictionaries(st.sampled_from(["p", "q"]), values, max_size=2).map(lambda found: found or None),
)
matches = st.builds(
    ItemMatch,
    categories=terms.map(lambda found: tuple(found) if found else None),
    tags=terms.map(lambda found: tuple(found) if found else None),
    attributes=st.dictionaries(st.sampled_from(["p", "q"]), values, max_size=2),
    min_price=st.sampled_from([None, 2.0]),
    max_price=st.sampled_from([None, 2.0]),
    max_age_seconds=st.sampled_from([None, 5.0]),
)


@settings(max_examples=200, deadline=None)
@given(items, matches)
def test_the_mask_over_the_catalogue_says_what_the_record_says(item: Item, match: ItemMatch) -> None:
    world = World()
    row = world.catalogue.upsert(item)
    found = match.mask(world.catalogue, np.array([row], np.int32), NOW_MS).tolist()
    assert found == [match.fits(item, NOW_MS)]

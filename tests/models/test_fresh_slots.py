"""Slots for new items: the draw follows the posteriors, its propensity is what happens, and the rules come first."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError

from models.catalogue import Catalogue
from models.counters import CountersConfig, ItemCounters
from models.events import RECOMMENDATION_CODEC, Item
from models.fresh_slots import FreshPool, FreshSlots
from models.item_index import ItemIndex
from models.recommender import RecommenderConfig, SlateRequest, SurfaceConfig
from models.rules import ItemMatch, RulesConfig
from tests.models.recommender_world import NOW_MS, World

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
TWO = FreshSlots(slots=(2, 4), draws=1_000)


def world_of(fresh: FreshSlots = TWO, rules: RulesConfig | None = None, k: int = 6) -> World:
    """Return ten old items with clicks, and eight that were published in the last hours."""
    surface = SurfaceConfig(k=k, fresh_slots=fresh, rules=rules or RulesConfig())
    world = World(users=2, config=RecommenderConfig(surfaces={"default": surface}))
    for i in range(10):
        world.item(f"old{i}", published_at=NOW_MS - 30 * DAY_MS)
    for i in range(8):
        world.item(f"new{i}", published_at=NOW_MS - i * HOUR_MS, categories=["a" if i < 4 else "b"])
    world.popular({f"old{i}": 20 - i for i in range(10)})
    return world


def test_drawn_items_stand_in_their_slots_and_nowhere_else() -> None:
    slate = world_of().slate(slot_seed=1)
    assert [item.item_id[:3] for item in slate.items] == ["old", "new", "old", "new", "old", "old"]
    assert [item.propensity is not None for item in slate.items] == [False, True, False, True, False, False]
    assert {slate.items[i].source for i in (1, 3)} == {"fresh"}
    assert {slate.items[i].reason.kind for i in (1, 3)} == {"exploration"}
    assert [item.position for item in slate.items] == [1, 2, 3, 4, 5, 6]


def test_the_slate_logs_its_pool_and_the_number_of_draws() -> None:
    slate = world_of().slate(slot_seed=1)
    assert slate.exploration is not None
    assert sorted(slate.exploration.pool) == [f"new{i}" for i in range(8)]
    assert slate.exploration.draws == 1_000


def test_without_slots_and_without_a_seed_nothing_is_drawn() -> None:
    ranked = world_of(FreshSlots()).slate(slot_seed=1)
    assert ranked.exploration is None
    assert {item.propensity for item in ranked.items} == {None}
    assert world_of().slate() == ranked


def test_the_propensity_is_how_often_the_item_stands_in_the_slot() -> None:
    world = world_of(FreshSlots(slots=(1,), draws=200))
    for _ in range(30):
        world.show(["new0", "new1"])
    world.popular({"new2": 12})
    world.recommender.refresh(NOW_MS)
    requests = [SlateRequest("user 0", 0, slot_seed=seed) for seed in range(4_000)]
    slates = world.recommender.recommend(world.rows, requests, NOW_MS)
    first = Counter(slate.items[0].item_id for slate in slates)
    said = {slate.items[0].item_id: slate.items[0].propensity or 0 for slate in slates}
    assert sum(said.values()) == pytest.approx(1.0, abs=1e-5)
    for item_id, propensity in said.items():
        assert first[item_id] / 4_000 == pytest.approx(propensity, abs=4 * (propensity / 4_000) ** 0.5)
    # Twelve clicks without an impression: drawn far more often than those shown 30 times for nothing.
    assert said["new2"] > 0.9


def test_the_chance_of_the_first_slot_is_that_of_the_greatest_posterior_rate() -> None:
    # No counts: all rates are alike, each item is as likely as any other.
    catalogue = Catalogue(ItemIndex(), 4)
    for i in range(4):
        catalogue.upsert(Item(item_id=f"i{i}", published_at=NOW_MS))
    counters = ItemCounters(catalogue.index, CountersConfig())
    pool = FreshPool.build(catalogue, counters, FreshSlots(slots=(1, 2), draws=10_000), NOW_MS)
    chances = {}
    table = pool.table(np.ones(4, np.bool_), 2)
    drawn, found = pool.draw(np.arange(200, dtype=np.uint64), table)
    for rows, propensities in zip(drawn.tolist(), found.tolist(), strict=True):
        assert len(set(rows)) == 2
        chances[rows[1]] = propensities[1]
    assert chances == {row: pytest.approx(0.25, abs=0.02) for row in range(4)}


def test_the_same_seed_draws_the_same_and_others_draw_others() -> None:
    world = world_of()
    assert world.ids(slot_seed=5) == world.ids(slot_seed=5)
    assert len({tuple(world.ids(slot_seed=seed)) for seed in range(20)}) > 5


def test_items_that_are_old_or_often_shown_or_not_out_yet_are_not_fresh() -> None:
    world = world_of(FreshSlots(slots=(1,), max_age_seconds=5 * 3_600.0, max_impressions=2))
    world.show(["new0"])
    world.show(["new0", "new1"])
    world.item("later", published_at=NOW_MS + HOUR_MS)
    exploration = world.slate(slot_seed=1).exploration
    assert exploration is not None
    assert sorted(exploration.pool) == ["new1", "new2", "new3", "new4"]


def test_the_pool_is_what_the_rules_and_the_user_leave() -> None:
    world = world_of(rules=RulesConfig(allowed=ItemMatch(categories=("a",)), pinned=("new3",)))
    world.act("new0", "hide")
    slate = world.slate(slot_seed=1, exclude=["new1"])
    assert slate.exploration is not None
    assert slate.exploration.pool == ["new2"]
    assert [(item.item_id, item.propensity) for item in slate.items] == [("new3", None), ("new2", 1.0)]


def test_a_pinned_item_gives_way_to_a_drawn_slot_but_stays() -> None:
    world = world_of(FreshSlots(slots=(1,)), RulesConfig(pinned=("old9",)))
    ids = world.ids(slot_seed=3)
    assert ids[0].startswith("new")
    assert ids[1] == "old9"


def test_slots_behind_the_end_of_a_slate_are_not_drawn() -> None:
    slate = world_of().slate(slot_seed=1, k=3)
    assert [item.item_id[:3] for item in slate.items] == ["old", "new", "old"]


def test_named_candidates_and_randomised_slates_have_no_slots_for_new_items() -> None:
    world = world_of()
    assert world.slate(slot_seed=1, candidates=["old1", "old2"]).exploration is None
    drawn = world.slate(slot_seed=1, draw_seed=1)
    assert drawn.exploration is None
    assert {round(1 / (item.propensity or 1)) for item in drawn.items} == {18}


def test_a_request_draws_the_same_alone_and_beside_others() -> None:
    world = world_of()
    world.act("new1", "hide", user=1)
    world.recommender.refresh(NOW_MS)
    one = world.recommender.recommend(world.rows, [SlateRequest("user 0", 0, slot_seed=3)], NOW_MS)[0]
    both = world.recommender.recommend(
        world.rows, [SlateRequest("user 1", 1, k=9, slot_seed=4), SlateRequest("user 0", 0, slot_seed=3)], NOW_MS
    )
    assert both[1] == one
    assert both[0].exploration is not None
    assert "new1" not in both[0].exploration.pool


def test_a_recommendation_without_exploration_is_still_read() -> None:
    record = RECOMMENDATION_CODEC.decode(
        b'{"recommendation_id":"r","user_id":"u","request_id":null,"generated_at":1,"expires_at":2,"surface":"s",'
        b'"degraded":false,"trigger":{"event_id":"e","topic":"t","partition":0,"offset":0},"model_version":"m",'
        b'"space_id":"s","experiment":null,"items":[]}'
    )
    assert record.exploration is None


@pytest.mark.parametrize("slots", [(3, 2), (2, 2), (0,)])
def test_slots_that_do_not_rise_are_refused(slots: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="must rise"):
        FreshSlots(slots=slots)

"""Slates of randomised users: drawn from what may be shown, with honest propensities, apart from everybody else's."""

from __future__ import annotations

import pytest

from models.exploration import RANDOMISED
from models.recommender import SlateRequest
from tests.models.recommender_world import NOW_MS, World


@pytest.fixture
def world() -> World:
    world = World(users=3)
    world.clusters({"a": 30, "b": 30, "c": 30})
    world.act("b0")
    return world


def test_a_randomised_slate_says_so_in_experiment_propensity_and_reason(world: World) -> None:
    slate = world.slate(k=5, draw_seed=1)
    assert slate.experiment == RANDOMISED == "randomised"
    assert {item.reason.kind for item in slate.items} == {"exploration"}
    # 90 items, of which the clicked one is ruled out.
    assert {round(1 / item.propensity) for item in slate.items if item.propensity} == {89}
    assert [item.position for item in slate.items] == [1, 2, 3, 4, 5]


def test_everybody_else_has_no_experiment_and_no_propensity(world: World) -> None:
    slate = world.slate(k=5)
    assert slate.experiment is None
    assert {item.propensity for item in slate.items} == {None}


def test_the_same_seed_draws_the_same_slate_and_another_one_another(world: World) -> None:
    assert world.ids(k=10, draw_seed=7) == world.ids(k=10, draw_seed=7)
    assert world.ids(k=10, draw_seed=7) != world.ids(k=10, draw_seed=8)
    assert world.ids(k=10, draw_seed=7) != world.ids(k=10)


def test_a_drawn_item_keeps_its_source_its_score_and_its_ctr(world: World) -> None:
    ranked = {item.item_id: item for item in world.slate(k=89).items}
    for item in world.slate(k=10, draw_seed=3).items:
        same = ranked[item.item_id]
        assert (item.source, item.score, item.ctr) == (same.source, same.score, same.ctr)


def test_the_rules_hold_in_a_randomised_slate(world: World) -> None:
    world.act("a3", "hide")
    for _ in range(3):
        world.show(["a4"])
    ids = world.ids(k=90, draw_seed=5, exclude=["a5"])
    assert len(ids) == len(set(ids)) == 86
    assert not {"b0", "a3", "a4", "a5"} & set(ids)


def test_of_named_candidates_those_that_the_past_rules_out_come_last(world: World) -> None:
    slate = world.slate(k=4, draw_seed=5, candidates=["b0", "a1", "a2", "c1"])
    assert slate.items[3].item_id == "b0"
    assert [round(1 / (item.propensity or 1)) for item in slate.items] == [3, 3, 3, 1]


def test_a_randomised_user_changes_no_other_slate_of_the_batch(world: World) -> None:
    world.recommender.refresh(NOW_MS + 1_000)
    alone = world.recommender.recommend(world.rows, [SlateRequest("user 0", 0)], NOW_MS + 1_000)[0]
    drawn, beside = world.recommender.recommend(
        world.rows, [SlateRequest("user 1", 1, draw_seed=2), SlateRequest("user 0", 0)], NOW_MS + 1_000
    )
    assert beside == alone
    assert drawn.experiment == RANDOMISED


def test_a_degraded_slate_is_no_experiment(world: World) -> None:
    slate = world.recommender.fallback(world.rows, [SlateRequest("user 0", 0, draw_seed=2)], NOW_MS)[0]
    assert slate.experiment is None

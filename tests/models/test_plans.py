"""Plans: which requests of a batch a stage serves together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import plans
from models.events import Filters
from models.experiments import Arm, ExperimentConfig
from models.plans import Plans
from models.slates import SlateRequest
from models.surfaces import RecommenderConfig, SurfaceConfig
from tests.models.recommender_world import NOW_MS, World

ARMS = {
    "quick": Arm(share=0.1, surface={"quotas": {"trending": 1.0}}),
    "varied": Arm(share=0.1, surface={"diversity": {"sameness": 0.5}}),
    "sure": Arm(share=0.1, ranking={"half_trust_exposure": 2.0}),
    "short": Arm(share=0.1, ranking={"clicked_window_seconds": 60.0}),
    "other": Arm(share=0.1, bundle="v2"),
    "same": Arm(share=0.1),
}
CONFIG = RecommenderConfig(
    surfaces={"default": SurfaceConfig(), "twin": SurfaceConfig(), "wide": SurfaceConfig(candidates=300)},
    experiment=ExperimentConfig(name="x", arms=ARMS),
)


def numbers(known: Plans, *arms: str | None) -> list[int]:
    return [known.number_of(None, arm) for arm in arms]


def test_surfaces_and_arms_that_do_the_same_have_one_plan() -> None:
    known = Plans(CONFIG)
    assert known.number_of("default", None) == known.number_of("twin", None) == known.number_of("unheard of", None)
    assert known.number_of("default", None) == known.number_of("default", "same")


@pytest.mark.parametrize(
    ("settings", "apart"),
    [
        (plans.offer, ["quick"]),
        (plans.order, ["varied"]),
        (plans.weights, ["sure", "short"]),
        (plans.newcomers, []),
        (plans.together, ["short", "other"]),
    ],
)
def test_a_stage_takes_only_those_apart_whose_arm_changes_what_it_reads(
    settings: plans.Settings, apart: list[str]
) -> None:
    known = Plans(CONFIG)
    arms = [None, *ARMS]
    parts = known.parts(numbers(known, *arms), settings)
    assert len(parts) == 1 + len(apart)
    assert [arms[place] for part in parts[1:] for place in part.members] == apart


@given(st.lists(st.sampled_from([None, *ARMS]), min_size=1, max_size=20))
def test_parts_hold_every_request_once_and_name_its_plan_as_far_as_the_stage_reads_it(arms: list[str | None]) -> None:
    known = Plans(CONFIG)
    own = numbers(known, *arms)
    for settings in (plans.offer, plans.order, plans.weights, plans.newcomers, plans.together):
        parts = known.parts(own, settings)
        places = np.arange(len(arms))
        assert sorted(place for part in parts for place in part.members) == places.tolist()
        for part in parts:
            assert places[part.at].tolist() == list(part.members)
            for place in part.members:
                assert settings(part.plan) == settings(known[own[place]])


def test_the_number_of_a_part_is_the_same_in_every_batch() -> None:
    known = Plans(CONFIG)
    own = numbers(known, *ARMS)
    alone = {arm: known.parts([number], plans.offer)[0].number for arm, number in zip(ARMS, own, strict=True)}
    for part in known.parts(own, plans.offer):
        assert {alone[list(ARMS)[place]] for place in part.members} == {part.number}


WISHES: list[dict[str, Any]] = [
    {},
    {"k": 3},
    {"exclude": ["a1", "new0"]},
    {"filters": Filters(categories=["odd"])},
    {"candidates": ["a2", "b3", "new1", "unheard of"]},
    {"draw_seed": 11, "slot_seed": None},
]


def world_of_arms() -> World:
    surface = SurfaceConfig.model_validate({"k": 6, "rules": {"pinned": ["b2"]}, "fresh_slots": {"slots": [2, 4]}})
    arms = ARMS | {
        "unpinned": Arm(share=0.1, surface={"rules": {"pinned": [], "blocked_items": ["a0"]}}),
        "later": Arm(share=0.1, surface={"fresh_slots": {"slots": [3]}}),
        "dull": Arm(share=0.1, surface={"diversity": {"popularity_debias": 1.0, "max_per_category": 2}}),
    }
    config = RecommenderConfig(surfaces={"default": surface}, experiment=ExperimentConfig(name="x", arms=arms))
    world = World(users=6, config=config)
    world.clusters({"a": 30, "b": 30, "c": 30})
    for n in range(12):
        world.item(f"new{n}", published_at=NOW_MS - n, categories=["odd" if n % 2 else "even"])
    world.popular({"a3": 5, "b4": 3, "c5": 9, "new3": 2})
    for user in range(5):
        world.act(f"{'abc'[user % 3]}{user}", user=user)
        world.show([f"a{user}", f"b{user + 7}", "c9"], user=user)
    world.recommender.refresh(NOW_MS + 1_000)
    return world


@pytest.fixture(scope="module")
def arms_world() -> World:
    return world_of_arms()


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5), st.sampled_from([None, *ARMS, "unpinned", "later", "dull"]), st.sampled_from(WISHES)
        ),
        min_size=2,
        max_size=9,
    )
)
def test_a_request_gets_the_same_slate_alone_and_beside_those_of_other_arms(
    arms_world: World, wanted: list[tuple[int, str | None, dict[str, Any]]]
) -> None:
    requests = [
        SlateRequest(f"user {user}", user, arm=arm, **({"slot_seed": user + 1} | wishes))
        for user, arm, wishes in wanted
    ]
    recommender, now_ms = arms_world.recommender, NOW_MS + 1_000
    together = recommender.recommend(arms_world.rows, requests, now_ms)
    assert together == [recommender.recommend(arms_world.rows, [request], now_ms)[0] for request in requests]


def test_the_values_of_a_surface_are_those_of_the_arm_sizes_included() -> None:
    arms = {"more": Arm(share=0.5, surface={"k": 9})}
    surfaces = {"default": SurfaceConfig(k=5), "long": SurfaceConfig(k=50)}
    known = Plans(RecommenderConfig(surfaces=surfaces, experiment=ExperimentConfig(name="x", arms=arms)))
    asked = [(None, None), ("long", None), ("unheard of", None), (None, "more"), ("long", "more"), ("long", None)]
    assert [known.surface(*each).k for each in asked] == [5, 50, 5, 9, 9, 50]

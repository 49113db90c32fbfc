"""Arms that name a bundle: its model scores for them and their slates name it; retrieval is that of all."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
from pydantic import ValidationError

from models.bootstrap import Space
from models.catalogue import SpaceVectors
from models.ctr import CtrScorer
from models.experiments import Arm, ExperimentConfig
from models.features import FeatureConfig
from models.live_features import IndexedVectors, raw_from_state
from models.manifest import BOOTSTRAP_VERSION
from models.ranking import RankingConfig
from models.recommender import Recommender, RecommenderConfig, SlateRequest, SurfaceConfig
from models.retrieval import VectorIndex
from models.serving import ServingModel
from models.user_state import UserReader
from tests.models.recommender_world import DIM, NOW_MS, SPACE, World
from tests.models.test_model_slates import LATER_MS, scorer

EXPERIMENT = ExperimentConfig(
    name="heads",
    arms={
        "first": Arm(share=0.3, bundle="v1"),
        "second": Arm(share=0.3, bundle="v2"),
        "same": Arm(share=0.3, bundle="v2", surface={"k": 7}),
    },
)


def version(world: World, name: str, head: CtrScorer | None, space_id: str = "s") -> ServingModel:
    """Return a version in the world's own space."""
    space = Space(space_id, "e", np.eye(DIM, dtype=np.float32))
    features = FeatureConfig() if head else None
    return ServingModel(name, 1, space, head, features, world.catalogue.space_vectors, world.index)


@pytest.fixture
def world() -> World:
    world = World(users=3, config=RecommenderConfig(experiment=EXPERIMENT))
    world.clusters({"a": 30, "b": 30, "c": 30})
    world.recommender._users = UserReader(world.state, world.catalogue, SPACE)
    world.popular({"b7": 9, "c3": 5, "a1": 2})
    return world


def test_an_arm_is_scored_by_the_bundle_that_it_names_and_its_slate_names_that(world: World) -> None:
    arms = {
        "v1": version(world, "v1", scorer(clicks_second=1.0)),
        "v2": version(world, "v2", scorer(clicks_second=-1.0)),
    }
    world.recommender.use(version(world, "v0", None), arms)
    slates = {arm: world.slate(k=90, arm=arm) for arm in ("first", "second", "control")}
    assert {arm: slate.model_version for arm, slate in slates.items()} == {
        "first": "v1",
        "second": "v2",
        "control": "v0",
    }
    assert [i.item_id for i in slates["first"].items[:3]] == ["b7", "c3", "a1"]
    assert {i.item_id for i in slates["second"].items[-3:]} == {"b7", "c3", "a1"}


def test_arms_of_one_bundle_with_other_settings_each_keep_theirs(world: World) -> None:
    world.recommender.use(version(world, "v0", None), {"v2": version(world, "v2", scorer(clicks_second=-1.0))})
    slates = [world.slate(arm="second"), world.slate(arm="same")]
    assert [(len(slate.items), slate.model_version) for slate in slates] == [(20, "v2"), (7, "v2")]


def test_an_arm_whose_bundle_is_not_there_is_served_by_the_live_one_and_names_it(world: World) -> None:
    live = version(world, "v0", scorer(clicks_second=1.0))
    world.recommender.use(live, {})
    assert world.slate(arm="first", k=20).model_version == "v0"
    assert world.slate(arm="first", k=20).items == world.slate(k=20).items


def test_a_bundle_that_is_taken_away_from_an_arm_scores_no_more(world: World) -> None:
    live = version(world, "v0", None)
    world.recommender.use(live, {"v1": version(world, "v1", scorer())})
    assert world.slate(arm="first").model_version == "v1"
    world.recommender.use(live)
    assert world.slate(arm="first").model_version == "v0"


def test_users_of_several_arms_in_one_batch_get_what_each_gets_alone(world: World) -> None:
    world.act("b0", user=1)
    arms = {
        "v1": version(world, "v1", scorer(clicks_second=1.0)),
        "v2": version(world, "v2", scorer(sim_short=2.0, clicks_second=-1.0)),
    }
    world.recommender.use(version(world, "v0", scorer(clicks_first=0.5)), arms)
    world.recommender.refresh(LATER_MS)
    wanted = [(0, "first"), (1, "second"), (2, "control"), (1, "first"), (1, "same"), (0, "second")]
    requests = [SlateRequest(f"user {user}", user, arm=arm) for user, arm in wanted]
    together = world.recommender.recommend(world.rows, requests, LATER_MS)
    alone = [world.recommender.recommend(world.rows, [request], LATER_MS)[0] for request in requests]
    assert [slate.model_version for slate in together] == ["v1", "v2", "v0", "v1", "v2", "v2"]
    for both, one in zip(together, alone, strict=True):
        assert [item.item_id for item in both.items] == [item.item_id for item in one.items]
        assert both.model_version == one.model_version


def turned(world: World, name: str, head: CtrScorer) -> ServingModel:
    """Return a version of another space: the items of a lie there where c lies in the live one, and the reverse."""
    turn = np.eye(DIM, dtype=np.float32)
    turn[[0, 2]] = turn[[2, 0]]
    vectors = SpaceVectors(DIM)
    rows = np.arange(len(world.catalogue.index), dtype=np.int32)
    vectors.set_many(rows, world.catalogue.vectors[rows] @ turn, np.zeros(len(rows), np.uint64))
    return ServingModel(name, 1, Space("t", "e", turn), head, FeatureConfig(), vectors, VectorIndex(DIM))


def log_odds(world: World, model: ServingModel, rows: npt.NDArray[np.int32]) -> Mapping[int, float]:
    """Return what a model says of catalogue rows for user 0, everything read in its own space."""
    reader = UserReader(world.state, IndexedVectors(world.catalogue.index, model.vectors), model.space_hash)
    raw = raw_from_state(
        world.rows[:1],
        rows[None],
        np.array([LATER_MS]),
        world.catalogue,
        world.counters,
        reader,
        RankingConfig(),
        vectors=model.vectors,
    )
    recents = world.catalogue.index.rows_by_hash(raw.recent_items[0].tolist(), 16)[None]
    found = model.log_odds(raw, rows[None], recents, RankingConfig())[0]
    return dict(zip(rows.tolist(), found.tolist(), strict=True))


def test_a_bundle_of_another_space_scores_by_vectors_and_user_vectors_of_that_space(world: World) -> None:
    world.act("a0")
    live = version(world, "v0", scorer())
    # The row is of the live space: its vectors must not be taken for such of the other one.
    world.rows["space_id"] = live.space_hash
    model = turned(world, "v1", scorer(sim_short=3.0, sim_short_rank=0.5))
    # One item lies elsewhere among the others: a turn alone changes no similarity.
    model.vectors.set_many(
        world.catalogue.index.rows(["c3"]), np.eye(DIM, dtype=np.float32)[2:3], np.zeros(1, np.uint64)
    )
    world.recommender.use(live, {"v1": model})
    slate = world.slate(arm="first", k=30)
    expected = log_odds(
        world, model, world.catalogue.index.rows([i.item_id for i in world.slate(arm="first", k=90).items])
    )
    assert slate.items[0].item_id == "c3"
    for item in slate.items:
        assert item.score == pytest.approx(expected[world.catalogue.index.row(item.item_id)], abs=1e-5)


def test_candidates_of_an_arm_are_those_of_the_live_space(world: World) -> None:
    world.recommender.reconfigure(
        RecommenderConfig(surfaces={"default": SurfaceConfig(candidates=20)}, experiment=EXPERIMENT)
    )
    world.act("c0")
    sources = {}
    model = turned(world, "v1", scorer())
    world.recommender.use(version(world, "v0", scorer()), {"v1": model})
    for arm in ("control", "first"):
        sources[arm] = {item.item_id: item.source for item in world.slate(arm=arm, k=10).items}
    assert sources["first"] == sources["control"]
    assert {name[0] for name, source in sources["first"].items() if source == "short_term"} == {"c"}


def test_the_bootstrap_as_an_arm_is_the_hand_set_score_in_the_live_space(world: World) -> None:
    config = RecommenderConfig(
        experiment=ExperimentConfig(name="e", arms={"by-hand": Arm(share=0.5, bundle=BOOTSTRAP_VERSION)})
    )
    world.recommender.reconfigure(config)
    world.act("a0")
    by_hand = version(world, BOOTSTRAP_VERSION, None)
    world.recommender.use(by_hand)
    expected = world.slate(k=20).items
    world.recommender.use(version(world, "v1", scorer(clicks_second=-1.0)), {BOOTSTRAP_VERSION: by_hand})
    slate = world.slate(k=20, arm="by-hand")
    assert slate.items == expected
    assert slate.model_version == BOOTSTRAP_VERSION


def test_a_degraded_slate_names_no_model_of_an_arm(world: World) -> None:
    world.recommender.use(version(world, "v0", None), {"v1": version(world, "v1", scorer())})
    degraded = world.recommender.fallback(world.rows, [SlateRequest("user 0", 0, arm="first")], NOW_MS)[0]
    assert degraded.model_version is None


def test_reasons_of_an_arm_are_what_its_own_model_looked_at(world: World) -> None:
    world.act("b0")
    blind = scorer()
    tensors = {name: tensor.copy() for name, tensor in blind.tensors.items()}
    tensors["attention.nothing"][0] = 9.0
    arms = {"v1": version(world, "v1", CtrScorer(blind.config, tensors)), "v2": version(world, "v2", blind)}
    world.recommender.use(version(world, "v0", None), arms)
    named = {arm: world.slate(arm=arm, candidates=["b1"]).items[0].reason.item_ids for arm in ("first", "second")}
    assert named == {"first": None, "second": ["b0"]}


def test_bundles_of_arms_are_named_once_and_only_while_the_experiment_runs() -> None:
    assert EXPERIMENT.bundles == ("v1", "v2")
    assert EXPERIMENT.model_copy(update={"name": ""}).bundles == ()


@pytest.mark.parametrize("name", ["../v1", "a b", "v1.partial", "-v1"])
def test_a_bundle_that_cannot_be_a_version_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="cannot name a bundle"):
        Arm(share=0.1, bundle=name)


def test_rows_read_without_a_space_take_no_arm_of_another_one(world: World) -> None:
    bare = Recommender(RecommenderConfig(), world.catalogue, world.counters, world.index)
    with pytest.raises(TypeError, match="without a space"):
        bare.use(version(world, "v0", None), {"v1": turned(world, "v1", scorer())})

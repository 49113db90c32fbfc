"""Slates that a CTR model ranks: the score is its log-odds, the rules and the rest stay as they are."""

from __future__ import annotations

import numpy as np
import pytest

from models.bootstrap import Space
from models.catalogue import SpaceVectors
from models.ctr import CtrConfig, CtrScorer, tensor_shapes
from models.errors import ModelError
from models.events import ACTIONS, ActionName
from models.exploration import RANDOMISED
from models.features import COLUMNS, FeatureConfig
from models.live_features import raw_from_state
from models.ranking import RankingConfig
from models.recommender import RecommenderConfig, SlateRequest
from models.retrieval import VectorIndex
from models.serving import ServingModel
from models.user_row import NEGATIVE, POSITIVE
from models.user_state import UserReader
from tests.models.recommender_world import DIM, NOW_MS, SPACE, World, is_of, unit_vector

LATER_MS = NOW_MS + 1_000


def scorer(**weights: float) -> CtrScorer:
    """Return a CTR model whose raw logit is the sum of the named columns times their weights, CTR about 2 %."""
    config = CtrConfig(features=len(COLUMNS), hidden=(1,), activation="relu")
    tensors = {name: np.zeros(shape) for name, shape in tensor_shapes(config).items()}
    tensors["feature_std"] = np.ones(len(COLUMNS))
    for name, weight in weights.items():
        tensors["head.features"][COLUMNS.index(name), 0] = weight
    # The rectifier passes what is positive: 50 is added and taken away again.
    tensors["head.bias"][:] = 50.0
    tensors["head.out"][:] = 1.0
    tensors["head.base"][:] = -50.0
    tensors["calibration"] = np.array([1.0, -4.0])
    return CtrScorer(config, tensors)


def serve(world: World, model: CtrScorer | None, version: str = "v1") -> ServingModel:
    """Have the world's recommender serve with ``model``."""
    served = ServingModel(
        version,
        1,
        Space("s", "e", np.eye(DIM, dtype=np.float32)),
        model,
        FeatureConfig() if model else None,
        world.catalogue.space_vectors,
        world.index,
    )
    world.recommender.use(served)
    return served


@pytest.fixture
def world() -> World:
    world = World(users=3)
    world.clusters({"a": 30, "b": 30, "c": 30})
    world.recommender._users = UserReader(world.state, world.catalogue, SPACE)
    return world


def test_the_model_and_not_the_hand_set_score_gives_the_order(world: World) -> None:
    world.popular({"b7": 9, "c3": 5, "a1": 2})
    assert world.ids(k=3) == ["b7", "c3", "a1"]
    serve(world, scorer(clicks_second=-1.0))
    assert not {"b7", "c3", "a1"} & set(world.ids(k=80))


def test_score_and_ctr_are_the_log_odds_of_the_model_for_the_live_state(world: World) -> None:
    world.act("b0")
    world.popular({"b7": 9, "c3": 5})
    served = serve(world, scorer(clicks_second=0.5, sim_short=2.0, sim_short_rank=0.3))
    slate = world.slate(k=5)
    rows = world.catalogue.index.rows([item.item_id for item in world.slate(k=90).items])[None]
    reader = UserReader(world.state, world.catalogue, served.space_hash)
    raw = raw_from_state(
        world.rows[:1],
        rows,
        np.array([LATER_MS]),
        world.catalogue,
        world.counters,
        reader,
        RankingConfig(),
    )
    recents = world.catalogue.index.rows_by_hash(raw.recent_items[0].tolist(), 16)[None]
    expected = dict(zip(rows[0].tolist(), served.log_odds(raw, rows, recents, RankingConfig())[0], strict=True))
    for item in slate.items:
        log_odds = expected[world.catalogue.index.row(item.item_id)]
        assert item.score == pytest.approx(log_odds, abs=1e-5)
        assert item.ctr == pytest.approx(1 / (1 + np.exp(-log_odds)), rel=1e-4)


def test_the_ctr_of_a_calibrated_model_is_a_probability_and_not_the_hand_set_one(world: World) -> None:
    serve(world, scorer())
    # A constant logit of 0 and a calibration of −4.
    assert {round(item.ctr, 4) for item in world.slate(k=5).items} == {0.018}


def test_a_query_moves_the_order_but_not_the_ctr(world: World) -> None:
    serve(world, scorer())
    plain = {item.ctr for item in world.slate(k=90).items}
    slate = world.slate(k=10, query_vector=unit_vector(0, 0, 1))
    assert is_of("c", [item.item_id for item in slate.items]) == 10
    assert {item.ctr for item in slate.items} == plain
    assert slate.items[0].score > slate.items[9].score


def test_a_profile_speaks_for_a_user_without_a_vector(world: World) -> None:
    serve(world, scorer())
    assert is_of("b", world.ids(k=10, profile_vector=unit_vector(0, 1))) == 10


def test_the_weight_of_a_query_is_a_setting() -> None:
    world = World(config=RecommenderConfig(ranking=RankingConfig(query_log_odds=0.0)))
    world.clusters({"a": 3, "b": 3})
    serve(world, scorer())
    scores = {round(item.score, 5) for item in world.slate(k=6, query_vector=unit_vector(0, 1)).items}
    assert scores == {-4.0}


def test_the_rules_hold_whatever_the_model_says(world: World) -> None:
    serve(world, scorer(sim_short=5.0))
    world.act("b0")
    world.act("b1", "hide")
    for _ in range(3):
        world.show(["b2"])
    assert not {"b0", "b1", "b2", "b3"} & set(world.ids(k=90, exclude=["b3"]))


def test_the_penalty_for_being_shown_is_the_hand_set_scores_alone(world: World) -> None:
    world.show(["a3"], at_ms=NOW_MS - 1_000)
    serve(world, scorer())
    assert {round(item.score, 5) for item in world.slate(k=90).items} == {-4.0}


def test_a_named_candidate_that_the_past_rules_out_comes_last(world: World) -> None:
    world.act("b0")
    serve(world, scorer(sim_short=5.0))
    assert world.ids(k=3, candidates=["b0", "a1", "c1"])[2] == "b0"


def test_a_request_that_names_no_candidate_gets_an_empty_slate(world: World) -> None:
    serve(world, scorer())
    assert world.slate(k=3, candidates=[]).items == []


def test_candidates_come_from_the_models_own_index_and_vectors(world: World) -> None:
    world.act("a0")
    other, index = SpaceVectors(DIM), VectorIndex(DIM)
    # In the other space the items of c lie where the user's clicked item lies.
    for name, direction in (("a", 0), ("b", 1), ("c", 0)):
        for i in range(30) if name != "a" else range(1):
            row = world.catalogue.index.row(f"{name}{i}")
            other.set(row, np.eye(DIM)[direction], 1)
            index.add(np.array([row], np.int32), other.vectors[row : row + 1])
    model = ServingModel(
        "v2", 2, Space("t", "e", np.eye(DIM, dtype=np.float32)), scorer(sim_short=5.0), FeatureConfig(), other, index
    )
    world.recommender.use(model)
    assert is_of("c", world.ids(k=10)) == 10


def test_back_on_the_bootstrap_the_slates_are_as_before(world: World) -> None:
    world.popular({"a3": 50})
    world.act("b0")
    serve(world, None, "bootstrap-0")
    before = world.slate(k=20)
    serve(world, scorer(clicks_second=3.0))
    assert world.slate(k=20) != before
    serve(world, None, "bootstrap-0")
    assert world.slate(k=20) == before


def test_scores_that_are_not_finite_make_no_slate(world: World) -> None:
    model = scorer(clicks_second=1.0)
    model.log_odds = lambda logits: np.full(logits.shape, np.nan, np.float32)  # type: ignore[method-assign]
    serve(world, model)
    with pytest.raises(ModelError, match="not finite"):
        world.slate(k=5)
    # The pipeline answers such an error with this one.
    assert len(world.recommender.fallback(world.rows, [SlateRequest("user 0", 0, k=5)], LATER_MS)[0].items) == 5


def test_a_randomised_user_is_drawn_under_a_model_too(world: World) -> None:
    serve(world, scorer(clicks_second=1.0))
    slate = world.slate(k=5, draw_seed=3)
    assert slate.experiment == RANDOMISED
    assert {round(1 / item.propensity) for item in slate.items if item.propensity} == {90}


def test_a_request_gets_the_same_slate_alone_and_in_a_batch(world: World) -> None:
    world.act("b0", user=1)
    world.act("c0", user=2)
    world.popular({"a3": 5, "b3": 5, "c3": 5})
    serve(world, scorer(clicks_second=0.5, sim_short=1.0, clicks_first_gap=0.2, ctr_first_rank=0.1))
    requests = [SlateRequest(f"user {n}", n, k=k) for n, k in ((0, 5), (1, 20), (2, 7))]
    world.recommender.refresh(LATER_MS)
    together = world.recommender.recommend(world.rows, requests, LATER_MS)
    alone = [world.recommender.recommend(world.rows, [request], LATER_MS)[0] for request in requests]
    assert [[i.item_id for i in s.items] for s in together] == [[i.item_id for i in s.items] for s in alone]


def doubting() -> World:
    """Return a world whose model is believed in proportion to exposure, and wants what was shown least of all."""
    world = World(config=RecommenderConfig(ranking=RankingConfig(half_trust_exposure=2.0, shown_limit=255)), users=3)
    world.clusters({"a": 30})
    world.recommender._users = UserReader(world.state, world.catalogue, SPACE)
    for _ in range(9):
        world.show(["a3", "a4"], user=1)
    world.act("a3", user=2)
    world.act("a4", user=2)
    serve(world, scorer(impressions_first=-0.2))
    return world


def test_what_is_shown_now_stands_before_what_the_model_only_extrapolates_to() -> None:
    assert set(doubting().ids(k=2)) == {"a3", "a4"}


def test_named_candidates_are_ordered_by_the_model_alone() -> None:
    assert doubting().ids(k=2, candidates=["a3", "a7"]) == ["a7", "a3"]


def test_doubt_moves_the_order_and_not_the_ctr() -> None:
    world = doubting()
    doubted = {item.item_id: item.ctr for item in world.slate(k=30).items}
    world.recommender.reconfigure(RecommenderConfig(ranking=RankingConfig(shown_limit=255)))
    plain = world.slate(k=30).items
    assert plain[-1].item_id in {"a3", "a4"}
    assert doubted == {item.item_id: item.ctr for item in plain}


def looking(nothing: float = 0.0, **kinds: float) -> CtrScorer:
    """Return a CTR model whose attention depends on the kind of action alone, by its bias, e.g. ``purchase=4.0``."""
    model = scorer()
    tensors = {name: tensor.copy() for name, tensor in model.tensors.items()}
    for name, bias in kinds.items():
        tensors["attention.kind"][ACTIONS.index(name) + 1 | (NEGATIVE if name == "hide" else POSITIVE)] = bias
    tensors["attention.nothing"][0] = nothing
    return CtrScorer(model.config, tensors)


def acting(world: World, *acts: tuple[str, ActionName]) -> World:
    for i, (item_id, action) in enumerate(acts):
        world.act(item_id, action, at_ms=NOW_MS + 10 * i)
    return world


def test_the_reason_names_the_item_that_the_model_looked_at_and_not_the_nearest(world: World) -> None:
    acting(world, ("b0", "purchase"), ("b1", "click"), ("b2", "click"))
    serve(world, None)
    near = [f"b{i}" for i in range(3, 30)]
    assert {tuple(item.reason.item_ids or ()) for item in world.slate(candidates=near).items} >= {("b1",), ("b2",)}
    serve(world, looking(purchase=4.0))
    slate = world.slate(candidates=near)
    assert {tuple(item.reason.item_ids or ()) for item in slate.items} == {("b0",)}
    assert slate.items[0].reason.text == "Because you bought “Title of b0”"


def test_the_reason_names_by_weight_those_that_have_half_of_the_highest(world: World) -> None:
    acting(world, ("b0", "share"), ("b1", "purchase"), ("b2", "click"))
    # Of 1 + e⁰ + e^0.9 + e^1.5: 0.49 to the purchase, 0.27 to the share, 0.11 to the click.
    serve(world, looking(purchase=1.5, share=0.9))
    reason = world.slate(candidates=["b7"]).items[0].reason
    assert reason.item_ids == ["b1", "b0"]
    assert reason.text == "Because you bought “Title of b1”"


def test_of_many_items_that_the_model_looked_at_alike_the_three_newest_are_named(world: World) -> None:
    acting(world, *((f"b{i}", "click") for i in range(5)))
    serve(world, looking())
    assert world.slate(candidates=["b7"]).items[0].reason.item_ids == ["b4", "b3", "b2"]


def test_no_item_is_named_where_the_model_looked_at_none(world: World) -> None:
    acting(world, ("b0", "click"))
    serve(world, looking(nothing=4.0))
    reason = world.slate(candidates=["b1"]).items[0].reason
    assert (reason.kind, reason.item_ids) == ("trending", None)


def test_no_item_is_named_where_the_model_looked_at_what_the_user_hid(world: World) -> None:
    acting(world, ("b0", "hide"), ("b1", "click"))
    # Weights of 0.58, 0.21 and 0.21: the click is above the least, and below half of the highest.
    serve(world, looking(hide=1.0))
    assert world.slate(candidates=["b2"]).items[0].reason.item_ids is None


def test_an_item_that_the_model_looked_at_and_that_is_unlike_is_not_named(world: World) -> None:
    acting(world, ("a0", "click"))
    serve(world, looking())
    reasons = {i.item_id: i.reason.item_ids for i in world.slate(candidates=["a1", "c1"]).items}
    assert reasons == {"a1": ["a0"], "c1": None}

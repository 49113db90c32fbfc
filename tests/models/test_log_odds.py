"""What a version says of items, as log-odds: the hand-set score of the bootstrap, and a learned model."""

from __future__ import annotations

import numpy as np
import pytest

from models.bootstrap import Space
from models.catalogue import SpaceVectors
from models.ctr import CtrConfig, CtrScorer, tensor_shapes
from models.features import COLUMNS, FeatureConfig, RawSlates
from models.log_odds import hand_set_log_odds, learned_log_odds, probability, trusted_log_odds
from models.ranking import RankingConfig
from models.retrieval import VectorIndex
from models.serving import ServingModel

RANKING = RankingConfig()
TRUSTING = RankingConfig(half_trust_exposure=2.0)
NO_ROWS = np.full((1, 16), -1, np.int32)


def slates(sims: list[float], clicks: list[float], impressions: list[float], shown: list[int]) -> RawSlates:
    """Return one slate: similarity to the short-term taste, decayed counts, times shown lately."""
    raw = RawSlates.empty(1, len(sims))
    raw.valid[:] = True
    raw.sims[0, :, 0] = sims
    raw.counters[0, :, 1, 0] = np.log1p(impressions)
    raw.counters[0, :, 1, 1] = np.log1p(clicks)
    raw.shown_counts[0] = shown
    return raw


def scorer(seed: int = 0, scale: float = 0.3) -> CtrScorer:
    """Return a CTR model with random weights."""
    config = CtrConfig(features=len(COLUMNS))
    random = np.random.default_rng(seed)
    tensors = {name: scale * random.normal(size=shape) for name, shape in tensor_shapes(config).items()}
    tensors["feature_std"] = np.ones(len(COLUMNS))
    tensors["calibration"] = np.array([0.5, -2.0])
    return CtrScorer(config, tensors)


@pytest.mark.parametrize(
    "better",
    [
        {"sims": [0.5, 0.1]},
        {"clicks": [20.0, 2.0]},
        {"impressions": [50.0, 500.0]},
        {"shown": [0, 2]},
    ],
)
def test_the_hand_set_log_odds_follow_each_part_of_the_score(better: dict[str, list[float]]) -> None:
    plain = {"sims": [0.1, 0.1], "clicks": [2.0, 2.0], "impressions": [100.0, 100.0], "shown": [0, 0]}
    found = hand_set_log_odds(slates(**(plain | better)), RANKING)  # type: ignore[arg-type]
    assert found[0, 0] > found[0, 1]


def test_the_sigmoid_of_the_hand_set_log_odds_is_near_the_smoothed_ctr() -> None:
    raw = slates([0, 0, 0], [100, 100, 100], [2_000, 2_000, 2_000], [0, 0, 0])
    # (100 + 20 · 0.05) / (2,000 + 20)
    assert probability(hand_set_log_odds(raw, RANKING)) == pytest.approx(101 / 2_020, rel=2e-2)


def test_padding_changes_no_hand_set_log_odds_and_has_none() -> None:
    raw = slates([0.5, 0.1], [20, 2], [100, 100], [0, 1])
    padded = RawSlates.empty(1, 5)
    for name in ("valid", "sims", "counters", "shown_counts"):
        getattr(padded, name)[:, :2] = getattr(raw, name)
    found = hand_set_log_odds(padded, RANKING)
    assert found[:, :2] == pytest.approx(hand_set_log_odds(raw, RANKING))
    assert found[0, 2:].tolist() == [0, 0, 0]


def test_a_slate_without_items_is_no_error() -> None:
    assert hand_set_log_odds(RawSlates.empty(2, 0), RANKING).shape == (2, 0)
    assert hand_set_log_odds(RawSlates.empty(2, 3), RANKING).tolist() == [[0, 0, 0]] * 2


def test_an_item_without_a_row_is_scored_without_a_vector() -> None:
    vectors = SpaceVectors(64)
    vectors.set(0, np.eye(64)[0], 1)
    raw = slates([0, 0], [0, 0], [0, 0], [0, 0])
    found = learned_log_odds(scorer(), FeatureConfig(), vectors, raw, np.array([[0, -1]], np.int32), NO_ROWS)
    assert np.isfinite(found).all()
    assert found[0, 0] != found[0, 1]


def test_a_free_place_of_the_ring_counts_for_nothing() -> None:
    vectors = SpaceVectors(64)
    for row in range(3):
        vectors.set(row, np.eye(64)[row], 1)
    raw = slates([0, 0], [0, 0], [0, 0], [0, 0])
    rows = np.array([[0, 1]], np.int32)
    model = scorer()
    without = learned_log_odds(model, FeatureConfig(), vectors, raw, rows, NO_ROWS)
    one = NO_ROWS.copy()
    one[0, 0] = 2
    assert learned_log_odds(model, FeatureConfig(), vectors, raw, rows, one).tolist() == without.tolist()
    raw.recent_codes[0, 0] = 0x11
    assert learned_log_odds(model, FeatureConfig(), vectors, raw, rows, one).tolist() != without.tolist()


def test_a_version_without_a_scorer_says_the_hand_set_score_and_one_with_it_the_learned_one() -> None:
    space = Space("s", "e", np.eye(64, dtype=np.float32))
    raw = slates([0.5, 0.1], [20, 2], [100, 100], [0, 0])
    rows = np.array([[0, 1]], np.int32)
    index, vectors = VectorIndex(64), SpaceVectors(64)
    bootstrap = ServingModel("bootstrap-0", 0, space, None, None, vectors, index)
    assert bootstrap.log_odds(raw, rows, NO_ROWS, RANKING).tolist() == hand_set_log_odds(raw, RANKING).tolist()
    model = scorer()
    trained = ServingModel("v1", 1, space, model, FeatureConfig(), vectors, index)
    expected = learned_log_odds(model, FeatureConfig(), vectors, raw, rows, NO_ROWS)
    assert trained.log_odds(raw, rows, NO_ROWS, RANKING).tolist() == expected.tolist()


def test_many_slates_score_as_each_of_them_alone() -> None:
    random = np.random.default_rng(3)
    vectors = SpaceVectors(64)
    for row in range(40):
        vectors.set(row, random.normal(size=64), 1)
    raw = RawSlates.empty(50, 200)
    raw.valid[:] = random.random((50, 200)) < 0.9
    raw.counters[:] = random.gamma(1.0, 2.0, raw.counters.shape)
    raw.sims[:] = random.uniform(-1, 1, raw.sims.shape)
    raw.recent_codes[:, :3] = 0x11
    rows = random.integers(0, 40, (50, 200)).astype(np.int32)
    recents = random.integers(-1, 40, (50, 16)).astype(np.int32)
    model = scorer()
    together = learned_log_odds(model, FeatureConfig(), vectors, raw, rows, recents)
    for slate in range(50):
        at = slice(slate, slate + 1)
        alone = learned_log_odds(model, FeatureConfig(), vectors, raw.take(at), rows[at], recents[at])
        assert together[at] == pytest.approx(alone, abs=1e-4)
    assert not together[~raw.valid].any()


def exposed(impressions: list[float], clicks: list[float] | None = None) -> RawSlates:
    """Return one slate: impressions at the shortest half-life, and clicks at the next one."""
    n = len(impressions)
    raw = slates([0.0] * n, clicks or [0.0] * n, [100.0] * n, [0] * n)
    raw.counters[0, :, 0, 0] = np.log1p(impressions)
    return raw


def test_without_a_half_trust_exposure_the_models_log_odds_are_the_very_same_array() -> None:
    learned = np.array([[-1.0, -3.0]], np.float32)
    assert trusted_log_odds(learned, exposed([0, 50]), RANKING) is learned


def test_an_item_that_others_do_not_show_needs_more_than_the_models_praise() -> None:
    learned = np.array([[-1.0, -3.0]], np.float32)
    found = trusted_log_odds(learned, exposed([0, 50]), TRUSTING)
    assert found[0, 0] < found[0, 1]


def test_a_usual_exposure_is_believed_by_a_third_where_half_trust_needs_twice_it() -> None:
    # Both were shown 50 times, so that usual is 50: w = 50.1 / 150.1; the hand-set odds count three tenths.
    raw, learned = exposed([50, 50]), np.array([[-1.0, -3.0]], np.float32)
    hand = np.exp(hand_set_log_odds(raw, TRUSTING))
    w = 50.1 / 150.1
    expected = np.log(w * np.exp(learned) + (1 - w) * 0.3 * hand)
    assert trusted_log_odds(learned, raw, TRUSTING) == pytest.approx(expected, abs=2e-3)


def test_items_that_nobody_is_shown_keep_the_hand_set_order_beside_one_that_everybody_is_shown() -> None:
    learned = np.array([[-3.0, -1.0, -2.0]], np.float32)
    found = trusted_log_odds(learned, exposed([0, 0, 5_000], clicks=[9, 0, 0]), TRUSTING)
    assert found[0, 0] > found[0, 1]


def test_where_nothing_is_shown_lately_the_model_is_believed_in_full() -> None:
    learned = np.array([[-1.0, -3.0]], np.float32)
    assert trusted_log_odds(learned, exposed([0, 0]), TRUSTING) == pytest.approx(learned, abs=1e-6)


def test_a_hundred_times_the_traffic_gives_the_same_order_of_trust() -> None:
    learned = np.array([[-2.0, -2.4, -3.0, -1.0]], np.float32)
    few = trusted_log_odds(learned, exposed([10, 20, 40, 5]), TRUSTING)
    many = trusted_log_odds(learned, exposed([1_000, 2_000, 4_000, 500]), TRUSTING)
    assert many == pytest.approx(few, abs=0.05)


def test_padding_changes_no_trusted_log_odds_and_has_none() -> None:
    raw, learned = exposed([3, 40]), np.array([[-1.0, -3.0]], np.float32)
    padded = RawSlates.empty(1, 5)
    for name in ("valid", "sims", "counters", "shown_counts"):
        getattr(padded, name)[:, :2] = getattr(raw, name)
    padded.counters[:, 2:] = 5.0
    found = trusted_log_odds(np.pad(learned, ((0, 0), (0, 3))), padded, TRUSTING)
    assert found[:, :2] == pytest.approx(trusted_log_odds(learned, raw, TRUSTING), abs=1e-6)
    assert found[0, 2:].tolist() == [0, 0, 0]


def test_slates_without_items_are_trusted_without_an_error() -> None:
    assert trusted_log_odds(np.zeros((2, 0), np.float32), RawSlates.empty(2, 0), TRUSTING).shape == (2, 0)


def test_the_hand_set_part_speaks_of_the_models_level_of_ctr() -> None:
    learned, raw = np.array([[-5.0, -5.0]], np.float32), exposed([0, 50])
    raw.counters[0, 0] = 0
    rare = FeatureConfig(prior_ctr=(0.01, 0.01, 0.01, 0.01))
    assert trusted_log_odds(learned, raw, TRUSTING, rare)[0, 0] < trusted_log_odds(learned, raw, TRUSTING)[0, 0] - 0.5

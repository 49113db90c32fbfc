"""Off-policy estimates: by hand, on bandits whose truth is known, and on the Open Bandit log."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.csv as csv
import pytest

from models.errors import NoSupportError
from models.off_policy import Estimate, SupportConfig, doubly_robust, self_normalised

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "obd-small"
open_bandit = pytest.mark.skipif(not DATA.is_dir(), reason="the Open Bandit log is not at ../shared/data")
ANY = SupportConfig(least_effective=1.0, least_share=0.1)
RATES = np.array([0.02, 0.05, 0.10, 0.01])
LOGGING = np.array([0.4, 0.3, 0.1, 0.2])
JUDGED = np.array([0.1, 0.2, 0.6, 0.1])
TRUTH = float(RATES @ JUDGED)  # 0.073


def bandit(seed: int, n: int = 4_000) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    generator = np.random.default_rng(seed)
    arms = generator.choice(4, n, p=LOGGING)
    return arms, (generator.random(n) < RATES[arms]).astype(np.float64)


def test_self_normalised_value_by_hand() -> None:
    # Weights 2, 0.5, 1: (2·1 + 0.5·0 + 1·1) / 3.5.
    found = self_normalised([1, 0, 1], [0.25, 0.5, 0.5], [0.5, 0.25, 0.5], support=ANY)
    assert found.value == pytest.approx(3 / 3.5)
    assert found.effective == pytest.approx(3.5**2 / 5.25)
    assert found.mean_weight == pytest.approx(3.5 / 3)


def test_doubly_robust_value_by_hand() -> None:
    # 0.4 + 2·(1 − 0.5) = 1.4 and 0.4 + 0.5·(0 − 0.2) = 0.3.
    found = doubly_robust([1, 0], [0.25, 0.5], [0.5, 0.25], [0.5, 0.2], [0.4, 0.4], support=ANY)
    assert found.value == pytest.approx((1.4 + 0.3) / 2)


def test_a_policy_judged_on_its_own_log_earned_what_it_earned() -> None:
    found = self_normalised([1, 0, 0, 1, 0], [0.3] * 5, [0.3] * 5, support=ANY)
    assert found.value == pytest.approx(0.4)
    assert found.effective == pytest.approx(5.0)


@pytest.mark.parametrize("kind", ["self-normalised", "doubly robust"])
def test_the_interval_covers_the_truth_as_often_as_it_says(kind: str) -> None:
    covered = 0
    for seed in range(300):
        arms, clicks = bandit(seed)
        if kind == "self-normalised":
            found = self_normalised(clicks, LOGGING[arms], JUDGED[arms])
        else:
            guess = np.array([0.03, 0.03, 0.07, 0.03])  # a wrong model: the propensities make up for it
            found = doubly_robust(
                clicks, LOGGING[arms], JUDGED[arms], guess[arms], np.full(len(arms), float(guess @ JUDGED))
            )
        covered += found.low <= TRUTH <= found.high
    assert 0.91 <= covered / 300 <= 0.99


def test_a_good_model_makes_the_doubly_robust_interval_narrower() -> None:
    arms, clicks = bandit(1)
    plain = self_normalised(clicks, LOGGING[arms], JUDGED[arms])
    robust = doubly_robust(clicks, LOGGING[arms], JUDGED[arms], RATES[arms], np.full(len(arms), TRUTH))
    assert robust.high - robust.low < plain.high - plain.low


def test_doubly_robust_holds_with_a_right_model_and_wrong_propensities() -> None:
    arms, clicks = bandit(2, 40_000)
    wrong = np.full(len(arms), 0.25)
    robust = doubly_robust(clicks, wrong, JUDGED[arms], RATES[arms], np.full(len(arms), TRUTH), support=ANY)
    assert robust.low <= TRUTH <= robust.high


def test_an_interval_clustered_by_user_is_wider_where_users_are_alike() -> None:
    arms, clicks = bandit(3, 400)
    arms, clicks, users = np.repeat(arms, 10), np.repeat(clicks, 10), np.repeat(np.arange(400), 10)
    alone = self_normalised(clicks, LOGGING[arms], JUDGED[arms])
    together = self_normalised(clicks, LOGGING[arms], JUDGED[arms], clusters=users)
    assert (together.high - together.low) > 2 * (alone.high - alone.low)


def test_no_click_at_all_still_has_an_upper_bound() -> None:
    found = self_normalised(np.zeros(300), np.full(300, 0.5), np.full(300, 0.5))
    assert (found.value, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 300))


def test_a_log_that_never_tried_what_the_policy_wants_is_refused() -> None:
    # The policy plays arm 2 with 0.6; the log holds arms 0, 1 and 3 alone.
    generator = np.random.default_rng(4)
    logging = np.array([0.5, 0.3, 0.0, 0.2])
    arms = generator.choice(4, 4_000, p=logging)
    with pytest.raises(NoSupportError, match="40% of what this policy would choose"):
        self_normalised(np.zeros(4_000), logging[arms], JUDGED[arms])


def test_few_effective_choices_are_refused() -> None:
    with pytest.raises(NoSupportError, match=r"5 logged choices count as 5\.0"):
        self_normalised([1, 0, 0, 1, 0], [0.3] * 5, [0.3] * 5)


@pytest.mark.parametrize("propensity", [0.0, float("nan"), 1.5])
def test_a_choice_without_a_propensity_is_refused(propensity: float) -> None:
    with pytest.raises(NoSupportError, match="1 of 2 logged choices have no propensity"):
        self_normalised([1, 0], [0.5, propensity], [0.5, 0.5])


def test_a_log_of_other_choices_alone_is_refused() -> None:
    with pytest.raises(NoSupportError, match="no logged choice"):
        doubly_robust([1, 0], [0.5, 0.5], [0.0, 0.0], [0.1, 0.1], [0.1, 0.1])


class Log:
    """One campaign of the Open Bandit log as one policy made it."""

    def __init__(self, policy: str, campaign: str) -> None:
        with gzip.open(DATA / policy / campaign / f"{campaign}.csv.gz") as file:
            table = csv.read_csv(file)
        self.items = table["item_id"].to_numpy()
        self.slots = table["position"].to_numpy()
        self.clicks = table["click"].to_numpy().astype(np.float64)
        self.propensities = table["propensity_score"].to_numpy()


def shares(log: Log) -> npt.NDArray[np.float64]:
    """Return how often each item stood in each slot, float64 [4, items]."""
    counts = np.zeros((4, log.items.max() + 1))
    np.add.at(counts, (log.slots, log.items), 1.0)
    share: npt.NDArray[np.float64] = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return share


def both(log: Log, policy: npt.NDArray[np.float64]) -> tuple[Estimate, Estimate]:
    """Judge ``policy`` [4, items] on ``log``; the model: smoothed click rates of items in the other half of the log."""
    target = policy[log.slots, log.items]
    q_logged, q_target = np.zeros(len(log.items)), np.zeros(len(log.items))
    half = np.arange(len(log.items)) % 2
    for part in (0, 1):
        seen, judged = half != part, half == part
        size = policy.shape[1]
        shown, clicked = np.bincount(log.items[seen], minlength=size), np.zeros(size)
        np.add.at(clicked, log.items[seen], log.clicks[seen])
        rates = (clicked + 200 * log.clicks[seen].mean()) / (shown + 200)
        q_logged[judged], q_target[judged] = rates[log.items[judged]], (policy @ rates)[log.slots[judged]]
    plain = self_normalised(log.clicks, log.propensities, target)
    return plain, doubly_robust(log.clicks, log.propensities, target, q_logged, q_target)


@open_bandit
@pytest.mark.parametrize("campaign", ["all", "men", "women"])
def test_what_thompson_sampling_earned_is_covered_by_estimates_from_the_random_log(campaign: str) -> None:
    earned = Log("bts", campaign)
    for found in both(Log("random", campaign), shares(earned)):
        assert found.low <= earned.clicks.mean() <= found.high
        assert found.effective > 2_000


@open_bandit
@pytest.mark.parametrize("campaign", ["all", "men"])
def test_what_uniform_choice_earned_is_covered_by_estimates_from_the_log_of_thompson_sampling(campaign: str) -> None:
    earned = Log("random", campaign)
    size = earned.items.max() + 1
    for found in both(Log("bts", campaign), np.full((4, size), 1 / size)):
        assert found.low <= earned.clicks.mean() <= found.high


@open_bandit
def test_a_log_that_hardly_ever_drew_some_items_does_not_judge_uniform_choice() -> None:
    # Propensities down to 1e-6: one choice weighs as much as all others, 10,000 count as two.
    log = Log("bts", "women")
    with pytest.raises(NoSupportError, match=r"10000 logged choices count as 2\.1"):
        self_normalised(log.clicks, log.propensities, np.full(10_000, 1 / 46))

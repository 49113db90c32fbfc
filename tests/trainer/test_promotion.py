"""The gate: its rules on literal slices, and its rates on simulated ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from models.errors import TrainingError
from models.evaluation import auc_per_impression
from trainer.promotion import Decision, GateConfig, check_labels, check_shadow, check_trained, judge, should_roll_back

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

ITEMS = 10
CONFIG = GateConfig(resamples=500)
SHARED_NOISE = 0.8
"""What both models do not know: a child errs much as its parent does."""
NOISE = 0.6
WORSE_NOISE, BETTER_NOISE = 0.78, 0.38
"""Noise of a model that ranks about 0.01 AUC worse or better than one with NOISE."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A simulated slice: labels [n], their impressions [n], users [I], and what both models see of each item [n]."""

    seen: F64
    labels: F64
    impressions: I64
    users: I64

    def model(self, random: np.random.Generator, noise: float) -> F64:
        """Return log-odds of a model with errors of its own beside the shared ones, in part alike for one user."""
        of_user = random.standard_normal((int(self.users.max()) + 1, ITEMS)) * noise * 0.6
        own = random.standard_normal(len(self.seen)) * noise * 0.8
        place = np.tile(np.arange(ITEMS), len(self.users))
        return np.asarray(-2.4 + 0.5 * (self.seen + of_user[self.users[self.impressions], place] + own))


def simulated(random: np.random.Generator, users: int = 250, mean_impressions: float = 4.0) -> Slice:
    """Make a slice; users look at a geometric number of impressions, and click more or less gladly."""
    counts = random.geometric(1 / mean_impressions, users)
    of = np.repeat(np.arange(users), counts)
    impressions = np.repeat(np.arange(len(of)), ITEMS)
    worth = random.standard_normal(len(impressions))
    gladness = random.standard_normal(users) * 0.5
    log_odds = -2.4 + worth + gladness[of[impressions]]
    labels = (random.random(len(worth)) < 1 / (1 + np.exp(-log_odds))).astype(np.float64)
    seen = worth + random.standard_normal(len(worth)) * SHARED_NOISE
    return Slice(seen, labels, impressions, of)


def decide(made: Slice, candidate: F64, live: F64, seed: int, config: GateConfig = CONFIG) -> Decision:
    return judge(candidate, live, made.labels, made.impressions, made.users, config, seed)


def promotions(slices: int, candidate_noise: float, *, users: int, seed: int) -> int:
    """Return how many of so many fresh slices promote a candidate of this noise over a live bundle of NOISE."""
    random = np.random.default_rng(seed)
    count = 0
    for i in range(slices):
        made = simulated(random, users)
        count += decide(made, made.model(random, candidate_noise), made.model(random, NOISE), i).promote
    return count


def most_by_chance(trials: int, rate: float, confidence: float = 0.999) -> int:
    """Return the count that a binomial of this rate does not pass with this confidence."""
    counts = np.random.default_rng(0).binomial(trials, rate, 200_000)
    return int(np.quantile(counts, confidence))


def test_the_planted_difference_is_a_hundredth_of_auc() -> None:
    random = np.random.default_rng(1)
    made = simulated(random, 20_000)
    auc = {
        noise: np.nanmean(auc_per_impression(made.model(random, noise), made.labels, made.impressions))
        for noise in (NOISE, WORSE_NOISE, BETTER_NOISE)
    }
    assert auc[NOISE] - auc[WORSE_NOISE] == pytest.approx(0.01, abs=0.002)
    assert auc[BETTER_NOISE] - auc[NOISE] == pytest.approx(0.01, abs=0.002)


@pytest.mark.parametrize("users", [40, 250])
def test_equal_models_are_promoted_no_more_often_than_the_stated_rate(users: int) -> None:
    trials = 600
    assert promotions(trials, NOISE, users=users, seed=users) <= most_by_chance(trials, CONFIG.equal_promotion_rate)


def test_a_model_worse_by_a_hundredth_of_auc_is_practically_never_promoted() -> None:
    assert promotions(250, WORSE_NOISE, users=500, seed=3) == 0


def test_a_model_better_by_a_hundredth_of_auc_is_soon_promoted_by_slices_of_4000_impressions() -> None:
    # Three slices in a row refuse it with (1 − p)³: p of 0.8 makes that less than one in a hundred.
    trials = 40
    assert promotions(trials, BETTER_NOISE, users=1_000, seed=4) >= 0.8 * trials


def test_the_same_slice_and_seed_give_the_same_decision() -> None:
    random = np.random.default_rng(5)
    made = simulated(random)
    candidate, live = made.model(random, BETTER_NOISE), made.model(random, NOISE)
    assert decide(made, candidate, live, 9) == decide(made, candidate, live, 9)


def test_equal_models_roll_back_no_more_often_than_the_stated_rate() -> None:
    random = np.random.default_rng(6)
    trials, count = 400, 0
    for i in range(trials):
        made = simulated(random)
        live, previous = made.model(random, NOISE), made.model(random, NOISE)
        found = should_roll_back(live, previous, made.labels, made.impressions, made.users, CONFIG, i)
        count += found.outcome == "roll-back"
    assert count <= most_by_chance(trials, CONFIG.roll_back_rate)


def test_a_live_bundle_that_ranks_at_random_is_rolled_back() -> None:
    random = np.random.default_rng(7)
    made = simulated(random)
    live, previous = random.standard_normal(len(made.labels)), made.model(random, NOISE)
    found = should_roll_back(live, previous, made.labels, made.impressions, made.users, CONFIG, 0)
    assert (found.outcome, found.reason) == ("roll-back", "auc-behind")


def test_a_live_bundle_whose_probabilities_went_wrong_is_rolled_back_though_it_ranks_as_before() -> None:
    random = np.random.default_rng(8)
    made = simulated(random)
    previous = made.model(random, NOISE)
    found = should_roll_back(previous + 2.0, previous, made.labels, made.impressions, made.users, CONFIG, 0)
    assert (found.outcome, found.reason) == ("roll-back", "log-loss-behind")


def test_a_night_that_lowers_both_bundles_alike_rolls_nothing_back() -> None:
    random = np.random.default_rng(9)
    made = simulated(random)
    scores = np.asarray(random.standard_normal(len(made.labels)))
    assert should_roll_back(scores, scores, made.labels, made.impressions, made.users, CONFIG, 0).outcome == "keep"


def test_a_live_score_that_is_not_a_number_is_rolled_back_at_once() -> None:
    scores = np.array([0.0, np.nan])
    found = should_roll_back(scores, np.zeros(2), [0, 1], [0, 0], ["u"], CONFIG, 0)
    assert (found.outcome, found.reason) == ("roll-back", "scores-not-finite")


def test_better_probabilities_with_the_same_order_are_promoted_for_log_loss() -> None:
    random = np.random.default_rng(10)
    made = simulated(random)
    candidate = made.model(random, NOISE)
    found = decide(made, candidate, candidate + 1.5, 0)
    assert (found.promote, found.reason) == (True, "better-log-loss")


def test_better_probabilities_do_not_pay_for_a_worse_order() -> None:
    random = np.random.default_rng(11)
    made = simulated(random, 1_000)
    found = decide(made, made.model(random, 2.0), made.model(random, NOISE) + 3.0, 0)
    assert not found.promote
    assert found.figures["log_loss_difference_high"] < 0


def test_the_figures_name_both_models_and_the_interval() -> None:
    random = np.random.default_rng(12)
    made = simulated(random)
    figures = decide(made, made.model(random, NOISE), made.model(random, NOISE), 0).figures
    assert {"auc_candidate", "auc_live", "auc_difference_low", "auc_difference_high", "impressions"} <= set(figures)


def test_labels_of_one_kind_are_no_slice() -> None:
    assert judge([0.0, 1.0], [1.0, 0.0], [0, 0], [0, 0], ["u"], CONFIG, 0).reason == "labels-of-one-kind"


def test_a_score_that_is_not_finite_is_refused() -> None:
    assert judge([0.0, np.inf], [1.0, 0.0], [0, 1], [0, 0], ["u"], CONFIG, 0).reason == "scores-not-finite"


def test_one_user_alone_promotes_nothing() -> None:
    found = judge([3.0, -3.0] * 50, [-3.0, 3.0] * 50, [1, 0] * 50, np.repeat(range(50), 2), ["u"] * 50, CONFIG, 0)
    assert not found.promote


@pytest.mark.parametrize(
    ("labels", "reason"),
    [([0, 0, 0], "labels-of-one-kind"), ([1, 1], "labels-of-one-kind"), ([], "labels-of-one-kind")],
)
def test_labels_that_cannot_be_learned_from_are_refused_with_a_reason(labels: list[int], reason: str) -> None:
    with pytest.raises(TrainingError) as refused:
        check_labels(labels, [], CONFIG)
    assert refused.value.reason == reason


def test_a_positive_rate_out_of_its_history_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"0\.5000 of the new labels are positive"):
        check_labels([0, 1] * 100, [0.05, 0.06, 0.05], CONFIG)


def test_a_lasting_change_of_the_positive_rate_is_accepted_when_half_of_the_history_shows_it() -> None:
    assert check_labels([0, 1] * 100, [0.05] * 6 + [0.5] * 7, CONFIG) == 0.5


def test_a_short_history_refuses_no_rate() -> None:
    assert check_labels([0, 1] * 100, [0.05, 0.05], CONFIG) == 0.5


@pytest.mark.parametrize(
    ("losses", "auc", "reason"), [([0.4, float("nan")], 0.7, "loss-not-finite"), ([0.4], 0.57, "metric-falls")]
)
def test_a_training_that_went_wrong_is_dropped(losses: list[float], auc: float, reason: str) -> None:
    with pytest.raises(TrainingError) as refused:
        check_trained(losses, auc, 0.6, CONFIG)
    assert refused.value.reason == reason


def test_a_training_that_holds_its_auc_passes() -> None:
    check_trained([0.4, 0.3], 0.595, 0.6, CONFIG)


@pytest.mark.parametrize(
    ("logged", "recomputed", "reason"),
    [
        ([np.zeros(2)] * 60, [np.zeros(2)] * 60, "shadow-healthy"),
        ([np.zeros(2)] * 10, [np.zeros(2)] * 10, "shadow-too-few"),
        ([np.array([0.0, np.nan])] * 60, [np.zeros(2)] * 60, "shadow-not-finite"),
        ([np.zeros(2)] * 60, [np.zeros(2)] * 58 + [np.ones(2)] * 2, "shadow-differs"),
        ([np.zeros(2)] * 60, [np.zeros(3)] * 60, "shadow-differs"),
    ],
)
def test_a_candidate_is_healthy_in_shadow_only_if_workers_score_it_as_the_trainer_does(
    logged: list[Any], recomputed: list[Any], reason: str
) -> None:
    assert check_shadow(logged, recomputed, CONFIG).reason == reason

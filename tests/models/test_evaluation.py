"""Measures against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.evaluation import (
    auc_per_impression,
    bootstrap_mean,
    coverage,
    expected_calibration_error,
    gini,
    log_loss,
    ndcg_per_impression,
    reciprocal_rank_per_impression,
)


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    # Clicked 0.8 and 0.3 against 0.5 and 0.1: three of four pairs are right.
    assert auc_per_impression([0.8, 0.5, 0.3, 0.1], [1, 0, 1, 0], [0, 0, 0, 0]).tolist() == [0.75]


def test_auc_counts_a_tie_as_one_half() -> None:
    assert auc_per_impression([1, 1, 0], [1, 0, 0], [0, 0, 0]).tolist() == [0.75]


def test_auc_is_kept_apart_by_impression_whatever_the_order_of_entries() -> None:
    found = auc_per_impression([9, 1, 2, 8], [0, 1, 0, 1], [1, 0, 0, 1])
    assert found.tolist() == [0.0, 0.0]


def test_auc_of_an_impression_without_a_click_is_not_a_number() -> None:
    found = auc_per_impression([1, 2, 3, 4], [0, 0, 0, 1], [0, 0, 1, 1])
    assert math.isnan(found[0])
    assert found[1] == 1.0


def test_auc_of_nothing_is_empty() -> None:
    assert auc_per_impression([], [], []).tolist() == []


@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 2)), min_size=1, max_size=40),
)
def test_auc_equals_the_count_over_all_pairs(entries: list[tuple[int, bool, int]]) -> None:
    scores, labels, groups = (np.array(c) for c in zip(*entries, strict=True))
    found = auc_per_impression(scores, labels, groups)
    for g in range(len(found)):
        clicked = scores[(groups == g) & labels]
        other = scores[(groups == g) & ~labels]
        if not len(clicked) or not len(other):
            assert math.isnan(found[g])
            continue
        wins = sum((c > o) + 0.5 * (c == o) for c in clicked for o in other)
        assert found[g] == pytest.approx(wins / (len(clicked) * len(other)))


def test_reciprocal_rank_is_the_mean_over_clicked_items() -> None:
    # Ranks of the clicked ones: 1 and 3.
    found = reciprocal_rank_per_impression([0.9, 0.5, 0.4], [1, 0, 1], [0, 0, 0])
    assert found.tolist() == [pytest.approx((1 + 1 / 3) / 2)]


def test_a_constant_score_puts_the_clicked_item_last() -> None:
    assert reciprocal_rank_per_impression([1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]).tolist() == [0.25]


def test_ndcg_discounts_by_the_logarithm_of_the_rank() -> None:
    # Clicked at ranks 2 and 3, ideal at 1 and 2.
    found = ndcg_per_impression([3, 2, 1], [0, 1, 1], [0, 0, 0], k=3)
    assert found.tolist() == [pytest.approx((1 / math.log2(3) + 1 / 2) / (1 + 1 / math.log2(3)))]


def test_ndcg_sees_nothing_below_k() -> None:
    assert ndcg_per_impression([3, 2, 1], [0, 0, 1], [0, 0, 0], k=2).tolist() == [0.0]


def test_ndcg_is_one_where_k_is_filled_with_clicked_items() -> None:
    assert ndcg_per_impression([3, 2, 1], [1, 1, 1], [0, 0, 0], k=2).tolist() == [1.0]


def test_log_loss_of_a_coin_is_ln_2() -> None:
    assert log_loss([0.5, 0.5], [1, 0]) == pytest.approx(math.log(2))


def test_log_loss_of_a_wrong_certainty_is_large_but_finite() -> None:
    assert 10 < log_loss([0.0], [1]) < 20


def test_calibration_error_is_the_gap_between_prediction_and_outcome() -> None:
    # Bin of 0.1: half clicked, gap 0.4; bin of 0.9: half clicked, gap 0.4.
    assert expected_calibration_error([0.1, 0.1, 0.9, 0.9], [0, 1, 0, 1], bins=2) == pytest.approx(0.4)


def test_calibration_error_of_true_rates_is_zero() -> None:
    assert expected_calibration_error([0.25] * 4 + [0.5] * 4, [1, 0, 0, 0, 1, 1, 0, 0], bins=2) == pytest.approx(0.0)


def test_equal_predictions_are_never_split_between_bins() -> None:
    # Split by order they would look wrong in both halves.
    assert expected_calibration_error([0.5] * 4, [1, 1, 0, 0], bins=2) == pytest.approx(0.0)


def test_coverage_counts_each_item_once() -> None:
    assert coverage([3, 3, 7], 8) == 0.25


def test_gini_is_zero_where_all_items_are_shown_alike() -> None:
    assert gini([5, 5, 5]) == pytest.approx(0.0)


def test_gini_of_one_item_shown_alone_is_one_minus_one_nth() -> None:
    assert gini([0, 0, 0, 9]) == pytest.approx(0.75)


def test_interval_holds_the_mean_and_is_repeatable() -> None:
    values, users = [0.0, 1.0, 0.5, 0.25, 0.75, 1.0], [1, 1, 2, 3, 4, 5]
    found = bootstrap_mean(values, users, resamples=500, seed=3)
    assert found.mean == pytest.approx(3.5 / 6)
    assert found.low < found.mean < found.high
    assert found == bootstrap_mean(values, users, resamples=500, seed=3)


def test_interval_of_one_user_has_no_width_however_many_impressions() -> None:
    found = bootstrap_mean([0.0, 1.0, 0.5], ["a", "a", "a"])
    assert found.low == found.high == pytest.approx(0.5)


def test_a_user_with_many_like_impressions_widens_the_interval() -> None:
    generator = np.random.default_rng(0)
    taste = np.repeat(generator.normal(size=40), 25)
    clustered = bootstrap_mean(taste, np.repeat(np.arange(40), 25))
    alone = bootstrap_mean(taste, np.arange(1_000))
    assert clustered.high - clustered.low > 3 * (alone.high - alone.low)


def test_values_that_are_not_numbers_are_left_out_of_the_mean() -> None:
    assert bootstrap_mean([float("nan"), 0.5], [1, 2]).mean == 0.5


def test_a_score_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not a number"):
        auc_per_impression([float("nan")], [1], [0])

"""Features, score, and the best k."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.events import ACTIONS
from models.ranking import (
    Features,
    RankingConfig,
    counts_of,
    is_in,
    is_refused,
    scale_tastes,
    score,
    similarity,
    top_k,
    unit,
)
from models.user_row import NEGATIVE, POSITIVE


def features(**given: list[list[float]]) -> Features:
    """Return features of one request with two candidates, the same but for what is given."""
    plain = [[0.0, 0.0]]
    sim = np.zeros((1, 2, 4), np.float32)
    sim[0, :, 0] = given.get("short", plain)[0]
    sim[0, :, 3] = given.get("query", plain)[0]
    return Features(
        similarity=sim,
        ctr=np.array(given.get("ctr", [[0.05, 0.05]]), np.float32),
        popularity=np.array(given.get("popularity", plain), np.float32),
        shown_counts=np.array(given.get("shown", plain), np.float32),
    )


@pytest.mark.parametrize(
    "better",
    [
        {"short": [[0.2, 0.1]]},
        {"query": [[0.2, 0.1]]},
        {"ctr": [[0.06, 0.05]]},
        {"popularity": [[0.5, 0.4]]},
        {"shown": [[0.0, 1.0]]},
    ],
)
def test_each_feature_moves_the_score_in_its_direction(better: dict[str, list[list[float]]]) -> None:
    found = score(features(**better), RankingConfig())
    assert found[0, 0] > found[0, 1]


def test_score_is_the_weighted_sum_that_it_claims_to_be() -> None:
    config = RankingConfig(short_term_weight=2, ctr_weight=0.5, popularity_weight=3, shown_penalty=0.25)
    found = score(features(short=[[0.5, 0]], ctr=[[0.2, 0.5]], popularity=[[0.1, 0]], shown=[[2, 0]]), config)
    assert found[0, 0] == pytest.approx(2 * 0.5 + 0.5 * np.log(0.2 / 0.8) + 3 * 0.1 - 0.25 * 2)
    assert found[0, 1] == pytest.approx(0.0)


def test_score_stays_finite_where_a_feature_is_not() -> None:
    found = score(features(ctr=[[0.0, 1.0]], popularity=[[float("nan"), float("inf")]]), RankingConfig())
    assert np.isfinite(found).all()


def test_a_weak_user_vector_counts_less_and_a_strong_one_no_more_than_whole() -> None:
    scaled = scale_tastes(np.array([[0.01, 0], [0.05, 0], [0.9, 0]], np.float32), 0.05)
    assert scaled[:, 0].tolist() == pytest.approx([0.2, 1.0, 1.0])


def test_a_vector_without_length_stays_zero() -> None:
    assert unit(np.zeros(3, np.float32)).tolist() == [0, 0, 0]


def test_similarity_is_taken_item_by_item_and_taste_by_taste() -> None:
    items = np.array([[[1, 0], [0, 2]]], np.float32)
    tastes = np.array([[[3, 4], [5, 6], [0, 0]]], np.float32)
    assert similarity(items, tastes).tolist() == [[[3, 5, 0], [8, 12, 0]]]


def test_membership_is_kept_apart_by_request() -> None:
    rows, sets = np.array([[1, 2], [1, 2]], np.int32), np.array([[1, -2], [2, -2]], np.int32)
    assert is_in(rows, sets).tolist() == [[True, False], [False, True]]


def test_padding_is_a_member_of_no_padded_set() -> None:
    assert not is_in(np.array([[-1]], np.int32), np.array([[-2]], np.int32)).any()


def test_counts_follow_their_rows() -> None:
    rows, sets = np.array([[7, 8, 9]], np.int32), np.array([[9, 7]], np.int32)
    assert counts_of(rows, sets, np.array([[2, 3]], np.float32)).tolist() == [[3, 0, 2]]


@pytest.mark.parametrize(
    ("action", "label", "refused"),
    [
        ("hide", NEGATIVE, True),
        ("dislike", NEGATIVE, True),
        ("rating", NEGATIVE, True),
        ("rating", POSITIVE, False),
        ("rating", 0, False),
        ("click", POSITIVE, False),
    ],
)
def test_only_a_negative_action_refuses_an_item(action: str, label: int, refused: bool) -> None:
    code = np.array([(ACTIONS.index(action) + 1) | label], np.uint8)
    assert is_refused(code).tolist() == [refused]


def test_a_free_place_of_the_ring_refuses_nothing() -> None:
    assert is_refused(np.zeros(1, np.uint8)).tolist() == [False]


def test_top_k_breaks_ties_by_row() -> None:
    columns, counts = top_k(
        np.array([[0.5, 0.5, 0.5]], np.float32), np.array([[9, 3, 6]], np.int32), np.ones((1, 3), np.bool_), 2
    )
    assert columns.tolist() == [[1, 2]]
    assert counts.tolist() == [2]


def test_top_k_takes_scores_that_differ_in_the_last_bit_for_equal() -> None:
    scores = np.array([[0.5, np.nextafter(np.float32(0.5), np.float32(1))]], np.float32)
    columns, _ = top_k(scores, np.array([[1, 2]], np.int32), np.ones((1, 2), np.bool_), 1)
    assert columns.tolist() == [[0]]


def test_top_k_leaves_out_what_is_not_valid_however_good() -> None:
    columns, counts = top_k(
        np.array([[9.0, 1.0]], np.float32), np.array([[1, 2]], np.int32), np.array([[False, True]]), 2
    )
    assert counts.tolist() == [1]
    assert columns[0, 0] == 1


scored = st.lists(st.tuples(st.integers(-50, 50), st.booleans()), min_size=1, max_size=30)


@given(scored, st.integers(0, 35))
def test_top_k_equals_a_plain_sort(entries: list[tuple[int, bool]], k: int) -> None:
    scores = np.array([[s / 10 for s, _ in entries]], np.float32)
    valid = np.array([[v for _, v in entries]])
    rows = np.arange(len(entries), dtype=np.int32)[None, ::-1].copy()
    columns, counts = top_k(scores, rows, valid, k)
    best = sorted((c for c in range(len(entries)) if valid[0, c]), key=lambda c: (-entries[c][0], rows[0, c]))[:k]
    assert columns[0, : counts[0]].tolist() == best

"""Debias, maximal marginal relevance and the maximum of a category, against values by hand and a plain form."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.diversity import DiversityConfig, debiased, diverse
from models.ranking import top_k

F32 = npt.NDArray[np.float32]


def chosen(
    scores: list[float], vectors: F32, config: DiversityConfig, k: int, categories: list[int] | None = None
) -> list[int]:
    rows = np.arange(len(scores), dtype=np.int32)[None]
    kinds = np.array([categories or [0] * len(scores)], np.int32)
    columns, counts = diverse(
        np.array([scores], np.float32),
        rows,
        np.ones(rows.shape, np.bool_),
        vectors[None].astype(np.float32),
        kinds,
        np.array([k]),
        config,
    )
    return columns[0, : counts[0]].tolist()  # type: ignore[no-any-return]


def test_debias_takes_the_logarithm_of_popularity() -> None:
    scores = np.array([[2.0, 1.0, 0.5]], np.float32)
    clicks = np.array([[np.e**2 - 1, 0.0, np.e - 1]], np.float32)
    assert debiased(scores, clicks, DiversityConfig(popularity_debias=0.5))[0].tolist() == pytest.approx([1.0, 1.0, 0])


def test_a_twin_of_the_first_item_gives_way_to_another() -> None:
    vectors = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    assert chosen([1.0, 0.9, 0.5], vectors, DiversityConfig(sameness=0.5), 3) == [0, 2, 1]
    # Relevance 1, 0.8, 0. With λ = 0.3 the twin has 0.7·0.8 − 0.3 = 0.26, the other one 0: the twin stays.
    assert chosen([1.0, 0.9, 0.5], vectors, DiversityConfig(sameness=0.3), 3) == [0, 1, 2]


def test_no_third_item_of_a_category_as_long_as_there_are_others() -> None:
    vectors = np.zeros((5, 2), np.float32)
    config = DiversityConfig(max_per_category=2)
    assert chosen([5, 4, 3, 2, 1], vectors, config, 4, [7, 7, 7, 7, 8]) == [0, 1, 4, 2]


def test_items_without_a_category_are_never_too_many() -> None:
    config = DiversityConfig(max_per_category=1)
    assert chosen([4, 3, 2, 1], np.zeros((4, 2), np.float32), config, 3, [0, 0, 0, 8]) == [0, 1, 2]


def test_an_item_put_last_by_a_penalty_stays_last() -> None:
    vectors = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    assert chosen([1.0, 0.9, 0.5 - 1e4], vectors, DiversityConfig(sameness=1.0), 3) == [0, 1, 2]


def plainly(scores: list[float], vectors: F32, sameness: float, k: int) -> list[int]:
    """Choose one by one, in plain Python, as the paper says it."""
    low, reach = min(scores), (max(scores) - min(scores)) or 1.0
    left, slate = list(range(len(scores))), list[int]()
    while left and len(slate) < k:

        def value(i: int) -> float:
            same = max((float(vectors[i] @ vectors[j]) for j in slate), default=0.0)
            return (1 - sameness) * (scores[i] - low) / reach - sameness * same

        best = max(left, key=lambda i: (round(value(i), 4), scores[i], -i))
        left.remove(best)
        slate.append(best)
    return slate


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=12, unique=True),
    st.sampled_from([0.0, 0.25, 0.5, 0.75]),
    st.integers(1, 12),
    st.integers(0, 1_000),
)
def test_the_batch_form_equals_the_plain_one(scores: list[int], sameness: float, k: int, seed: int) -> None:
    # Directions of a coarse grid: values are equal or clearly apart.
    angles = np.random.default_rng(seed).integers(0, 8, len(scores)) * (np.pi / 4)
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    numbers = [float(s) for s in scores]
    assert chosen(numbers, vectors, DiversityConfig(sameness=sameness), k) == plainly(numbers, vectors, sameness, k)


def test_a_request_gets_the_same_order_alone_and_beside_a_longer_one() -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(2, 300)).astype(np.float32)
    vectors = generator.normal(size=(2, 300, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    rows, valid = np.tile(np.arange(300, dtype=np.int32), (2, 1)), np.ones((2, 300), np.bool_)
    kinds = np.zeros((2, 300), np.int32)
    config = DiversityConfig(sameness=0.4)
    alone, _ = diverse(scores[:1], rows[:1], valid[:1], vectors[:1], kinds[:1], np.array([10]), config)
    both, counts = diverse(scores, rows, valid, vectors, kinds, np.array([10, 150]), config)
    assert counts.tolist() == [10, 150]
    assert both[0, :10].tolist() == alone[0].tolist()


def test_without_strength_the_order_is_that_of_the_scores() -> None:
    scores = np.random.default_rng(1).normal(size=(3, 40)).astype(np.float32)
    rows, valid = np.tile(np.arange(40, dtype=np.int32), (3, 1)), np.ones((3, 40), np.bool_)
    kinds = np.zeros((3, 40), np.int32)
    found, _ = diverse(scores, rows, valid, np.zeros((3, 40, 2), np.float32), kinds, np.full(3, 20), DiversityConfig())
    assert found.tolist() == top_k(scores, rows, valid, 20)[0].tolist()

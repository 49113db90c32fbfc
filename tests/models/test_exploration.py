"""Randomised users: the share, the rotation, and the honesty of the draw."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from models.exploration import ExplorationConfig, draw, draw_seed, is_randomised
from models.hashing import hash64

WEEK_MS = 7 * 86_400_000
NOW_MS = 1_700_000_000_000
CONFIG = ExplorationConfig()


def chosen(config: ExplorationConfig, time_ms: int = NOW_MS, users: int = 20_000) -> set[int]:
    return {n for n in range(users) if is_randomised(f"user-{n}", time_ms, config)}


def items(n: int) -> np.ndarray:
    return np.array([hash64(f"item-{i}") for i in range(n)], np.uint64)


def test_the_share_of_randomised_users_is_near_the_setting() -> None:
    # 20,000 users at 1 %: 200 expected, standard deviation 14.
    assert 140 < len(chosen(CONFIG)) < 260
    assert 780 < len(chosen(ExplorationConfig(randomised_share=0.045))) < 1_020


def test_nobody_is_randomised_where_the_share_is_zero() -> None:
    assert not chosen(ExplorationConfig(randomised_share=0.0))


def test_everybody_is_randomised_where_the_share_is_one() -> None:
    assert len(chosen(ExplorationConfig(randomised_share=1.0), users=500)) == 500


def test_a_user_stays_within_a_period_and_others_are_chosen_in_the_next() -> None:
    start_ms = NOW_MS // WEEK_MS * WEEK_MS
    first = chosen(CONFIG, start_ms)
    assert chosen(CONFIG, start_ms + WEEK_MS - 1) == first
    # By chance 1 % of the first ones are chosen again: two of two hundred.
    assert len(first & chosen(CONFIG, start_ms + WEEK_MS)) < len(first) // 10


def test_another_salt_chooses_others() -> None:
    assert chosen(CONFIG) != chosen(ExplorationConfig(salt="other"))


def test_the_same_trigger_draws_the_same() -> None:
    seed = draw_seed("events", 3, 17, "u")
    everything, nothing = np.ones(50, np.bool_), np.zeros(50, np.bool_)
    first, _ = draw(seed, items(50), everything, nothing, 10)
    again, _ = draw(draw_seed("events", 3, 17, "u"), items(50), everything, nothing, 10)
    assert first.tolist() == again.tolist()
    other, _ = draw(draw_seed("events", 3, 18, "u"), items(50), everything, nothing, 10)
    assert first.tolist() != other.tolist()


def test_every_item_stands_in_every_slot_equally_often() -> None:
    n, k, draws = 12, 4, 24_000
    hashes, everything, nothing = items(n), np.ones(n, np.bool_), np.zeros(n, np.bool_)
    times = np.zeros((k, n), np.int64)
    for offset in range(draws):
        columns, propensities = draw(draw_seed("events", 0, offset, "u"), hashes, everything, nothing, k)
        times[np.arange(k), columns] += 1
        assert propensities.tolist() == [np.float32(1 / n)] * k
    # Pearson's chi-square of each slot against 1 / n, 11 degrees of freedom: above 31.3 once in a thousand.
    expected = draws / n
    assert (((times - expected) ** 2 / expected).sum(axis=1) < 31.3).all()


def test_neighbours_in_the_catalogue_are_drawn_together_no_more_often_than_by_chance() -> None:
    n, draws = 10, 20_000
    hashes, everything, nothing = items(n), np.ones(n, np.bool_), np.zeros(n, np.bool_)
    pairs = np.zeros((n, n), np.int64)
    for offset in range(draws):
        (a, b), _ = draw(draw_seed("events", 1, offset, "u"), hashes, everything, nothing, 2)
        pairs[a, b] += 1
    expected = draws / (n * (n - 1))
    seen = pairs[~np.eye(n, dtype=bool)]
    # 89 degrees of freedom: above 135.8 once in a thousand.
    assert ((seen - expected) ** 2 / expected).sum() < 135.8
    assert pairs.trace() == 0


def test_what_only_fills_up_comes_after_the_others_with_its_own_propensity() -> None:
    first = np.array([True, False, True, False, False])
    second = np.array([True, True, True, True, False])
    columns, propensities = draw(5, items(5), first, second, 5)
    assert set(columns[:2].tolist()) == {0, 2}
    assert set(columns[2:].tolist()) == {1, 3}
    assert propensities.tolist() == [0.5, 0.5, 0.5, 0.5]


@given(st.integers(0, 2**64 - 1), st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40), st.integers(0, 50))
def test_a_draw_has_each_candidate_once_and_no_other(seed: int, members: list[tuple[bool, bool]], k: int) -> None:
    first = np.array([f for f, _ in members], np.bool_)
    second = np.array([s for _, s in members], np.bool_)
    columns, propensities = draw(seed, items(len(members)), first, second, k)
    assert len(set(columns.tolist())) == len(columns) == min(k, int((first | second).sum()))
    assert (first | second)[columns].all()
    assert ((propensities > 0) & (propensities <= 1)).all()

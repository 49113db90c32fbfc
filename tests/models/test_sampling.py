"""models.sampling: negatives for logs without impressions, and the correction of their rate."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.events import Action
from models.examples import SAMPLED, FeaturesRecord, decode_features, decode_labels, encode, label_values
from models.hashing import hash64
from models.sampling import LoneAction, offset_of, sampled_impressions
from models.user_events import UserStateConfig

CATALOGUE = np.arange(1, 501, dtype=np.uint64)
CLICK, HIDE = 1 | 0x10, 4 | 0x20


def act(user: str, item: int, time_ms: int, code: int = CLICK) -> LoneAction:
    """Return an action at the offset of its time."""
    return LoneAction(user, item, code, time_ms, time_ms, 0, time_ms)


def items(record: FeaturesRecord) -> list[int]:
    """Return the item hashes of a record."""
    return [int(v) for v in np.frombuffer(record.items, "<u8")]


def test_each_positive_action_is_an_impression_of_its_item_and_drawn_ones() -> None:
    ((features, labels),) = sampled_impressions([act("u", 7, 1_000), act("u", 9, 2_000, HIDE)], CATALOGUE, 5, seed=1)
    assert items(features)[0] == 7
    assert len(set(items(features))) == 6
    assert label_values(labels, 6).tolist() == [1, 0, 0, 0, 0, 0]
    assert features.flags == SAMPLED
    assert features.negative_rate == 5 / 499


def test_both_records_are_readable_as_any_others() -> None:
    ((features, labels),) = sampled_impressions([act("u", 7, 1_000)], CATALOGUE, 5, seed=1)
    assert decode_features(encode(features)) == features
    assert decode_labels(encode(labels)) == labels
    assert features.impression_id == labels.impression_id != 0


@settings(max_examples=40, deadline=None)
@given(
    log=st.lists(st.tuples(st.sampled_from("uv"), st.integers(1, 30)), min_size=1, max_size=25),
    catalogue=st.integers(1, 40),
    per_positive=st.integers(1, 50),
)
def test_no_user_gets_an_own_positive_as_a_negative_and_none_twice(
    log: list[tuple[str, int]], catalogue: int, per_positive: int
) -> None:
    actions = [act(user, item, time_ms) for time_ms, (user, item) in enumerate(log)]
    liked = {user: {a.item for a in actions if a.user_id == user} for user in "uv"}
    for features, _ in sampled_impressions(actions, np.arange(1, catalogue + 1, dtype=np.uint64), per_positive, 3):
        negatives = items(features)[1:]
        possible = catalogue - len([i for i in liked[features.user_id] if i <= catalogue])
        assert not liked[features.user_id] & set(negatives)
        assert len(negatives) == len(set(negatives)) == min(per_positive, possible)
        assert features.negative_rate == len(negatives) / possible


def test_an_item_that_the_user_liked_before_is_no_example_again() -> None:
    bought = 5 | 0x10
    log = [act("u", 7, 1), act("u", 7, 2, bought), act("u", 8, 3), act("v", 7, 4)]
    made = sampled_impressions(log, CATALOGUE, 5, seed=1)
    assert [(f.user_id, items(f)[0]) for f, _ in made] == [("u", 7), ("u", 8), ("v", 7)]
    for features, _ in made:
        assert not set(items(features)) & set(np.frombuffer(features.recent_items, "<u8").tolist())


def test_an_item_that_was_hidden_first_is_an_example_when_it_is_liked() -> None:
    ((features, _),) = sampled_impressions([act("u", 7, 1, HIDE), act("u", 7, 2)], CATALOGUE, 5, seed=1)
    assert items(features)[0] == 7


def test_an_action_draws_the_same_in_another_window() -> None:
    first = sampled_impressions([act("u", 7, 1_000), act("v", 8, 2_000)], CATALOGUE, 5, seed=1)
    other = sampled_impressions([act("v", 8, 2_000), act("w", 3, 3_000)], CATALOGUE, 5, seed=1)
    assert items(first[1][0]) == items(other[0][0])


def test_another_seed_draws_others() -> None:
    one, two = (items(sampled_impressions([act("u", 7, 1)], CATALOGUE, 9, seed)[0][0]) for seed in (1, 2))
    assert one[0] == two[0]
    assert one[1:] != two[1:]


def test_draws_are_uniform_over_what_may_be_drawn() -> None:
    actions = [act(f"u{n}", 1, n) for n in range(4_000)]
    drawn = [item for features, _ in sampled_impressions(actions, CATALOGUE[:11], 2, 5) for item in items(features)[1:]]
    counts = np.bincount(drawn, minlength=12)
    assert (counts[0], counts[1]) == (0, 0)
    # 8,000 draws over ten items: 800 each, standard deviation 25.
    assert np.abs(counts[2:] - 800).max() < 130


def test_recent_items_and_counts_are_those_before_the_action() -> None:
    log = [act("u", 7, 1_000), act("u", 9, 3_000, HIDE), act("v", 1, 4_000), act("u", 7, 5_000), act("u", 8, 6_000)]
    last = sampled_impressions(log, CATALOGUE, 1, seed=1)[-1][0]
    assert np.frombuffer(last.recent_items, "<u8").tolist() == [7, 9]
    assert np.frombuffer(last.recent_age_seconds, "<f4").tolist() == [1.0, 3.0]
    assert list(last.recent_codes) == [CLICK, HIDE]
    assert last.user_counts == (0, 2, 3)


def test_nothing_to_draw_from_makes_no_impression() -> None:
    assert sampled_impressions([act("u", 1, 1_000)], CATALOGUE[:1], 5, seed=1) == []


def test_shown_items_are_never_corrected() -> None:
    assert offset_of(None) == 0.0


def test_an_accepted_action_becomes_one_of_its_place() -> None:
    action = Action(event_id="e", event_time=5, user_id="u", item_id="a", action="rating", value=5.0, surface="home")
    assert LoneAction.of(action, 2, 30, 4, 6, UserStateConfig()) == LoneAction(
        "u", hash64("a"), 7 | 0x10, 4, 6, 2, 30, "home"
    )


def fit(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], offset: float) -> npt.NDArray[np.float64]:
    """Return intercept and slope of a logistic regression with a fixed offset, by Newton's method."""
    design = np.stack([np.ones_like(x), x], axis=1)
    weights = np.array([np.log(y.mean() / (1 - y.mean())) - offset, 0.0])
    for _ in range(15):
        p = 1 / (1 + np.exp(-(design @ weights + offset)))
        weights += np.linalg.solve((design * (p * (1 - p))[:, None]).T @ design, design.T @ (y - p))
    return weights


def test_the_correction_recovers_the_base_rate_of_the_whole_catalogue() -> None:
    """Each of 6,000 users clicks one of 500 items, item i with odds of nearly e^(1.5 x_i) / Σ_j e^(1.5 x_j)."""
    random = np.random.default_rng(8)
    x = random.normal(size=500)
    clicked = random.choice(500, 6_000, p=np.exp(1.5 * x) / np.exp(1.5 * x).sum())
    actions = [act(f"u{n}", int(item) + 1, n) for n, item in enumerate(clicked)]
    made = sampled_impressions(actions, CATALOGUE, 8, seed=2)
    kept = np.concatenate([np.array(items(features)) - 1 for features, _ in made])
    y = np.concatenate([label_values(labels, len(features)) for features, labels in made]).astype(np.float64)
    rate = made[0][0].negative_rate
    intercept, slope = fit(x[kept], y, offset_of(rate))
    assert (intercept, slope) == (pytest.approx(-np.log(np.exp(1.5 * x).sum()), abs=0.15), pytest.approx(1.5, abs=0.08))
    assert fit(x[kept], y, 0.0)[0] > intercept + 4

"""models.live_features: what rows, counters and catalogue say about slates, each at its own time."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from models.features import FeatureConfig, RawSlates, encode
from models.hashing import hash64
from models.live_features import IndexedVectors, raw_from_state, sims_of
from models.ranking import RankingConfig
from models.user_state import UserReader, empty_rows
from tests.models.recommender_world import DIM, NOW_MS, SPACE, World, unit_vector

RANKING = RankingConfig()
MINUTE_MS = 60_000


def raw(world: World, item_ids: list[list[str]], times_ms: list[int], users: list[int] | None = None) -> RawSlates:
    """Return the raw state of slates of ``item_ids``; "" is padding."""
    rows = np.array([world.catalogue.index.rows(ids) for ids in item_ids], np.int32)
    states = world.rows[np.array(users or [0] * len(item_ids))]
    reader = UserReader(world.state, world.catalogue, SPACE)
    return raw_from_state(states, rows, np.array(times_ms), world.catalogue, world.counters, reader, RANKING)


def counts(found: RawSlates, half_life: int, kind: int) -> npt.NDArray[Any]:
    """Return the decayed counts of all slates, [S, C]."""
    return np.expm1(found.counters[..., half_life, kind].astype(np.float64))


def test_each_slate_reads_the_counters_at_its_own_time() -> None:
    world = World()
    world.item("a")
    world.popular({"a": 8})
    found = raw(world, [["a"], ["a"]], [NOW_MS, NOW_MS + 60 * MINUTE_MS])
    # Half-lives of 10 minutes, one hour, …: after an hour 8 is 8 / 64 and 4.
    assert counts(found, 0, 1).ravel() == pytest.approx([8.0, 0.125], rel=2e-3)
    assert counts(found, 1, 1).ravel() == pytest.approx([8.0, 4.0], rel=2e-3)


def test_reading_at_many_times_equals_reading_at_each() -> None:
    world = World()
    world.clusters({"a": 5})
    world.popular({"a0": 3, "a1": 1})
    world.show(["a0", "a2"], at_ms=NOW_MS + 5_000)
    rows = np.array([[0, 1, 2, -1], [0, 4, 1, 99]], np.int32)
    times_ms = np.array([NOW_MS - 1_000, NOW_MS + 90 * MINUTE_MS])
    each = [world.counters.read(rows[s], int(times_ms[s])) for s in range(2)]
    assert np.array_equal(world.counters.read_at(rows, times_ms), np.stack(each))


def test_an_age_is_since_publication_and_absent_where_none_is_given() -> None:
    world = World()
    world.item("a", published_at=NOW_MS - 90_000)
    world.item("b")
    assert np.array_equal(raw(world, [["a", "b", "unheard of"]], [NOW_MS]).age_seconds, [[90, np.nan, np.nan]], True)


def test_similarity_is_to_the_scaled_taste_and_zero_without_vector_or_taste() -> None:
    world = World(users=2)
    for name in "abc":
        world.item(name, unit_vector(1.0) if name != "c" else None)
    for _ in range(5):
        world.act("a")
    found = raw(world, [["b", "c", ""], ["b", "c", ""]], [NOW_MS] * 2, users=[0, 1])
    assert found.sims[0, :, 0].tolist() == [1.0, 0.0, 0.0]
    assert not found.sims[1].any()


def test_similarity_in_another_space_is_read_with_its_own_vectors() -> None:
    world = World()
    world.item("a", unit_vector(1.0))
    world.item("b", unit_vector(0.0, 1.0))
    for _ in range(5):
        world.act("a")
    other = type(world.catalogue.space_vectors)(DIM)
    for row in (0, 1):
        other.set(row, unit_vector(1.0), 0)

    reader = UserReader(world.state, IndexedVectors(world.catalogue.index, other), SPACE + 1)
    rows = np.array([[0, 1]], np.int32)
    sims = sims_of(world.rows, rows, np.array([NOW_MS]), other, reader, RANKING)
    assert (sims[0, :, 0] > 0.99).all()


def test_what_was_shown_has_its_count_and_age_and_the_rest_has_none() -> None:
    world = World()
    for name in "abc":
        world.item(name)
    world.show(["a", "b"])
    world.show(["a"], at_ms=NOW_MS + 10_000)
    found = raw(world, [["a", "b", "c"]], [NOW_MS + 30_000])
    assert found.shown_counts.tolist() == [[2, 1, 0]]
    assert np.array_equal(found.shown_age_seconds, [[20, 30, np.nan]], equal_nan=True)


def test_recent_items_are_newest_first_with_their_ages_and_codes() -> None:
    world = World()
    world.item("a")
    world.item("b")
    world.act("a")
    world.act("b", "hide", at_ms=NOW_MS + 10_000)
    found = raw(world, [["a"]], [NOW_MS + 15_000])
    assert found.recent_items[0, :3].tolist() == [hash64("b"), hash64("a"), 0]
    assert found.recent_age_seconds[0, :3].tolist() == [5.0, 15.0, 0.0]
    assert found.recent_codes[0, :3].tolist() == [4 | 0x20, 1 | 0x10, 0]


def test_an_item_that_the_user_acted_on_says_when_last_and_the_others_do_not() -> None:
    world = World()
    world.item("a")
    world.item("b")
    world.act("a")
    world.act("a", "like", at_ms=NOW_MS + 10_000)
    found = raw(world, [["a", "b", "unheard of"]], [NOW_MS + 15_000])
    assert np.array_equal(found.acted_age_seconds, [[5, np.nan, np.nan]], True)


def test_an_item_that_anybody_was_shown_says_when_first() -> None:
    world = World()
    world.item("a")
    world.item("b")
    world.show(["a"])
    world.show(["a"])
    found = raw(world, [["a", "b", "unheard of"]], [NOW_MS + 60_000])
    assert found.first_seen_seconds[0, 0] >= 0
    assert np.isnan(found.first_seen_seconds[0, 1:]).all()


def test_the_counts_of_the_user_are_those_of_the_row() -> None:
    world = World()
    world.item("a")
    world.show(["a"])
    world.act("a")
    world.act("a", "like")
    assert raw(world, [["a"]], [NOW_MS]).user_counts.tolist() == [[1, 1, 2]]


def test_an_impression_before_the_state_was_written_has_no_negative_ages() -> None:
    world = World()
    world.item("a")
    world.act("a")
    world.show(["a"])
    found = raw(world, [["a"]], [NOW_MS - 5_000])
    assert (found.recent_age_seconds.min(), found.shown_age_seconds.min()) == (0.0, 0.0)


def test_a_slate_is_the_same_to_the_bit_in_any_batch_and_padding() -> None:
    world = World(users=3)
    world.clusters({"a": 40, "b": 40})
    random = np.random.default_rng(4)
    names = [f"{c}{i}" for c in "ab" for i in range(40)]
    for user in range(3):
        for _ in range(12):
            at_ms = NOW_MS + int(random.integers(0, 10**7))
            world.show(random.choice(names, 5).tolist(), user=user, at_ms=at_ms)
            world.act(str(random.choice(names)), user=user, at_ms=at_ms + 900)
    slates = [random.choice(names, 13).tolist() for _ in range(3)]
    times_ms = [NOW_MS + 10**7 + 977 * s for s in range(3)]
    together = encode(raw(world, [s + [""] * 50 for s in slates], times_ms, [0, 1, 2]), FeatureConfig())
    for s in range(3):
        alone = encode(raw(world, [slates[s]], times_ms[s : s + 1], [s]), FeatureConfig())
        assert np.array_equal(alone[0], together[s, :13])


def test_no_slate_is_an_empty_answer() -> None:
    world = World()
    reader = UserReader(world.state, world.catalogue, SPACE)
    none = np.zeros((0, 4), np.int32)
    found = raw_from_state(empty_rows(0), none, np.zeros(0, np.int64), world.catalogue, world.counters, reader, RANKING)
    assert found.valid.shape == (0, 4)

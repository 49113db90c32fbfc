from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import TrainingError
from models.examples import raw_slates
from models.features import FeatureConfig, encode
from models.hashing import hash64
from tests.trainer.tiny_world import START_MS, impressions, record, texts
from trainer.batches import (
    Slates,
    TrainingSet,
    cut,
    feature_moments,
    fit_priors,
    prepare,
    sampling_offset,
    shuffled,
    split,
    time_order,
)


def slates_of(sizes: list[int]) -> Slates:
    random = np.random.default_rng(0)
    records = [
        record(n, n % 3, random.choice(90, size, replace=False).tolist(), [n % 5, 40 + n % 7][: n % 3], START_MS + n)
        for n, size in enumerate(sizes)
    ]
    labels = [(random.random(size) < 0.3).astype(np.float32) for size in sizes]
    return prepare(TrainingSet(records, labels, texts()), FeatureConfig())


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=40), data=st.data())
def test_batch_holds_what_its_impressions_hold_and_nothing_else(sizes: list[int], data: st.DataObject) -> None:
    slates = slates_of(sizes)
    chosen = np.array(data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=9)))
    batch = cut(slates, chosen)
    assert batch.valid.sum(1).tolist() == [sizes[i] for i in chosen]
    flat = slates.flat(chosen)
    assert not batch.x[~batch.valid].any()
    assert np.array_equal(slates.hashes[batch.rows[batch.items[batch.valid]]], slates.hashes[slates.items[flat]])
    assert np.array_equal(batch.labels[batch.valid], slates.labels[flat])
    assert not batch.weights[~batch.valid].any()
    recents = slates.recents[chosen]
    assert np.array_equal(batch.rows[batch.recents[batch.recent_known]], recents[recents >= 0])


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=60), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_pass_takes_each_impression_once(sizes: list[int], size: int, seed: int) -> None:
    slates = slates_of(sizes)
    batches = shuffled(slates, np.arange(len(sizes)), size, np.random.default_rng(seed))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(sizes)))
    assert max(map(len, batches)) <= size


def test_each_item_of_a_batch_stands_in_it_once() -> None:
    window = impressions(50)
    slates = prepare(window, FeatureConfig())
    batch = cut(slates, np.arange(50))
    assert len(np.unique(batch.rows)) == len(batch.rows)


def test_columns_are_those_that_serving_encodes() -> None:
    window = impressions(300)
    batch = cut(prepare(window, FeatureConfig()), np.array([271, 3, 278]))
    raw = raw_slates([window.records[i] for i in (271, 3, 278)])
    assert np.array_equal(batch.x, encode(raw, FeatureConfig()))


def test_moments_are_those_of_the_columns() -> None:
    window = impressions(600)
    slates = prepare(window, FeatureConfig())
    raw = raw_slates(window.records[:590])
    x = encode(raw, FeatureConfig())[raw.valid].astype(np.float64)
    mean, std = feature_moments(slates, np.arange(590))
    np.testing.assert_allclose(mean, x.mean(0), atol=1e-9)
    np.testing.assert_allclose(std, x.std(0), atol=1e-6)


def test_slices_follow_one_another_in_time() -> None:
    train, held_back, calibration = split(100, 0.2, 0.1)
    assert (train[0], train[-1], held_back[0], held_back[-1], calibration[0], calibration[-1]) == (
        0,
        69,
        70,
        89,
        90,
        99,
    )


def test_smallest_window_has_all_three_slices() -> None:
    assert [len(part) for part in split(10, 0.01, 0.01)] == [8, 1, 1]


def test_too_small_a_window_is_refused() -> None:
    with pytest.raises(TrainingError, match="window-too-small"):
        split(9, 0.1, 0.1)


def test_impressions_of_one_time_keep_their_order() -> None:
    records = [record(n, 0, [1, 2], [], START_MS + (n == 0)) for n in range(4)]
    ordered = time_order(TrainingSet(records, [np.zeros(2, np.float32)] * 4, {}))
    assert [r.offset for r in ordered.records] == [1, 2, 3, 0]


def test_priors_are_the_rates_that_the_counters_show() -> None:
    shown = record(0, 0, [1, 2], [], START_MS)
    counters = np.zeros((2, 4, 4))
    counters[:, :, 0], counters[:, :, 1], counters[:, :, 3] = np.log1p(10_000), np.log1p(200), np.log1p(100)
    shown.counters = counters.astype("<f2").tobytes()
    priors = fit_priors([shown])
    np.testing.assert_allclose(priors.prior_ctr, [0.02] * 4, rtol=0.02)
    np.testing.assert_allclose(priors.prior_coec, [2.0] * 4, rtol=0.03)


def test_priors_of_a_window_are_not_padded_to_its_longest_slate() -> None:
    records = [record(n, 0, [1, 2], [], START_MS) for n in range(1_000)]
    records.append(record(1_000, 0, list(range(500)), [], START_MS))
    tracemalloc.start()
    fit_priors(records)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1_001 * 500 * 24


def test_priors_without_counts_are_the_defaults() -> None:
    assert fit_priors([record(0, 0, [1, 2], [], START_MS)]) == FeatureConfig()


def test_shown_items_have_no_offset_and_drawn_ones_that_of_their_rate() -> None:
    assert sampling_offset(record(0, 0, [1], [], 0)) == 0
    assert sampling_offset(record(0, 0, [1], [], 0, negative_rate=0.25)) == pytest.approx(np.log(4))


def test_item_that_is_only_recent_is_an_item_of_the_window() -> None:
    slates = prepare(TrainingSet([record(0, 0, [1], [77], 0)], [np.zeros(1, np.float32)], {}), FeatureConfig())
    assert set(slates.hashes.tolist()) == {hash64("item-1"), hash64("item-77")}

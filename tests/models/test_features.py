"""models.features: every column finite, the same in any order, padding and batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.counter_events import CLICKS, EXPECTED, IMPRESSIONS, KINDS
from models.errors import BundleError
from models.features import COLUMNS, FeatureConfig, RawSlates, columns, encode, encode_sims, require_spec, spec_id

CONFIG = FeatureConfig(
    prior_ctr=(0.1, 0.1, 0.1, 0.1), prior_strength=10.0, prior_coec=(2.0, 2.0, 2.0, 2.0), coec_strength=4.0
)
KIND_OF = {"impressions": IMPRESSIONS, "clicks": CLICKS, "expected": EXPECTED}
MONDAY_6_UTC_MS = 1_704_088_800_000
"""2024-01-01T06:00:00Z."""


def column(x: np.ndarray, name: str) -> list[float]:
    """Return a column of the first slate."""
    return [round(float(v), 4) for v in x[0, :, COLUMNS.index(name)]]


def slate(**fields: list[float]) -> RawSlates:
    """Return one slate with the given impressions, clicks, ages and sims of its items."""
    raw = RawSlates.empty(1, len(next(iter(fields.values()))))
    raw.valid[:] = True
    raw.time_ms[:] = MONDAY_6_UTC_MS
    for name, values in fields.items():
        if name in KIND_OF:
            kind = KIND_OF[name]
            raw.counters[0, :, :, kind] = np.log1p(np.array(values))[:, None]
        elif name == "sim":
            raw.sims[0, :, 0] = values
        else:
            getattr(raw, name)[0] = values
    return raw


def random_slates(seed: int, slates: int, items: int) -> RawSlates:
    """Return slates with many equal values, missing ages and items never shown."""
    random = np.random.default_rng(seed)
    raw = RawSlates.empty(slates, items)
    raw.valid[:] = random.random((slates, items)) < 0.8
    raw.counters[:] = np.log1p(random.poisson(random.gamma(0.4, 40, (slates, items, 1, 1)), (slates, items, 4, KINDS)))
    ages = random.gamma(0.5, 2e5, (slates, items))
    raw.age_seconds[:] = np.where(random.random((slates, items)) < 0.3, np.nan, ages)
    raw.first_seen_seconds[:] = np.where(random.random((slates, items)) < 0.3, np.nan, ages[::-1] / 9)
    raw.sims[:] = random.normal(0, 0.3, (slates, items, 2)) * (random.random((slates, items, 1)) < 0.9)
    raw.shown_counts[:] = random.poisson(0.3, (slates, items))
    raw.shown_age_seconds[:] = np.where(raw.shown_counts > 0, random.gamma(1, 9e3, (slates, items)), np.nan)
    raw.acted_age_seconds[:] = np.where(random.random((slates, items)) < 0.9, np.nan, ages)
    raw.user_counts[:] = random.poisson(20, (slates, 3))
    raw.time_ms[:] = random.integers(0, 4_102_444_800_000, slates)
    return raw


def garbage() -> RawSlates:
    """Return a slate of the worst values that the fields can hold."""
    raw = RawSlates.empty(1, 6)
    raw.valid[:] = True
    worst = [np.nan, np.inf, -np.inf, 65504, -65504, 0]
    raw.counters[:] = np.array(worst, np.float16)[None, :, None, None]
    raw.sims[:] = np.array(worst, np.float16)[None, :, None]
    raw.age_seconds[:] = raw.first_seen_seconds[:] = raw.shown_age_seconds[:] = raw.acted_age_seconds[:] = np.array(
        [np.nan, np.inf, -np.inf, 3e38, -3e38, 0], np.float32
    )
    raw.shown_counts[:] = 255
    raw.user_counts[:] = 2**32 - 1
    raw.time_ms[:] = -(2**61)
    return raw


def test_every_column_is_finite_whatever_the_raw_values_are() -> None:
    assert np.isfinite(encode(garbage(), CONFIG)).all()


def test_items_that_are_not_valid_have_zeros() -> None:
    raw = random_slates(1, 3, 8)
    raw.valid[:, 5:] = False
    assert not encode(raw, CONFIG)[:, 5:].any()


def test_no_slate_and_no_item_give_an_empty_array_of_all_columns() -> None:
    assert encode(RawSlates.empty(0, 7), CONFIG).shape == (0, 7, len(COLUMNS))
    assert encode(RawSlates.empty(2, 0), CONFIG).shape == (2, 0, len(COLUMNS))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), slates=st.integers(1, 4), items=st.integers(1, 40))
def test_permuting_the_items_permutes_the_rows_bit_for_bit(seed: int, slates: int, items: int) -> None:
    raw = random_slates(seed, slates, items)
    order = np.random.default_rng(seed + 1).permutation(items)
    other = random_slates(seed, slates, items)
    for name in (
        "valid",
        "counters",
        "age_seconds",
        "first_seen_seconds",
        "sims",
        "shown_counts",
        "shown_age_seconds",
        "acted_age_seconds",
    ):
        setattr(other, name, getattr(raw, name)[:, order])
    assert np.array_equal(encode(other, CONFIG), encode(raw, CONFIG)[:, order])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), slates=st.integers(1, 5), items=st.integers(1, 40), more=st.integers(1, 200))
def test_padding_and_the_rest_of_the_batch_change_no_bit(seed: int, slates: int, items: int, more: int) -> None:
    raw = random_slates(seed, slates, items)
    together = encode(raw, CONFIG)
    for s in range(slates):
        padded = RawSlates.empty(1, items + more)
        for name in RawSlates.__slots__:
            value = getattr(raw, name)[s : s + 1]
            target = getattr(padded, name)
            target[(slice(None), *(slice(0, n) for n in value.shape[1:]))] = value
        assert np.array_equal(encode(padded, CONFIG)[0, :items], together[s])


@pytest.mark.parametrize("shape", [(1, 1), (1, 15), (4, 30), (2, 0)])
def test_columns_of_another_space_are_those_that_its_similarities_alone_change(shape: tuple[int, int]) -> None:
    raw = random_slates(1, *shape)
    elsewhere = replace(raw, sims=random_slates(2, *shape).sims)
    x = encode(raw, CONFIG)
    before = x.copy()
    assert encode_sims(x, elsewhere).tobytes() == encode(elsewhere, CONFIG).tobytes()
    assert np.array_equal(x, before)


def test_a_value_at_the_lower_bound_ranks_lowest_of_those_that_are_compared() -> None:
    # A rate of next to nothing beside an item without an age and one that is not there.
    raw = slate(impressions=[8e6, 0.0, 8e6, 3.0])
    raw.valid[0, 3] = False
    x = encode(raw, FeatureConfig(prior_ctr=(1e-9,) * 4, prior_strength=1e-6, quick_prior_strength=1e-6))
    assert column(x, "ctr_first") == [-16.0, 0.0, -16.0, 0.0]
    assert column(x, "ctr_first_rank") == [0.0, 1.0, 0.0, 0.0]
    assert column(x, "ctr_first_gap") == [-16.0, 0.0, -16.0, 0.0]


def test_an_item_alone_has_the_lowest_rank_and_no_gap() -> None:
    x = encode(slate(clicks=[3.0]), CONFIG)
    assert [column(x, f"clicks_first_{kind}") for kind in ("rank", "gap")] == [[0.0], [0.0]]


def test_ties_share_the_lowest_rank() -> None:
    assert column(encode(slate(clicks=[5.0, 0.0, 5.0, 9.0, 0.0]), CONFIG), "clicks_first_rank") == [
        0.5,
        0.0,
        0.5,
        1.0,
        0.0,
    ]


def test_a_gap_is_what_is_lacking_to_the_highest_of_the_slate() -> None:
    x = encode(slate(sim=[0.25, 0.5, -0.25]), CONFIG)
    assert column(x, "sim_short_gap") == [-0.25, 0.0, -0.75]


def test_clicks_over_expected_clicks_are_told_against_the_mean_ratio() -> None:
    x = encode(slate(clicks=[12.0, 0.0], expected=[3.0, 0.0]), CONFIG)
    # (12 / 2 + 4) / (3 + 4); nothing seen is the mean ratio itself.
    assert np.allclose(column(x, "coec_first"), [np.log(10 / 7), 0.0], atol=5e-3)


def test_quick_columns_believe_few_events_more() -> None:
    x = encode(slate(impressions=[4.0], clicks=[4.0], expected=[0.4]), CONFIG)
    assert column(x, "quick_ctr_first")[0] > column(x, "ctr_first")[0] > 0
    assert column(x, "quick_coec_first")[0] > column(x, "coec_first")[0] > 0


def test_an_item_that_nobody_was_shown_takes_no_part_in_the_ranks_of_first_seen() -> None:
    x = encode(slate(first_seen_seconds=[60.0, float("nan"), 180.0]), CONFIG)
    assert column(x, "first_seen") == [round(float(np.log(2)), 4), 0.0, round(float(np.log(4)), 4)]
    assert column(x, "first_seen_given") == [1.0, 0.0, 1.0]
    assert column(x, "first_seen_rank") == [0.0, 0.0, 1.0]
    assert column(x, "first_seen_gap") == [round(-float(np.log(2)), 4), 0.0, 0.0]


def test_a_ctr_is_told_against_the_prior() -> None:
    x = encode(slate(impressions=[100.0, 0.0, 90.0], clicks=[28.0, 0.0, 9.0]), CONFIG)
    # (28 + 10 · 0.1) / (100 + 10) over 0.1; nothing seen is the prior itself; 10 / 100 over 0.1.
    assert np.allclose(column(x, "ctr_first"), [np.log(29 / 110 / 0.1), 0.0, np.log(10 / 100 / 0.1)], atol=5e-3)


def test_clicks_without_impressions_count_as_impressions() -> None:
    x = encode(slate(impressions=[0.0], clicks=[10.0]), CONFIG)
    assert np.allclose(column(x, "ctr_first"), [np.log(11 / 20 / 0.1)], atol=5e-3)


def test_an_item_without_an_age_takes_no_part_in_the_ranks_of_age() -> None:
    x = encode(slate(age_seconds=[3600.0, float("nan"), 7200.0]), CONFIG)
    assert column(x, "age") == [round(float(np.log(2)), 4), 0.0, round(float(np.log(3)), 4)]
    assert column(x, "age_given") == [1.0, 0.0, 1.0]
    assert column(x, "age_rank") == [0.0, 0.0, 1.0]


def test_an_item_never_shown_has_no_recency() -> None:
    raw = slate(shown_counts=[2, 0], shown_age_seconds=[3600.0, float("nan")])
    x = encode(raw, CONFIG)
    assert column(x, "shown_recency") == [0.5, 0.0]
    assert column(x, "shown_just_now") == [round(1 / 31, 4), 0.0]
    assert column(x, "shown_ever") == [1.0, 0.0]


def test_an_item_that_the_user_acted_on_says_how_long_ago() -> None:
    x = encode(slate(acted_age_seconds=[3600.0, float("nan")]), CONFIG)
    assert column(x, "acted_recency") == [0.5, 0.0]
    assert column(x, "acted_before") == [1.0, 0.0]


def test_the_hour_and_the_weekday_are_angles() -> None:
    x = encode(slate(clicks=[0.0]), CONFIG)
    assert (column(x, "hour_sin"), column(x, "hour_cos")) == ([1.0], [0.0])
    assert column(x, "weekday_sin") == [round(float(np.sin(2 * np.pi * 0.25 / 7)), 4)]


def test_the_slate_length_and_the_positions_are_in_no_column() -> None:
    lone, long = slate(clicks=[0.0, 0.0]), slate(clicks=[0.0] * 9)
    long.positions[:] = np.arange(1, 10)
    assert np.array_equal(encode(lone, CONFIG)[0, 0], encode(long, CONFIG)[0, 4])


def test_the_spec_id_stays_as_bundles_have_written_it() -> None:
    assert spec_id(FeatureConfig()) == "features-2-c44a95a36141"
    assert len(columns(FeatureConfig())) == len(set(COLUMNS)) == 106


def test_other_priors_are_the_same_spec() -> None:
    assert spec_id(CONFIG) == spec_id(FeatureConfig())


def test_a_bundle_of_another_spec_is_refused_by_name() -> None:
    with pytest.raises(BundleError, match=r"feature-spec: .*'features-1-0123456789ab'.*kept"):
        require_spec("features-1-0123456789ab", CONFIG)


def test_a_bundle_lists_its_columns_and_one_that_is_not_known_is_refused() -> None:
    stored = FeatureConfig().model_dump(mode="json")
    assert stored["columns"] == list(COLUMNS)
    with pytest.raises(ValueError, match="co_click"):
        FeatureConfig.model_validate(stored | {"columns": [*COLUMNS, "co_click"]})


def test_the_same_columns_in_another_order_are_refused() -> None:
    with pytest.raises(ValueError, match="their order"):
        FeatureConfig(columns=COLUMNS[::-1])


def test_the_documentation_tells_of_every_column() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "features.md").read_text("utf-8")
    plain = [name for name in COLUMNS if not name.endswith(("_rank", "_gap", "_second", "_third"))]
    assert [name for name in plain if f"`{name}`" not in text] == []
    assert f"{len(COLUMNS)} of them" in text

"""The join: which records make an example, and which are left out for what."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.examples import EARLY, LAGGED, REPLAYED, FeaturesRecord, LabelsRecord, encode
from models.manifest import OffsetRange
from tests.models.bundles import features_record
from tests.trainer.round_world import labels_record
from trainer import dataset
from trainer.dataset import Example, Examples, join, read_examples
from trainer.spool import Spool, SpooledRecord


def shown(impression_id: int, time_ms: int = 1_000, **given: Any) -> FeaturesRecord:
    """Return the features of an impression of a, b and c."""
    record = features_record(["a", "b", "c"], impression_id=impression_id)
    return msgspec.structs.replace(record, time_ms=time_ms, **given)


def spooled(*records: FeaturesRecord | LabelsRecord) -> list[SpooledRecord]:
    return [SpooledRecord(offset, 5_000, encode(record)) for offset, record in enumerate(records)]


def joined(features: list[FeaturesRecord], labels: list[LabelsRecord], most: int = 1_000) -> Examples:
    return join(spooled(*features), spooled(*labels), most)


def test_an_impression_and_its_label_make_an_example() -> None:
    found = joined([shown(7)], [labels_record(7, [1])])
    assert [e.labels.tolist() for e in found.impressions] == [[0.0, 1.0, 0.0]]
    assert (found.items, found.clicks, found.left_out) == (3, 1, {})


def test_an_impression_without_a_label_yet_waits() -> None:
    assert joined([shown(7)], []).left_out == {"unlabelled": 1}


def test_a_label_without_features_is_no_example() -> None:
    assert len(joined([], [labels_record(7, [1])])) == 0


def test_a_label_that_knows_less_of_the_log_does_not_win_by_coming_late() -> None:
    found = joined([shown(7)], [labels_record(7, [2], as_of=8), labels_record(7, [], as_of=5)])
    assert found.impressions[0].labels.tolist() == [0.0, 0.0, 1.0]


def test_the_last_label_of_an_impression_wins() -> None:
    found = joined([shown(7)], [labels_record(7, []), labels_record(7, [2], revision=1)])
    assert found.impressions[0].labels.tolist() == [0.0, 0.0, 1.0]


def test_the_first_features_of_an_impression_win() -> None:
    found = joined([shown(7, surface="first"), shown(7, surface="again")], [labels_record(7, [])])
    assert [e.features.surface for e in found.impressions] == ["first"]
    assert found.left_out == {"repeated": 1}


def test_an_impression_that_was_replayed_first_is_not_learned_from_though_it_came_again() -> None:
    found = joined([shown(7, flags=REPLAYED), shown(7)], [labels_record(7, [])])
    assert found.left_out == {"replayed": 1, "repeated": 1}


def test_impressions_processed_with_lag_are_left_out_and_counted() -> None:
    assert joined([shown(7, flags=LAGGED)], [labels_record(7, [0])]).left_out == {"lagged": 1}


def test_labels_that_were_closed_early_are_left_out_and_counted() -> None:
    assert joined([shown(7)], [labels_record(7, [0], flags=EARLY)]).left_out == {"early": 1}


def test_a_label_that_names_a_place_outside_the_impression_is_left_out() -> None:
    assert joined([shown(7)], [labels_record(7, [3])]).left_out == {"unreadable": 1}


def test_a_record_that_is_none_costs_only_itself() -> None:
    features = [SpooledRecord(0, 1, b"\xc1 nonsense"), *spooled(shown(7))]
    found = join(features, spooled(labels_record(7, [0])), 10)
    assert (len(found), found.left_out) == (1, {"unreadable": 1})


def test_examples_stand_in_the_order_of_time() -> None:
    found = joined([shown(1, 3_000), shown(2, 1_000), shown(3, 2_000)], [labels_record(i, []) for i in (1, 2, 3)])
    assert [e.features.impression_id for e in found.impressions] == [2, 3, 1]


def test_above_the_limit_the_newest_are_kept() -> None:
    found = joined([shown(1, 1_000), shown(2, 2_000)], [labels_record(1, []), labels_record(2, [])], most=1)
    assert [e.features.impression_id for e in found.impressions] == [2]
    assert found.left_out == {"above-limit": 1}


def test_of_a_long_window_no_more_than_twice_the_limit_is_ever_held(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    keep = dataset._keep_newest

    def watched(found: list[Example], most: int, left_out: Counter[str]) -> None:
        held.append(len(found))
        keep(found, most, left_out)

    monkeypatch.setattr(dataset, "_keep_newest", watched)
    numbers = range(1, 5_001)
    found = joined([shown(n, n) for n in reversed(numbers)], [labels_record(n, []) for n in numbers], most=500)
    assert max(held) <= 2 * 500 + 1_000
    assert [e.features.impression_id for e in found.impressions] == list(range(4_501, 5_001))
    assert found.left_out == {"above-limit": 4_500}


def test_partitions_are_joined_with_the_labels_of_their_own_and_put_in_the_order_of_time(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    ranges = [OffsetRange(topic, partition, 0, 2) for topic in ("features", "labels") for partition in (0, 1)]
    for partition in (0, 1):
        numbers = (partition + 1, partition + 3)
        spool.write(ranges[partition], spooled(*(shown(n, n * 1_000) for n in numbers)))
        spool.write(ranges[2 + partition], spooled(*(labels_record(n, []) for n in numbers)))
    found = read_examples(spool, ranges, "features", "labels", 3)
    assert [e.features.impression_id for e in found.impressions] == [2, 3, 4]
    assert found.left_out == {"above-limit": 1}


def test_a_slice_holds_what_is_later_than_a_time() -> None:
    found = joined([shown(1, 1_000), shown(2, 2_000)], [labels_record(1, []), labels_record(2, [])])
    assert [e.features.impression_id for e in found.after(1_000).impressions] == [2]


def test_labels_users_and_impression_numbers_go_together() -> None:
    found = joined([shown(1, 1), shown(2, 2, user_id="bob")], [labels_record(1, [0]), labels_record(2, [])])
    assert found.flat_labels().tolist() == [1, 0, 0, 0, 0, 0]
    assert found.impression_numbers().tolist() == [0, 0, 0, 1, 1, 1]
    assert found.users().tolist() == ["ann", "bob"]


def test_the_window_counts_what_was_learned_from() -> None:
    ranges = [OffsetRange("features", 0, 3, 9)]
    window = joined([shown(1, 1_000), shown(2, 2_000)], [labels_record(1, []), labels_record(2, [])]).window(ranges)
    assert (window.from_ms, window.to_ms, window.impressions, window.examples, window.users) == (1_000, 2_000, 2, 6, 1)
    assert window.ranges == ranges


@settings(max_examples=50, deadline=None)
@given(order=st.permutations(range(8)), again=st.lists(st.integers(0, 7), max_size=6))
def test_neither_the_order_of_partitions_nor_repeated_records_change_the_examples(
    order: list[int], again: list[int]
) -> None:
    features = [shown(i + 1, 1_000 + i // 2) for i in range(8)]
    labels = [labels_record(i + 1, [i % 3]) for i in range(8)]
    plain = joined(features, labels)
    mixed = joined([features[i] for i in [*order, *again]], [labels[i] for i in [*order, *again]])

    def seen(found: Examples) -> list[tuple[int, list[float]]]:
        return [(e.features.impression_id, e.labels.tolist()) for e in found.impressions]

    assert seen(mixed) == seen(plain)
    assert np.array_equal(mixed.flat_labels(), plain.flat_labels())

"""models.examples: what streams write is what the trainer reads."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import RecordError
from models.examples import (
    FeaturesRecord,
    LabelsRecord,
    decode_features,
    decode_labels,
    encode,
    label_values,
    raw_slates,
    state_fields,
)


def features(k: int, recent: int = 2, **changes: Any) -> FeaturesRecord:
    """Return the record of an impression of ``k`` items, each number told by its item's place."""
    place = np.arange(k, dtype=np.uint64)
    record = FeaturesRecord(
        impression_id=2**64 - 1,
        user_id="Zoë",
        partition=3,
        offset=17,
        time_ms=1_704_088_800_000,
        broker_ms=1_704_088_800_010,
        processed_ms=1_704_088_800_020,
        flags=0,
        surface="default",
        request_id=None,
        experiment=None,
        policy="external",
        session_id=None,
        context={"device": "phone"},
        space_id="bootstrap",
        items=(place + np.uint64(2**63)).astype("<u8").tobytes(),
        positions=(place + np.uint64(1)).astype("<u2").tobytes(),
        propensities=b"",
        counters=np.tile(place[:, None], 16).astype("<f2").tobytes(),
        age_seconds=(place * np.uint64(60)).astype("<f4").tobytes(),
        first_seen_seconds=(place * np.uint64(7)).astype("<f4").tobytes(),
        sims=np.tile(place[:, None] / 8, 2).astype("<f2").tobytes(),
        shown_counts=place.astype("u1").tobytes(),
        shown_age_seconds=np.full(k, np.nan, "<f4").tobytes(),
        acted_age_seconds=np.full(k, np.nan, "<f4").tobytes(),
        recent_items=np.arange(1, recent + 1).astype("<u8").tobytes(),
        recent_age_seconds=np.arange(recent).astype("<f4").tobytes(),
        recent_codes=np.full(recent, 17, "u1").tobytes(),
        user_counts=(5, 2, 3),
        scores=[("v1", np.zeros(k, "<f4").tobytes())],
        model_version="v1",
    )
    return msgspec.structs.replace(record, **changes)


def labels(**changes: Any) -> LabelsRecord:
    """Return labels with clicks at places 1 and 4."""
    record = LabelsRecord(
        impression_id=7,
        user_id="u",
        time_ms=1,
        closed_ms=2,
        revision=0,
        flags=0,
        clicked=np.array([1, 4], "<u2").tobytes(),
        refused=b"",
        actions=bytes([1, 7]),
    )
    return msgspec.structs.replace(record, **changes)


def test_a_features_record_comes_back_as_it_was() -> None:
    assert decode_features(encode(features(15))) == features(15)


def test_a_labels_record_comes_back_as_it_was() -> None:
    assert decode_labels(encode(labels(revision=3))) == labels(revision=3)


def test_an_impression_of_15_items_with_a_full_ring_has_1347_bytes() -> None:
    assert len(encode(features(15, recent=16))) == 1347


def test_slates_are_padded_to_the_longest_impression() -> None:
    raw = raw_slates([features(3, recent=0), features(5, recent=16)])
    assert raw.valid.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert raw.items[0].tolist() == [2**63, 2**63 + 1, 2**63 + 2, 0, 0]
    assert raw.counters[1, 4].tolist() == [[4.0] * 4] * 4
    assert raw.sims[1, 2].tolist() == [0.25, 0.25]
    assert np.isnan(raw.age_seconds[0, 3:]).all()
    assert raw.recent_items[0].tolist() == [0] * 16
    assert raw.recent_items[1].tolist() == list(range(1, 17))
    assert raw.user_counts.tolist() == [[5, 2, 3]] * 2
    assert raw.time_ms.tolist() == [1_704_088_800_000] * 2


def test_no_record_gives_no_slate() -> None:
    assert raw_slates([]).valid.shape == (0, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"items": b"", "positions": b""},
        {"items": b"12345"},
        {"sims": b""},
        {"propensities": b"123"},
        {"recent_codes": bytes(17), "recent_items": bytes(17 * 8), "recent_age_seconds": bytes(17 * 4)},
        {"recent_items": b""},
        {"scores": [("v1", b"1234")]},
        {"user_counts": (-1, 0, 0)},
    ],
)
def test_features_whose_parts_do_not_fit_are_refused(change: dict[str, Any]) -> None:
    broken = features(3, **change)
    with pytest.raises(RecordError, match="invalid"):
        decode_features(encode(broken))


def test_slates_of_a_record_that_does_not_fit_are_refused_with_its_impression() -> None:
    with pytest.raises(RecordError, match=str(2**64 - 1)):
        raw_slates([features(3), features(3, sims=b"1234")])


@pytest.mark.parametrize("value", [b"", b"\x93\xa1x\x02\x03", b"{}", b"\xff" * 30, encode(labels())[:-3]])
def test_bytes_that_are_no_record_are_refused(value: bytes) -> None:
    for decode in (decode_features, decode_labels):
        with pytest.raises(RecordError, match="malformed"):
            decode(value)


def test_features_of_an_earlier_version_are_refused_though_their_fields_are_others() -> None:
    with pytest.raises(RecordError, match="version 1; this program reads 2"):
        decode_features(msgspec.msgpack.encode([1, 7, "u", 0]))


def test_a_record_of_a_later_version_is_refused() -> None:
    with pytest.raises(RecordError, match="version 2"):
        decode_labels(encode(labels(version=2)))


def test_labels_with_an_action_missing_are_refused() -> None:
    with pytest.raises(RecordError, match="invalid"):
        decode_labels(encode(labels(actions=b"")))


def test_clicked_places_are_ones() -> None:
    assert label_values(labels(), 5).tolist() == [0.0, 1.0, 0.0, 0.0, 1.0]


def test_labels_of_a_longer_impression_are_refused() -> None:
    with pytest.raises(RecordError, match="place 4 of 4 items"):
        label_values(labels(), 4)


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 16)), min_size=1, max_size=6), seed=st.integers(0, 99)
)
def test_slates_give_back_the_bytes_that_they_were_made_of(sizes: list[tuple[int, int]], seed: int) -> None:
    random = np.random.default_rng(seed)
    records = []
    for k, recent in sizes:
        whole = features(k, recent)
        noise = {name: random.bytes(len(getattr(whole, name))) for name in ("items", "counters", "shown_age_seconds")}
        records.append(msgspec.structs.replace(whole, **noise))
    raw = raw_slates(records)
    for slate, one in enumerate(records):
        assert {name: getattr(one, name) for name in state_fields(raw, slate)} == state_fields(raw, slate)

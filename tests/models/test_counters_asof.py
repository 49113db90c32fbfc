"""Counts as they stood inside a batch are those of counting one event after the other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.counter_events import HALF_LIVES, KINDS
from models.counters import CLICKS, IMPRESSIONS, CountersConfig, ItemCounters, TouchBatch
from models.counters_asof import running
from models.errors import FencedError
from models.events import Action, Event, ImpressedItem, Impression
from models.item_index import ItemIndex

T = 1_700_000_000_000
MINUTE = 60_000
DAY = 24 * 60 * MINUTE
ROWS = np.array([[0, 1, 2, -1]], np.int32)
CONFIG = CountersConfig(user_cap=2)


def counters() -> ItemCounters:
    index = ItemIndex()
    for item in "abc":
        index.add(item)
    made = ItemCounters(index, CONFIG)
    made.own(0)
    return made


def event(name: str, user: str, items: str) -> Event:
    if len(items) == 1:
        return Action(event_id=name, event_time=T, user_id=user, item_id=items, action="click")
    return Impression(event_id=name, event_time=T, user_id=user, items=[ImpressedItem(i) for i in items])


def batch(*events: tuple[int, str, str], first_offset: int = 0) -> TouchBatch:
    """Return (time, user, items) as a batch: one item is a click on it, more are an impression."""
    made = TouchBatch()
    for offset, (time_ms, user, items) in enumerate(events, first_offset):
        made.add_event(event(f"e{offset}", user, items), offset, time_ms, CONFIG)
    return made


def at(*times_ms: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(times_ms, np.int64)


def test_a_read_sees_what_arrived_before_it_and_nothing_of_the_rest_of_the_batch() -> None:
    made = counters()
    as_of = made.add_as_of(0, batch((T, "u", "ab"), (T + MINUTE, "v", "ab")), at(T + 1, T + MINUTE + 1))
    read = as_of.read_at(np.repeat(ROWS, 3, axis=0), at(T, T + MINUTE, T + 2 * MINUTE))
    assert read[:, 0, 3, IMPRESSIONS] == pytest.approx([0, 1, 2], abs=0.01)


def test_a_touch_that_the_cap_keeps_out_is_not_seen_either() -> None:
    made = counters()
    clicks = [(T + i, "u", "a") for i in range(4)]
    as_of = made.add_as_of(0, batch(*clicks), at(*(T + i + 1 for i in range(4))))
    assert as_of.read_at(ROWS, at(T + 10))[0, 0, 0, CLICKS] == pytest.approx(2, rel=1e-4)


def test_a_batch_that_spans_too_much_is_refused_and_counts_nothing() -> None:
    made = counters()
    with pytest.raises(ValueError, match="cut it"):
        made.add_as_of(0, batch((T, "u", "ab"), (T + 30 * DAY, "u", "ab")), at(T + 1, T + 30 * DAY + 1))
    assert not made.totals(ROWS).any()


def test_a_partition_of_another_is_not_counted() -> None:
    with pytest.raises(FencedError):
        counters().add_as_of(1, batch((T, "u", "ab")), at(T + 1))


def test_sums_of_a_small_group_keep_their_digits_beside_a_great_one() -> None:
    values = np.array([[1e200], [1e200], [1e-200], [2e-200], [3e-200]])
    assert running(np.add, values, np.array([0, 1, 0, 1, 2]))[:, 0] == pytest.approx(
        [1e200, 2e200, 1e-200, 3e-200, 6e-200], rel=1e-12, abs=0
    )


EVENTS = st.lists(
    st.tuples(st.integers(0, 90 * 60), st.sampled_from("uv"), st.sampled_from(["a", "b", "ab", "abc", "bc"])),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(
    before=EVENTS,
    inside=EVENTS,
    reads=st.lists(st.integers(0, 150 * 60), min_size=1, max_size=8),
    delay_ms=st.sampled_from([1, MINUTE, 40 * MINUTE]),
    gap_ms=st.sampled_from([0, DAY, 3 * DAY, 5 * DAY, 400 * DAY]),
)
def test_reads_inside_a_batch_are_those_of_counting_one_event_after_the_other(
    before: list[tuple[int, str, str]],
    inside: list[tuple[int, str, str]],
    reads: list[int],
    delay_ms: int,
    gap_ms: int,
) -> None:
    """The landmark moves where there are some days between what was counted before and the batch."""
    old = [(T + s * 1_000, u, i) for s, u, i in sorted(before)]
    start_ms = T + 90 * MINUTE + gap_ms
    new = [(start_ms + s * 1_000, u, i) for s, u, i in sorted(inside)]
    times = at(*(start_ms + delay_ms + s * 1_000 for s in sorted(reads)))

    whole = counters()
    whole.add(0, batch(*old))
    arrivals = at(*(time_ms + delay_ms for time_ms, _, _ in new))
    as_of = whole.add_as_of(0, batch(*new, first_offset=len(old)), arrivals)
    rows = np.repeat(ROWS, len(times), axis=0)
    read, first = as_of.read_at(rows, times), as_of.first_seen_seconds(rows, times)

    single = counters()
    single.add(0, batch(*old))
    counted = 0
    for slate, time_ms in enumerate(times.tolist()):
        while counted < len(new) and new[counted][0] + delay_ms <= time_ms:
            single.add(0, batch(new[counted], first_offset=len(old) + counted))
            counted += 1
        expected = single.read_at(ROWS, at(time_ms))
        assert expected.shape == (1, 4, HALF_LIVES, KINDS)
        np.testing.assert_allclose(read[slate], expected[0], rtol=1e-6, atol=1e-30)
        np.testing.assert_array_equal(first[slate], single.first_seen_seconds(ROWS, at(time_ms))[0])

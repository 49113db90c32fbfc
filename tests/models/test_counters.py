"""Decayed counters: what counts, what it adds up to, and that it is a function of the partition's log alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.counters import (
    ACTIONS,
    CLICKS,
    EXPECTED,
    IMPRESSIONS,
    Absolute,
    Checkpoint,
    CountersConfig,
    ItemCounters,
    TouchBatch,
    Touches,
    counter_touches,
)
from models.errors import FencedError
from models.events import Action, Event, ImpressedItem, Impression, Request
from models.item_index import UNKNOWN, ItemIndex

T = 1_700_000_000_000
HOUR_MS = 3_600_000
ITEMS = ["a", "b", "c"]
ROWS = np.array([0, 1, 2], np.int32)
CONFIG = CountersConfig()

Logged = tuple[Event, int, int]
"""(event, offset, event time)."""


def counters(config: CountersConfig = CONFIG, partitions: int = 1) -> ItemCounters:
    index = ItemIndex()
    for item in ITEMS:
        index.add(item)
    made = ItemCounters(index, config)
    for partition in range(partitions):
        made.own(partition)
    return made


def click(user: str, item: str, event_id: str, action: str = "click", value: float | None = None) -> Action:
    return Action(event_id=event_id, event_time=T, user_id=user, item_id=item, action=action, value=value)  # type: ignore[arg-type]


def impression(user: str, items: str, event_id: str) -> Impression:
    return Impression(event_id=event_id, event_time=T, user_id=user, items=[ImpressedItem(item_id=i) for i in items])


def feed(made: ItemCounters, log: list[Logged], partition: int = 0, batch_events: int = 1_000) -> None:
    for begin in range(0, len(log), batch_events):
        batch = TouchBatch()
        for event, offset, time_ms in log[begin : begin + batch_events]:
            batch.add_event(event, offset, time_ms, made.config)
        made.add(partition, batch)


def publish(made: ItemCounters, partition: int = 0) -> Absolute:
    slots, _, _ = made.dirty(partition)
    return made.take_dirty(partition, slots)


# What an event adds


def test_impression_of_an_item_twice_in_one_slate_counts_once() -> None:
    assert counter_touches(impression("u", "aab", "e"), CONFIG).item_ids == ["a", "b"]


def test_click_counts_as_a_click_and_as_a_weighted_action() -> None:
    touches = counter_touches(click("u", "a", "e"), CONFIG)
    assert (list(touches.kinds), list(touches.weights)) == ([CLICKS, ACTIONS], [1.0, 1.0])


@pytest.mark.parametrize(
    ("action", "value", "weight"),
    [("purchase", None, 5.0), ("rating", 5.0, 2.0), ("rating", 3.75, 1.0), ("dwell", 15.0, 0.5)],
)
def test_action_counts_with_its_weight(action: str, value: float | None, weight: float) -> None:
    touches = counter_touches(click("u", "a", "e", action, value), CONFIG)
    assert (list(touches.kinds), list(touches.weights)) == ([ACTIONS], [weight])


@pytest.mark.parametrize(("action", "value"), [("hide", None), ("dislike", None), ("rating", 1.0), ("dwell", None)])
def test_action_that_says_nothing_good_counts_nothing(action: str, value: float | None) -> None:
    assert not counter_touches(click("u", "a", "e", action, value), CONFIG).item_ids


def test_request_counts_nothing() -> None:
    request = Request(event_id="e", event_time=T, user_id="u", request_id="r")
    assert not counter_touches(request, CONFIG).item_ids


def test_half_lives_that_do_not_rise_are_refused() -> None:
    with pytest.raises(ValueError, match="must rise"):
        CountersConfig(half_lives_seconds=(600, 600, 3_600, 7_200))


# Reading


def test_count_is_half_after_each_half_life() -> None:
    made = counters()
    feed(made, [(click("u", "a", "e"), 0, T)])
    read = made.read(ROWS[:1], T + HOUR_MS)[0, :, CLICKS]
    assert read == pytest.approx([2.0**-6, 0.5, 2 ** (-1 / 6), 2 ** (-1 / 24)])


def test_totals_do_not_decay() -> None:
    made = counters()
    feed(
        made,
        [(impression("u", "ab", "e1"), 0, T), (click("u", "a", "e2"), 1, T), (click("v", "a", "e3", "share"), 2, T)],
    )
    assert made.totals(ROWS).tolist() == [[1, 1, 4], [1, 0, 0], [0, 0, 0]]


def test_unknown_item_reads_zero_and_reading_adds_no_row() -> None:
    made = counters()
    feed(made, [(click("u", "a", "e"), 0, T)])
    read = made.read(np.array([[UNKNOWN, 99, 2]], np.int32), T)
    assert read.shape == (1, 3, 4, 4)
    assert not read.any()
    assert len(made.index) == 3


def test_event_after_the_time_of_reading_counts_whole_and_not_more() -> None:
    made = counters()
    feed(made, [(click("u", "a", "e1"), 0, T), (click("u", "b", "e2"), 1, T + 24 * HOUR_MS)])
    assert made.read(ROWS[:2], T)[:, 0, CLICKS] == pytest.approx([1.0, 1.0])
    assert made.top(3, T, 0, CLICKS).tolist() == [0, 1]


def test_counts_survive_years_without_overflow() -> None:
    made = counters()
    year_ms = 365 * 24 * HOUR_MS
    feed(made, [(click("u", "a", f"e{i}"), i, T + i * year_ms) for i in range(5)])
    assert made.read(ROWS[:1], T + 4 * year_ms)[0, :, CLICKS] == pytest.approx([1.0] * 4)
    assert made.totals(ROWS)[0, CLICKS] == 5


def test_smoothed_ctr_of_an_item_without_counts_is_the_prior() -> None:
    assert counters().smoothed_ctr(ROWS, T, 1) == pytest.approx([CONFIG.prior_ctr] * 3)


def test_smoothed_ctr_moves_from_the_mean_to_the_items_own() -> None:
    made = counters()
    log: list[Logged] = []
    for i in range(1_000):
        log.append((impression(f"u{i}", "ab", f"i{i}"), 2 * i, T))
        log.append((click(f"u{i}", "a" if i % 2 else "c", f"c{i}"), 2 * i + 1, T))
    feed(made, log)
    a, b, c = made.smoothed_ctr(ROWS, T, 1).tolist()
    assert a == pytest.approx(0.5, abs=0.01)
    assert 0 < b < 0.02
    assert 0.9 < c < 1


def test_top_is_greatest_first_and_ties_go_by_row() -> None:
    made = counters()
    feed(
        made,
        [(click(u, i, f"{u}{i}"), n, T) for n, (u, i) in enumerate([("u", "c"), ("v", "c"), ("u", "b"), ("u", "a")])],
    )
    assert made.top(2, T, 1, CLICKS).tolist() == [2, 0]


def test_top_leaves_out_what_the_mask_forbids_and_what_was_never_counted() -> None:
    made = counters()
    feed(made, [(click("u", "a", "e1"), 0, T), (click("u", "b", "e2"), 1, T)])
    assert made.top(10, T, 1, CLICKS, np.array([False, True])).tolist() == [1]


# Guard, repetitions, cap, bounds


def test_event_of_a_partition_that_is_not_owned_is_refused() -> None:
    made = counters()
    with pytest.raises(FencedError, match="partition 7"):
        feed(made, [(click("u", "a", "e"), 0, T)], partition=7)


def test_repeated_event_id_with_a_new_offset_counts_once() -> None:
    made = counters()
    feed(made, [(click("u", "a", "same"), 0, T), (click("u", "a", "same"), 1, T + 100_000)])
    assert made.totals(ROWS)[0, CLICKS] == 1


def test_same_event_id_of_two_users_counts_twice() -> None:
    made = counters()
    feed(made, [(click("u", "a", "1"), 0, T), (click("v", "a", "1"), 1, T)])
    assert made.totals(ROWS)[0, CLICKS] == 2


def test_one_user_moves_an_item_by_the_cap_per_window_and_kind() -> None:
    made = counters()
    feed(made, [(click("u", "a", f"e{i}"), i, T) for i in range(50)])
    assert made.totals(ROWS)[0].tolist() == [0, CONFIG.user_cap, CONFIG.user_cap]


def test_cap_starts_again_with_the_next_window() -> None:
    made = counters()
    feed(made, [(click("u", "a", f"e{i}"), i, T + (i // 10) * 120_000) for i in range(20)])
    assert made.totals(ROWS)[0, CLICKS] == 2 * CONFIG.user_cap


def test_late_event_does_not_open_a_window_again() -> None:
    made = counters()
    times = [T + 130_000] * 3 + [T] * 3
    feed(made, [(click("u", "a", f"e{i}"), i, t) for i, t in enumerate(times)])
    assert made.totals(ROWS)[0, CLICKS] == CONFIG.user_cap


def test_cap_of_one_user_does_not_touch_another() -> None:
    made = counters()
    feed(made, [(click(f"u{i % 40}", "a", f"e{i}"), i, T) for i in range(200)])
    assert made.totals(ROWS)[0, CLICKS] == 40 * CONFIG.user_cap


def test_window_of_too_many_touches_ends_early_so_that_memory_is_bounded() -> None:
    made = counters(CountersConfig(user_window_max_touches=1_024))
    feed(made, [(click("u", "a", f"e{i}"), i, T) for i in range(2 * 1_024)])
    # A click is two touches: four windows.
    assert made.totals(ROWS)[0, CLICKS] == 4 * CONFIG.user_cap


def test_items_that_no_catalogue_record_names_are_counted_up_to_their_bound() -> None:
    made = counters(CountersConfig(max_unknown_items=2))
    feed(made, [(impression("u", "vwxyz", "e"), 0, T)])
    assert len(made.index) == len(ITEMS) + 2
    assert made.dropped_touches == 3


def test_item_that_the_catalogue_names_later_makes_room_for_another() -> None:
    named: set[int] = set()
    index = ItemIndex()
    made = ItemCounters(index, CountersConfig(max_unknown_items=1), is_named=named.__contains__)
    assert made.row_for("x") == 0
    assert made.row_for("y") == UNKNOWN
    named.add(0)
    assert [made.row_for(f"z{i}") for i in range(1_001)].count(1) == 1


# A function of the log

events = st.one_of(
    st.builds(
        impression,
        st.sampled_from("uv"),
        st.lists(st.sampled_from(ITEMS), min_size=1, max_size=4).map("".join),
        st.integers(0, 40).map(str),
    ),
    st.builds(
        click,
        st.sampled_from("uv"),
        st.sampled_from(ITEMS),
        st.integers(0, 40).map(str),
        st.sampled_from(["click", "click", "share", "hide"]),
    ),
)


@st.composite
def logs(draw: st.DrawFn, max_size: int = 60) -> list[Logged]:
    """A partition's log: offsets with gaps, event times that mostly rise, over several windows."""
    steps = draw(st.lists(st.tuples(events, st.integers(1, 3), st.integers(-90, 60)), max_size=max_size))
    offset, time_ms = -1, T
    log: list[Logged] = []
    for event, gap, seconds in steps:
        offset += gap
        time_ms += max(seconds, 0) * 1_000
        log.append((event, offset, time_ms + min(seconds, 0) * 1_000))
    return log


def assert_same(one: ItemCounters, other: ItemCounters, now_ms: int = T + HOUR_MS) -> None:
    assert one.totals(ROWS).tolist() == other.totals(ROWS).tolist()
    np.testing.assert_allclose(one.read(ROWS, now_ms), other.read(ROWS, now_ms), rtol=1e-6)


@given(log=logs(), batch_events=st.integers(1, 7))
@settings(deadline=None)
def test_cutting_the_log_into_other_batches_changes_nothing(log: list[Logged], batch_events: int) -> None:
    whole, cut = counters(), counters()
    feed(whole, log)
    feed(cut, log, batch_events=batch_events)
    assert_same(whole, cut)


@given(log=logs(), first=st.integers(0, 60), length=st.integers(0, 60))
@settings(deadline=None)
def test_replaying_any_part_of_the_log_changes_nothing(log: list[Logged], first: int, length: int) -> None:
    once, again = counters(), counters()
    feed(once, log)
    feed(again, log)
    feed(again, log[first : first + length])
    assert_same(once, again)


@given(log=logs(max_size=30), order=st.randoms(use_true_random=False))
@settings(deadline=None)
def test_order_of_late_events_of_different_users_does_not_matter(log: list[Logged], order: object) -> None:
    made = []
    for seed in (0, 1):
        times = [time_ms for _, _, time_ms in log]
        shuffled = list(times)
        if seed:
            order.shuffle(shuffled)  # type: ignore[attr-defined]
        # Cap and repetition look at the order of the log on purpose; distinct users keep both out of this.
        distinct = [impression(f"u{t}-{i}", "ab", "e") for i, t in enumerate(times)]
        made.append(counters(CountersConfig(user_cap=255)))
        feed(made[-1], [(e, o, t) for e, (_, o, _), t in zip(distinct, log, shuffled, strict=True)])
    assert_same(made[0], made[1])


@given(first=logs(max_size=20), second=logs(max_size=20))
@settings(deadline=None)
def test_two_partitions_sum(first: list[Logged], second: list[Logged]) -> None:
    both, one, other = counters(partitions=2), counters(), counters()
    feed(both, first, 0)
    feed(both, second, 1)
    feed(one, first)
    feed(other, second)
    assert both.totals(ROWS).tolist() == (one.totals(ROWS) + other.totals(ROWS)).tolist()
    now_ms = T + HOUR_MS
    np.testing.assert_allclose(both.read(ROWS, now_ms), one.read(ROWS, now_ms) + other.read(ROWS, now_ms), rtol=1e-5)


lives = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(0, 20), st.sets(st.sampled_from(range(3)))), min_size=1, max_size=3),
        st.integers(0, 20),
    ),
    max_size=4,
)
"""For each life of a process: how far it goes before it publishes which items, and how far its commit lags."""


@given(log=logs(), lives=lives, max_touches=st.sampled_from([1_024, 131_072]))
@settings(deadline=None, max_examples=120)
def test_deaths_at_any_points_equal_no_death(
    log: list[Logged], lives: list[tuple[list[tuple[int, set[int]]], int]], max_touches: int
) -> None:
    config = CountersConfig(user_window_max_touches=max_touches)
    uninterrupted = counters(config)
    feed(uninterrupted, log)
    topic: list[Absolute] = []
    checkpoint, committed = Checkpoint(), 0
    for steps, lag in [*lives, ([(len(log), {0, 1, 2})], 0)]:
        alive = reborn(config, topic, checkpoint, log, committed)
        done = committed
        for length, rows in steps:
            feed(alive, log[done : done + length], batch_events=4)
            done = min(done + length, len(log))
            slots, _, _ = alive.dirty(0)
            # Only some of the changed items are published, as under the rate cap.
            topic.append(alive.take_dirty(0, slots[np.isin(slots, list(rows))]))
            checkpoint = alive.checkpoint(0)
            alive.published(0, checkpoint)
        committed = max(committed, done - lag)
    assert_same(uninterrupted, alive)


def reborn(
    config: CountersConfig, topic: list[Absolute], checkpoint: Checkpoint, log: list[Logged], committed: int
) -> ItemCounters:
    """Return the counters of a new process that mirrored the topic and read the log again up to the commit."""
    made = counters(config)
    made.release(0)
    for state in topic:
        made.replace(0, state)
    made.own(0, checkpoint)
    feed(made, [e for e in log[:committed] if e[1] >= checkpoint.resume_offset])
    return made


def test_cap_holds_across_a_death_within_the_window() -> None:
    log: list[Logged] = [(click("u", "a", f"e{i}"), i, T + i) for i in range(10)]
    victim, survivor = counters(), counters()
    survivor.release(0)
    feed(victim, log[:5])
    survivor.replace(0, publish(victim))
    survivor.own(0, victim.checkpoint(0))
    feed(survivor, log)
    assert survivor.totals(ROWS)[0, CLICKS] == CONFIG.user_cap


def test_retry_after_a_death_is_still_recognised() -> None:
    victim, survivor = counters(), counters()
    survivor.release(0)
    log: list[Logged] = [(click("u", "a", "same"), 0, T), (click("v", "b", "other"), 1, T + 120_000)]
    feed(victim, log)
    survivor.replace(0, publish(victim))
    checkpoint = victim.checkpoint(0)
    survivor.own(0, checkpoint)
    feed(survivor, [e for e in log if e[1] >= checkpoint.resume_offset])
    feed(survivor, [(click("u", "a", "same"), 2, T + 121_000)])
    assert survivor.totals(ROWS)[0, CLICKS] == 1


def test_retry_of_a_retry_is_recognised_in_the_window_after_each() -> None:
    made = counters()
    feed(made, [(click("u", "a", "same"), i, T + i * 120_000) for i in range(5)])
    assert made.totals(ROWS)[0, CLICKS] == 1


def test_retry_read_again_without_what_it_repeats_is_not_counted() -> None:
    # The first event lies before the window that is read again; its retry must not count because of that.
    log: list[Logged] = [
        (click("u", "a", "same"), 0, T),
        (click("u", "b", "same"), 1, T + 120_000),
        (click("v", "c", "other"), 2, T + 240_000),
    ]
    victim, survivor = counters(), counters()
    survivor.release(0)
    feed(victim, log)
    survivor.replace(0, publish(victim))
    checkpoint = victim.checkpoint(0)
    assert checkpoint.resume_offset == 1
    survivor.own(0, checkpoint)
    feed(survivor, log[1:])
    assert survivor.totals(ROWS)[:, CLICKS].tolist() == [1, 0, 1]


def test_window_that_ended_early_is_rebuilt_with_its_watermark() -> None:
    config = CountersConfig(user_window_max_touches=1_024)
    # A window ends 40 s after T. The watermark has passed that; all that follows is late.
    log: list[Logged] = [(impression("first", "a", "e"), 0, T + 50_000)]
    log += [(impression(f"u{i}", "b", "e"), i, T) for i in range(1, 2_100)]
    log += [(click("u", "a", f"c{i}"), 2_100 + i, T) for i in range(3)]
    log += [(impression("last", "b", "e"), 2_110, T + 45_000), (click("u", "a", "c9"), 2_111, T + 45_000)]
    victim, survivor = counters(config), counters(config)
    survivor.release(0)
    feed(victim, log[:2_103])
    survivor.replace(0, publish(victim))
    checkpoint = victim.checkpoint(0)
    assert checkpoint.resume_offset == 1_024
    survivor.own(0, checkpoint)
    feed(survivor, log[1_024:])
    assert survivor.totals(ROWS)[0, CLICKS] == CONFIG.user_cap


def test_checkpoint_does_not_pass_an_item_that_waits() -> None:
    made = counters()
    feed(made, [(click("u", i, f"e{n}"), n, T) for n, i in enumerate("abab")])
    slots, _, _ = made.dirty(0)
    made.take_dirty(0, slots[:1])
    assert made.checkpoint(0).offset == 1


def test_checkpoint_reads_again_from_the_window_before_the_one_in_force() -> None:
    made = counters()
    feed(made, [(click("u", "a", f"e{i}"), i, T + i * 60_000) for i in range(10)])
    publish(made)
    found = made.checkpoint(0)
    # T lies 80 s into its window, so that events 1 3 5 7 9 open one each.
    assert (found.offset, found.resume_offset) == (10, 7)


def test_state_that_contains_less_does_not_replace_what_is_held() -> None:
    owner, mirror = counters(), counters()
    mirror.release(0)
    feed(owner, [(click("u", "a", "e0"), 0, T)])
    early = publish(owner)
    feed(owner, [(click("v", "a", "e1"), 1, T)])
    mirror.replace(0, publish(owner))
    mirror.replace(0, early)
    assert mirror.totals(ROWS)[0, CLICKS] == 2


def test_mirrored_state_of_an_owned_partition_is_left_alone() -> None:
    owner, other = counters(), counters()
    feed(other, [(click(f"u{i}", "a", "e"), i, T) for i in range(5)])
    owner.replace(0, publish(other))
    assert not owner.totals(ROWS).any()


def test_own_item_overwritten_by_a_late_writer_is_published_again() -> None:
    made = counters()
    feed(made, [(click(f"u{i}", "a", "e"), i, T) for i in range(5)])
    publish(made)
    made.touch_again(0, ROWS[:1], np.array([2]))
    slots, since, _ = made.dirty(0)
    assert (len(slots), since.tolist()) == (1, [3])


def test_kinds_are_the_last_axis_in_their_order() -> None:
    made = counters()
    feed(made, [(impression("u", "a", "e1"), 0, T), (click("u", "a", "e2", "purchase"), 1, T)])
    assert made.read(ROWS[:1], T)[0, 0].tolist() == [1.0, 0.0, 5.0, 1.0]
    assert (IMPRESSIONS, CLICKS, ACTIONS, EXPECTED) == (0, 1, 2, 3)


def test_an_item_is_expected_to_take_its_share_of_the_clicks_of_each_slate() -> None:
    made = counters()
    feed(made, [(impression("u", "abc", "e1"), 0, T), (impression("v", "ab", "e2"), 1, T)])
    expected = made.read(ROWS, T)[:, 0, EXPECTED].tolist()
    assert expected == pytest.approx([1 / 3 + 1 / 2, 1 / 3 + 1 / 2, 1 / 3], rel=1e-6)


def test_an_unclicked_item_that_stands_for_others_is_expected_to_take_their_shares() -> None:
    made, batch = counters(), TouchBatch()
    batch.add(0, T, 1, 1, Touches(["a", "b"], [IMPRESSIONS, IMPRESSIONS], [1.0, 9.0]))
    made.add(0, batch)
    assert made.read(ROWS, T)[:2, 0, EXPECTED].tolist() == pytest.approx([0.1, 0.9], rel=1e-6)


def test_an_impression_that_the_cap_keeps_out_is_not_expected_to_be_clicked() -> None:
    made = counters()
    feed(made, [(impression("u", "ab", f"e{n}"), n, T) for n in range(10)])
    assert made.read(ROWS, T)[0, 0, EXPECTED] == pytest.approx(CONFIG.user_cap / 2, rel=1e-6)


def test_time_since_the_first_impression_is_that_of_the_earliest_and_none_is_not_a_number() -> None:
    made = counters()
    feed(made, [(impression("u", "a", "e1"), 0, T), (impression("v", "a", "e2"), 1, T - HOUR_MS)])
    feed(made, [(click("u", "b", "e3"), 2, T)])
    seconds = made.first_seen_seconds(ROWS[None], np.array([T + 1_000]))[0]
    assert seconds[0] == 3_601
    assert np.isnan(seconds[1:]).all()


def test_first_impression_is_the_earliest_of_all_partitions_and_survives_publication() -> None:
    owner, mirror = counters(partitions=2), counters(partitions=0)
    feed(owner, [(impression("u", "ab", "e1"), 0, T)], partition=0)
    feed(owner, [(impression("v", "ac", "e2"), 0, T - HOUR_MS)], partition=1)
    for partition in (0, 1):
        mirror.replace(partition, publish(owner, partition))
    for side in (owner, mirror):
        assert side.first_seen_seconds(ROWS[None], np.array([T])).tolist() == [[3_600.0, 0.0, 3_600.0]]


def test_counts_of_a_partition_weeks_behind_another_are_published_whole() -> None:
    index = ItemIndex()
    counters = ItemCounters(index, CountersConfig())
    day_ms = 86_400_000
    for partition, time_ms in ((0, 60 * day_ms), (1, 52 * day_ms), (2, 10 * day_ms)):
        counters.own(partition)
        batch = TouchBatch()
        for offset in range(3):
            batch.add(offset, time_ms, offset + 1, offset + 1, Touches((f"item-{partition}",), (CLICKS,), (1.0,)))
        counters.add(partition, batch)
    for partition in (0, 1, 2):
        slots, _, _ = counters.dirty(partition)
        state = counters.take_dirty(partition, slots)
        assert np.isfinite(state.values).all()
        assert state.totals[:, CLICKS].sum() == 3
    assert np.isfinite(counters.read(np.arange(3), 60 * day_ms)).all()


def test_no_room_for_unknown_items_counts_nothing_and_breaks_nothing() -> None:
    counters = ItemCounters(ItemIndex(), CountersConfig(max_unknown_items=0))
    counters.own(0)
    batch = TouchBatch()
    batch.add(0, 1_000, 1, 1, Touches(("nobody-knows",), (CLICKS,), (1.0,)))
    assert counters.add(0, batch) == 0
    assert counters.dropped_touches == 1


def test_the_last_offset_that_an_item_contains_is_that_of_its_partition() -> None:
    made = counters(partitions=2)
    feed(made, [(impression("u", "ab", "1"), 3, T), (click("u", "a", "2"), 7, T)])
    assert made.last_offsets(0, np.array([0, 1, 2, UNKNOWN, 10**6], np.int32)).tolist() == [7, 3, -1, -1, -1]
    assert made.last_offsets(1, ROWS).tolist() == [-1, -1, -1]

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import RowError
from models.examples import BY_TIMER, EARLY, LabelsRecord
from models.hashing import impression_id
from models.joiner import (
    JoinContext,
    Joined,
    JoinerConfig,
    decode_block,
    due_labels,
    is_spent,
    join,
    next_close_ms,
)
from models.user_events import ACTION, IMPRESSION, REQUEST, Outcome, UserEvent, UserStateConfig
from tests.models import joiner_reference
from tests.models.user_state_logs import ACTIONS_AND_VALUES, START_MS, event

EPOCH, PARTITION = 7, 3
WINDOW, SHORT_WINDOW, GRACE = 600, 60, 120
"""Seconds."""
SURFACES = ("front", "mail")
USER_STATE = UserStateConfig(
    short_dwell_seconds=5.0, attribution_window_seconds=WINDOW, attribution_windows_seconds={"mail": SHORT_WINDOW}
)
WINDOWS_MS = {0: WINDOW * 1_000, 1: SHORT_WINDOW * 1_000, 255: WINDOW * 1_000}
ROOMY = JoinerConfig(
    grace_seconds=GRACE, max_impressions=1_000, max_actions=1_000, max_unmatched_actions=1_000, max_bytes=500_000
)
CONTEXT = JoinContext.of(ROOMY, USER_STATE, SURFACES)


class Topic:
    """A user's log as it is processed: state and clock, and the labels that were sent."""

    def __init__(self, context: JoinContext = CONTEXT) -> None:
        self.context = context
        self.block, self.clock_ms = b"", 0
        self.sent: list[LabelsRecord] = []
        self.last = Joined(b"", [], None, join(b"", [], [], 0, context, user_id="u", epoch=0, partition=0).counts)

    def take(self, events: Sequence[UserEvent], outcome: int = Outcome.APPLIED) -> list[LabelsRecord]:
        """Process one batch; returns its labels."""
        self.last = join(
            self.block,
            events,
            [outcome] * len(events),
            self.clock_ms,
            self.context,
            user_id="u",
            epoch=EPOCH,
            partition=PARTITION,
        )
        self.block = self.last.block
        if outcome == Outcome.APPLIED:
            self.clock_ms = max([self.clock_ms, *(e.time_ms for e in events)])
        self.sent += self.last.labels
        return self.last.labels


def show(items: Sequence[int], at: float, *, offset: int, request: int = 0, surface: int = 0) -> UserEvent:
    """Return an impression ``at`` seconds after the start."""
    return event(IMPRESSION, items, offset=offset, time_ms=START_MS + int(at * 1_000), request=request, surface=surface)


def act(item: int, at: float, *, offset: int, request: int = 0, action: str = "click") -> UserEvent:
    """Return an action ``at`` seconds after the start."""
    return event(ACTION, [item], offset=offset, time_ms=START_MS + int(at * 1_000), request=request, action=action)


def look(at: float, *, offset: int = 999) -> UserEvent:
    """Return a request ``at`` seconds after the start: it moves the clock and nothing else."""
    return event(REQUEST, [], offset=offset, time_ms=START_MS + int(at * 1_000))


def meaning(label: LabelsRecord) -> joiner_reference.Outcome:
    """Return what a label says."""
    return joiner_reference.Outcome(
        tuple(np.frombuffer(label.clicked, "<u2").tolist()),
        tuple(np.frombuffer(label.refused, "<u2").tolist()),
        tuple(label.actions),
    )


def newest(labels: Sequence[LabelsRecord]) -> dict[int, joiner_reference.Outcome]:
    """Return what the last label of each impression says, by impression id."""
    return {label.impression_id: meaning(label) for label in labels}


def by_event(labels: Sequence[LabelsRecord], log: Sequence[UserEvent]) -> dict[int, joiner_reference.Outcome]:
    """Return the same by event hash, which does not depend on the place in the log."""
    hashes = {impression_id(EPOCH, PARTITION, e.offset): e.event_hash for e in log}
    return {hashes[id_]: said for id_, said in newest(labels).items()}


CLICK, LIKE, PURCHASE = 0x11, 0x12, 0x16


def clicks_on(*places: int) -> joiner_reference.Outcome:
    return joiner_reference.Outcome(places, (), (CLICK,) * len(places))


NOTHING = joiner_reference.Outcome()


# --- one fact each


def test_an_impression_is_labelled_when_its_users_own_log_passes_its_window() -> None:
    topic = Topic()
    assert topic.take([show([1, 2, 3], 0, offset=5), act(2, 10, offset=6)]) == []
    assert topic.take([look(WINDOW)]) == []
    (label,) = topic.take([look(WINDOW + 0.001)])
    assert meaning(label) == clicks_on(1)
    assert label.impression_id == impression_id(EPOCH, PARTITION, 5)
    assert (label.user_id, label.time_ms, label.closed_ms) == ("u", START_MS, START_MS + WINDOW * 1_000)
    assert (label.revision, label.flags) == (0, 0)


def test_an_impression_that_nobody_acted_on_is_labelled_too() -> None:
    assert [meaning(label) for label in Topic().take([show([1], 0, offset=0), look(700)])] == [NOTHING]


def test_the_end_of_the_window_still_counts_and_a_millisecond_later_does_not() -> None:
    log = [show([1, 2], 0, offset=0), act(1, WINDOW, offset=1), act(2, WINDOW + 0.001, offset=2)]
    assert [meaning(label) for label in Topic().take(log)] == [clicks_on(0)]


def test_an_action_before_the_impression_is_not_of_it() -> None:
    log = [act(1, -1, offset=0), show([1], 0, offset=1), look(700)]
    assert [meaning(label) for label in Topic().take(log)] == [NOTHING]


def test_a_surface_has_a_window_of_its_own() -> None:
    topic = Topic()
    topic.take([show([1], 0, offset=0, surface=0), show([1], 1, offset=1, surface=1)])
    assert [label.time_ms for label in topic.take([look(62)])] == [START_MS + 1_000]


def test_an_action_belongs_to_the_newest_impression_that_holds_its_item() -> None:
    log = [show([1, 2], 0, offset=0), show([2, 1], 5, offset=1), show([3], 6, offset=2), act(2, 10, offset=3)]
    assert [meaning(label) for label in Topic().take([*log, look(700)])] == [NOTHING, clicks_on(0), NOTHING]


def test_an_action_that_names_its_request_belongs_to_it_although_a_newer_impression_holds_the_item() -> None:
    log = [show([1], 0, offset=0, request=9), show([1], 5, offset=1), act(1, 10, offset=2, request=9)]
    assert [meaning(label) for label in Topic().take([*log, look(700)])] == [clicks_on(0), NOTHING]


def test_of_two_showings_of_one_request_the_newest_that_holds_the_item_is_clicked() -> None:
    first, second = show([1, 2], 0, offset=0, request=9), show([3, 1], 5, offset=1, request=9)
    clicks = [act(1, 10, offset=2, request=9), act(2, 11, offset=3, request=9)]
    assert [meaning(x) for x in Topic().take([first, second, *clicks, look(700)])] == [clicks_on(1), clicks_on(1)]


def test_an_action_on_an_item_that_its_request_did_not_show_labels_nothing() -> None:
    log = [show([2], 0, offset=0), show([1], 5, offset=1, request=9), act(2, 10, offset=2, request=9), look(700)]
    assert [meaning(label) for label in Topic().take(log)] == [NOTHING, NOTHING]


def test_an_action_whose_request_was_never_shown_belongs_to_the_newest_that_holds_the_item() -> None:
    log = [show([2], 0, offset=0), act(2, 10, offset=2, request=9), look(700)]
    assert [meaning(label) for label in Topic().take(log)] == [clicks_on(0)]


def test_an_action_without_a_label_does_nothing() -> None:
    middling = event(ACTION, [1], offset=1, time_ms=START_MS + 5_000, action="rating", value=3.0)
    assert [meaning(label) for label in Topic().take([show([1], 0, offset=0), middling, look(700)])] == [NOTHING]


def test_of_a_click_and_a_hide_the_later_one_counts() -> None:
    log = [show([1, 2], 0, offset=0), act(1, 5, offset=1), act(1, 6, offset=2, action="hide")]
    back = [act(2, 7, offset=3, action="dislike"), act(2, 8, offset=4, action="like")]
    (label,) = Topic().take([*log, *back, look(700)])
    assert meaning(label) == joiner_reference.Outcome((1,), (0,), (LIKE,))


def test_the_strongest_positive_action_names_the_label() -> None:
    log = [show([1], 0, offset=0), act(1, 5, offset=1, action="purchase"), act(1, 6, offset=2)]
    (label,) = Topic().take([*log, look(700)])
    assert meaning(label).actions == (PURCHASE,)


def test_a_late_click_within_the_grace_sends_a_corrected_label() -> None:
    topic = Topic()
    topic.take([show([1, 2], 0, offset=0)])
    topic.take([look(WINDOW + GRACE)])
    (label,) = topic.take([act(2, 30, offset=2)])
    assert (label.revision, meaning(label)) == (1, clicks_on(1))
    assert (topic.last.counts.corrected, topic.last.counts.late_actions) == (1, 0)


def test_a_click_after_the_grace_is_counted_and_changes_no_label() -> None:
    topic = Topic()
    topic.take([show([1, 2], 0, offset=0)])
    topic.take([look(WINDOW + GRACE + 0.001)])
    assert topic.take([act(2, 30, offset=2)]) == []
    assert topic.last.counts.late_actions == 1


def test_a_late_action_that_names_a_forgotten_impression_does_not_label_another() -> None:
    topic = Topic()
    topic.take([show([1], 0, offset=0, request=9)])
    topic.take([show([1], 60, offset=1)])
    topic.take([look(WINDOW + GRACE + 1)])
    assert topic.take([act(1, 70, offset=2, request=9)]) == []
    assert topic.last.counts.late_actions == 1


def test_a_late_click_that_changes_nothing_sends_nothing() -> None:
    topic = Topic()
    topic.take([show([1], 0, offset=0), act(1, 10, offset=1), look(700)])
    assert topic.take([act(1, 12, offset=3)]) == []


def test_a_late_impression_takes_its_click_from_an_older_one() -> None:
    topic = Topic()
    topic.take([show([1], 0, offset=0), act(1, 60, offset=1), look(WINDOW + 50)])
    labels = topic.take([show([1], 30, offset=3), look(WINDOW + 60)])
    assert newest(labels) == {
        impression_id(EPOCH, PARTITION, 0): NOTHING,
        impression_id(EPOCH, PARTITION, 3): clicks_on(0),
    }


def test_a_click_that_comes_before_its_impression_waits_for_it() -> None:
    topic = Topic()
    topic.take([act(1, 10, offset=0)])
    assert [meaning(label) for label in topic.take([show([1], 5, offset=1), look(700)])] == [clicks_on(0)]


def test_an_impression_from_before_the_grace_is_labelled_at_once() -> None:
    topic = Topic()
    topic.take([look(5_000)])
    assert [meaning(label) for label in topic.take([show([1], 0, offset=1)])] == [NOTHING]


def test_a_duplicate_does_nothing() -> None:
    topic = Topic()
    topic.take([show([1], 0, offset=0)])
    block = topic.block
    assert topic.take([show([1], 0, offset=1), look(5_000)], Outcome.DUPLICATE) == []
    assert topic.block == block


def test_a_replayed_event_sends_the_closed_labels_again_and_changes_nothing() -> None:
    topic = Topic()
    topic.take([show([1], 0, offset=0), act(1, 10, offset=1), show([2], 590, offset=2)])
    (first,) = topic.take([look(700)])
    block = topic.block
    assert topic.take([look(700)], Outcome.REPLAYED) == [first]
    assert topic.block == block
    assert (topic.last.counts.resent, topic.last.counts.closed) == (1, 0)


def test_a_label_of_a_long_absent_user_is_still_there_when_the_batch_that_closed_it_comes_again() -> None:
    topic = Topic()
    topic.take([show([1], 0, offset=0)])
    (first,) = topic.take([look(90 * 86_400)])
    assert topic.take([look(90 * 86_400)], Outcome.REPLAYED) == [first]


def test_a_final_impression_is_forgotten_at_the_start_of_the_next_batch() -> None:
    topic = Topic()
    topic.take([show([1], 0, offset=0), act(1, 3, offset=1), look(5_000)])
    assert len(decode_block(topic.block).impressions) == 1
    topic.take([look(5_001)])
    assert topic.block == b""


def test_a_block_made_in_the_same_batch_keeps_its_final_impressions() -> None:
    first = join(
        b"",
        [show([1], 0, offset=0), look(5_000, offset=1)],
        [0, 0],
        0,
        CONTEXT,
        user_id="u",
        epoch=EPOCH,
        partition=PARTITION,
    )
    second = join(
        first.block,
        [look(5_001, offset=2)],
        [0],
        START_MS + 5_000_000,
        CONTEXT,
        user_id="u",
        epoch=EPOCH,
        partition=PARTITION,
        may_drop=False,
    )
    assert second.block == first.block


def test_no_room_for_impressions_closes_the_oldest_early() -> None:
    topic = Topic(JoinContext.of(ROOMY.model_copy(update={"max_impressions": 2}), USER_STATE, SURFACES))
    topic.take([show([1], 0, offset=0), act(1, 1, offset=1), show([2], 2, offset=2)])
    (label,) = topic.take([show([3], 3, offset=3)])
    assert (label.time_ms, label.flags, meaning(label)) == (START_MS, EARLY, clicks_on(0))
    assert topic.last.counts.early == 1


def test_an_impression_larger_than_all_room_is_closed_at_once() -> None:
    topic = Topic(JoinContext.of(ROOMY.model_copy(update={"max_bytes": 256}), USER_STATE, SURFACES))
    (label,) = topic.take([show(range(100), 0, offset=0)])
    assert label.flags == EARLY


def test_no_room_for_actions_closes_the_oldest_impression_that_has_any() -> None:
    topic = Topic(JoinContext.of(ROOMY.model_copy(update={"max_actions": 2}), USER_STATE, SURFACES))
    topic.take([show([1], 0, offset=0), show([2, 3], 1, offset=1), show([4], 2, offset=2)])
    topic.take([act(2, 3, offset=3), act(4, 4, offset=4)])
    (label,) = topic.take([act(3, 5, offset=5)])
    assert (label.time_ms, label.flags, meaning(label)) == (START_MS + 1_000, EARLY, clicks_on(0, 1))


def test_an_action_without_an_impression_goes_when_there_is_no_room_for_it() -> None:
    topic = Topic(JoinContext.of(ROOMY.model_copy(update={"max_unmatched_actions": 2}), USER_STATE, SURFACES))
    topic.take([act(1, 1, offset=1), act(2, 2, offset=2), act(3, 3, offset=3)])
    assert topic.last.counts.dropped_actions == 1
    assert [meaning(label) for label in topic.take([show([1, 2, 3], 0, offset=4), look(700)])] == [clicks_on(1, 2)]


def test_the_timer_reads_the_label_of_a_silent_user_and_says_when_to_look_again() -> None:
    topic = Topic()
    topic.take([show([1, 2], 0, offset=0), act(2, 10, offset=1), show([3], 20, offset=2)])
    labels, next_ms = due_labels(topic.block, START_MS + WINDOW * 1_000 + 1, "u", CONTEXT)
    assert [(label.revision, label.flags, meaning(label)) for label in labels] == [(0, BY_TIMER, clicks_on(1))]
    assert next_close_ms(topic.block) == START_MS + WINDOW * 1_000
    assert next_ms == START_MS + (20 + WINDOW) * 1_000


def test_the_timer_finds_nothing_before_the_window_is_over() -> None:
    topic = Topic()
    topic.take([show([1, 2], 0, offset=0)])
    assert due_labels(topic.block, START_MS + WINDOW * 1_000, "u", CONTEXT)[0] == []


def test_the_users_own_log_says_the_same_as_the_timer_did() -> None:
    topic = Topic()
    topic.take([show([1, 2], 0, offset=0), act(2, 10, offset=1)])
    by_timer, _ = due_labels(topic.block, START_MS + 10**9, "u", CONTEXT)
    assert newest(by_timer) == newest(topic.take([look(10**6)]))


def test_a_block_is_spent_when_its_last_impression_is_past_the_grace() -> None:
    topic = Topic()
    topic.take([show([1], 0, offset=0), show([2], 50, offset=1), act(2, 60, offset=2)])
    last_ms = START_MS + (50 + WINDOW + GRACE) * 1_000
    assert [is_spent(topic.block, last_ms + extra, CONTEXT) for extra in (0, 1)] == [False, True]


@pytest.mark.parametrize(
    "block", [b"\x01", b"\x93\x02\x90\xc4\x00", b"\x93\x01\x90\xc4\x01a", b"\x93\x01\x91\x01\xc4\x00"]
)
def test_a_block_that_is_nonsense_is_refused(block: bytes) -> None:
    with pytest.raises(RowError, match="open impressions"):
        join(block, [], [], 0, CONTEXT, user_id="u", epoch=0, partition=0)


# --- every order, every cut, every replay


@st.composite
def histories(draw: st.DrawFn, most: int = 14) -> list[UserEvent]:
    """Draw what one user did, in the order of event time; a few items, surfaces and requests, so that all collide."""
    made: list[UserEvent] = []
    time_ms = START_MS
    for number in range(draw(st.integers(1, most))):
        time_ms += draw(st.sampled_from([0, 1, 500, 20_000, 60_000, 60_001, 119_000, 300_000, 599_999, 800_000]))
        kind = draw(st.sampled_from([IMPRESSION, ACTION, ACTION, REQUEST]))
        shown = st.lists(st.integers(0, 4), min_size=1, max_size=4, unique=True)
        action, value = draw(st.sampled_from(ACTIONS_AND_VALUES)) if kind == ACTION else ("click", None)
        made.append(
            event(
                kind,
                draw(shown) if kind == IMPRESSION else [draw(st.integers(0, 4))] if kind == ACTION else [],
                offset=number,
                time_ms=time_ms,
                action=action,
                value=value,
                request=draw(st.sampled_from([0, 0, 1, 2])),
                surface=draw(st.sampled_from([0, 1, 255])),
                config=USER_STATE,
            )
        )
    return made


@st.composite
def arrivals(draw: st.DrawFn) -> list[UserEvent]:
    """Draw a history as it arrives: each event at most the grace late, then a look long after."""
    history = draw(histories())
    delays = draw(st.lists(st.integers(0, GRACE * 1_000), min_size=len(history), max_size=len(history)))
    arrived = [e for _, e in sorted(zip(delays, history, strict=True), key=lambda p: p[0] + p[1].time_ms)]
    log = [replace(e, offset=place) for place, e in enumerate(arrived)]
    return [*log, look(10**7, offset=len(log))]


def batches(log: Sequence[UserEvent], cuts: Sequence[int]) -> list[list[UserEvent]]:
    ends = [0, *sorted(cuts), len(log)]
    return [list(log[a:b]) for a, b in itertools.pairwise(ends) if a < b]


@settings(max_examples=400, deadline=None)
@given(arrivals(), st.data())
def test_any_arrival_order_within_the_grace_and_any_batches_give_the_labels_of_the_whole_log(
    log: list[UserEvent], data: st.DataObject
) -> None:
    topic = Topic()
    for batch in batches(log, data.draw(st.lists(st.integers(0, len(log)), max_size=5))):
        topic.take(batch)
    assert by_event(topic.sent, log) == joiner_reference.outcomes(log, USER_STATE, WINDOWS_MS)


@st.composite
def tight_contexts(draw: st.DrawFn) -> JoinContext:
    config = JoinerConfig(
        grace_seconds=GRACE,
        max_impressions=draw(st.integers(1, 4)),
        max_actions=draw(st.integers(1, 4)),
        max_unmatched_actions=draw(st.integers(0, 3)),
        max_bytes=draw(st.sampled_from([256, 300, 500_000])),
    )
    return JoinContext.of(config, USER_STATE, SURFACES)


def late_logs() -> st.SearchStrategy[list[UserEvent]]:
    """Return logs in any order at all."""
    shuffled = histories().flatmap(st.permutations)
    return shuffled.map(
        lambda log: [*(replace(e, offset=place) for place, e in enumerate(log)), look(10**7, offset=len(log))]
    )


@settings(max_examples=300, deadline=None)
@given(late_logs(), st.one_of(st.just(CONTEXT), tight_contexts()), st.data())
def test_batches_change_no_label_however_late_and_however_little_room(
    log: list[UserEvent], context: JoinContext, data: st.DataObject
) -> None:
    alone, together = Topic(context), Topic(context)
    for single in log:
        alone.take([single])
    for batch in batches(log, data.draw(st.lists(st.integers(0, len(log)), max_size=5))):
        together.take(batch)
    assert newest(together.sent) == newest(alone.sent)
    assert len(newest(alone.sent)) == sum(e.kind == IMPRESSION for e in log)


@given(late_logs(), tight_contexts())
def test_what_is_kept_stays_within_its_bounds(log: list[UserEvent], context: JoinContext) -> None:
    topic = Topic(context)
    config = context.config
    for single in log:
        topic.take([single])
        state = decode_block(topic.block)
        live = [i for i in state.impressions if not i.is_final]
        assert len(live) <= config.max_impressions
        assert len(state.actions) <= 17 * (config.max_actions + config.max_unmatched_actions)
        assert not live or sum(len(i.items) + 48 for i in live) + len(state.actions) <= config.max_bytes


@settings(max_examples=300, deadline=None)
@given(late_logs(), st.one_of(st.just(CONTEXT), tight_contexts()), st.data())
def test_a_crash_anywhere_loses_no_label(log: list[UserEvent], context: JoinContext, data: st.DataObject) -> None:
    """State and labels of a batch are written apart; the log is read again from any offset that may be committed."""
    calm = Topic(context)
    for single in log:
        calm.take([single])
    block, guard, clock_ms, committed = b"", 0, 0, 0
    sent: list[LabelsRecord] = []
    crashes = 0
    at = 0
    while at < len(log):
        size = data.draw(st.integers(1, 4))
        batch = log[at : at + size]
        done = [Outcome.REPLAYED if e.offset < guard else Outcome.APPLIED for e in batch]
        joined = join(block, batch, done, clock_ms, context, user_id="u", epoch=EPOCH, partition=PARTITION)
        crash = crashes < 6 and data.draw(st.booleans())
        wrote_state = not crash or data.draw(st.booleans())
        wrote = len(joined.labels) if not crash else data.draw(st.integers(0, len(joined.labels)))
        if wrote_state:
            applied = [e.time_ms for e, outcome in zip(batch, done, strict=True) if outcome == Outcome.APPLIED]
            block, clock_ms = joined.block, max([clock_ms, *applied])
            guard = max(guard, batch[-1].offset + 1)
        sent += joined.labels[:wrote]
        if crash:
            crashes += 1
            at = committed
        else:
            at += len(batch)
            committed = data.draw(st.integers(committed, at))
    assert newest(sent) == newest(calm.sent)

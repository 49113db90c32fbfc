"""The timer that closes the impressions of users who fell silent; time is an argument."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.examples import LabelsRecord, decode_labels
from models.joiner import JoinContext, JoinerConfig, join
from models.user_events import UserEvent, UserStateConfig
from models.user_row import empty_rows, encode_rows
from models.user_value import join_value, split_value
from streams.label_timer import Due, LabelTimer
from streams.labels import RowKey, SentLabels
from streams.maintenance import may_be_replayed
from tests.models import joiner_reference, test_joiner
from tests.models.user_state_logs import START_MS, click, event, impression

WINDOW, GRACE = 600, 120
CONTEXT = JoinContext.of(
    JoinerConfig(grace_seconds=GRACE), UserStateConfig(attribution_window_seconds=WINDOW), ["default"]
)
NOON = 1_000.0
"""The monotonic clock when a test begins, seconds."""
ANN: RowKey = (0, b"ann")


class Table:
    """Values as the worker would make them of users' events, and a timer that follows them."""

    def __init__(self) -> None:
        self.values: dict[RowKey, bytes] = {}
        self.timer = LabelTimer(CONTEXT)
        self.timer.take_over(0, {}, NOON)

    def apply(self, key: RowKey, events: Sequence[UserEvent], now: float = NOON) -> None:
        """Process a batch of one user's events."""
        _, block = split_value(self.values.get(key))
        joined = join(
            block, events, [0] * len(events), self.clock_ms(key), CONTEXT, user_id="", epoch=1, partition=key[0]
        )
        rows = empty_rows(1)
        newest_ms = max([self.clock_ms(key), *(e.time_ms for e in events)])
        rows["version"], rows["last_time_ms"], rows["impressions"] = 1, newest_ms, 1
        self.values[key] = join_value(encode_rows(rows)[0], joined.block)
        self.timer.see(key[0], newest_ms, now)
        self.timer.touch({key: joined.next_close_ms}, now)

    def clock_ms(self, key: RowKey) -> int:
        row, _ = split_value(self.values.get(key))
        return int.from_bytes(row[32:40], "little") if row else 0

    def due(self, now: float, most_users: int = 100) -> Due:
        has_due = self.timer.has_due(now)
        due = self.timer.due(lambda partition, key: self.values.get((partition, key)), now, most_users)
        assert has_due == bool(due._looked_at)
        return due

    def send(self, now: float, most_users: int = 100) -> list[LabelsRecord]:
        """Return the labels that are due and say that they were acknowledged."""
        due = self.due(now, most_users)
        self.timer.done(due)
        return [decode_labels(label.value) for label in due.labels]


def clicked(label: LabelsRecord) -> list[int]:
    return [int(place) for place in np.frombuffer(label.clicked, "<u2")]


def test_a_silent_users_label_is_due_when_the_time_that_passed_fills_its_window() -> None:
    table = Table()
    table.apply(ANN, [impression([1, 2], 0), click(2, 1, START_MS + 5_000)])
    assert table.send(NOON + WINDOW - 5) == []
    (label,) = table.send(NOON + WINDOW - 4.9)
    assert (label.user_id, label.revision, clicked(label)) == ("ann", 0, [1])


def test_other_users_of_the_partition_move_the_watermark() -> None:
    table = Table()
    table.apply(ANN, [impression([1], 0)])
    table.apply((0, b"bob"), [click(1, 1, START_MS + WINDOW * 1_000 + 1)])
    assert len(table.send(NOON)) == 1


def test_a_partition_without_events_has_no_watermark() -> None:
    assert LabelTimer(CONTEXT).watermark_ms(0, NOON) == 0
    assert Table().timer.watermark_ms(0, NOON + 10**6) == 0


def test_an_older_event_does_not_put_the_watermark_back() -> None:
    table = Table()
    table.apply(ANN, [click(1, 0, START_MS)])
    table.apply((0, b"bob"), [click(1, 1, START_MS - 90_000)], NOON + 10)
    assert table.timer.watermark_ms(0, NOON + 10) == START_MS + 10_000


def test_a_label_is_sent_once() -> None:
    table = Table()
    table.apply(ANN, [impression([1], 0)])
    assert len(table.send(NOON + 700)) == 1
    assert table.send(NOON + 9_999) == []


def test_a_label_that_was_not_acknowledged_is_due_again_after_a_take_over() -> None:
    table = Table()
    table.apply(ANN, [impression([1], 0)])
    assert len(table.due(NOON + 700).labels) == 1
    table.timer.take_over(0, {key: value for (_, key), value in table.values.items()}, NOON)
    assert len(table.send(NOON + 700)) == 1


def test_a_late_click_sends_what_the_timer_said_again_corrected() -> None:
    table = Table()
    table.apply(ANN, [impression([1, 2], 0)])
    table.send(NOON + 700)
    table.apply(ANN, [click(2, 1, START_MS + 3_000)], NOON + 701)
    assert [(label.revision, clicked(label)) for label in table.send(NOON + 701)] == [(1, [1])]


def closing(table: Table, items: list[int], *, at_ms: int, flags: int = 0) -> SentLabels:
    """Return what a user's own log says of the impression at the start, clicked at the places ``items``."""
    joined = join(
        b"",
        [impression([1, 2], 0), *(click(i, 1, START_MS + 1) for i in items), click(9, 2, at_ms)],
        [0] * (2 + len(items)),
        0,
        CONTEXT,
        user_id="",
        epoch=1,
        partition=0,
    )
    (record,) = joined.labels
    record.flags |= flags
    return SentLabels.of(ANN, record)


def test_what_the_timer_said_is_not_said_again_by_the_users_own_log() -> None:
    table = Table()
    table.apply(ANN, [impression([1, 2], 0)])
    table.send(NOON + 700)
    assert table.timer.unsaid([closing(table, [], at_ms=START_MS + 900_000)]) == []


def test_what_the_timer_did_not_say_or_said_otherwise_is_written() -> None:
    table = Table()
    table.apply(ANN, [impression([1, 2], 0)])
    own = closing(table, [], at_ms=START_MS + 900_000)
    assert table.timer.unsaid([own]) == [own]
    table.send(NOON + 700)
    for other in (closing(table, [2], at_ms=START_MS + 900_000), closing(table, [], at_ms=START_MS + 900_000, flags=1)):
        assert table.timer.unsaid([other]) == [other]


def test_a_correction_back_to_what_the_timer_said_is_written() -> None:
    table = Table()
    table.apply(ANN, [impression([1, 2], 0)])
    table.send(NOON + 700)
    clicked_on, not_after_all = (closing(table, items, at_ms=START_MS + 900_000) for items in ([2], []))
    assert table.timer.unsaid([clicked_on]) == [clicked_on]
    assert table.timer.unsaid([not_after_all]) == [not_after_all]


def test_what_was_due_but_not_acknowledged_is_written_again() -> None:
    table = Table()
    table.apply(ANN, [impression([1, 2], 0)])
    assert len(table.due(NOON + 700).labels) == 1
    own = closing(table, [], at_ms=START_MS + 900_000)
    assert table.timer.unsaid([own]) == [own]


def test_a_touch_that_changes_no_label_sends_nothing_again() -> None:
    table = Table()
    table.apply(ANN, [impression([1, 2], 0)])
    table.send(NOON + 700)
    table.apply(ANN, [click(9, 1, START_MS + 3_000)], NOON + 701)
    assert table.send(NOON + 701) == []


def test_a_user_whose_own_log_closed_the_impression_is_not_waited_for() -> None:
    table = Table()
    table.apply(ANN, [impression([1], 0), click(5, 1, START_MS + 700_000)])
    assert table.timer.waiting_users == 0
    assert table.send(NOON + 10**6) == []


def test_the_next_impression_of_a_user_is_waited_for_after_the_first() -> None:
    table = Table()
    table.apply(ANN, [impression([1], 0), impression([2], 1, START_MS + 60_000)])
    assert [label.time_ms for label in table.send(NOON + 541)] == [START_MS]
    assert [label.time_ms for label in table.send(NOON + 601)] == [START_MS + 60_000]


def test_a_bounded_number_of_users_is_looked_at_in_one_step() -> None:
    table = Table()
    for number in range(5):
        table.apply((0, f"u{number}".encode()), [impression([1], number)])
    assert [len(table.send(NOON + 700, most_users=2)) for _ in range(4)] == [2, 2, 1, 0]


def test_a_take_over_finds_the_open_impressions_and_the_watermark_in_the_values() -> None:
    table = Table()
    table.apply(ANN, [impression([1], 0)])
    timer = LabelTimer(CONTEXT)
    timer.take_over(0, {key: value for (_, key), value in table.values.items()}, NOON + 5_000)
    assert timer.waiting_users == 1
    assert timer.watermark_ms(0, NOON + 5_000) == START_MS
    assert len(timer.due(lambda p, k: table.values[(p, k)], NOON + 5_601, 10).labels) == 1


def test_a_revoked_partition_is_forgotten() -> None:
    table = Table()
    table.apply(ANN, [impression([1], 0)])
    due = table.due(NOON + 700)
    table.timer.keep_only(set())
    table.timer.done(due)
    assert table.timer.waiting_users == 0
    assert table.send(NOON + 10**6) == []


def test_a_user_who_was_deleted_is_passed_over() -> None:
    table = Table()
    table.apply(ANN, [impression([1], 0)])
    del table.values[ANN]
    assert table.send(NOON + 700) == []
    assert table.timer.waiting_users == 0


@pytest.mark.parametrize("value", [b"\x07", b"\x02\x01\x00\x01nonsense"])
def test_a_value_that_cannot_be_read_stops_no_other(value: bytes) -> None:
    table = Table()
    table.apply(ANN, [impression([1], 0)])
    table.apply((0, b"bob"), [impression([1], 1)])
    table.values[ANN] = value
    assert [label.user_id for label in table.send(NOON + 700)] == ["bob"]
    table.timer.take_over(0, {b"ann": value}, NOON)
    assert table.timer.waiting_users == 0


def block_of(table: Table, key: RowKey) -> bytes:
    return split_value(table.values[key])[1]


def test_open_impressions_can_go_only_after_the_grace_and_when_their_labels_are_out() -> None:
    table = Table()
    table.apply(ANN, [impression([1], 0)])
    late = NOON + WINDOW + GRACE + 1
    assert not table.timer.may_strip(*ANN, block_of(table, ANN), late)
    table.send(NOON + WINDOW + 1)
    assert not table.timer.may_strip(*ANN, block_of(table, ANN), NOON + WINDOW + 1)
    assert table.timer.may_strip(*ANN, block_of(table, ANN), late)


def test_a_request_moves_the_watermark_too() -> None:
    table = Table()
    table.apply(ANN, [impression([1], 0)])
    table.apply((0, b"bob"), [event(2, [], offset=1, time_ms=START_MS + 601_000)])
    assert len(table.send(NOON)) == 1


def test_labels_that_a_crash_cost_may_be_told_again_until_their_event_has_come_again() -> None:
    rows = empty_rows(1)
    rows["version"], rows["epoch"], rows["offset"] = 1, 5, 42 + 1
    value = join_value(encode_rows(rows)[0], b"open")
    assert [may_be_replayed(value, 5, next_offset) for next_offset in (0, 42, 43)] == [True, True, False]
    assert not may_be_replayed(value, 6, 0), "the log of that offset is gone"


@settings(max_examples=150, deadline=None)
@given(test_joiner.arrivals(), st.data())
def test_timer_and_own_log_together_leave_the_labels_of_the_whole_log(
    log: list[UserEvent], data: st.DataObject
) -> None:
    """However fast time passes, and although a restart forgets what the timer said."""
    timer, now, clock_ms, block, value = LabelTimer(test_joiner.CONTEXT), NOON, 0, b"", b""
    timer.take_over(0, {}, NOON)
    timer.see(0, START_MS, NOON)
    last: dict[int, LabelsRecord] = {}
    for batch in test_joiner.batches(log, data.draw(st.lists(st.integers(0, len(log)), max_size=8))):
        now += data.draw(st.sampled_from([0, 10, 130, 700, 5_000]))
        due = timer.due(lambda partition, key, held=value: held, now, 10)  # type: ignore[misc]
        joined = join(
            block,
            batch,
            [0] * len(batch),
            clock_ms,
            test_joiner.CONTEXT,
            user_id="ann",
            epoch=test_joiner.EPOCH,
            partition=test_joiner.PARTITION,
            as_of=batch[-1].offset + 1,
        )
        timer.done(due)
        for label in [*due.labels, *timer.unsaid([SentLabels.of(ANN, record) for record in joined.labels])]:
            held = last.get(label.record.impression_id)
            if held is None or label.record.as_of >= held.as_of:
                last[label.record.impression_id] = label.record
        block, clock_ms = joined.block, max([clock_ms, *(e.time_ms for e in batch)])
        rows = empty_rows(1)
        rows["version"], rows["last_time_ms"], rows["offset"] = 1, clock_ms, batch[-1].offset + 1
        value = join_value(encode_rows(rows)[0], block)
        timer.see(0, clock_ms, now)
        timer.touch({ANN: joined.next_close_ms}, now)
        if data.draw(st.booleans()):
            timer.take_over(0, {ANN[1]: value}, now)
    wanted = joiner_reference.outcomes(log, test_joiner.USER_STATE, test_joiner.WINDOWS_MS)
    assert test_joiner.by_event(list(last.values()), log) == wanted

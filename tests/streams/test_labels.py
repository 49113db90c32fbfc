"""Labels in a micro-batch: which users' events close what, and what goes back into the table with the row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry

from models.examples import LabelsRecord
from models.joiner import JoinCounts, decode_block
from models.user_events import UserEvent
from models.user_row import empty_rows, encode_rows
from models.user_value import split_value
from streams.labels import Closings, LabelMetrics, LabelsWriter, RowKey
from streams.settings import Settings
from tests.models.user_state_logs import START_MS, click, impression

ANN, BOB = (0, b"ann"), (3, "bøb".encode())
SETTINGS = Settings(user_state={"attribution_window_seconds": 600}, joiner={"grace_seconds": 60})


def row() -> bytes:
    rows = empty_rows(1)
    rows["version"] = 1
    return encode_rows(rows)[0]


def written(
    events: Sequence[UserEvent],
    outcomes: Sequence[int] | None = None,
    *,
    blocks: Sequence[bytes] = (b"", b""),
    clock_ms: int = 0,
    fresh: Mapping[RowKey, bytes] | None = None,
    settings: Settings = SETTINGS,
) -> tuple[dict[RowKey, bytes], Closings]:
    """Process events of Ann (user 0) and of Bob (user 1)."""
    done = outcomes if outcomes is not None else [0] * len(events)
    writer = LabelsWriter(settings, epoch=1, surfaces=["default"])
    clocks = [clock_ms, clock_ms]
    return writer.values([ANN, BOB], [row(), row()], blocks, clocks, [7, 9], events, done, fresh or {})


def labels(closings: Closings) -> list[LabelsRecord]:
    return [label.record for label in closings.labels]


LATER_MS = START_MS + 700_000


def test_a_user_s_events_close_that_user_s_impressions_alone() -> None:
    events = [impression([1], 0), impression([1], 1, user=1), click(5, 2, LATER_MS, user=1)]
    _, closings = written(events)
    assert [(label.partition, label.key, label.record.user_id) for label in closings.labels] == [(*BOB, "bøb")]
    assert closings.next_close_ms == {ANN: START_MS + 600_000, BOB: None}


def test_a_label_says_up_to_where_it_knows_the_log() -> None:
    _, closings = written([impression([1], 1, user=1), click(5, 2, LATER_MS, user=1)])
    assert [label.as_of for label in labels(closings)] == [9]


def test_the_value_of_a_user_without_open_impressions_is_the_row_alone() -> None:
    values, _ = written([impression([1], 0)])
    assert values[BOB] == row()
    held, block = split_value(values[ANN])
    assert held == row()
    assert len(decode_block(block).impressions) == 1


def test_what_was_closed_in_the_same_batch_is_not_dropped_by_a_second_part_of_it() -> None:
    first, _ = written([impression([1], 0), click(5, 1, START_MS + 10_000_000)])
    _, block = split_value(first[ANN])
    again, _ = written([click(6, 2, START_MS + 10_000_001)], blocks=[block, b""], clock_ms=START_MS + 10_000_000)
    assert decode_block(split_value(again[ANN])[1]).impressions == []
    same_batch, _ = written(
        [click(6, 2, START_MS + 10_000_001)], blocks=[block, b""], clock_ms=START_MS + 10_000_000, fresh=first
    )
    assert len(decode_block(split_value(same_batch[ANN])[1]).impressions) == 1


def test_with_examples_switched_off_nothing_is_kept_and_nothing_labelled() -> None:
    off = SETTINGS.model_copy(update={"examples": SETTINGS.examples.model_copy(update={"enabled": False})})
    values, closings = written([impression([1], 0), click(5, 1, LATER_MS)], settings=off)
    assert values == {ANN: row(), BOB: row()}
    assert (closings.labels, closings.next_close_ms) == ([], {})


def test_the_parts_of_a_batch_add_up() -> None:
    _, whole = written([impression([1], 0), click(5, 1, LATER_MS)])
    _, other = written([impression([1], 1, user=1)])
    whole.add(other)
    assert (whole.counts.closed, len(whole.labels)) == (1, 1)
    assert whole.next_close_ms == {ANN: None, BOB: START_MS + 600_000}


def test_a_label_that_was_known_already_is_not_counted_as_written() -> None:
    registry = CollectorRegistry()
    metrics = LabelMetrics(registry)
    metrics.count(JoinCounts(closed=5, early=1, corrected=2, resent=3, late_actions=4), known=1)

    def value(kind: str) -> float | None:
        return registry.get_sample_value("millstream_labels_total", {"kind": kind})

    assert [value(kind) for kind in ("own_log", "early", "corrected", "again")] == [3, 1, 2, 3]
    assert registry.get_sample_value("millstream_labels_known_total") == 1
    assert registry.get_sample_value("millstream_late_actions_total") == 4

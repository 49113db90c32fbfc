"""A recorded log counts by context as a worker does, when actions arrive, in any blocks; what the replay says of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.context_popularity import ContextPopularity
from models.item_index import ItemIndex
from models.logs import LogEvent
from models.recommender import RecommenderConfig
from tests.trainer.replay_logs import Line, click, impression, write_log
from tests.trainer.test_log_examples import Log, catalogue
from tests.trainer.test_log_state import EVENTS, log_of
from trainer.log_examples import LogConfig, Reads, log_examples
from trainer.replay import replay
from trainer.replay_settings import ReplayConfig

BY_SURFACE = RecommenderConfig(popularity_context=("surface",))
Counts = dict[str, float]


def counts_of(found: ContextPopularity, event: LogEvent, index: ItemIndex, now_ms: int) -> Counts:
    rows, counts, _ = found.counts(0, found.values_of(event.event)[0], now_ms)
    return {index.item_id(row): round(n, 6) for row, n in zip(rows.tolist(), counts.tolist(), strict=True)}


def counts_read(log: list[LogEvent], config: LogConfig) -> list[Counts]:
    """Return the counts that each impression of a log knows of."""
    read: list[Counts] = []

    def on_reads(reads: Reads) -> None:
        assert reads.contexts is not None
        for event, time_ms in zip(reads.events, reads.times_ms.tolist(), strict=True):
            read.append(counts_of(reads.contexts, event, reads.catalogue.index, time_ms))

    log_examples(Log(*log), catalogue(), "literal", config, on_reads=on_reads, cut_at=set(range(len(log))))
    return read


def counts_expected(log: list[LogEvent], config: LogConfig) -> list[Counts]:
    """Return the same from one event after the other: those that arrived by then and happened strictly before."""
    index = catalogue().index
    index.add("z")
    found = ContextPopularity(BY_SURFACE, config.counters, config.user_state, index)
    expected: list[Counts] = []
    counted = 0
    for logged in log:
        while counted < len(log) and log[counted].time_ms < logged.time_ms:
            if log[counted].time_ms + config.feedback_delay_seconds * 1_000 > logged.time_ms:
                break
            if not log[counted].is_history:
                found.add(0, counted, log[counted].event, log[counted].time_ms)
            counted += 1
        if logged.event.event_id.startswith("i"):
            expected.append(counts_of(found, logged, index, logged.time_ms))
    return expected


@settings(max_examples=60, deadline=None)
@given(
    events=EVENTS,
    delay=st.sampled_from([0.0, 3.0, 3_600.0]),
    block=st.sampled_from([0.5, 60.0, 7 * 86_400.0]),
)
def test_blocks_give_the_counts_that_one_event_after_the_other_gives(
    events: list[tuple[int, str, str]], delay: float, block: float
) -> None:
    log = log_of(events, history=3)
    config = LogConfig(feedback_delay_seconds=delay, block_seconds=block, contexts=BY_SURFACE)
    assert counts_read(log, config) == counts_expected(log, config)


def test_nothing_is_counted_where_no_key_is_named() -> None:
    told: list[ContextPopularity | None] = []
    log = log_of([(1, "u", "a"), (2, "u", "ab")], history=0)
    config = LogConfig(contexts=RecommenderConfig())
    log_examples(Log(*log), catalogue(), "literal", config, on_reads=lambda reads: told.append(reads.contexts))
    assert told == [None]


def fashions_by_device(hours: int, scored_hours: int) -> tuple[list[Line], list[Line]]:
    """Ten impressions an hour on each of two devices; on each another item of forty is what all click."""
    random = np.random.default_rng(5)
    lines: list[Line] = []
    for n in range(hours * 20):
        device = ("tv", "phone")[n % 2]
        fashion = f"i{n // 20 * 7 % 20 + (20 if device == 'tv' else 0)}"
        shown = [fashion, *(f"i{i}" for i in random.permutation(40)[:7].tolist() if f"i{i}" != fashion)]
        context = {"context": {"device": device}}
        lines.append(impression(n * 180_000, f"u{n}", shown) | context)
        lines.append(click(n * 180_000 + 2_000, f"u{n}", fashion) | context)
    lines.append(impression((hours + 3) * 3_600_000, "last", ["i0", "i1"]))
    edge = lines[2 * 20 * (hours - scored_hours)]["event_time"]
    return [line for line in lines if line["event_time"] < edge], [line for line in lines if line["event_time"] >= edge]


@pytest.mark.parametrize(("keys", "finds"), [(("device",), True), ((), False)])
def test_replay_tells_the_recall_of_what_is_popular_in_the_context(
    tmp_path: Path, keys: tuple[str, ...], finds: bool
) -> None:
    log = write_log(tmp_path, *fashions_by_device(hours=30, scored_hours=8))
    recommender = RecommenderConfig(popularity_context=keys, popularity_context_prior=1.0, popularity_half_life_index=0)
    config = ReplayConfig(slates=40, k=1, modes=("live",), recommender=recommender)
    (live,) = replay(log, config).results
    assert live.slates is not None
    assert ("popular_context" in live.slates.source_recall_first) == finds
    if finds:
        first = live.slates.source_recall_first
        assert first["popular_context"] > first["popular"] + 0.3

"""A recorded log teaches pairs as a worker learns them: when they arrive, and in any blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.co_clicks import CoClicks, CoClicksConfig
from models.logs import LogEvent
from models.recommender import RecommenderConfig
from models.user_events import user_event
from models.user_state import apply, empty_rows
from tests.trainer.replay_logs import Written, write_log
from tests.trainer.test_log_examples import HOUR, Log, catalogue, click, impression
from tests.trainer.test_log_state import EVENTS, SPACE, START, log_of
from trainer.log_examples import LogConfig, Reads, log_examples
from trainer.log_state import EPOCH
from trainer.replay import replay
from trainer.replay_settings import ReplayConfig

ITEMS = "abcd"
Pairs = dict[tuple[str, str], float]


def pairs_of(found: CoClicks | None, now_ms: int) -> Pairs:
    """Return the weights of the pairs among the named items, to a millionth."""
    assert found is not None
    index = catalogue().index
    rows = {name: index.row(name) for name in ITEMS}
    names = {row: name for name, row in rows.items()}
    return {
        (a, names[b]): round(weight, 6)
        for a in ITEMS
        for b, weight in found.followers(rows[a], now_ms).items()
        if b in names
    }


def pairs_read(log: list[LogEvent], config: LogConfig) -> list[Pairs]:
    """Return the pairs that each impression of a log knows of."""
    read: list[Pairs] = []

    def on_reads(reads: Reads) -> None:
        read.extend(pairs_of(reads.co_clicks, time_ms) for time_ms in reads.times_ms.tolist())

    log_examples(Log(*log), catalogue(), "literal", config, on_reads=on_reads, cut_at=set(range(len(log))))
    return read


def pairs_expected(log: list[LogEvent], config: LogConfig) -> list[Pairs]:
    """Return the same from one event after the other: those that arrived by then and happened strictly before."""
    assert config.co_clicks is not None
    items, found = catalogue(), CoClicks(config.co_clicks, catalogue().index)
    rows = {name: empty_rows(1) for name in "uvw"}
    expected: list[Pairs] = []
    learned = 0
    for logged in log:
        while log[learned].time_ms + config.feedback_delay_seconds * 1_000 <= logged.time_ms:
            if log[learned].time_ms >= logged.time_ms:
                break
            user, event = log[learned].event.user_id, log[learned].event
            hashed = user_event(event, 0, learned, log[learned].time_ms, config.user_state, ["default"])
            before = rows[user]
            rows[user], outcomes = apply(
                before, [hashed], items, config.user_state, epoch=EPOCH, space_id=SPACE, generation=0
            )
            found.learn(found.steps_of(before, [hashed], outcomes))
            learned += 1
        if logged.event.event_id.startswith("i"):
            expected.append(pairs_of(found, logged.time_ms))
    return expected


@settings(max_examples=60, deadline=None)
@given(
    events=EVENTS,
    delay=st.sampled_from([0.0, 3.0, 3_600.0]),
    block=st.sampled_from([0.5, 60.0, 7 * 86_400.0]),
    neighbours=st.sampled_from([4, 32]),
)
def test_blocks_give_the_pairs_that_one_event_after_the_other_gives(
    events: list[tuple[int, str, str]], delay: float, block: float, neighbours: int
) -> None:
    log = log_of(events, history=3)
    co_clicks = CoClicksConfig(neighbours=neighbours, half_life_seconds=3_600.0)
    config = LogConfig(feedback_delay_seconds=delay, block_seconds=block, co_clicks=co_clicks)
    assert pairs_read(log, config) == pairs_expected(log, config)


def test_a_pair_is_not_known_before_its_delay() -> None:
    log = [
        click(START, "u", "a"),
        click(START + 1_000, "u", "b"),
        impression(START + 2_000, "v", "ab", "b"),
        impression(START + HOUR, "v", "ab", "b"),
    ]
    at_once = pairs_read(log, LogConfig(co_clicks=CoClicksConfig(half_life_seconds=1e9)))
    late = pairs_read(log, LogConfig(co_clicks=CoClicksConfig(half_life_seconds=1e9), feedback_delay_seconds=60.0))
    assert [len(pairs) for pairs in at_once] == [1, 1]
    assert late == [{}, {("a", "b"): pytest.approx(1.0, rel=1e-3)}]


def test_an_impression_that_nobody_cut_at_knows_no_later_pair() -> None:
    log = [click(START, "u", "a"), impression(START + 500, "v", "ab", "b"), click(START + 1_000, "u", "b")]
    log.append(impression(START + 2_000, "v", "ab", "b"))
    read: list[Pairs] = []

    def on_reads(reads: Reads) -> None:
        read.extend(pairs_of(reads.co_clicks, time_ms) for time_ms in reads.times_ms.tolist())

    log_examples(Log(*log), catalogue(), "literal", LogConfig(co_clicks=CoClicksConfig()), on_reads=on_reads)
    assert read[0] == {}


def test_nothing_is_learned_where_nobody_asks() -> None:
    told: list[CoClicks | None] = []
    log = [click(START, "u", "a"), impression(START + 1_000, "u", "ab", "b")]
    log_examples(Log(*log), catalogue(), "literal", LogConfig(), on_reads=lambda reads: told.append(reads.co_clicks))
    assert told == [None]


def test_replay_tells_the_recall_of_neighbours_and_the_mix_has_them_by_their_quota(tmp_path: Path) -> None:
    # Every hour the item of the hour is what everybody clicks, so that it follows those of the hours before.
    log = write_log(tmp_path, *Written.fashions(hours=30, scored_hours=8))
    surface = {"candidates": 4, "quotas": {"co_click": 100.0}}
    recommender = RecommenderConfig.model_validate({"surfaces": {"default": surface}, "popular_items": 1})
    (live,) = replay(log, ReplayConfig(slates=20, modes=("live",), recommender=recommender)).results
    assert live.slates is not None
    assert live.slates.source_recall["co_click"] > 0.5
    assert live.slates.source_recall["mix"] >= live.slates.source_recall["co_click"]

"""A log taken block by block knows at each impression what it would have known event by event."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.bundle import ItemEncodings
from models.catalogue import Catalogue
from models.counters import ItemCounters, TouchBatch
from models.events import Action, Impression
from models.examples import FeaturesRecord, encode, raw_slates
from models.hashing import hash64
from models.live_features import raw_from_state
from models.logs import LogEvent
from models.user_events import surface_names, user_event
from models.user_state import Rows, UserReader, apply, empty_rows
from tests.models.test_logs import behavior, ebnerd
from tests.trainer.test_log_examples import HOUR, Log, catalogue, click, impression, space
from trainer.log_examples import LogConfig, Reads, catalogue_of, log_examples
from trainer.log_state import DEFAULT_SURFACE, EPOCH, blocks, waves
from trainer.scoring import ItemTable

DAY = 24 * HOUR
START = 400 * DAY
SPACE = hash64("literal")


class OneByOne:
    """The reference: every event that has arrived is taken alone, every impression is read alone."""

    def __init__(self, config: LogConfig) -> None:
        self.config = config
        self.catalogue: Catalogue = catalogue()
        named = self.catalogue.item
        self.counters = ItemCounters(self.catalogue.index, config.counters, lambda row: named(row) is not None)
        self.counters.own(0)
        self.reader = UserReader(config.user_state, self.catalogue, SPACE)
        self.surfaces = surface_names(DEFAULT_SURFACE, (), config.user_state)
        self.rows: dict[str, Rows] = {}

    def row(self, user: str) -> Rows:
        return self.rows.setdefault(user, empty_rows(1))

    def learn(self, logged: LogEvent, offset: int) -> None:
        event = logged.event
        hashed = user_event(event, 0, offset, logged.time_ms, self.config.user_state, self.surfaces)
        self.rows[event.user_id], _ = apply(
            self.row(event.user_id),
            [hashed],
            self.catalogue,
            self.config.user_state,
            epoch=EPOCH,
            space_id=SPACE,
            generation=0,
            surfaces=self.surfaces,
        )
        if not logged.is_history or self.config.count_history:
            batch = TouchBatch()
            batch.add_event(event, offset, logged.time_ms, self.config.counters)
            self.counters.add(0, batch)

    def read(self, logged: LogEvent) -> dict[str, npt.NDArray[Any]]:
        event = logged.event
        assert isinstance(event, Impression)
        names = [shown.item_id for shown in event.items]
        raw = raw_from_state(
            self.row(event.user_id),
            self.catalogue.index.rows(names)[None],
            np.array([logged.time_ms], np.int64),
            self.catalogue,
            self.counters,
            self.reader,
            self.config.ranking,
            valid=np.ones((1, len(names)), np.bool_),
            items=np.array([[hash64(name) for name in names]], np.uint64),
        )
        return {name: getattr(raw, name)[0] for name in STATE}


STATE = (
    "items",
    "counters",
    "age_seconds",
    "first_seen_seconds",
    "sims",
    "shown_counts",
    "shown_age_seconds",
    "acted_age_seconds",
    "recent_items",
    "recent_codes",
    "recent_age_seconds",
    "user_counts",
)


def expected(log: list[LogEvent], config: LogConfig) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Yield what each impression knows, by the rule: arrived by then and happened before, or in an earlier tick."""
    delay_ms, tick_ms = round(config.feedback_delay_seconds * 1_000), round(config.tick_seconds * 1_000)
    reference, learned = OneByOne(config), 0
    frozen = config.frozen_from_ms
    for logged in log:
        if not isinstance(logged.event, Impression):
            continue
        while learned < len(log):
            time_ms = log[learned].time_ms
            late = time_ms + delay_ms > logged.time_ms or time_ms >= logged.time_ms
            if tick_ms > 1:
                late = (time_ms + delay_ms) // tick_ms >= logged.time_ms // tick_ms
            if late:
                break
            if frozen is None or time_ms < frozen:
                reference.learn(log[learned], learned)
            learned += 1
        yield reference.read(logged)


def check(records: list[FeaturesRecord], log: list[LogEvent], config: LogConfig) -> None:
    wanted = list(expected(log, config))
    assert len(records) == len(wanted)
    for record, want in zip(records, wanted, strict=True):
        raw = raw_slates([record])
        for name in STATE:
            got = getattr(raw, name)[0]
            # float16 of a sum in another order: at most the last digit.
            slack = 2e-3 if name == "counters" else 0.0
            np.testing.assert_allclose(got, want[name], rtol=slack, atol=slack, err_msg=name)


TIMES = st.one_of(st.integers(0, 5), st.integers(0, 3_600), st.integers(0, 6 * 24 * 3_600))
EVENTS = st.lists(
    st.tuples(TIMES, st.sampled_from("uvw"), st.sampled_from(["a", "b", "c", "z", "ab", "abc", "dz", "ca"])),
    min_size=1,
    max_size=40,
)


def log_of(events: list[tuple[int, str, str]], history: int) -> list[LogEvent]:
    """Return (second, user, items) as a log: one item is a click, more are an impression; some clicks are history."""
    log: list[LogEvent] = []
    for n, (second, user, items) in enumerate(sorted(events, key=lambda e: e[0])):
        time_ms = START + second * 1_000
        if len(items) == 1:
            action = Action(event_id=f"c{n}", event_time=time_ms, user_id=user, item_id=items, action="click")
            log.append(LogEvent(time_ms, action, None, n < history))
        else:
            shown = impression(time_ms, user, items, items[-1]).event
            log.append(LogEvent(time_ms, shown, (items[-1],)))
    return log


@settings(max_examples=120, deadline=None)
@given(
    events=EVENTS,
    delay=st.sampled_from([0.0, 0.5, 1.0, 3.0, 3_600.0, 86_400.0]),
    tick=st.sampled_from([0.001, 1.0, 60.0, 3_600.0]),
    frozen=st.one_of(st.none(), st.integers(0, 6 * 24 * 3_600), st.integers(0, 5)),
    block=st.sampled_from([0.5, 60.0, 7 * 86_400.0]),
    history=st.integers(0, 10),
    count_history=st.booleans(),
)
def test_blocks_give_what_one_event_after_the_other_gives(
    events: list[tuple[int, str, str]],
    delay: float,
    tick: float,
    frozen: int | None,
    block: float,
    history: int,
    count_history: bool,
) -> None:
    log = log_of(events, history)
    config = LogConfig(
        feedback_delay_seconds=delay,
        tick_seconds=tick,
        frozen_from_ms=None if frozen is None else START + frozen * 1_000,
        block_seconds=block,
        count_history=count_history,
    )
    made = log_examples(Log(*log), catalogue(), "literal", config)
    check(made.records, log, config)


def test_in_a_log_of_whole_hours_a_click_is_known_as_soon_as_its_impression() -> None:
    log = [
        impression(START, "u", "ab", "a"),
        click(START + 1_000, "u", "a"),
        impression(START + HOUR, "v", "ab", "b"),
        impression(START + 2 * HOUR, "v", "ab", "b"),
    ]
    config = LogConfig(tick_seconds=3_600, feedback_delay_seconds=3_600)
    made = log_examples(Log(*log), catalogue(), "literal", config)
    _, then, last = (raw_slates([record]) for record in made.records)
    assert not then.counters.any()
    impressions_of_a, clicks_of_a = np.expm1(last.counters[0, 0, -1, :2].astype(np.float64))
    assert impressions_of_a == pytest.approx(clicks_of_a, rel=0.01)
    assert clicks_of_a > 0.5


def test_nothing_enters_from_the_frozen_time_on_and_decay_goes_on() -> None:
    log = [
        impression(START, "u", "ab", "a"),
        click(START + 1_000, "u", "a"),
        impression(START + HOUR, "u", "ab", "b"),
        click(START + HOUR + 1_000, "u", "b"),
        impression(START + 2 * HOUR, "u", "ab", "b"),
    ]
    made = log_examples(Log(*log), catalogue(), "literal", LogConfig(frozen_from_ms=START + HOUR))
    first, then, last = (raw_slates([record]) for record in made.records)
    assert not first.counters.any()
    assert last.user_counts.tolist() == then.user_counts.tolist() == [[1, 1, 1]]
    assert last.recent_items[0, 0] == hash64("a")
    assert 0 < last.counters[0, 0, 1, 0] < then.counters[0, 0, 1, 0]


def test_labels_that_the_joiner_makes_know_no_delay_and_no_frozen_time() -> None:
    log = [
        impression(START, "u", "ab"),
        click(START + 60_000, "u", "b"),
        impression(START + 3 * HOUR, "v", "ab"),
    ]
    config = LogConfig(feedback_delay_seconds=86_400, frozen_from_ms=START)
    made = log_examples(Log(*log), catalogue(), "literal", config)
    assert [labels.tolist() for labels in made.labels] == [[0.0, 1.0]]


def test_a_repeated_event_labels_nothing_twice_in_another_block() -> None:
    shown = impression(START, "u", "ab")
    log = [shown, LogEvent(START + 1_000, shown.event), impression(START + 3 * HOUR, "v", "ab")]
    made = log_examples(Log(*log), catalogue(), "literal", LogConfig(block_seconds=0.5))
    assert made.unlabelled == 2


def test_whoever_asks_gets_the_rows_just_before_each_impression() -> None:
    log = [
        impression(START, "u", "ab", "a"),
        click(START + 1_000, "u", "a"),
        impression(START + 2_000, "u", "ab", "b"),
        impression(START + 3_000, "v", "ab", "b"),
        impression(START + 3_000, "u", "ab", "b"),
    ]
    told: list[tuple[int, str, int]] = []

    def on_reads(reads: Reads) -> None:
        for i, offset in enumerate(reads.offsets):
            told.append((offset, reads.impression(i).user_id, int(reads.rows["impressions"][i])))

    log_examples(Log(*log), catalogue(), "literal", LogConfig(), on_reads=on_reads)
    assert told == [(0, "u", 0), (2, "u", 1), (3, "v", 0), (4, "u", 2)]


def test_counters_are_exact_where_asked_for_and_never_newer_elsewhere() -> None:
    log = [impression(START + n * 1_000, "uvw"[n % 3], "ab", "a") for n in range(12)]
    told: dict[int, float] = {}

    def on_reads(reads: Reads) -> None:
        held = reads.counters.totals(reads.catalogue.index.rows(["a"]))
        told.update((offset, float(held[0, 0])) for offset in reads.offsets)

    config = LogConfig(counters=LogConfig().counters.model_copy(update={"user_cap": 255}))
    log_examples(Log(*log), catalogue(), "literal", config, on_reads=on_reads, cut_at={5, 9})
    assert list(told) == list(range(12))
    assert (told[5], told[9]) == (5, 9)
    assert all(counted <= offset for offset, counted in told.items())


@settings(max_examples=60, deadline=None)
@given(events=EVENTS, cut_at=st.sets(st.integers(0, 40), max_size=5), delay=st.sampled_from([0.0, 2.0, 3_600.0]))
def test_where_the_counters_are_asked_for_changes_no_example(
    events: list[tuple[int, str, str]], cut_at: set[int], delay: float
) -> None:
    log, config = log_of(events, 3), LogConfig(feedback_delay_seconds=delay)
    made = log_examples(Log(*log), catalogue(), "literal", config, cut_at=cut_at)
    check(made.records, log, config)


def test_a_block_ends_before_it_is_longer_than_asked_for() -> None:
    log = [click(START + s * 1_000, "u", "a") for s in (0, 1, 2, 3, 10, 11)]
    cut = [[(e.time_ms - START) // 1_000 for e in block] for block in blocks(iter(log), 2.0)]
    assert cut == [[0, 1, 2], [3], [10, 11]]


@pytest.mark.parametrize(
    ("reads", "arrivals", "seen", "taken"),
    [
        ("u", "", [0], [([0], [])]),
        ("uu", "u", [0, 1], [([0], [2]), ([1], [])]),
        ("uv", "uuv", [0, 2], [([0, 1], [2, 3, 4])]),
        ("uuv", "uuv", [0, 1, 2], [([0, 2], [3, 5]), ([1], [4])]),
        ("", "uu", [], [([], [0, 1])]),
    ],
)
def test_a_wave_takes_the_reads_of_a_user_up_to_the_next_arrival(
    reads: str, arrivals: str, seen: list[int], taken: list[tuple[list[int], list[int]]]
) -> None:
    users = np.array([ord(user) for user in reads + arrivals], np.intp)
    made = [(r.tolist(), a.tolist()) for r, a in waves(users, np.array(seen, np.intp))]
    assert made == taken


def day(*read_times: float, **later: Any) -> list[dict[str, Any]]:
    """Return EB-NeRD rows of two users in turn, half a minute apart, with these read times."""
    rows = []
    for n, read_time in enumerate(read_times):
        row = behavior(n + 1, 8 + n % 2, f"2023-05-18 07:{n // 2:02}:{n % 2 * 30:02}", [5, 6, 7 + n % 2], [5 + n % 2])
        rows.append(row | {"read_time": read_time, "scroll_percentage": 50.0} | later)
    return rows


def records_of(folder: Path, rows: list[dict[str, Any]]) -> list[bytes]:
    reader = ebnerd(folder, rows)
    table = ItemTable(
        space(), ItemEncodings(np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros((0, 64), np.float16))
    )
    made = log_examples(reader, catalogue_of(reader.items(), table), "literal")
    return [encode(record) for record in made.records]


@pytest.mark.parametrize(
    "later", [{"scroll_percentage": 99.0}, {"next_read_time": 77.0}, {"next_scroll_percentage": 1.0}], ids=str
)
def test_ebnerd_columns_from_after_the_decision_reach_no_feature(tmp_path: Path, later: dict[str, Any]) -> None:
    before = records_of(tmp_path / "before", day(20, 20, 20, 20, 20, 20))
    after = records_of(tmp_path / "after", day(20, 20, 20, 20, 20, 20, **later))
    assert after == before


def test_ebnerd_read_time_dates_the_click_and_reaches_nothing_before_it(tmp_path: Path) -> None:
    """The third impression, at 07:01:00, is clicked at 07:01:20 or 07:01:50; the fourth is shown at 07:01:30."""
    before = records_of(tmp_path / "before", day(20, 20, 20, 20, 20, 20))
    after = records_of(tmp_path / "after", day(20, 20, 50, 20, 20, 20))
    assert after[:3] == before[:3]
    assert after[3] != before[3]


def test_ebnerd_read_times_of_the_last_impressions_reach_nothing_at_all(tmp_path: Path) -> None:
    before = records_of(tmp_path / "before", day(20, 20, 20, 20, 40, 40))
    after = records_of(tmp_path / "after", day(20, 20, 20, 20, 35, 5))
    assert after == before

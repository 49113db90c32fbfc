"""A tiny log through the pure core: what an impression knew, and what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from models.bootstrap import Space
from models.bundle import ItemEncodings
from models.catalogue import Catalogue
from models.counter_events import CLICKS, IMPRESSIONS
from models.events import Action, ImpressedItem, Impression, Item, User
from models.examples import FeaturesRecord, raw_slates
from models.hashing import hash64
from models.logs import LogEvent, open_log
from models.user_events import UserStateConfig
from trainer.log_examples import LogConfig, LogExamples, catalogue_of, log_examples, thinned
from trainer.scoring import ItemTable

HOUR = 3_600_000
DAY_HALF_LIFE = 3
TEXT_OF = {"a": 0, "b": 1, "c": 2, "d": 3}


class Log:
    """Events as they are given."""

    kind = "literal"

    def __init__(self, *events: LogEvent) -> None:
        self._events = events
        self.files: tuple[Path, ...] = ()
        self.skipped: Counter[str] = Counter()

    def items(self) -> Iterator[Item]:
        return iter([Item(item_id=name, title=name) for name in TEXT_OF])

    def users(self) -> Iterator[User]:
        return iter(())

    def events(self) -> Iterator[LogEvent]:
        return iter(self._events)

    def count_events(self) -> int | None:
        return len(self._events)


def impression(time_ms: int, user: str, items: str, clicked: str | None = None) -> LogEvent:
    event = Impression(
        event_id=f"i{time_ms}{user}", event_time=time_ms, user_id=user, items=[ImpressedItem(i) for i in items]
    )
    return LogEvent(time_ms, event, None if clicked is None else tuple(clicked))


def click(time_ms: int, user: str, item: str, *, is_history: bool = False) -> LogEvent:
    event = Action(event_id=f"c{time_ms}{user}{item}", event_time=time_ms, user_id=user, item_id=item, action="click")
    return LogEvent(time_ms, event, None, is_history)


def space() -> Space:
    projection = np.zeros((64, 64), np.float32)
    np.fill_diagonal(projection, 1.0)
    return Space("literal", "none", projection)


def catalogue() -> Catalogue:
    base = np.eye(64, dtype=np.float16)[: len(TEXT_OF)]
    items = np.array([hash64(name) for name in TEXT_OF], np.uint64)
    table = ItemTable(space(), ItemEncodings(items, items, base))
    return catalogue_of(Log().items(), table)


def examples(*events: LogEvent, config: LogConfig | None = None) -> LogExamples:
    return log_examples(Log(*events), catalogue(), "literal", config)


def count(record: FeaturesRecord, item: str, kind: int) -> float:
    raw = raw_slates([record])
    place = raw.items[0].tolist().index(hash64(item))
    return float(np.expm1(raw.counters[0, place, DAY_HALF_LIFE, kind].astype(np.float64)))


def recent(record: FeaturesRecord) -> list[int]:
    hashes: list[int] = np.frombuffer(record.recent_items, "<u8").tolist()
    return hashes


def test_an_impression_knows_nothing_of_its_own_click() -> None:
    made = examples(impression(HOUR, "u", "ab", "a"), click(HOUR + 1_000, "u", "a"))
    (record,) = made.records
    assert made.labels[0].tolist() == [1.0, 0.0]
    assert not any(record.counters)
    assert not any(record.sims)
    assert recent(record) == []
    assert record.user_counts == (0, 0, 0)


def test_the_next_impression_knows_the_click() -> None:
    made = examples(
        impression(HOUR, "u", "ab", "a"), click(HOUR + 1_000, "u", "a"), impression(HOUR + 2_000, "u", "ac", "")
    )
    second = made.records[1]
    assert recent(second) == [hash64("a")]
    assert count(second, "a", CLICKS) == pytest.approx(1, abs=0.01)
    assert count(second, "a", IMPRESSIONS) == pytest.approx(1, abs=0.01)
    assert second.user_counts == (1, 1, 1)


def test_events_of_the_same_hour_are_not_seen_where_times_are_hours() -> None:
    log = (
        impression(HOUR, "u", "ab", "a"),
        click(HOUR + 1_000, "u", "a"),
        impression(HOUR + 2_000, "v", "ab", "b"),
        impression(HOUR + 3_000, "u", "ac", ""),
        impression(2 * HOUR, "u", "ac", ""),
    )
    made = examples(*log, config=LogConfig(tick_seconds=3_600))
    assert [count(r, "a", CLICKS) for r in made.records[:3]] == [0, 0, 0]
    assert recent(made.records[2]) == []
    assert count(made.records[3], "a", IMPRESSIONS) == pytest.approx(3, rel=0.1)
    assert recent(made.records[3]) == [hash64("a")]


def test_an_impression_at_the_very_time_of_another_does_not_see_it() -> None:
    made = examples(impression(HOUR, "u", "ab", ""), impression(HOUR, "v", "ab", ""))
    assert count(made.records[1], "a", IMPRESSIONS) == 0


def test_a_delay_holds_back_counters_and_the_user_row_alike() -> None:
    log = (
        impression(HOUR, "u", "ab", "a"),
        click(HOUR + 1_000, "u", "a"),
        impression(HOUR + 60_000, "u", "ac", ""),
        impression(3 * HOUR, "u", "ac", ""),
    )
    made = examples(*log, config=LogConfig(feedback_delay_seconds=3_600))
    assert count(made.records[1], "a", CLICKS) == 0
    assert recent(made.records[1]) == []
    assert made.records[1].user_counts == (0, 0, 0)
    assert count(made.records[2], "a", CLICKS) == pytest.approx(1, rel=0.1)
    assert recent(made.records[2]) == [hash64("a")]


def test_an_unclicked_item_counts_for_those_that_the_log_left_out() -> None:
    log = (
        impression(HOUR, "u", "ab", "a"),
        impression(2 * HOUR, "u", "ab", "a"),
        impression(2 * HOUR + 60_000, "u", "ab", ""),
    )
    made = examples(*log, config=LogConfig(unclicked_weight=10, thinned_from_ms=2 * HOUR))
    assert count(made.records[1], "b", IMPRESSIONS) == pytest.approx(1, rel=0.1)
    assert count(made.records[2], "b", IMPRESSIONS) == pytest.approx(11, rel=0.1)
    assert count(made.records[2], "a", IMPRESSIONS) == pytest.approx(2, rel=0.1)


def test_history_moves_the_row_and_the_counters_only_where_its_times_are_real() -> None:
    log = (click(HOUR, "u", "c", is_history=True), impression(2 * HOUR, "u", "ac", ""))
    counted = examples(*log, config=LogConfig(count_history=True))
    left_out = examples(*log)
    assert counted.histories == left_out.histories == {"u": [hash64("c")]}
    assert count(counted.records[0], "c", CLICKS) == pytest.approx(1, rel=0.1)
    assert count(left_out.records[0], "c", CLICKS) == 0
    assert recent(left_out.records[0]) == [hash64("c")]
    assert np.frombuffer(left_out.records[0].sims, "<f2").reshape(2, 2)[1, 0] > 0.5


def test_without_outcomes_the_joiner_labels_and_an_open_window_is_left_out() -> None:
    made = examples(
        impression(HOUR, "u", "ab"),
        click(HOUR + 60_000, "u", "b"),
        impression(2 * HOUR, "v", "ab"),
        impression(3 * HOUR, "w", "ab"),
    )
    assert [r.user_id for r in made.records] == ["u", "v"]
    assert [labels.tolist() for labels in made.labels] == [[0.0, 1.0], [0.0, 0.0]]
    assert made.unlabelled == 1


def test_an_event_without_a_surface_has_the_window_of_the_default_one_whatever_its_name() -> None:
    log = impression(HOUR, "u", "ab"), click(HOUR + 120_000, "u", "b"), impression(3 * HOUR, "u", "ab")
    brief = UserStateConfig(attribution_windows_seconds={"home": 60})
    home = examples(*log, config=LogConfig(surfaces=("home", "article"), user_state=brief))
    article = examples(*log, config=LogConfig(surfaces=("article", "home"), user_state=brief))
    assert (home.records[0].surface, home.labels[0].tolist()) == ("home", [0.0, 0.0])
    assert (article.records[0].surface, article.labels[0].tolist()) == ("article", [0.0, 1.0])


def test_an_item_that_no_record_names_is_in_the_example() -> None:
    made = examples(impression(HOUR, "u", "az", "z"))
    assert np.frombuffer(made.records[0].items, "<u8").tolist() == [hash64("a"), hash64("z")]


def test_a_thinned_slate_is_a_click_with_items_of_its_own_slate() -> None:
    log = (impression(HOUR, "u", "abcd", "b"), impression(2 * HOUR, "v", "dcba", "da"))
    made = thinned(examples(*log), unclicked=1, per_click=2, seed=1)
    assert len(made.records) == 2 + 4
    shown = [np.frombuffer(r.items, "<u8").tolist() for r in made.records]
    clicked = [items[int(labels.argmax())] for items, labels in zip(shown, made.labels, strict=True)]
    assert clicked == [hash64(i) for i in "bbddaa"]
    assert all(labels.sum() == 1 and len(labels) == 2 for labels in made.labels)
    first = raw_slates([examples(*log).records[1]])
    place = first.items[0].tolist().index(shown[2][0])
    assert raw_slates([made.records[2]]).counters[0, 0].tolist() == first.counters[0, place].tolist()


def histories_of(made: LogExamples) -> Sequence[int]:
    return [len(history) for history in made.histories.values()]


def test_the_real_log_gives_one_example_for_each_impression() -> None:
    data = Path(__file__).parents[2].parent / "shared" / "data" / "mind-subset" / "train"
    if not data.exists():
        pytest.skip("the MIND subset is not beside the repository")
    reader = open_log("mind", data)
    table = ItemTable(
        space(), ItemEncodings(np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros((0, 64), np.float16))
    )
    config = LogConfig(count_history=False, tick_seconds=3_600)
    made = log_examples(reader, catalogue_of(reader.items(), table), "literal", config)
    assert (len(made.records), made.unlabelled) == (4_480, 0)
    assert all(0 < labels.sum() < len(labels) for labels in made.labels)
    assert made.records[0].time_ms <= made.records[-1].time_ms
    assert sum(histories_of(made)) == 125_839

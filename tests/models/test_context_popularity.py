"""Popularity by context: what is counted, by which values, within which bounds, and that batches do not matter."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from models.context_popularity import ContextPopularity
from models.counters import CountersConfig
from models.events import Action, ImpressedItem, Impression
from models.item_index import ItemIndex
from models.recommender import RecommenderConfig
from models.user_events import UserStateConfig

NOW_MS = 1_700_000_000_000
HOUR_MS = 3_600_000
ITEMS = ("a", "b", "c", "d", "e", "f")


def counting(*keys: str, items: Sequence[str] = ITEMS, **settings_: Any) -> ContextPopularity:
    index = ItemIndex()
    for item in items:
        index.add(item)
    config = RecommenderConfig(popularity_context=keys, **settings_)
    return ContextPopularity(config, CountersConfig(), UserStateConfig(), index)


def click(item: str, user: str = "u", **context: Any) -> Action:
    return Action(
        event_id=f"{user}-{item}",
        event_time=NOW_MS,
        user_id=user,
        item_id=item,
        action="click",
        context=context or None,
    )


def in_context(counts: ContextPopularity, now_ms: int = NOW_MS, **context: Any) -> dict[str, float]:
    """Return the counts of one value of the first key."""
    value = counts.values_of(click("a", **context))[0]
    rows, found, _ = counts.counts(0, value, now_ms)
    return {ITEMS[row]: round(count, 6) for row, count in zip(rows.tolist(), found.tolist(), strict=True)}


def add(counts: ContextPopularity, *events: Action, at_ms: int = NOW_MS, first_offset: int = 0) -> None:
    for offset, event in enumerate(events, first_offset):
        counts.add(0, offset, event, at_ms)


def test_an_action_counts_for_the_value_of_its_context_alone() -> None:
    counts = counting("device")
    add(counts, click("a", "u1", device="tv"), click("a", "u2", device="tv"), click("b", "u3", device="phone"))
    assert in_context(counts, device="tv") == {"a": 2.0}
    assert in_context(counts, device="phone") == {"b": 1.0}


def test_an_action_without_the_key_counts_for_no_value() -> None:
    counts = counting("device")
    add(counts, click("a"), click("b", locale="de"), click("c", device=None))
    assert counts.held() == (0, 0)


def test_without_keys_nothing_is_counted() -> None:
    counts = counting()
    add(counts, click("a", device="tv"))
    assert counts.held() == (0, 0)


def test_the_key_surface_is_the_surface_of_the_event_and_the_default_one_where_it_names_none() -> None:
    counts = counting("surface")
    named = Action(event_id="e", event_time=0, user_id="u", item_id="b", action="like", surface="default")
    add(counts, click("a"), named)
    assert in_context(counts) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (1, "1"), (True, "true")])
def test_a_value_is_one_however_a_client_writes_it(one: object, other: object) -> None:
    counts = counting("device")
    add(counts, click("a", device=one))
    assert in_context(counts, device=other) == {"a": 1.0}


def test_true_and_one_are_two_values() -> None:
    counts = counting("device")
    add(counts, click("a", device=True))
    assert in_context(counts, device=1) == {}


@pytest.mark.parametrize(
    ("action", "value", "counted"),
    [("like", None, 1), ("purchase", None, 1), ("rating", 5.0, 1), ("rating", 1.0, 0), ("hide", None, 0)],
)
def test_positive_actions_count_once_whatever_they_are(action: Any, value: float | None, counted: int) -> None:
    counts = counting("device")
    event = Action(
        event_id="e", event_time=0, user_id="u", item_id="a", action=action, value=value, context={"device": "tv"}
    )
    add(counts, event)
    assert in_context(counts, device="tv") == ({"a": 1.0} if counted else {})


def test_an_impression_counts_nothing() -> None:
    counts = counting("device")
    shown = Impression(event_id="i", event_time=0, user_id="u", items=[ImpressedItem("a")], context={"device": "tv"})
    counts.add(0, 0, shown, NOW_MS)
    assert counts.held() == (0, 0)


def test_a_count_halves_in_the_half_life_of_popularity() -> None:
    counts = counting("device", popularity_half_life_index=1)
    add(counts, click("a", device="tv"))
    assert in_context(counts, NOW_MS + HOUR_MS, device="tv") == {"a": 0.5}


def test_a_late_action_counts_as_much_as_if_it_had_come_in_time() -> None:
    counts = counting("device")
    add(counts, click("b", "u1", device="tv"))
    add(counts, click("a", "u2", device="tv"), at_ms=NOW_MS - HOUR_MS, first_offset=1)
    assert in_context(counts, device="tv") == {"a": 0.5, "b": 1.0}


def test_what_is_older_than_the_reach_of_a_number_is_forgotten_and_the_rest_stays_exact() -> None:
    counts = counting("device", popularity_half_life_index=0)
    add(counts, click("a", "u1", device="tv"))
    add(
        counts,
        click("b", "u2", device="tv"),
        click("b", "u3", device="tv"),
        at_ms=NOW_MS + 100 * HOUR_MS,
        first_offset=1,
    )
    assert in_context(counts, NOW_MS + 100 * HOUR_MS, device="tv") == {"b": 2.0}


def test_what_is_kept_when_the_landmark_moves_stays_exact() -> None:
    # 198 half-lives of ten minutes after the first it still stands; 201 after, it moves.
    counts = counting("device", popularity_half_life_index=0)
    for offset, (item, minutes) in enumerate((("a", 0), ("b", 1_980), ("c", 2_010))):
        at_ms = NOW_MS + minutes * 60_000
        add(counts, click(item, f"u{offset}", device="tv"), at_ms=at_ms, first_offset=offset)
    now_ms = NOW_MS + 2_010 * 60_000
    assert in_context(counts, now_ms, device="tv") == {"b": 0.125, "c": 1.0}
    assert counts.counts(0, counts.values_of(click("a", device="tv"))[0], now_ms)[2] == pytest.approx(1.125)


def test_events_that_are_read_again_change_nothing_however_late() -> None:
    counts = counting("device")
    events = [click("a", f"u{n}", device="tv") for n in range(5)]
    add(counts, *events)
    # Two windows later nothing but the offset tells that they were counted.
    for hours in (1, 2):
        add(counts, click("b", f"v{hours}", device="tv"), at_ms=NOW_MS + hours * HOUR_MS, first_offset=4 + hours)
    add(counts, *events)
    assert in_context(counts, device="tv")["a"] == 5.0


def test_one_user_counts_once_for_an_item_in_a_window() -> None:
    counts = counting("device")
    add(counts, *[click("a", "zealot", device="tv")] * 50, click("b", "u2", device="tv"))
    assert in_context(counts, device="tv") == {"a": 1.0, "b": 1.0}


def test_the_end_of_a_window_does_not_let_a_user_count_again_at_once() -> None:
    counts = counting("device")
    edge_ms = NOW_MS // 120_000 * 120_000
    for offset, at_ms in enumerate((edge_ms - 1, edge_ms + 1, edge_ms + 240_000, edge_ms + 480_000)):
        add(counts, click("a", device="tv"), at_ms=at_ms, first_offset=offset)
    _, found, _ = counts.counts(0, counts.values_of(click("a", device="tv"))[0], edge_ms)
    assert found == pytest.approx([1 + 2 ** (240 / 3_600) + 2 ** (480 / 3_600)], rel=1e-3), "all but the second"


def test_an_item_that_has_no_row_is_not_counted() -> None:
    counts = counting("device")
    add(counts, click("unheard-of", device="tv"))
    assert counts.held() == (0, 0)


def test_a_value_holds_twice_its_items_at_most_and_the_strongest_stay() -> None:
    items = [f"i{n}" for n in range(200)]
    counts = counting("device", items=items, popularity_context_items=10)
    add(counts, *[click("i7", f"fan{n}", device="tv") for n in range(30)])
    add(counts, *[click(item, f"u-{item}", device="tv") for item in items], first_offset=30)
    rows, found, total = counts.counts(0, counts.values_of(click("a", device="tv"))[0], NOW_MS)
    assert len(rows) <= 20
    assert dict(zip(rows.tolist(), found.round(6).tolist(), strict=True))[7] == 31.0
    assert total == pytest.approx(230.0), "what was given up stays in the sum"
    assert counts.dropped_items == 200 - len(rows)


def test_a_newcomer_rises_where_the_list_is_full_of_steady_items() -> None:
    items = [f"i{n}" for n in range(20)]
    counts = counting("device", items=[*items, "new"], popularity_context_items=10)
    offset = 0
    for n in range(20):
        events = [click(item, f"u{n}-{item}", device="tv") for item in items]
        if n >= 10:
            events += [click("new", f"u{n}-{again}", device="tv") for again in range(3)]
        add(counts, *events, first_offset=offset)
        offset += len(events)
    rows, found, _ = counts.counts(0, counts.values_of(click("a", device="tv"))[0], NOW_MS)
    assert dict(zip(rows.tolist(), found.round(6).tolist(), strict=True))[20] >= 25.0, "it had thirty"


def test_a_key_with_a_value_for_everybody_costs_a_bounded_number_and_common_values_stay() -> None:
    counts = counting("session", popularity_context_values=4)
    add(counts, *[click("a", f"fan{n}", session="shared") for n in range(5)])
    add(counts, *[click("b", f"u{n}", session=f"s{n}") for n in range(100)], first_offset=5)
    held, _ = counts.held()
    assert held <= 8
    assert in_context(counts, session="shared") == {"a": 5.0}
    assert counts.dropped_values == 101 - held


def test_a_key_that_stays_keeps_its_counts_when_settings_change() -> None:
    counts = counting("device")
    add(counts, click("a", device="tv", locale="de"))
    counts.reconfigure(RecommenderConfig(popularity_context=("locale", "device")))
    assert counts.values_of(click("a", device="tv"))[0] == 0
    rows, _, _ = counts.counts(1, counts.values_of(click("a", device="tv"))[1], NOW_MS)
    assert rows.tolist() == [0]


def test_a_key_named_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="names a key twice"):
        RecommenderConfig(popularity_context=("device", "device"))


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(ITEMS),
        st.sampled_from(["u1", "u2", "u3"]),
        st.sampled_from(["tv", "phone", "web", "car", "fridge"]),
        st.integers(-400, 400),
        st.integers(0, 2),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=60)
@given(EVENTS, st.lists(st.integers(0, 60), max_size=5))
def test_any_split_in_batches_with_repetitions_leaves_the_same_counts(
    drawn: list[tuple[str, str, str, int, int]], cuts: list[int]
) -> None:
    settings_: dict[str, Any] = {
        "popularity_context_values": 2,
        "popularity_context_items": 10,
        "popularity_half_life_index": 0,
    }
    log = [
        (partition, offset, click(item, user, device=device), NOW_MS + hours * HOUR_MS)
        for offset, (item, user, device, hours, partition) in enumerate(drawn)
    ]
    whole, cut = counting("device", "surface", **settings_), counting("device", "surface", **settings_)
    for record in log:
        whole.add(*record)
    bounds = sorted({0, *(min(c, len(log)) for c in cuts), len(log)})
    for start, end in pairwise(bounds):
        # A batch that is read again, with what came right before it.
        for record in log[max(0, start - 3) : end]:
            cut.add(*record)
    for number, key in enumerate(("tv", "phone", "web", "car", "fridge")):
        value = whole.values_of(click("a", device=key))[0]
        one, other = whole.counts(0, value, NOW_MS), cut.counts(0, value, NOW_MS)
        assert one[0].tolist() == other[0].tolist(), number
        assert one[1].tolist() == other[1].tolist()
        assert one[2] == other[2]

"""What the demo measures and when it counts as failed."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from models.events import Reason, Recommendation, RecommendedItem, Trigger
from streams.demo.statistics import ClickRates, Freshness, Recent, Statistics, Story, quantile
from streams.demo.users import Half


def slate(*item_ids: str) -> Recommendation:
    items = [
        RecommendedItem(i, n, 1.0, 0.1, "short-term", None, Reason(kind="trending", text=f"why {i}"))
        for n, i in enumerate(item_ids, 1)
    ]
    return Recommendation(
        recommendation_id="r",
        user_id="u",
        request_id=None,
        generated_at=0,
        expires_at=1,
        surface="home",
        degraded=False,
        trigger=Trigger("e", "t", 0, 0),
        model_version="m",
        space_id="s",
        experiment=None,
        items=items,
    )


def statistics(triggers: int, answered: int) -> Statistics:
    made = Statistics(1, Story("u"))
    for offset in range(triggers):
        made.freshness.sent(0.0, f"u{offset}", offset, 0)
    for offset in range(answered):
        made.slates += 1
        made.freshness.arrived(0.0, f"u{offset}", offset, 5.0)
    return made


def test_the_p99_of_a_hundred_values_is_the_ninety_ninth() -> None:
    assert quantile([float(n) for n in range(1, 101)], 0.99) == 99.0


def test_a_quantile_of_nothing_is_not_a_number() -> None:
    assert math.isnan(quantile([], 0.5))


def test_values_older_than_the_window_are_forgotten() -> None:
    recent = Recent(10.0)
    recent.add(1.0, 7.0)
    recent.add(5.0, 8.0)
    assert recent.values(12.0) == [8.0]


def test_freshness_runs_from_broker_time_to_arrival() -> None:
    freshness = Freshness()
    freshness.sent(0.0, "u", 3, 1_000)
    assert freshness.arrived(0.0, "u", 3, 1_012.5) == [12.5]


def test_a_slate_that_comes_before_the_acknowledgement_of_its_trigger_still_answers_it() -> None:
    freshness = Freshness()
    freshness.arrived(0.0, "u", 3, 1_012.0)
    assert freshness.sent(0.0, "u", 3, 1_000) == 12.0


def test_one_slate_answers_all_earlier_triggers_of_its_user() -> None:
    freshness = Freshness()
    freshness.sent(0.0, "u", 3, 1_000)
    freshness.sent(0.0, "u", 5, 1_004)
    assert freshness.arrived(0.0, "u", 5, 1_010.0) == [10.0, 6.0]


def test_a_slate_does_not_answer_a_later_trigger_or_another_user() -> None:
    freshness = Freshness()
    freshness.sent(0.0, "u", 7, 1_000)
    freshness.sent(0.0, "v", 3, 1_000)
    freshness.arrived(0.0, "u", 5, 1_010.0)
    assert freshness.unanswered == 2


@given(st.permutations(range(8)))
def test_every_trigger_is_answered_once_in_whatever_order_slates_and_acknowledgements_come(order: list[int]) -> None:
    freshness = Freshness()
    for step in order:
        user, is_slate = f"u{step // 2}", step % 2
        if is_slate:
            freshness.arrived(0.0, user, 1, 1_010.0)
        else:
            freshness.sent(0.0, user, 1, 1_000)
    assert freshness.all_ms == [10.0] * 4


def test_the_click_rate_is_clicks_for_each_slate_shown() -> None:
    rates = ClickRates(1)
    for _ in range(4):
        rates.show(0.0, Half.OURS, 0)
    rates.click(0.0, Half.OURS, 0)
    assert rates.overall(Half.OURS) == 0.25


def test_the_interval_of_the_difference_is_wider_when_one_pair_made_all_the_clicks() -> None:
    spread, single = ClickRates(20), ClickRates(20)
    for rates, clickers in ((spread, range(20)), (single, [0] * 20)):
        for pair in range(20):
            for half in Half:
                for _ in range(20):
                    rates.show(0.0, half, pair)
        for pair in clickers:
            rates.click(0.0, Half.OURS, pair)
    widths = []
    for rates in (spread, single):
        intervals = rates.intervals()
        assert intervals is not None
        widths.append(intervals[2].high - intervals[2].low)
    assert widths[0] < widths[1]


def test_a_click_counts_in_the_span_in_which_its_slate_was_shown() -> None:
    rates = ClickRates(1)
    for half in Half:
        rates.show(0.0, half, 0)
    rates.begin_after()
    rates.click(1.0, Half.OURS, 0)
    for half in Half:
        rates.show(2.0, half, 0)
    (before, ours_before, _), (after, ours_after, _) = rates.spans()
    assert (before, ours_before.rate) == ("before", 1.0)
    assert (after, ours_after.rate) == ("after", 0.0)


def test_a_run_without_a_swap_has_one_span() -> None:
    rates = ClickRates(1)
    for half in Half:
        rates.show(0.0, half, 0)
    assert [name for name, _, _ in rates.spans()] == ["before"]


def test_there_is_no_interval_when_a_half_was_shown_nothing() -> None:
    rates = ClickRates(2)
    rates.show(0.0, Half.OURS, 0)
    assert rates.intervals() is None


def test_a_story_tells_the_slates_on_both_sides_of_a_click_and_marks_what_is_new() -> None:
    story = Story("u")
    story.slate(slate("a", "b"), 3.0)
    story.click(1.0, "a")
    story.slate(slate("b", "c"), 9.0)
    assert [line.item_id for line in story.before] == ["a", "b"]
    assert [(line.item_id, line.is_new, line.reason) for line in story.after] == [
        ("b", False, "why b"),
        ("c", True, "why c"),
    ]


def test_a_slate_without_a_click_before_it_leaves_the_story_as_it_is() -> None:
    story = Story("u")
    for sent in (slate("a"), slate("b"), slate("c")):
        story.slate(sent, 3.0)
    assert not story.is_complete


def test_a_run_without_slates_has_failed() -> None:
    assert statistics(5, 0).failure() == "no slate came for 5 requests and clicks"


def test_a_run_with_fewer_than_half_of_the_triggers_answered_has_failed() -> None:
    assert statistics(5, 2).failure() == "only 2 of 5 requests and clicks were answered by a slate"


def test_a_run_with_half_of_the_triggers_answered_has_not_failed() -> None:
    assert statistics(4, 2).failure() is None


def test_a_run_in_which_nobody_asked_has_failed() -> None:
    assert statistics(0, 0).failure() is not None

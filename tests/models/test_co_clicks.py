"""Co-click neighbours: what follows what, kept bounded, whatever the batches, and again from the rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.candidates import Quotas
from models.co_clicks import CoClicks, CoClicksConfig, Steps
from models.hashing import hash64
from models.item_index import ItemIndex
from models.recommender import RecommenderConfig, SurfaceConfig
from models.user_events import UserEvent
from models.user_row import POSITIVE, RECENT, Rows, empty_rows, recent
from models.user_state import apply
from tests.models.recommender_world import NOW_MS, World
from tests.models.user_state_logs import CONFIG, START_MS, ItemVectors, event

ITEMS = 30
VECTORS = ItemVectors(range(ITEMS))
ROW_OF = {hash64(str(item)): item for item in range(ITEMS)}
HOUR_MS = 3_600_000
UNDECAYED = CoClicksConfig(fading=0.5, half_life_seconds=1e9)


def index_of(items: int = ITEMS) -> ItemIndex:
    """Return an index in which item n has row n."""
    index = ItemIndex()
    for item in range(items):
        index.add(str(item))
    return index


def acted(item: int, offset: int, *, user: int = 0, action: str = "click", at_ms: int = START_MS) -> UserEvent:
    return event(1, [item], offset=offset, user=user, action=action, time_ms=at_ms, event_id=offset + 1)


def clicks(items: Sequence[int], *, user: int = 0, first: int = 0, step_ms: int = 60_000) -> list[UserEvent]:
    return [acted(item, first + n, user=user, at_ms=START_MS + n * step_ms) for n, item in enumerate(items)]


def taken(rows: Rows, events: Sequence[UserEvent], items: int = ITEMS) -> tuple[Rows, Steps]:
    """Apply events to rows as a worker does; return the new rows and the steps, of the items that have a row."""
    after, outcomes = apply(rows, events, VECTORS, CONFIG, epoch=1, space_id=7, generation=1)
    found = CoClicks(CoClicksConfig(last_items=RECENT - 1), index_of(items))
    return after, found.steps_of(rows, events, outcomes)


def learned(events: Sequence[UserEvent], config: CoClicksConfig = UNDECAYED, users: int = 1) -> CoClicks:
    found = CoClicks(config, index_of())
    found.learn(taken(empty_rows(users), events)[1])
    return found


def state(found: CoClicks) -> list[npt.NDArray[np.generic]]:
    return [found._followers, found._weights, found._errors, found._actions]


def test_an_item_is_followed_by_what_came_after_it_and_less_by_what_came_later() -> None:
    found = learned(clicks([1, 2, 3]))
    assert found.followers(1, START_MS) == pytest.approx({2: 1.0, 3: 0.5}, rel=1e-3)
    assert found.followers(2, START_MS) == pytest.approx({3: 1.0}, rel=1e-3)
    assert found.followers(3, START_MS) == {}


def test_only_so_many_items_before_are_followed() -> None:
    found = learned(clicks([1, 2, 3, 4]), CoClicksConfig(last_items=2))
    assert 4 in found.followers(2, START_MS)
    assert 4 not in found.followers(1, START_MS)


def test_users_add_up_and_one_users_repetitions_do_not() -> None:
    twice = learned([*clicks([1, 2]), *clicks([1, 2], user=1, first=2)], users=2)
    again = learned([*clicks([1, 2]), *clicks([1, 2], first=2)])
    assert twice.followers(1, START_MS) == pytest.approx({2: 2.0}, rel=1e-3)
    assert again.followers(1, START_MS) == pytest.approx({2: 1.0}, rel=1e-3)


def test_what_a_user_hid_neither_follows_nor_is_followed() -> None:
    found = learned([acted(1, 0), acted(2, 1, action="hide"), acted(3, 2), acted(1, 3, action="hide"), acted(4, 4)])
    assert found.followers(1, START_MS) == pytest.approx({3: 1.0}, rel=1e-3)
    assert found.followers(2, START_MS) == {}
    assert found.followers(3, START_MS) == pytest.approx({4: 1.0}, rel=1e-3)


def test_an_action_without_a_meaning_leaves_a_liked_item_liked() -> None:
    glance = event(1, [1], offset=1, action="dwell", value=10.0, time_ms=START_MS, event_id=2)
    found = learned([acted(1, 0), glance, acted(2, 2)])
    assert found.followers(1, START_MS) == pytest.approx({2: 1.0}, rel=1e-3)


def test_an_event_that_was_applied_before_teaches_nothing() -> None:
    rows, steps = taken(empty_rows(1), clicks([1, 2]))
    assert len(steps) == 2
    assert len(taken(rows, clicks([1, 2]))[1]) == 0


def test_an_item_that_the_index_does_not_hold_is_part_of_no_pair() -> None:
    found = CoClicks(UNDECAYED, index_of(3))
    found.learn(taken(empty_rows(1), clicks([1, 20, 2]), items=3)[1])
    assert found.followers(1, START_MS) == pytest.approx({2: 0.5}, rel=1e-3)


def test_a_pair_loses_half_of_its_weight_in_a_half_life() -> None:
    found = learned(clicks([1, 2], step_ms=0), CoClicksConfig(half_life_seconds=3_600.0))
    assert found.followers(1, START_MS + HOUR_MS)[2] == pytest.approx(0.5)


def test_weights_of_a_year_of_half_lives_stay_finite_and_the_newest_count_whole() -> None:
    config = CoClicksConfig(half_life_seconds=3_600.0)
    found = CoClicks(config, index_of())
    rows, offset = empty_rows(1), 0
    for day in range(0, 365, 5):
        at_ms = START_MS + day * 24 * HOUR_MS
        pair = [acted(item, offset + n, at_ms=at_ms) for n, item in enumerate((day % 28, day % 28 + 1))]
        rows, steps = taken(rows, pair)
        found.learn(steps)
        offset += 2
        assert found.followers(day % 28, at_ms)[day % 28 + 1] == pytest.approx(1.0)
    assert all(np.isfinite(values).all() for values in state(found))


def test_an_event_of_the_next_century_leaves_what_was_learned() -> None:
    rows, steps = taken(empty_rows(1), [*clicks([1, 2], step_ms=0), acted(3, 5, at_ms=4_000_000_000_000)])
    found = CoClicks(CoClicksConfig(fading=1.0), index_of())
    found.learn(steps, START_MS)
    found.learn(taken(rows, [acted(4, 6)])[1], START_MS)
    assert found.followers(1, START_MS) == pytest.approx({2: 1.0, 3: 1.0, 4: 1.0})


def test_a_newcomer_that_keeps_coming_gets_in_where_all_places_are_taken() -> None:
    many = [[0, other] for other in range(1, 20) for _ in range(3)]
    rising = [[0, other] for n in range(8) for other in (25, 20 + n % 5)]
    events = [e for user, pair in enumerate(many + rising) for e in clicks(pair, user=user, first=2 * user, step_ms=0)]
    found = learned(events, CoClicksConfig(neighbours=4), users=len(many + rising))
    followers = found.followers(0, START_MS)
    assert len(followers) == 4
    assert max(followers, key=lambda row: followers[row]) == 25


def test_the_error_that_a_newcomer_inherited_is_not_read() -> None:
    pairs = [[0, other] for other in (1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5)]
    events = [e for user, pair in enumerate(pairs) for e in clicks(pair, user=user, first=2 * user, step_ms=0)]
    found = learned(events, CoClicksConfig(neighbours=4, half_life_seconds=1e9), users=len(pairs))
    assert found.followers(0, START_MS) == pytest.approx({1: 3.0, 2: 3.0, 3: 3.0, 5: 1.0}, rel=1e-3)


logs = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.integers(0, ITEMS - 1),
        st.sampled_from(["click", "click", "click", "hide", "purchase", "dwell"]),
        st.integers(0, 3 * HOUR_MS),
    ),
    max_size=60,
)


def events_of(log: Sequence[tuple[int, int, str, int]]) -> list[UserEvent]:
    """Return a log's events: times rise, but for those who look back."""
    events, now_ms = [], START_MS
    for offset, (user, item, action, later_ms) in enumerate(log):
        now_ms += later_ms
        value = 10.0 if action == "dwell" else None
        made = event(
            1, [item], offset=offset, user=user, action=action, value=value, time_ms=now_ms, event_id=offset // 2
        )
        events.append(made)
    return events


@given(logs, st.lists(st.integers(0, 60), max_size=5), st.sampled_from([4, 32]))
def test_any_cut_into_batches_leaves_the_same_bits(
    log: list[tuple[int, int, str, int]], cuts: list[int], neighbours: int
) -> None:
    config, events = CoClicksConfig(neighbours=neighbours, half_life_seconds=600.0), events_of(log)
    whole = CoClicks(config, index_of())
    whole.learn(taken(empty_rows(4), events)[1])
    parts, rows = CoClicks(config, index_of()), empty_rows(4)
    bounds = [0, *sorted(min(cut, len(events)) for cut in cuts), len(events)]
    for begin, end in pairwise(bounds):
        rows, steps = taken(rows, events[begin:end])
        parts.learn(steps)
    assert parts.followers(0, START_MS) == whole.followers(0, START_MS)
    for item in range(ITEMS):
        assert parts.followers(item, START_MS + HOUR_MS) == whole.followers(item, START_MS + HOUR_MS)


@given(logs)
def test_steps_follow_the_ring_of_the_row(log: list[tuple[int, int, str, int]]) -> None:
    rows = empty_rows(4)
    for one in events_of(log):
        held, codes, _ = (values[one.user].tolist() for values in recent(rows))
        before = [ROW_OF[item] for item, code in zip(held, codes, strict=True) if code & POSITIVE]
        rows, steps = taken(rows, [one])
        if len(steps):
            assert steps.items[0] == ROW_OF[int(one.items[0])] not in before
            assert steps.earlier[0].tolist() == (before + [-1] * RECENT)[: RECENT - 1]
    # All at once: the rings that are followed inside must be those that apply makes.
    after, steps = taken(empty_rows(4), events_of(log))
    assert after.tobytes() == rows.tobytes()


@given(st.lists(st.lists(st.integers(0, ITEMS - 1), unique=True, max_size=RECENT), min_size=1, max_size=4))
def test_rows_tell_the_pairs_that_were_learned_from_their_events(users: list[list[int]]) -> None:
    events, offset = [], 0
    for user, items in enumerate(users):
        # Whole seconds, as a row keeps them.
        events += clicks(items, user=user, first=offset, step_ms=7_000)
        offset += len(items)
    events.sort(key=lambda e: e.time_ms)
    rows, steps = taken(empty_rows(4), events)
    live, again = CoClicks(UNDECAYED, index_of()), CoClicks(UNDECAYED, index_of())
    live.learn(steps)
    again.learn(again.steps_of_rows(rows))
    for item in range(ITEMS):
        assert again.followers(item, START_MS) == pytest.approx(live.followers(item, START_MS))
    np.testing.assert_allclose(again._actions, live._actions)


def test_rows_tell_only_what_came_after_the_time_that_is_named() -> None:
    rows, _ = taken(empty_rows(1), clicks([1, 2, 3], step_ms=HOUR_MS))
    found = CoClicks(UNDECAYED, index_of())
    found.learn(found.steps_of_rows(rows, START_MS + HOUR_MS))
    assert {item: list(found.followers(item, START_MS)) for item in (1, 2)} == {1: [3], 2: [3]}


@given(logs)
def test_no_item_keeps_more_followers_than_there_are_places(log: list[tuple[int, int, str, int]]) -> None:
    found = learned(events_of(log), CoClicksConfig(neighbours=4), users=4)
    assert all(len(found.followers(item, START_MS)) <= 4 for item in range(ITEMS))


def test_fifty_thousand_items_take_no_more_than_24_megabytes() -> None:
    found = CoClicks(CoClicksConfig(), ItemIndex())
    found._grow(50_000)
    assert found.nbytes <= 24e6


def test_what_everybody_acts_on_is_behind_what_belongs_to_the_item() -> None:
    popular = [clicks([n % 10 + 10, 1], user=n, first=2 * n, step_ms=0) for n in range(40)]
    own = [clicks([0, 2], user=40 + n, first=100 + 2 * n, step_ms=0) for n in range(3)]
    both = [clicks([0, 1], user=50 + n, first=200 + 2 * n, step_ms=0) for n in range(4)]
    events = [e for part in (*popular, *own, *both) for e in part]
    liked = np.array([[0]], np.int32)
    assert learned(events, users=60).candidates(liked, START_MS, 2).tolist() == [[2, 1]]
    plain = CoClicksConfig(popularity_exponent=0.0)
    assert learned(events, plain, users=60).candidates(liked, START_MS, 2).tolist() == [[1, 2]]


def test_the_newest_liked_item_speaks_loudest() -> None:
    found = learned([*clicks([0, 1]), *clicks([2, 3], user=1, first=2)], users=2)
    liked = np.array([[-1, 2, -1, 0], [0, -1, 2, -1], [-1, -1, -1, -1]], np.int32)
    assert found.candidates(liked, START_MS, 9).tolist() == [[3, 1], [1, 3], [-1, -1]]


def test_items_between_that_were_not_liked_weaken_no_older_one() -> None:
    # Two users went on from 2 to 3, one from 0 to 1.
    pairs = [(0, 1), (2, 3), (2, 3)]
    found = learned(
        [e for n, pair in enumerate(pairs) for e in clicks(pair, user=n, first=2 * n)], CoClicksConfig(), users=3
    )
    liked = np.array([[0, 2, -1, -1, -1], [0, -1, -1, -1, 2], [0, 2, 5, 5, 5]], np.int32)
    assert found.candidates(liked, START_MS, 9).tolist() == [[3, 1]] * 3
    assert found.candidates(np.array([[0, 5, 6, 7, 8, 2]], np.int32), START_MS, 9).tolist() == [[1, 3]]


@given(logs, st.lists(st.integers(0, ITEMS - 1), unique=True, max_size=5), st.sampled_from([0.0, 0.3, 0.5]))
def test_candidates_are_those_of_the_written_formula(
    log: list[tuple[int, int, str, int]], liked: list[int], exponent: float
) -> None:
    config = CoClicksConfig(popularity_exponent=exponent, half_life_seconds=1e9)
    found = learned(events_of(log), config, users=4)
    actions = np.zeros(ITEMS)
    actions[: len(found._actions)] = found._actions[:ITEMS] * found._decay(START_MS)
    expected: dict[int, float] = {}
    for n, item in enumerate(liked):
        for row, weight in found.followers(item, START_MS).items():
            one = weight * 0.85**n / (actions[item] + 5.0) ** 0.5 / (actions[row] + 5.0) ** exponent
            expected[row] = expected.get(row, 0.0) + one
    got = found.candidates(np.array([liked], np.int32).reshape(1, -1), START_MS, ITEMS)[0].tolist()
    assert sorted(got) == sorted(expected)
    strengths = [expected[row] for row in got]
    assert all(above >= below * (1 - 1e-6) for above, below in pairwise(strengths))


@given(logs, st.lists(st.lists(st.integers(-1, ITEMS + 3), min_size=3, max_size=3), min_size=1, max_size=5))
def test_a_request_gets_the_same_candidates_alone_and_in_any_batch(
    log: list[tuple[int, int, str, int]], liked: list[list[int]]
) -> None:
    found = learned(events_of(log), CoClicksConfig(), users=4)
    together = found.candidates(np.array(liked, np.int32), START_MS + HOUR_MS, 7)
    for b, own in enumerate(liked):
        alone = found.candidates(np.array([own], np.int32), START_MS + HOUR_MS, 7)[0].tolist()
        held = together[b].tolist()
        assert [row for row in held if row >= 0] == [row for row in alone if row >= 0]
        assert len(set(alone) - {-1}) == len([row for row in alone if row >= 0]) <= 7


def world_of(quotas: Quotas) -> World:
    """Return a world whose items lie far apart, in which users went on from "x" to "y"; users 1 and 2 did nothing."""
    surface = SurfaceConfig(k=20, candidates=40, quotas=quotas)
    world = World(users=3, config=RecommenderConfig(surfaces={"default": surface}, popular_items=1))
    for place, name in enumerate(("x", "y", *(f"other {i}" for i in range(30)))):
        world.item(name, np.eye(64, dtype=np.float32)[place], title=f"Title {name}")
    world.recommender.co_clicks = CoClicks(CoClicksConfig(), world.catalogue.index)
    pair = world.catalogue.index.rows(["x", "y"])
    earlier = np.array([[-1], [pair[0]]], np.int32)
    world.recommender.co_clicks.learn(Steps(pair, earlier, np.full(2, NOW_MS, np.int64)))
    return world


def test_a_click_brings_what_others_went_on_to() -> None:
    world = world_of(Quotas(co_click=4.0))
    world.act("x")
    assert [item.item_id for item in world.slate().items if item.source == "co_click"] == ["y"]


def test_at_quota_0_the_source_is_not_asked() -> None:
    world = world_of(Quotas(trending=1.0))
    world.recommender.co_clicks = None
    world.act("x")
    without = world.ids()
    found = world_of(Quotas(trending=1.0))
    found.act("x")
    assert found.ids() == without
    assert "co_click" not in {item.source for item in found.slate().items}


def test_a_user_who_did_nothing_has_no_neighbours() -> None:
    world = world_of(Quotas(co_click=4.0))
    assert "co_click" not in {item.source for item in world.slate(user=1).items}


def test_the_reason_of_a_co_clicked_item_says_so() -> None:
    world = world_of(Quotas(co_click=4.0))
    world.act("x")
    (reason,) = [item.reason for item in world.slate().items if item.item_id == "y"]
    assert (reason.kind, reason.text) == ("because_clicked", "Often chosen after what you clicked")


def test_surfaces_and_arms_tell_whether_anybody_needs_the_pairs() -> None:
    on = {"quotas": {"co_click": 0.5}}
    assert not RecommenderConfig().uses_co_clicks
    assert RecommenderConfig.model_validate({"surfaces": {"default": on}}).uses_co_clicks
    arm = {"name": "e", "arms": {"a": {"share": 0.5, "surface": on}}}
    assert RecommenderConfig.model_validate({"experiment": arm}).uses_co_clicks

"""Co-click pairs in a worker: learned from events, filled from rows, never twice."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from models.co_clicks import CoClicks, CoClicksConfig
from models.events import Action
from streams.co_click_fill import FILL_ROWS, CoClickFill
from streams.settings import Settings
from streams.state_thread import StateThread
from tests.streams.test_examples import NOW_MS, Bench

HOUR_MS = 3_600_000


def settings(co_click: float = 1.0, **co_clicks: Any) -> Settings:
    return Settings(
        exploration={"randomised_share": 0.0},
        recommender={"surfaces": {"default": {"quotas": {"co_click": co_click}}}, "co_clicks": co_clicks},
    )


def click(item: str, user: str = "u", at_ms: int = NOW_MS) -> Action:
    return Action(event_id=f"{user} {item} {at_ms}", event_time=at_ms, user_id=user, item_id=item, action="click")


def pairs(found: CoClicks | None, now_ms: int = NOW_MS) -> dict[tuple[int, int], float]:
    """Return the weights of all pairs of the bench's ten items."""
    assert found is not None
    return {(a, b): weight for a in range(10) for b, weight in found.followers(a, now_ms).items()}


@dataclass
class Owner:
    """A process that owns partitions: rows by partition, and a structure that they are learned into."""

    rows: dict[int, dict[bytes, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = StateThread()
        self.fill = CoClickFill(self.rows_of, self.state)

    def rows_of(self, partition: int) -> Mapping[bytes, bytes]:
        return self.rows[partition]

    def follow(self, into: CoClicks | None, partitions: Sequence[int], now_ms: int = NOW_MS) -> None:
        """Take over, and learn to the end."""

        async def to_the_end() -> None:
            self.fill.follow(into, partitions, now_ms)
            while self.fill.rows_left:
                await self.fill.step()

        asyncio.run(to_the_end())


def rows_after(*users: Sequence[str]) -> tuple[Bench, dict[bytes, bytes]]:
    """Return a bench after clicks of users u0, u1, … on items, and the rows that it has then."""
    bench = Bench(settings())
    bench.prepare(*(bench.at(click(item, f"u{n}")) for n, items in enumerate(users) for item in items))
    return bench, {key: value for (_, key), value in bench.rows.items()}


def test_a_worker_learns_what_users_go_on_to() -> None:
    bench, _ = rows_after(["i1", "i2"], ["i1", "i2", "i3"])
    assert pairs(bench.pipeline.co_clicks) == pytest.approx({(1, 2): 2.0, (1, 3): 0.85, (2, 3): 1.0}, rel=1e-3)


def test_the_slate_after_a_click_holds_what_others_went_on_to() -> None:
    bench, _ = rows_after(["i1", "i9"], ["i1"])
    (slate,) = bench.prepare(bench.at(click("i1", "u7"))).slates
    assert {item.item_id for item in slate.record.items if item.source == "co_click"} == {"i9"}


def test_events_that_are_read_again_are_not_learned_again() -> None:
    bench = Bench(settings())
    events = [bench.at(click("i1")), bench.at(click("i2"))]
    bench.prepare(*events)
    bench.prepare(*events)
    assert pairs(bench.pipeline.co_clicks) == pytest.approx({(1, 2): 1.0}, rel=1e-3)


def test_without_a_quota_nothing_is_kept() -> None:
    bench = Bench(settings(co_click=0.0))
    bench.prepare(bench.at(click("i1")), bench.at(click("i2")))
    assert bench.pipeline.co_clicks is None


def test_settings_turn_the_pairs_on_and_off_and_keep_them_over_other_changes() -> None:
    bench = Bench(settings(co_click=0.0))
    bench.pipeline.reconfigure(settings())
    first = bench.pipeline.co_clicks
    assert first is not None
    bench.pipeline.reconfigure(settings(co_click=2.0))
    assert bench.pipeline.co_clicks is first
    bench.pipeline.reconfigure(settings(neighbours=8))
    assert bench.pipeline.co_clicks is not first
    bench.pipeline.reconfigure(settings(co_click=0.0))
    assert bench.pipeline.co_clicks is None


def test_a_process_that_takes_over_learns_the_pairs_that_the_last_owner_had() -> None:
    bench, rows = rows_after(["i1", "i2"], ["i1", "i2", "i3"], ["i4"])
    again = CoClicks(CoClicksConfig(), bench.index)
    Owner({0: rows}).follow(again, [0])
    assert pairs(again) == pytest.approx(pairs(bench.pipeline.co_clicks))


def test_more_rows_than_one_step_takes_are_all_learned() -> None:
    bench, rows = rows_after(*[["i1", "i2"]] * (FILL_ROWS + 1))
    again = CoClicks(CoClicksConfig(), bench.index)
    Owner({0: rows}).follow(again, [0])
    assert pairs(again) == pytest.approx({(1, 2): FILL_ROWS + 1.0}, rel=1e-3)


def test_a_partition_that_stays_is_not_learned_again() -> None:
    bench, rows = rows_after(["i1", "i2"])
    owner, into = Owner({0: rows, 1: {}}), CoClicks(CoClicksConfig(), bench.index)
    owner.follow(into, [0])
    owner.follow(into, [0, 1])
    assert pairs(into) == pytest.approx({(1, 2): 1.0}, rel=1e-3)


def test_a_partition_that_comes_back_brings_only_what_happened_since_it_went() -> None:
    bench, rows = rows_after(["i1", "i2"])
    owner, into = Owner({0: rows}), CoClicks(CoClicksConfig(), bench.index)
    owner.follow(into, [0])
    owner.follow(into, [], NOW_MS + HOUR_MS)
    bench.prepare(bench.at(click("i3", "u0", NOW_MS + 2 * HOUR_MS)))
    owner.rows[0] = {key: value for (_, key), value in bench.rows.items()}
    owner.follow(into, [0], NOW_MS + 3 * HOUR_MS)
    found = pairs(into, NOW_MS + 2 * HOUR_MS)
    assert found == pytest.approx({(1, 2): 2 ** (-1 / 3), (2, 3): 1.0, (1, 3): 0.85}, rel=1e-3)


def test_pairs_that_are_turned_on_later_are_filled_from_all_rows() -> None:
    bench, rows = rows_after(["i1", "i2"])
    owner = Owner({0: rows})
    owner.follow(None, [0])
    into = CoClicks(CoClicksConfig(), bench.index)
    owner.follow(into, [0])
    assert pairs(into) == pytest.approx({(1, 2): 1.0}, rel=1e-3)


def test_a_row_that_cannot_be_read_costs_only_its_own_pairs() -> None:
    bench, rows = rows_after(["i1", "i2"])
    into = CoClicks(CoClicksConfig(), bench.index)
    Owner({0: {b"odd": b"\x09" * 1_000, **rows}}).follow(into, [0])
    assert pairs(into) == pytest.approx({(1, 2): 1.0}, rel=1e-3)


def test_the_filling_task_learns_what_is_handed_to_it_while_it_waits() -> None:
    bench, rows = rows_after(["i1", "i2"])
    owner, into = Owner({0: rows}), CoClicks(CoClicksConfig(), bench.index)

    async def scenario() -> None:
        task = asyncio.create_task(owner.fill.run())
        owner.fill.follow(into, [0], NOW_MS)
        async with asyncio.timeout(10):
            while not pairs(into):  # noqa: ASYNC110 - a learned row is no event here
                await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(scenario())
    assert pairs(into) == pytest.approx({(1, 2): 1.0}, rel=1e-3)

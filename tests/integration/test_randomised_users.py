"""Randomised users on real Kafka: the slate says it, and a worker that dies draws the same again."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import SettingsWith, wait_until
from tests.integration.workers import World, now_ms, record, world

pytestmark = pytest.mark.integration

ITEMS = 40


def request(user_id: str) -> tuple[bytes | None, bytes | None]:
    name = uuid.uuid4().hex
    return record(
        {
            "type": "request",
            "event_id": name,
            "event_time": now_ms(),
            "user_id": user_id,
            "request_id": f"r-{name}",
            "k": 10,
        }
    )


def item_ids(slate: Any) -> list[str]:
    return [item["item_id"] for item in slate["items"]]


async def slates_when(on: World, enough: Callable[[list[Any]], bool]) -> list[Any]:
    found: list[Any] = []

    async def there() -> bool:
        found[:] = await on.slates()
        return enough(found)

    await wait_until(there, 90, "the slates are there", every_seconds=0.2)
    return found


async def test_every_slate_of_a_randomised_user_is_drawn_and_says_so(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    async with world(settings_with, tmp_path, items=ITEMS, exploration={"randomised_share": 1.0}) as on:
        await on.ready_worker()
        await on.publish([request(f"user {n}") for n in range(20)])
        slates = await slates_when(on, lambda found: len(found) >= 20)
    assert {slate["experiment"] for slate in slates} == {"randomised"}
    assert {slate["degraded"] for slate in slates} == {False}
    assert {item["reason"]["kind"] for slate in slates for item in slate["items"]} == {"exploration"}
    # Nothing rules an item out for a user without a past: each slot is drawn from all 40.
    assert {round(1 / item["propensity"], 3) for slate in slates for item in slate["items"]} == {ITEMS}
    assert len({tuple(item_ids(slate)) for slate in slates}) == 20


async def test_a_share_of_the_users_is_drawn_and_the_others_are_ranked(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    async with world(settings_with, tmp_path, items=ITEMS, exploration={"randomised_share": 0.5}) as on:
        await on.ready_worker()
        await on.publish([request(f"user {n % 60}") for n in range(120)])
        slates = await slates_when(on, lambda found: len(found) >= 120)
    by_user: dict[str, set[str | None]] = {}
    for slate in slates:
        by_user.setdefault(slate["user_id"], set()).add(slate["experiment"])
    assert all(len(experiments) == 1 for experiments in by_user.values()), "who is drawn is always drawn"
    # 60 users at one half: 30 expected, standard deviation 4.
    assert 10 < sum(experiments == {"randomised"} for experiments in by_user.values()) < 50
    ranked = [slate for slate in slates if slate["experiment"] is None]
    assert {item["propensity"] for slate in ranked for item in slate["items"]} == {None}


async def test_a_slate_that_is_made_again_after_a_kill_draws_the_same(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"exploration": {"randomised_share": 1.0}, "worker": {"commit_interval_seconds": 30.0}}
    async with world(settings_with, tmp_path, items=ITEMS, **sections) as on:
        worker = await on.ready_worker()
        await on.publish([request(f"user {n}") for n in range(20)])
        await slates_when(on, lambda found: len(found) >= 20)
        worker.kill()
        worker.start()
        await worker.wait_ready()
        slates = await slates_when(on, lambda found: len(found) >= 40)
    drawn: dict[str, set[tuple[str, ...]]] = {}
    for slate in slates:
        drawn.setdefault(slate["recommendation_id"], set()).add(tuple(item_ids(slate)))
    assert len(drawn) == 20
    assert {len(draws) for draws in drawn.values()} == {1}

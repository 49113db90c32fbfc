"""Co-click neighbours on real Kafka: a worker that was killed has them again, from the rows of its users."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import SettingsWith, wait_until
from tests.integration.workers import World, now_ms, record, world

pytestmark = pytest.mark.integration

SECTIONS: dict[str, Any] = {
    "exploration": {"randomised_share": 0.0},
    "recommender": {"surfaces": {"default": {"k": 20, "quotas": {"co_click": 100.0}}}},
}


def click(user_id: str, item_id: str) -> tuple[bytes | None, bytes | None]:
    event = {"type": "action", "event_id": f"{user_id} {item_id}", "event_time": now_ms(), "user_id": user_id}
    return record({**event, "item_id": item_id, "action": "click"})


async def neighbours_of(on: World, user_id: str) -> list[str]:
    """Return what the newest slate of a user has from co-click neighbours, once it has any."""
    found: list[str] = []
    asked = 0

    async def there() -> bool:
        nonlocal asked
        asked += 1
        event = {"type": "request", "event_id": f"{user_id} {asked}", "event_time": now_ms(), "user_id": user_id}
        await on.publish([record({**event, "request_id": f"r {user_id} {asked}"})])
        own = [slate for slate in await on.slates() if slate["user_id"] == user_id]
        found[:] = [item["item_id"] for item in own[-1]["items"] if item["source"] == "co_click"] if own else []
        return bool(found)

    await wait_until(there, 90, "a slate has neighbours", every_seconds=0.5)
    return found


async def test_a_killed_worker_knows_again_what_users_went_on_to(settings_with: SettingsWith, tmp_path: Path) -> None:
    async with world(settings_with, tmp_path, items=40, **SECTIONS) as on:
        worker = await on.ready_worker()
        # Three users go on from 1 to 2; more come to 1 alone, so that 2 is not what is popular first.
        await on.publish([click(f"user {n}", f"item-{item}") for n in range(3) for item in (1, 2)])
        await on.publish([click(f"other {n}", "item-1") for n in range(5)])
        await on.publish([click("before", "item-1")])
        assert await neighbours_of(on, "before") == ["item-2"]
        worker.kill()
        worker.start()
        await worker.wait_ready()
        await on.publish([click("after", "item-1")])
        assert await neighbours_of(on, "after") == ["item-2"]

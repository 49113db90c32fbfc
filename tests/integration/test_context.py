"""Popularity by context on real Kafka: a new user gets what users of the same device click; what a kill -9 costs."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import SettingsWith, wait_until
from tests.integration.workers import Record, World, now_ms, record, world

pytestmark = pytest.mark.integration

CONTEXTS: dict[str, Any] = {
    "exploration": {"randomised_share": 0.0},
    "recommender": {
        "popularity_context": ["device"],
        "popularity_context_prior": 5.0,
        "surfaces": {"default": {"k": 3}},
    },
}
ON_TV, ON_PHONE = ["item-1", "item-2", "item-3"], ["item-11", "item-12", "item-13"]


def click(item_id: str, user_id: str, device: str) -> Record:
    event = {"type": "action", "event_id": f"{user_id}-{item_id}", "event_time": now_ms(), "user_id": user_id}
    return record({**event, "action": "click", "item_id": item_id, "context": {"device": device}})


def request(user_id: str, device: str) -> Record:
    event = {"type": "request", "event_id": user_id, "event_time": now_ms(), "user_id": user_id, "request_id": user_id}
    return record({**event, "context": {"device": device}})


def clicks(items: list[str], users: int, device: str, name: str = "user") -> list[Record]:
    return [click(item, f"{name} {n} with {device}", device) for n in range(users) for item in items]


async def slate_of(on: World, user: str) -> list[Any]:
    """Return the items of a user's first slate, as soon as there is one."""
    found: list[Any] = []

    async def there() -> bool:
        found[:] = [slate for slate in await on.slates() if slate["user_id"] == user]
        return bool(found)

    await wait_until(there, 90, f"{user} has a slate", every_seconds=0.2)
    items: list[Any] = found[0]["items"]
    return items


async def ids_of(on: World, user: str) -> set[str]:
    return {item["item_id"] for item in await slate_of(on, user)}


async def wait_for_context(on: World, device: str, ids: list[str]) -> list[Any]:
    """Let new users of a device ask until a slate has these items, and return it: lists are a second old at most."""
    found: list[Any] = []
    users = (f"new user {n} with {device}" for n in count(len(await on.slates())))

    async def there() -> bool:
        user = next(users)
        await on.publish([request(user, device)])
        found[:] = await slate_of(on, user)
        return {item["item_id"] for item in found} == set(ids)

    await wait_until(there, 60, f"a new user with {device} gets {ids}", every_seconds=0.3)
    return found


async def test_a_new_user_on_a_television_set_gets_what_is_clicked_there(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    async with world(settings_with, tmp_path, **CONTEXTS) as on:
        worker = await on.ready_worker()
        await on.publish(clicks(ON_PHONE, 30, "phone") + clicks(ON_TV, 10, "tv"))
        await on.wait_committed()
        items = await wait_for_context(on, "tv", ON_TV)
        assert {item["source"] for item in items} == {"popular_context"}
        assert {item["reason"]["kind"] for item in items} == {"trending"}
        await wait_for_context(on, "phone", ON_PHONE)
        await on.publish([request("elsewhere", "car")])
        assert await ids_of(on, "elsewhere") == set(ON_PHONE), "a context that nobody knows says what all say"
        assert await worker.metric("millstream_processing_errors_total") == 0


async def test_after_a_kill_slates_say_what_all_say_until_the_context_is_known_again(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    async with world(settings_with, tmp_path, **CONTEXTS) as on:
        worker = await on.ready_worker()
        await on.publish(clicks(ON_PHONE, 30, "phone") + clicks(ON_TV, 10, "tv"))
        await on.wait_committed()
        await wait_for_context(on, "tv", ON_TV)
        worker.kill()
        worker.start()
        await worker.wait_ready()
        await on.publish([request("right after", "tv")])
        assert await ids_of(on, "right after") == set(ON_PHONE)
        await on.publish(clicks(ON_TV, 10, "tv", "another"))
        await on.wait_committed()
        await wait_for_context(on, "tv", ON_TV)

"""An experiment on real Kafka: slates name their arm and obey it, drawn slots are logged, and the report counts."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from models.events import Item
from streams.sender import Outbox
from streams.topic_io import TopicWriter
from tests.integration.conftest import REPOSITORY, SettingsWith, environment, wait_until
from tests.integration.label_oracle import sent_labels
from tests.integration.workers import JSON, World, now_ms, record, world

pytestmark = pytest.mark.integration

USERS = 40
SECTIONS: dict[str, Any] = {
    "exploration": {"randomised_share": 0.0},
    "user_state": {"attribution_window_seconds": 2},
    "joiner": {"grace_seconds": 60},
    "recommender": {
        "surfaces": {"default": {"k": 5, "fresh_slots": {"slots": [2], "draws": 100}}},
        "experiment": {
            "name": "spring",
            "arms": {"bold": {"share": 0.5, "surface": {"rules": {"pinned": ["item-7"]}}}},
        },
    },
}


async def give_times(on: World) -> None:
    """Have the first ten items published just now: they are the fresh pool."""
    outbox = Outbox()
    async with TopicWriter(on.settings, on.names.items) as writer:
        for item_id in on.item_ids[:10]:
            item = Item(item_id=item_id, title=f"title of {item_id}", published_at=now_ms() - 60_000)
            writer.add(outbox, on.names.items, item_id.encode(), msgspec.json.encode(item), JSON)
        await writer.send(outbox)


def request(user_id: str) -> tuple[bytes | None, bytes | None]:
    event = {"type": "request", "event_id": f"r-{user_id}", "event_time": now_ms(), "user_id": user_id}
    return record({**event, "request_id": f"r-{user_id}"})


def shown(slate: Any, at_ms: int) -> tuple[bytes | None, bytes | None]:
    """Return the impression that a client sends of a slate: experiment and propensities as they came."""
    items = [
        {"item_id": i["item_id"], "position": i["position"]}
        | ({"propensity": i["propensity"]} if i["propensity"] is not None else {})
        for i in slate["items"]
    ]
    event = {"type": "impression", "event_id": f"i-{slate['user_id']}", "event_time": at_ms, "items": items}
    echoed = {"request_id": slate["recommendation_id"], "experiment": slate["experiment"]}
    return record({**event, **echoed, "user_id": slate["user_id"]})


def clicked(slate: Any, at_ms: int) -> tuple[bytes | None, bytes | None]:
    event = {"type": "action", "event_id": f"a-{slate['user_id']}", "event_time": at_ms, "action": "click"}
    return record({**event, "user_id": slate["user_id"], "item_id": slate["items"][0]["item_id"]})


async def test_arms_reach_slates_metrics_labels_and_the_report(settings_with: SettingsWith, tmp_path: Path) -> None:
    async with world(settings_with, tmp_path, items=40, **SECTIONS) as on:
        await give_times(on)
        worker = await on.ready_worker()
        await on.publish([request(f"user {n}") for n in range(USERS)])
        slates: list[Any] = []

        async def all_there() -> bool:
            slates[:] = await on.slates()
            return len(slates) >= USERS

        await wait_until(all_there, 90, "every user has a slate", every_seconds=0.2)
        bold = [slate for slate in slates if slate["experiment"] == "spring/bold"]
        control = [slate for slate in slates if slate["experiment"] == "spring/control"]
        assert len(bold) + len(control) == USERS
        assert 8 < len(bold) < 32, "40 users at one half: standard deviation 3.2"
        assert {slate["items"][0]["item_id"] for slate in bold} == {"item-7"}
        # The second slot is drawn from the ten items with a time, the pinned one apart in its arm.
        assert {len(slate["exploration"]["pool"]) for slate in control} == {10}
        assert {len(slate["exploration"]["pool"]) for slate in bold} == {9}
        for slate in slates:
            assert [item["propensity"] is not None for item in slate["items"]] == [False, True, False, False, False]
            assert slate["items"][1]["item_id"] in slate["exploration"]["pool"]
            assert slate["exploration"]["draws"] == 100
        assert await worker.metric("millstream_slates_by_experiment_total", experiment="spring/bold") == len(bold)

        at_ms = now_ms()
        await on.publish([shown(slate, at_ms) for slate in slates])
        await on.publish([clicked(slate, at_ms + 200) for slate in bold[:6] + control[:3]])

        async def labelled() -> bool:
            return len({label.impression_id for label in await sent_labels(on)}) >= USERS

        await wait_until(labelled, 90, "every impression has a label", every_seconds=0.2)
        told = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "millstream", "experiments", "report", "spring", "--models", "--json"],
            env=environment(on.settings, tmp_path / "report"),
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    first, second = (json.loads(line) for line in told.stdout.splitlines())
    assert (first["arm"], first["impressions"], first["clicked"]) == ("control", len(control), 3)
    assert (second["arm"], second["impressions"], second["clicked"]) == ("bold", len(bold), 6)
    version = slates[0]["model_version"]
    assert (first["ranked_by"], second["ranked_by"]) == ({version: len(control)}, {version: len(bold)})
    assert second["difference_low"] < second["difference"] < second["difference_high"]


async def test_an_item_that_the_settings_block_is_in_no_slate_soon_after_and_the_worker_goes_on(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    surface = {"k": 5, "rules": {"pinned": ["item-7"]}}
    async with world(settings_with, tmp_path, recommender={"surfaces": {"default": surface}}) as on:
        worker = await on.ready_worker()
        await on.publish([request("before")])

        async def slate_of(user: str) -> Any:
            found: list[Any] = []

            async def there() -> bool:
                found[:] = [slate for slate in await on.slates() if slate["user_id"] == user]
                return bool(found)

            await wait_until(there, 90, f"{user} has a slate", every_seconds=0.2)
            return found[0]

        assert (await slate_of("before"))["items"][0]["item_id"] == "item-7"
        pid = worker.pid
        file = tmp_path / "worker-settings" / "millstream.toml"
        text = file.read_text()
        assert text.count("blocked_items = []") == 1
        file.write_text(text.replace("blocked_items = []", 'blocked_items = ["item-7"]'))

        async def in_force() -> bool:
            return await worker.metric("millstream_settings_reload_seconds_count") == 1

        await wait_until(in_force, 60, "the block is in force", every_seconds=0.1)
        await on.publish([request("after")])
        ids = [item["item_id"] for item in (await slate_of("after"))["items"]]
        assert len(ids) == 5
        assert "item-7" not in ids
        assert worker.pid == pid
        assert worker.returncode is None

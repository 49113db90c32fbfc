"""kill -9 in the middle of everything: nothing lost, nothing applied twice."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.integration.conftest import SettingsWith, wait_until
from tests.integration.oracle import assert_exact
from tests.integration.traffic import traffic
from tests.integration.workers import World, now_ms, record, world

pytestmark = pytest.mark.integration


async def changelog_records(on: World) -> int:
    """Return how many row writes the broker has acknowledged so far."""
    return sum((await on.end_offsets(on.names.user_table_changelog)).values())


async def test_three_kills_under_load_lose_nothing_and_apply_nothing_twice(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    # Commits far more often than batches end: an offset that is committed too early is lost at one of the kills.
    async with world(settings_with, tmp_path, worker={"commit_interval_seconds": 0.01}) as on:
        for round_number in range(3):
            # So many that a worker is not done before a busy machine comes to killing it.
            await on.publish(traffic(on, 4_000, 150, seed=round_number))
            written = await changelog_records(on)
            worker = on.worker(f"worker-{round_number}")

            async def under_way(at_least: int = written + 300) -> bool:
                return await changelog_records(on) > at_least

            await wait_until(under_way, 90, "a part of the backlog is written", every_seconds=0.01)
            worker.kill()
            ends = await on.end_offsets(on.names.events)
            assert sum((await on.committed()).values()) < sum(ends.values()), "killed too late: nothing was left to do"
        await on.ready_worker("last")
        await on.publish(traffic(on, 300, 50, seed=9))
        await assert_exact(on)


@pytest.mark.parametrize(("user", "slates_sent"), [("row-only", 1), ("slate-only", 2)])
async def test_a_death_between_a_row_and_its_slate_loses_neither_and_a_repeated_slate_has_the_same_id(
    settings_with: SettingsWith, tmp_path: Path, user: str, slates_sent: int
) -> None:
    async with world(settings_with, tmp_path) as on:
        click = {"type": "action", "event_id": "e-1", "user_id": user, "item_id": "item-1", "action": "click"}
        await on.publish([*traffic(on, 50, 10), record(click | {"event_time": now_ms()})])
        assert await on.worker("cut-off", "tests.integration.faulty_worker").exit_code() == -signal.SIGKILL
        await on.ready_worker("next")
        await assert_exact(on)
        slates = [slate["recommendation_id"] for slate in await on.slates() if slate["user_id"] == user]
    assert (len(slates), len(set(slates))) == (slates_sent, 1)

"""kill -9 in the middle of everything: nothing lost, nothing applied twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.conftest import SettingsWith, wait_until
from tests.integration.oracle import assert_exact
from tests.integration.traffic import traffic
from tests.integration.workers import World, world

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
            await on.publish(traffic(1_500, 150, on.item_ids, seed=round_number))
            written = await changelog_records(on)
            worker = on.worker(f"worker-{round_number}")

            async def under_way(at_least: int = written + 300) -> bool:
                return await changelog_records(on) > at_least

            await wait_until(under_way, 90, "a part of the backlog is written", every_seconds=0.01)
            worker.kill()
            ends = await on.end_offsets(on.names.events)
            assert sum((await on.committed()).values()) < sum(ends.values()), "killed too late: nothing was left to do"
        await on.ready_worker("last")
        await on.publish(traffic(300, 50, on.item_ids, seed=9))
        await assert_exact(on)

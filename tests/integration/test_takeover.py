"""Workers that join, die and sleep past their session: partitions move, nothing is lost, no zombie's write survives."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from streams.exit_codes import ExitCode
from streams.sender import Outbox
from streams.topic_io import TopicWriter
from tests.integration.conftest import SettingsWith, wait_until
from tests.integration.oracle import assert_exact, changelog_rows
from tests.integration.traffic import load, traffic
from tests.integration.workers import WorkerProcess, World, world

pytestmark = pytest.mark.integration


async def processed(worker: WorkerProcess) -> float:
    """Return how many events a worker has processed since its start."""
    return await worker.metric("millstream_events_total")


async def wait_processing(worker: WorkerProcess) -> None:
    """Return when a worker has processed more events than now."""
    before = await processed(worker)

    async def more() -> bool:
        return await processed(worker) > before

    await wait_until(more, 60, f"{worker.name} processes events")


async def test_workers_join_die_and_sleep_past_their_session_and_nothing_is_lost(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    async with world(settings_with, tmp_path) as on:
        first = await on.ready_worker("first")
        async with load(on, seed=1):
            second = await on.ready_worker("second")
            await wait_processing(second)
            await wait_processing(first)
        async with load(on, seed=2):
            second.kill()
            third = await on.ready_worker("third")
            await wait_processing(third)
            await wait_processing(first)
        async with load(on, seed=3):
            first.send(signal.SIGSTOP)
            taken_over = third.log.count('"taking_over"')
            await wait_until(lambda: third.log.count('"taking_over"') > taken_over, 30, "the group moves on")
            await third.wait_ready()
            await wait_processing(third)
            first.send(signal.SIGCONT)
            assert await first.exit_code(30) == ExitCode.FENCED
            await wait_processing(third)
        await assert_exact(on)


async def test_a_late_write_of_a_former_owner_is_overwritten_by_the_owner_and_by_the_next_one(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    async with world(settings_with, tmp_path) as on:
        owner = await on.ready_worker("owner")
        await on.publish(traffic(on, 200, 20, seed=1))
        await on.wait_committed()
        stale, _ = await changelog_rows(on)
        await on.publish(traffic(on, 200, 20, seed=2))
        await on.wait_committed()
        await assert_exact(on)

        await write_rows(on, stale)

        async def rewritten() -> bool:
            highest, last = await changelog_rows(on)
            return highest == last

        assert not await rewritten(), "the late write changed nothing, the test tells nothing"
        await wait_until(rewritten, 20, "the owner writes its rows again", every_seconds=0.5)
        await assert_exact(on)
        assert await owner.metric("millstream_foreign_rows_total") >= len(stale)

        assert await owner.stop() == ExitCode.STOPPED
        await write_rows(on, stale)
        await on.ready_worker("next-owner")
        await wait_until(rewritten, 20, "the next owner writes its rows again", every_seconds=0.5)
        await assert_exact(on)


async def write_rows(on: World, rows: dict[tuple[int, bytes], bytes]) -> None:
    """Write rows to the changelog, as a process would that does not know that it is no owner any more."""
    outbox = Outbox()
    for (partition, key), value in rows.items():
        outbox.add(on.names.user_table_changelog, partition, key, value)
    async with TopicWriter(on.settings, on.names.user_table_changelog) as writer:
        await writer.send(outbox)

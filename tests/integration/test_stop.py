"""How a worker ends: an orderly stop, and exit codes that say why it ended."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from streams import topics
from streams.exit_codes import ExitCode
from streams.supervisor import Child
from tests.integration.conftest import SettingsWith, delete_topics, environment, wait_until
from tests.integration.oracle import assert_exact
from tests.integration.traffic import traffic
from tests.integration.workers import WorkerProcess, world

pytestmark = pytest.mark.integration


async def test_sigterm_under_load_finishes_the_batch_flushes_commits_and_exits_with_zero(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    async with world(settings_with, tmp_path, worker={"batch_max_events": 32}) as on:
        # So many that the worker is not done before a busy machine comes to stopping it.
        await on.publish(traffic(on, 4_000, 100))
        worker = on.worker("stopped")

        async def under_way() -> bool:
            return sum((await on.end_offsets(on.names.user_table_changelog)).values()) > 200

        await wait_until(under_way, 90, "a part of the backlog is written", every_seconds=0.01)
        code = await worker.stop()
        committed = sum((await on.committed()).values())
        assert code == ExitCode.STOPPED
        assert 200 < committed < 4_000, "stopped before or after the load"
        ready_before = worker.log.count('"ready"')
        worker.start()
        await wait_until(lambda: worker.log.count('"ready"') > ready_before, 60, "it works again")
        await assert_exact(on)
        assert await worker.metric("millstream_events_total", outcome="replayed") == 0, "something was not committed"


async def test_topics_of_another_shape_end_the_supervisor_with_code_10_and_no_restart(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    settings = settings_with(topics={"partitions": 2})
    await topics.create(settings)
    wider = settings.model_copy(update={"topics": settings.topics.model_copy(update={"partitions": 3})})
    process = WorkerProcess(wider, tmp_path, "wide", "streams.worker")
    environment(process.settings, tmp_path / "child")
    starts = 0

    class Counted(Child):
        def before_start(self) -> None:
            nonlocal starts
            starts += 1

    child = Counted("worker", "streams.worker", process.settings, tmp_path / "child" / "millstream.toml")
    try:
        code = await asyncio.wait_for(child.run(), 60)
    finally:
        child.kill()
    assert (code, starts) == (ExitCode.LAYOUT, 1)
    await delete_topics(settings)


async def test_topics_that_do_not_exist_are_a_layout_error_that_names_the_command(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    process = WorkerProcess(settings_with(), tmp_path, "no-topics", "streams.worker")
    process.start()
    try:
        assert await process.exit_code() == ExitCode.LAYOUT
        assert "topics create" in process.log
    finally:
        process.kill()


async def test_an_unknown_setting_ends_with_code_2(settings_with: SettingsWith, tmp_path: Path) -> None:
    settings = settings_with(kafka={"bootstrap_servers": "127.0.0.1:1"})
    process = WorkerProcess(settings, tmp_path, "unknown-setting", "streams.worker")
    (tmp_path / "unknown-setting-settings" / "millstream.toml").write_text("[worker]\nspeed = 3\n")
    process.start()
    try:
        assert await process.exit_code() == ExitCode.SETTINGS
        assert "worker.speed" in process.log
    finally:
        process.kill()


async def test_a_worker_whose_supervisor_is_killed_stops_in_order(settings_with: SettingsWith, tmp_path: Path) -> None:
    async with world(settings_with, tmp_path) as on:
        shell = on.worker("orphan", "tests.integration.parent_of_worker")

        async def ready() -> bool:
            return await shell.is_ready()

        await wait_until(ready, 90, "the worker under the parent is ready")
        await on.publish(traffic(on, 100, 20))
        shell.send(signal.SIGKILL)

        async def gone() -> bool:
            return not await shell.is_ready()

        await wait_until(gone, 30, "the worker stops")
        await wait_until(lambda: '"event": "stopped"' in shell.log, 30, "it stopped in order")

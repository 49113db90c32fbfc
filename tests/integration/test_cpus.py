"""A worker's event threads on one processor, and a processor that it cannot have."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import psutil
import pytest

from streams.exit_codes import ExitCode
from tests.integration.conftest import SettingsWith, wait_until
from tests.integration.traffic import traffic
from tests.integration.workers import WorkerProcess, world

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a thread choose its processor"),
]


async def test_event_threads_keep_to_the_processor_that_settings_and_metric_name(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    # A number is kept however much else runs here.
    number = min(os.sched_getaffinity(0))
    async with world(settings_with, tmp_path, worker={"cpu": number}) as on:
        worker = await on.ready_worker()
        await on.publish(traffic(on, 50, 10))
        await on.wait_committed()

        async def is_said() -> bool:
            return await worker.metric("millstream_kept_cpu") == number

        await wait_until(is_said, 30, "the metric names the processor")
        where = {}
        for thread in psutil.Process(worker.pid).threads():
            with contextlib.suppress(ProcessLookupError):
                where[thread.id] = os.sched_getaffinity(thread.id)
        assert where[worker.pid] == {number}, "the event loop"
        assert sum(processors == {number} for processors in where.values()) >= 3, "threads that were started later"


async def test_a_processor_that_the_worker_may_not_use_is_a_setting_to_change(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    process = WorkerProcess(settings_with(worker={"cpu": 60_000}), tmp_path, "nowhere", "streams.worker")
    process.start()
    try:
        assert await process.exit_code() == ExitCode.SETTINGS
        assert "worker.cpu is 60000" in process.log
    finally:
        process.kill()

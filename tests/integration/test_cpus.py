"""A worker's event threads on one processor, and a processor that it cannot have."""

from __future__ import annotations

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


@pytest.mark.skipif(
    sys.platform == "linux" and len(os.sched_getaffinity(0)) < 2, reason="this host has one processor to choose from"
)
async def test_event_loop_consumer_and_state_thread_keep_to_the_processor_that_the_metric_names(
    settings_with: SettingsWith, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Locks of its own: whatever else runs here may have taken every processor.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    async with world(settings_with, tmp_path, worker={"cpu": "auto"}) as on:
        worker = await on.ready_worker()
        await on.publish(traffic(on, 50, 10))
        await on.wait_committed()

        async def is_said() -> bool:
            return await worker.metric("millstream_kept_cpu") >= 0

        await wait_until(is_said, 30, "the metric names a processor")
        kept = {int(await worker.metric("millstream_kept_cpu"))}
        threads = {thread.id: os.sched_getaffinity(thread.id) for thread in psutil.Process(worker.pid).threads()}
        assert threads[worker.pid] == kept, "the event loop"
        assert sum(processors == kept for processors in threads.values()) >= 3, "consumer and state thread too"


async def test_a_processor_that_the_worker_may_not_use_is_a_setting_to_change(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    process = WorkerProcess(settings_with(worker={"cpu": 100_000}), tmp_path, "nowhere", "streams.worker")
    process.start()
    try:
        assert await process.exit_code() == ExitCode.SETTINGS
        assert "worker.cpu is 100000" in process.log
    finally:
        process.kill()

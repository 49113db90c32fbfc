"""The events topic deleted and created again under a running worker: noticed and said, never silently skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from streams import topics
from streams.exit_codes import FINAL, ExitCode
from tests.integration.conftest import SettingsWith, delete_topics, wait_until
from tests.integration.oracle import assert_exact, expected
from tests.integration.traffic import traffic
from tests.integration.workers import world

pytestmark = pytest.mark.integration


async def test_a_recreated_events_topic_ends_the_worker_and_the_next_one_reads_all_of_it(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    async with world(settings_with, tmp_path) as on:
        worker = await on.ready_worker()
        await on.publish(traffic(on, 60, 20, seed=1))
        await assert_exact(on)
        before = await expected(on)

        await delete_topics(on.settings, [on.names.events])
        await topics.create(on.settings)
        # More than the deleted topic held: what was committed there would be a place in the middle of this one.
        await on.publish(traffic(on, 400, 20, seed=2))

        code = await worker.exit_code(60)
        assert code == ExitCode.TOPIC_RECREATED
        assert code not in FINAL
        assert "deleted and created again" in worker.log

        worker.start()
        await worker.wait_ready()
        await assert_exact(on, before=before)


async def test_a_deleted_events_topic_is_said_and_waited_for(settings_with: SettingsWith, tmp_path: Path) -> None:
    async with world(settings_with, tmp_path) as on:
        worker = await on.ready_worker()
        await delete_topics(on.settings, [on.names.events])
        await wait_until(lambda: "events_topic_missing" in worker.log, 30, "the worker says that the topic is gone")
        assert worker.returncode is None
        assert not await worker.is_ready()

"""A group that starts for the first time: no offset is committed, and what a rebalance drops must be fetched again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.errors import BrokerUnavailable
from streams import faust_patches, topics
from streams.app import build
from streams.sender import Outbox
from streams.topic_io import TopicWriter
from streams.topics import TopicNames
from tests.integration.conftest import SettingsWith, delete_topics, wait_until
from tests.integration.oracle import assert_exact
from tests.integration.traffic import traffic
from tests.integration.workers import now_ms, record, world

pytestmark = pytest.mark.integration


async def test_what_was_fetched_and_dropped_before_the_first_commit_is_fetched_again(
    settings_with: SettingsWith,
) -> None:
    settings = settings_with()
    names = TopicNames.of(settings)
    await topics.create(settings)
    outbox = Outbox()
    async with TopicWriter(settings, names.events) as writer:
        for number in range(10):
            outbox.add(names.events, 0, b"user", b"%d" % number)
        await writer.send(outbox)
    seen: list[bytes] = []
    errors: list[BaseException] = []

    async def agent(stream: Any) -> None:
        async for events in faust_patches.batches(stream, 256, 0.1):
            # Nothing is acknowledged: a rebalance would drop all of it.
            seen.extend(event.message.value for event in events)

    async def take_over(partitions: set[int], generation: int) -> None:
        pass

    settings.worker.data_folder.mkdir(parents=True, exist_ok=True)
    refusals = [BrokerUnavailable("the coordinator is loading")]

    async def committed(partitions: set[int]) -> dict[int, int]:
        if refusals:
            raise refusals.pop()
        return dict.fromkeys(partitions, 0)

    app = build(settings, names, agent, take_over, committed, lambda error, where: errors.append(error))
    await app.start()
    try:
        await wait_until(lambda: len(seen) >= 10, 60, "the events are fetched")
        await app.consumer.perform_seek()
        await wait_until(lambda: len(seen) >= 20, 10, "they are fetched again")
    finally:
        app.conf.stream_wait_empty = False
        await app.stop()
    assert seen == [b"%d" % number for number in [*range(10), *range(10)]]
    assert not errors
    assert not refusals
    await delete_topics(settings)


async def test_events_that_wait_when_a_worker_joins_before_the_first_commit_are_all_processed(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    async with world(settings_with, tmp_path, worker={"batch_max_events": 4}) as on:
        request = {"type": "request", "request_id": "r", "k": 3}
        await on.publish([record(request | {"event_id": "e", "user_id": "slow", "event_time": now_ms() - 80_000_000})])
        await on.publish(traffic(on, 400, 60))
        await on.ready_worker("first", "tests.integration.faulty_worker")
        # The first of its batches is on its way, the rest of the log in its queue.
        await on.ready_worker("second")
        await assert_exact(on)

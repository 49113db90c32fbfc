"""The broker absent, stopped for a minute, or one of three killed: the worker catches up and nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiokafka import TopicPartition

from streams.broker import KafkaCluster
from streams.exit_codes import ExitCode
from streams.kafka_clients import new_consumer
from streams.supervisor import WorkerChild
from tests.integration.conftest import NewCluster, SettingsWith, environment, wait_until
from tests.integration.oracle import assert_exact
from tests.integration.traffic import traffic
from tests.integration.workers import World, world

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

ABSENT_SECONDS = 8.0
OUTAGE_SECONDS = 60.0


class Watched(WorkerChild):
    """A supervised worker whose exit codes are noted."""

    codes: list[int]

    def after_death(self, code: int) -> None:
        self.codes.append(code)
        super().after_death(code)


@asynccontextmanager
async def supervised(on: World, folder: Path) -> AsyncIterator[Watched]:
    """Run a worker under its supervisor's care; it must stop in order at the end."""
    prepared = on.worker("supervised")
    prepared.kill()
    environment(prepared.settings, folder / "child")
    child = Watched(prepared.settings, folder / "child" / "millstream.toml")
    child.codes = []
    running = asyncio.create_task(child.run())
    try:
        yield child
    finally:
        child.stop()
        code = await asyncio.wait_for(running, 60)
    assert code == ExitCode.STOPPED


async def outage(cluster: KafkaCluster, seconds: float) -> None:
    """Stop the cluster for a time. The length of the outage is what the test is about, so it is waited out."""
    await asyncio.to_thread(cluster.stop)
    await asyncio.sleep(seconds)
    await cluster.start()


async def some_written(on: World, more_than: int) -> None:
    """Return when the broker has acknowledged more than so many row writes."""

    async def written() -> bool:
        return sum((await on.end_offsets(on.names.user_table_changelog)).values()) > more_than

    await wait_until(written, 90, f"more than {more_than} rows are written", every_seconds=0.02)


async def test_a_broker_absent_at_start_and_then_gone_for_a_minute_costs_nothing(
    settings_with: SettingsWith, new_cluster: NewCluster, tmp_path: Path
) -> None:
    cluster = new_cluster(1)
    await cluster.start()
    kafka = {"bootstrap_servers": cluster.bootstrap_servers}
    worker = {"restart_backoff_max_seconds": 2.0, "batch_max_events": 32}
    async with world(settings_with, tmp_path, kafka=kafka, worker=worker) as on:
        await on.publish(traffic(on, 300, 40, seed=1))
        await asyncio.to_thread(cluster.stop)
        async with supervised(on, tmp_path) as child:
            await asyncio.sleep(ABSENT_SECONDS)
            await wait_until(lambda: bool(child.codes), 60, "the worker says that the broker is away")
            await cluster.start()
            await assert_exact(on)
            assert set(child.codes) == {ExitCode.BROKER}

            written = sum((await on.end_offsets(on.names.user_table_changelog)).values())
            await on.publish(traffic(on, 1_000, 40, seed=2))
            await some_written(on, written + 20)
            await outage(cluster, OUTAGE_SECONDS)
            await on.publish(traffic(on, 100, 40, seed=3))
            await assert_exact(on)


async def leader_of(on: World, topic: str, partition: int) -> int:
    """Return the node id of a partition's leader."""
    consumer = new_consumer(on.settings)
    await consumer.start()
    try:
        await consumer._client.set_topics([topic])
        node = consumer._client.cluster.leader_for_partition(TopicPartition(topic, partition))
        assert node, f"{topic}/{partition} has no leader"
        return int(node)
    finally:
        await consumer.stop()


async def test_the_leader_of_three_brokers_killed_under_load_costs_nothing(
    settings_with: SettingsWith, new_cluster: NewCluster, tmp_path: Path
) -> None:
    cluster = new_cluster(3)
    await cluster.start()
    kafka = {"bootstrap_servers": cluster.bootstrap_servers}
    replicated = {"replication_factor": 3, "min_insync_replicas": 2}
    async with world(settings_with, tmp_path, kafka=kafka, topics=replicated, worker={"batch_max_events": 32}) as on:
        await on.publish(traffic(on, 1_500, 60, seed=1))
        async with supervised(on, tmp_path):
            await some_written(on, 50)
            leader = await leader_of(on, on.names.events, 0)
            cluster.nodes[leader].kill()
            await on.publish(traffic(on, 300, 60, seed=2))
            await assert_exact(on)

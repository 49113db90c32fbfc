"""The local broker: start, stop, restart, and nodes that fail."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import psutil
import pytest

from models.errors import BrokerUnavailable
from streams import broker, topics
from streams.broker import BrokerStatus, KafkaNode, broker_ids
from streams.kafka_clients import bootstrap_servers, new_producer
from streams.settings import Settings
from streams.topics import TopicNames
from tests.integration.conftest import NewCluster, SettingsWith, read_topic, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture
def local(tmp_path: Path, kafka_jars: Path) -> Settings:
    """Settings without a cluster, whose local folder has the jars and whose preferred port is taken."""
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / kafka_jars.name).symlink_to(kafka_jars)
    return Settings(broker={"folder": folder})


async def test_the_local_broker_starts_once_takes_a_free_port_and_stops_by_its_pid(local: Settings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = local.model_copy(update={"broker": local.broker.model_copy(update={"port": port})})
        try:
            first = await broker.start(settings)
            second = await broker.start(settings)
            named = bootstrap_servers(settings)
        finally:
            was_running = await asyncio.to_thread(broker.stop, settings)
    assert first.ready
    assert first.bootstrap_servers != f"127.0.0.1:{port}"
    assert second.pid == first.pid
    assert named == first.bootstrap_servers
    assert was_running
    assert first.pid is not None
    assert not psutil.pid_exists(first.pid)
    assert await broker.status(settings) == BrokerStatus(False, False, None)
    with pytest.raises(BrokerUnavailable, match="millstream kafka start"):
        bootstrap_servers(settings)


async def test_a_named_cluster_is_used_and_none_is_started(settings: Settings) -> None:
    found = await broker.start(settings)
    assert (found.own, found.ready) == (False, True)
    assert not (settings.broker.folder / "node-1").exists()


def test_a_pid_file_that_names_another_program_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "pid").write_text(f"{psutil.Process().pid}\n")
    assert KafkaNode(tmp_path).stop() is False


def test_without_java_the_error_names_the_two_ways_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(BrokerUnavailable, match=r"install Java 17.*compose\.yaml"):
        broker.java()


def test_an_old_java_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    old = tmp_path / "bin" / "java"
    old.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\" 2019-01-15' >&2\n")
    old.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(BrokerUnavailable, match="is Java 11"):
        broker.java()


async def test_a_killed_broker_comes_back_on_its_port_with_its_records(
    new_cluster: NewCluster, settings_with: SettingsWith
) -> None:
    cluster = new_cluster(1)
    await cluster.start()
    before = cluster.bootstrap_servers
    settings = settings_with(kafka={"bootstrap_servers": before})
    await topics.create(settings)
    events = TopicNames.of(settings).events
    producer = new_producer(settings)
    await producer.start()
    await producer.send_and_wait(events, b"kept", key=b"u1")
    await producer.stop()

    cluster.nodes[1].kill()
    assert await broker_ids(before) == set()
    cluster.start_node(1)
    await cluster.wait_ready()

    assert cluster.bootstrap_servers == before
    assert [r.value for r in await read_topic(settings, events)] == [b"kept"]


async def test_three_nodes_survive_the_loss_of_one(new_cluster: NewCluster, settings_with: SettingsWith) -> None:
    cluster = new_cluster(3)
    await cluster.start()
    settings = settings_with(
        kafka={"bootstrap_servers": cluster.bootstrap_servers},
        topics={"partitions": 3, "replication_factor": 3, "min_insync_replicas": 2},
    )
    await topics.create(settings)
    assert await topics.check(settings) == []
    events = TopicNames.of(settings).events
    producer = new_producer(settings)
    await producer.start()
    await producer.send_and_wait(events, b"before", key=b"u1")
    cluster.nodes[3].kill()
    await producer.send_and_wait(events, b"after", key=b"u1")
    await producer.stop()
    assert [r.value for r in await read_topic(settings, events)] == [b"before", b"after"]


async def test_a_paused_broker_does_not_answer_until_it_is_resumed(new_cluster: NewCluster) -> None:
    cluster = new_cluster(1)
    await cluster.start()
    cluster.nodes[1].pause()
    assert await broker_ids(cluster.bootstrap_servers, timeout_seconds=0.5) == set()
    cluster.nodes[1].resume()

    async def answers() -> bool:
        return await broker_ids(cluster.bootstrap_servers) == {1}

    await wait_until(answers, 30.0, "the resumed broker answers")

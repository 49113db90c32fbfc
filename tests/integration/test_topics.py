"""Topics on a real broker: creating, comparing, refusing to start."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import NewTopic

from models.errors import LayoutError
from streams import topics
from streams.kafka_clients import new_admin
from streams.settings import Settings
from streams.topic_ids import epoch, topic_ids
from streams.topics import TopicNames
from tests.integration.conftest import SettingsWith, delete_topics, environment, read_topic

pytestmark = pytest.mark.integration


async def test_created_topics_have_no_difference(settings: Settings) -> None:
    assert await topics.check(settings) == []


async def test_creating_twice_makes_nothing_the_second_time(settings: Settings) -> None:
    assert await topics.create(settings) == []


async def test_a_missing_topic_is_named_and_stops_the_worker(settings: Settings) -> None:
    labels = TopicNames.of(settings).labels
    await delete_topics(settings, [labels])
    with pytest.raises(LayoutError, match=labels):
        await topics.require_layout(settings)


async def test_create_makes_only_the_topic_that_is_missing(settings: Settings) -> None:
    labels = TopicNames.of(settings).labels
    await delete_topics(settings, [labels])
    assert await topics.create(settings) == [labels]


async def test_another_partition_count_can_no_longer_be_changed_once_there_are_records(
    settings: Settings, settings_with: SettingsWith, producer: AIOKafkaProducer
) -> None:
    events = TopicNames.of(settings).events
    await producer.send_and_wait(events, b"{}", key=b"u1")
    differences = await topics.check(settings_with(topics={**settings.topics.model_dump(), "partitions": 8}))
    found = [d for d in differences if d.topic == events]
    assert [(d.what, d.wanted, d.found, d.fixable) for d in found] == [("partitions", "8", "4", False)]


async def test_another_partition_count_of_an_empty_topic_is_fixable(
    settings: Settings, settings_with: SettingsWith
) -> None:
    events = TopicNames.of(settings).events
    differences = await topics.check(settings_with(topics={**settings.topics.model_dump(), "partitions": 8}))
    assert [d.fixable for d in differences if d.topic == events] == [True]


async def test_create_does_not_alter_a_topic_that_is_there(settings_with: SettingsWith) -> None:
    settings = settings_with()
    events = TopicNames.of(settings).events
    admin = new_admin(settings)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(events, 4, 1, topic_configs={"retention.ms": "1000"})])
    finally:
        await admin.close()
    try:
        await topics.create(settings)
        found = {d.what: d.found for d in await topics.check(settings) if d.topic == events}
        assert found["retention.ms"] == "1000"
        assert found["message.timestamp.type"] == "CreateTime"
    finally:
        await delete_topics(settings)


async def test_events_carry_broker_time_and_not_the_clients(settings: Settings, producer: AIOKafkaProducer) -> None:
    events = TopicNames.of(settings).events
    await producer.send_and_wait(events, b"{}", key=b"u1", timestamp_ms=1_000)
    (record,) = await read_topic(settings, events)
    assert record.timestamp > 1_600_000_000_000


async def test_a_recreated_topic_has_another_epoch(settings: Settings) -> None:
    events = TopicNames.of(settings).events
    before = await topic_ids(settings, [events])
    await delete_topics(settings, [events])
    await topics.create(settings)
    after = await topic_ids(settings, [events])
    assert epoch(before[events]) != epoch(after[events])


async def test_the_epoch_of_a_topic_stays(settings: Settings, producer: AIOKafkaProducer) -> None:
    events = TopicNames.of(settings).events
    before = await topic_ids(settings, [events])
    await producer.send_and_wait(events, b"{}", key=b"u1")
    assert await topic_ids(settings, [events]) == before


async def test_the_id_of_a_missing_topic_is_a_layout_error(settings_with: SettingsWith) -> None:
    with pytest.raises(LayoutError, match="no-such-topic"):
        await topic_ids(settings_with(), ["no-such-topic"])


async def test_ids_of_several_topics_come_in_one_answer(settings: Settings) -> None:
    names = TopicNames.of(settings).all()
    ids = await topic_ids(settings, names)
    assert len(set(ids.values())) == len(names) == 12


def run_command(settings: Settings, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "millstream", *arguments]
    return subprocess.run(
        command, env=environment(settings, folder), cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_command_creates_and_then_finds_nothing_wrong(settings_with: SettingsWith, tmp_path: Path) -> None:
    settings = settings_with()
    created = run_command(settings, tmp_path, "topics", "create")
    checked = run_command(settings, tmp_path, "topics", "check")
    asyncio.run(delete_topics(settings))
    assert "12 topics created, 0 were there" in created.stdout
    assert (checked.returncode, checked.stdout) == (0, "all topics are as they must be\n")


def test_the_check_command_fails_and_names_the_missing_topics(settings_with: SettingsWith, tmp_path: Path) -> None:
    settings = settings_with()
    checked = run_command(settings, tmp_path, "topics", "check")
    assert checked.returncode == 1
    assert f"wrong: {TopicNames.of(settings).events}: does not exist" in checked.stdout

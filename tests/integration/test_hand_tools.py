from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiokafka import AIOKafkaProducer

from models.logs.jsonl import Refusal
from streams.hand_tools import publish, tail
from streams.settings import Settings
from streams.topics import TopicNames
from tests.integration.conftest import REPOSITORY, environment, read_topic, wait_until

pytestmark = pytest.mark.integration

CLICK = b'{"type":"action","event_id":"1","event_time":1000,"user_id":"ann","item_id":"a","action":"click"}'


async def tailed(settings: Settings, topic: str, **options: Any) -> list[dict[str, Any]]:
    return [record async for record in tail(settings, topic, start="beginning", follow=False, **options)]


async def test_published_lines_stand_on_the_topic_as_they_were_with_the_users_key(settings: Settings) -> None:
    result = await publish(settings, "events", [CLICK + b"\n", b"\n"])
    (record,) = await read_topic(settings, TopicNames.of(settings).events)
    assert (result.sent, result.refused) == (1, 0)
    assert (record.key, record.value) == (b"ann", CLICK)


async def test_a_refused_line_is_named_and_the_others_are_sent(settings: Settings) -> None:
    refused: list[Refusal] = []
    result = await publish(
        settings, "items", [b'{"item_id": "a"}', b"{}", b'{"item_id": "b"}'], on_refusal=refused.append
    )
    assert (result.sent, result.refused) == (2, 1)
    assert [(r.line, r.reason) for r in refused] == [(2, "invalid")]
    assert len(await read_topic(settings, TopicNames.of(settings).items)) == 2


async def test_removing_items_sends_null_values(settings: Settings) -> None:
    await publish(settings, "items", [b'{"item_id": "a"}'], remove=True)
    (record,) = await read_topic(settings, TopicNames.of(settings).items)
    assert (record.key, record.value) == (b"a", None)


async def test_tail_decodes_json_and_messagepack(settings: Settings, producer: AIOKafkaProducer) -> None:
    users = TopicNames.of(settings).users
    await producer.send_and_wait(users, b'{"user_id": "ann"}', key=b"ann", partition=0)
    await producer.send_and_wait(users, msgspec.msgpack.encode({"user_id": "bob"}), key=b"bob", partition=0)
    await producer.send_and_wait(users, None, key=b"eve", partition=0)
    shown = await tailed(settings, "users")
    assert [r["value"] for r in shown] == [{"user_id": "ann"}, {"user_id": "bob"}, None]


async def test_tail_shows_one_users_records_alone(settings: Settings) -> None:
    await publish(settings, "users", [b'{"user_id": "ann"}', b'{"user_id": "bob"}', b'{"user_id": "eve"}'])
    assert [r["key"] for r in await tailed(settings, "users", user="bob")] == ["bob"]


async def test_tail_stops_at_its_limit(settings: Settings) -> None:
    await publish(settings, "users", [b'{"user_id": "%d"}' % n for n in range(5)])
    assert len(await tailed(settings, "users", limit=3)) == 3


async def test_tail_from_the_end_shows_only_what_comes_later(settings: Settings) -> None:
    await publish(settings, "users", [b'{"user_id": "before"}'])
    opened = asyncio.Event()

    async def follow() -> list[Any]:
        return [r["key"] async for r in tail(settings, "users", start="end", limit=1, on_open=opened.set)]

    following = asyncio.create_task(follow())
    await asyncio.wait_for(opened.wait(), 30.0)
    await publish(settings, "users", [b'{"user_id": "after"}'])
    await wait_until(following.done, 30.0, "the later record is shown")
    assert await following == ["after"]


def command(settings: Settings, folder: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "millstream.py"), *arguments],
        input=text,
        capture_output=True,
        text=True,
        env=environment(settings, folder),
        cwd=folder,
        timeout=120,
        check=False,
    )


async def test_publish_and_tail_work_from_the_command_line(settings: Settings, tmp_path: Path) -> None:
    published = await asyncio.to_thread(
        command, settings, tmp_path, "publish", "events", "-", text=CLICK.decode() + "\n{}\n"
    )
    assert published.returncode == 1
    assert "1 sent, 1 refused" in published.stdout
    assert "line 2: invalid" in published.stderr
    shown = await asyncio.to_thread(command, settings, tmp_path, "tail", "events", "--from", "beginning", "--no-follow")
    assert [json.loads(line)["value"]["event_id"] for line in shown.stdout.splitlines()] == ["1"]


async def test_import_works_from_the_command_line_and_says_what_workers_need(
    settings: Settings, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(CLICK + b'\n{"item_id": "a"}\n')
    done = await asyncio.to_thread(command, settings, tmp_path, "import", "jsonl", str(log))
    assert done.returncode == 0, done.stderr
    assert "1 items, 0 users and 1 events" in done.stdout
    assert "trusted" in done.stderr
    assert "WARNING: the settings in force here say 'live'" in done.stderr

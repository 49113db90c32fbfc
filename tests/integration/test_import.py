from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer

from models.errors import DeliveryError, LayoutError, LogFormatError
from models.events import EVENT_CODEC, ITEM_CODEC, Action, Event, Impression, Request, epoch_ms
from models.logs import LogEvent, open_log
from models.logs.jsonl import JsonlLog
from streams.importer import Importer, ImportOptions, read_state
from streams.sender import Delivered, Outbox
from streams.settings import Settings
from streams.topic_io import TopicWriter, partition_of
from streams.topics import TopicNames
from tests.integration.conftest import PARTITIONS, REPOSITORY, SettingsWith, environment, read_topic, wait_until

pytestmark = pytest.mark.integration


def write_log(folder: Path, events: int = 40) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "items.jsonl").write_text('{"item_id": "a", "title": "A"}\n{"item_id": "b"}\n')
    (folder / "users.jsonl").write_text('{"user_id": "user-1"}\n')
    lines = []
    for n in reversed(range(events)):  # out of order on purpose
        common = {"event_id": f"e{n}", "event_time": 1_000_000 + n * 1_000, "user_id": f"user-{n % 7}"}
        if n % 4:
            lines.append({"type": "action", "item_id": "a", "action": "click", **common})
        else:
            lines.append({"type": "impression", "items": [{"item_id": "a"}, {"item_id": "b"}], **common})
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def start_import(settings: Settings, log: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Start the command in a process of its own, slow enough to be killed on its way."""
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "millstream.py"), "import", "jsonl", str(log), "--speed", "20"],
        env=environment(settings, folder / "process"),
        cwd=folder,
    )


async def events_on_topic(settings: Settings) -> list[Event]:
    records = await read_topic(settings, TopicNames.of(settings).events)
    return [EVENT_CODEC.decode(record.value) for record in records]


async def test_every_event_of_a_log_arrives_once(settings: Settings, tmp_path: Path) -> None:
    log = open_log("jsonl", write_log(tmp_path / "log"))
    result = await Importer(settings, log, ImportOptions()).run()
    assert (result.items, result.users, result.events) == (2, 1, 40)
    assert sorted(e.event_id for e in await events_on_topic(settings)) == sorted(f"e{n}" for n in range(40))


async def test_events_stand_on_the_partition_of_their_user_in_event_time_order(
    settings: Settings, tmp_path: Path
) -> None:
    await Importer(settings, open_log("jsonl", write_log(tmp_path / "log")), ImportOptions()).run()
    records = await read_topic(settings, TopicNames.of(settings).events)
    times: dict[int, list[int]] = {}
    for record in records:
        event = EVENT_CODEC.decode(record.value)
        assert record.key == event.user_id.encode()
        assert record.partition == partition_of(record.key, PARTITIONS)
        times.setdefault(record.partition, []).append(epoch_ms(event.event_time))
    assert len(times) > 1
    assert all(seen == sorted(seen) for seen in times.values())


async def test_the_catalogue_is_keyed_by_item(settings: Settings, tmp_path: Path) -> None:
    await Importer(settings, open_log("jsonl", write_log(tmp_path / "log")), ImportOptions()).run()
    records = await read_topic(settings, TopicNames.of(settings).items)
    assert {r.key: ITEM_CODEC.decode(r.value).title for r in records} == {b"a": "A", b"b": ""}


async def test_requests_stand_right_before_their_impression(settings: Settings, tmp_path: Path) -> None:
    log = open_log("jsonl", write_log(tmp_path / "log"))
    await Importer(settings, log, ImportOptions(requests=True)).run()
    events = await events_on_topic(settings)
    requests = [i for i, event in enumerate(events) if isinstance(event, Request)]
    assert len(requests) == 10
    for i in requests:
        of_user = [e for e in events[i + 1 :] if e.user_id == events[i].user_id]
        assert isinstance(of_user[0], Impression)
        assert events[i].event_id == f"{of_user[0].event_id}:request"


async def test_a_limit_stops_early_and_a_resume_sends_the_rest_only(settings: Settings, tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log")
    first = await Importer(settings, open_log("jsonl", folder), ImportOptions(limit=15)).run()
    second = await Importer(settings, open_log("jsonl", folder), ImportOptions(resume=True)).run()
    assert (first.events, second.events, second.resumed_at) == (15, 25, 15)
    assert sorted(e.event_id for e in await events_on_topic(settings)) == sorted(f"e{n}" for n in range(40))


async def test_a_resume_does_not_send_the_catalogue_again(settings: Settings, tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log")
    await Importer(settings, open_log("jsonl", folder), ImportOptions(limit=15)).run()
    await Importer(settings, open_log("jsonl", folder), ImportOptions(resume=True)).run()
    assert len(await read_topic(settings, TopicNames.of(settings).items)) == 2


async def test_a_crash_after_sending_and_before_the_state_file_sends_nothing_twice(
    settings: Settings, tmp_path: Path
) -> None:
    folder = write_log(tmp_path / "log")
    importer = Importer(settings, open_log("jsonl", folder), ImportOptions(limit=10))
    await importer.run()
    older_state = importer.state_file.read_bytes()
    await Importer(settings, open_log("jsonl", folder), ImportOptions(limit=25, resume=True)).run()
    importer.state_file.write_bytes(older_state)  # as if the process died before it wrote the newer one
    last = await Importer(settings, open_log("jsonl", folder), ImportOptions(resume=True)).run()
    assert (last.resumed_at, last.events) == (10, 15)
    assert sorted(e.event_id for e in await events_on_topic(settings)) == sorted(f"e{n}" for n in range(40))


async def test_an_import_that_is_killed_and_resumed_sends_every_event_once(settings: Settings, tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log", events=400)
    events = TopicNames.of(settings).events
    killed = start_import(settings, folder, tmp_path)
    try:

        async def has_begun() -> bool:
            return len(await read_topic(settings, events)) >= 5

        await wait_until(has_begun, 60.0, "the import has begun")
    finally:
        killed.kill()
        killed.wait(30)
    sent_before = len(await read_topic(settings, events))
    result = await Importer(settings, open_log("jsonl", folder), ImportOptions(resume=True)).run()
    assert 0 < sent_before < 400
    assert result.events == 400 - sent_before
    assert sorted(e.event_id for e in await events_on_topic(settings)) == sorted(f"e{n}" for n in range(400))


async def test_a_failed_delivery_leaves_a_state_from_which_nothing_is_lost(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_log(tmp_path / "log", events=9_000)
    chunks = 0
    real_send = TopicWriter.send

    async def failing_send(self: TopicWriter, outbox: Outbox) -> list[Delivered]:
        nonlocal chunks
        delivered = await real_send(self, outbox)
        chunks += any(topic == TopicNames.of(settings).events for topic, _ in outbox.records)
        if chunks == 3:
            raise DeliveryError("the answer of the broker was lost")
        return delivered

    monkeypatch.setattr(TopicWriter, "send", failing_send)
    with pytest.raises(DeliveryError):
        await Importer(settings, open_log("jsonl", folder), ImportOptions()).run()
    monkeypatch.undo()
    await Importer(settings, open_log("jsonl", folder), ImportOptions(resume=True)).run()
    assert sorted(e.event_id for e in await events_on_topic(settings)) == sorted(f"e{n}" for n in range(9_000))


async def test_a_state_of_another_log_is_refused_and_nothing_is_sent(settings: Settings, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    first = open_log("jsonl", write_log(tmp_path / "one", events=5))
    await Importer(settings, first, ImportOptions(state_file=state)).run()
    other = open_log("jsonl", write_log(tmp_path / "two", events=6))
    with pytest.raises(LogFormatError, match="belongs to another log"):
        await Importer(settings, other, ImportOptions(state_file=state, resume=True)).run()
    assert len(await events_on_topic(settings)) == 5


async def test_a_topic_that_was_created_anew_is_noticed(
    settings: Settings, settings_with: SettingsWith, tmp_path: Path
) -> None:
    state_file = tmp_path / "state.json"
    log = open_log("jsonl", write_log(tmp_path / "log"))
    await Importer(settings, log, ImportOptions(state_file=state_file)).run()
    state = read_state(state_file)
    assert state is not None
    state_file.write_text(
        json.dumps(
            {
                "version": 1,
                "fingerprint": state.fingerprint,
                "topic": state.topic,
                "next_offsets": {str(p): offset + 1 for p, offset in state.next_offsets.items()},
            }
        )
    )
    with pytest.raises(LogFormatError, match="created anew"):
        await Importer(settings, log, ImportOptions(state_file=state_file, resume=True)).run()


async def test_a_paced_import_keeps_the_order_of_event_times(settings: Settings, tmp_path: Path) -> None:
    log = open_log("jsonl", write_log(tmp_path / "log"))
    await Importer(settings, log, ImportOptions(speed=100.0)).run()  # 39 s of log in 0.39 s
    records = sorted(await read_topic(settings, TopicNames.of(settings).events), key=lambda r: r.timestamp)
    broker_times = {EVENT_CODEC.decode(r.value).event_id: r.timestamp for r in records}
    assert broker_times["e0"] < broker_times["e20"] < broker_times["e39"]


async def test_a_missing_topic_is_named(settings_with: SettingsWith, tmp_path: Path) -> None:
    bare = settings_with()
    with pytest.raises(LayoutError, match="millstream topics create"):
        await Importer(bare, open_log("jsonl", write_log(tmp_path / "log")), ImportOptions()).run()


async def test_a_record_of_somebody_else_on_the_topic_does_not_stop_a_resume(
    settings: Settings, producer: AIOKafkaProducer, tmp_path: Path
) -> None:
    folder = write_log(tmp_path / "log")
    await Importer(settings, open_log("jsonl", folder), ImportOptions(limit=5)).run()
    await producer.send_and_wait(TopicNames.of(settings).events, b"\xffnonsense", key=b"user-1")
    result = await Importer(settings, open_log("jsonl", folder), ImportOptions(resume=True)).run()
    assert result.events == 35


class TooLate(JsonlLog):
    """A log whose reading fails in the middle."""

    def events(self) -> Iterator[LogEvent]:
        for n in range(10):
            event = Action(event_id=f"e{n}", event_time=n, user_id="u", item_id="a", action="click")
            yield LogEvent(n, event)
        raise LogFormatError("line 11 is broken")


async def test_a_log_that_breaks_off_is_an_error_and_the_state_can_be_resumed(
    settings: Settings, tmp_path: Path
) -> None:
    log = TooLate(write_log(tmp_path / "log"))
    importer = Importer(settings, log, ImportOptions())
    with pytest.raises(LogFormatError, match="line 11"):
        await importer.run()
    state = read_state(importer.state_file)
    assert state is not None
    assert state.is_catalogue_sent
    assert not state.is_finished

"""On a real broker: every impression has its features exactly once in effect, through kill -9 and replay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from models.errors import RecordError
from models.events import EVENT_CODEC, Impression
from models.examples import LAGGED, REPLAYED, FeaturesRecord, decode_features, raw_slates
from models.hashing import hash64, impression_id
from streams.topic_ids import epoch, topic_ids
from tests.integration.conftest import SettingsWith, read_topic, wait_until
from tests.integration.traffic import traffic
from tests.integration.workers import World, now_ms, record, world

pytestmark = pytest.mark.integration


async def features(on: World) -> list[FeaturesRecord]:
    """Return the features records in the order of partitions and offsets, after checking where each lies."""
    found = []
    for kept in await read_topic(on.settings, on.names.features):
        decoded = decode_features(kept.value)
        assert (kept.key, kept.partition) == (decoded.user_id.encode(), decoded.partition)
        found.append(decoded)
    return found


async def impressions(on: World) -> tuple[dict[int, Impression], set[int]]:
    """Return the impressions of the log by their id, and the ids of those that are a client's retries."""
    topic_epoch = epoch((await topic_ids(on.settings, [on.names.events]))[on.names.events])
    found: dict[int, Impression] = {}
    retries: set[int] = set()
    recent: dict[str, list[str]] = {}
    for kept in await read_topic(on.settings, on.names.events):
        try:
            event = EVENT_CODEC.decode(kept.value)
        except RecordError:
            continue
        # As a row does: a retry is known by the last eight event ids of its user.
        seen = recent.setdefault(event.user_id, [])
        is_retry = event.event_id in seen[-8:]
        if not is_retry:
            seen.append(event.event_id)
        if isinstance(event, Impression):
            key = impression_id(topic_epoch, kept.partition, kept.offset)
            if is_retry:
                retries.add(key)
            else:
                found[key] = event
    return found, retries


def first_wins(records: Sequence[FeaturesRecord]) -> dict[int, FeaturesRecord]:
    """Return the record that counts of each impression."""
    found: dict[int, FeaturesRecord] = {}
    for one in records:
        found.setdefault(one.impression_id, one)
    return found


async def test_every_impression_has_its_features_exactly_once_in_effect_after_three_kills(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    async with world(settings_with, tmp_path, worker={"commit_interval_seconds": 0.01}) as on:
        for round_number in range(3):
            # So many that a worker is not done before a busy machine comes to killing it.
            await on.publish(traffic(on, 4_000, 120, seed=round_number))
            written = sum((await on.end_offsets(on.names.features)).values())
            worker = on.worker(f"worker-{round_number}")

            async def under_way(at_least: int = written + 150) -> bool:
                return sum((await on.end_offsets(on.names.features)).values()) > at_least

            await wait_until(under_way, 90, "a part of the backlog is written", every_seconds=0.01)
            worker.kill()
            ends = await on.end_offsets(on.names.events)
            assert sum((await on.committed()).values()) < sum(ends.values()), "killed too late: nothing was left to do"
        await on.ready_worker("last")
        await on.wait_committed()
        records = await features(on)
        shown, retries = await impressions(on)
    effective = first_wins(records)
    # After a crash a row cannot tell a client's retry from what it holds: it is marked, and never trained on.
    marked = effective.keys() - shown.keys()
    assert marked <= retries
    assert all(effective.pop(key).flags & REPLAYED for key in marked)
    assert effective.keys() == shown.keys()
    assert len(records) > len(effective), "no impression was sent twice: the kills came at no bad moment"
    for key, impression in shown.items():
        items = dict.fromkeys(hash64(item.item_id) for item in impression.items)
        assert raw_slates([effective[key]]).items[0].tolist() == list(items)
    # A repetition is that of a row which held the event already, or the very same record in a later life.
    repeated = [one for one in records if one is not effective.get(one.impression_id, one)]
    for one in repeated:
        first = effective[one.impression_id]
        assert (one.items, one.time_ms, one.offset) == (first.items, first.time_ms, first.offset)
    assert any(one.flags & REPLAYED for one in repeated)


async def test_a_late_worker_marks_what_it_could_not_see_in_time_and_names_its_model(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    async with world(settings_with, tmp_path, examples={"max_lag_seconds": 2.0}) as on:
        shown = {"type": "impression", "user_id": "u", "items": [{"item_id": "item-1"}, {"item_id": "item-2"}]}
        await on.publish([record(shown | {"event_id": "early", "event_time": now_ms()})])
        started_ms = now_ms()
        await wait_until(lambda: now_ms() - started_ms > 2_500, 10, "the first impression is old")
        worker = await on.ready_worker()
        await on.publish([record(shown | {"event_id": "now", "event_time": now_ms()})])
        await on.wait_committed()
        early, now = await features(on)
        lagged = await worker.metric("millstream_features_lagged_total")
        written_bytes = await worker.metric("millstream_features_bytes_total")
    assert (early.flags, now.flags, lagged) == (LAGGED, 0, 1)
    assert written_bytes == sum(len(msgspec.msgpack.encode(one)) for one in (early, now))
    assert [version for version, _ in now.scores] == [now.model_version]
    assert list(now.shown_counts) == [1, 1]

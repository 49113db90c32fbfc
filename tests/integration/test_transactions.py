"""Producers that use transactions: their marks in the log hold up no commit, and an aborted event is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streams.kafka_clients import new_producer
from tests.integration.conftest import SettingsWith, wait_until
from tests.integration.oracle import assert_exact, changelog_rows
from tests.integration.traffic import traffic
from tests.integration.workers import Record, World, now_ms, record, world

pytestmark = pytest.mark.integration


def click(user_id: str, number: int) -> dict[str, Any]:
    """Return a click."""
    return {
        "type": "action",
        "event_id": f"{user_id}-{number}",
        "event_time": now_ms(),
        "user_id": user_id,
        "item_id": f"item-{number}",
        "action": "click",
    }


async def publish_in_transaction(on: World, records: list[Record], *, commit: bool) -> None:
    """Send records of one user in one transaction, commit or abort it, and return when its mark is in the log.

    The coordinator answers before it writes the mark; an event that comes first would stand before it.
    """
    before = await log_length(on)
    producer = new_producer(on.settings, transactional_id=f"{on.settings.worker.group}-{commit}")
    await producer.start()
    try:
        await producer.begin_transaction()
        for key, value in records:
            await producer.send(on.names.events, value, key=key)
        await producer.flush()
        await (producer.commit_transaction() if commit else producer.abort_transaction())
    finally:
        await producer.stop()

    async def marked() -> bool:
        return await log_length(on) == before + len(records) + 1

    await wait_until(marked, 30, "the transaction's mark is written")


async def log_length(on: World) -> int:
    """Return how many records of any kind stand on the events topic, those of open transactions left out."""
    return sum((await on.end_offsets(on.names.events)).values())


async def test_committed_events_count_aborted_ones_do_not_and_both_hold_up_no_commit(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    async with world(settings_with, tmp_path) as on:
        worker = await on.ready_worker()
        await publish_in_transaction(on, [record(click("sure", n)) for n in range(5)], commit=True)
        await publish_in_transaction(on, [record(click("torn", n)) for n in range(5)], commit=False)
        # The last record of each partition must be an event: only of those is the offset committed.
        await on.publish(traffic(on, 200, 100))
        await assert_exact(on)
        worker.kill()
        await on.ready_worker("next")
        await on.publish(traffic(on, 50, 20, seed=2))
        await assert_exact(on)
        rows, _ = await changelog_rows(on)
        users = {key for _, key in rows}
    assert b"sure" in users
    assert b"torn" not in users

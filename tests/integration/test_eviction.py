"""Idle users leave a marker that still holds their guard."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.user_row import decode_rows, is_marker
from models.user_value import guard_of, row_of
from tests.integration.conftest import SettingsWith, read_topic, wait_until
from tests.integration.workers import now_ms, record, world

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


async def test_an_idle_row_becomes_a_marker_that_holds_its_guard(settings_with: SettingsWith, tmp_path: Path) -> None:
    idle = {"idle_eviction_days": 1.0 / 86_400, "port": 0}
    # An action waits as long as the grace for an impression that may come after it.
    async with world(settings_with, tmp_path, worker=idle, joiner={"grace_seconds": 0}) as made:
        await made.ready_worker()
        click = {"type": "action", "event_id": "e1", "event_time": now_ms(), "user_id": "u1"}
        await made.publish([record({**click, "item_id": "item-1", "action": "click"})])
        await made.wait_committed()

        async def newest() -> bytes | None:
            records = await read_topic(made.settings, made.names.user_table_changelog)
            values = [r.value for r in records if r.key == b"u1"]
            return values[-1] if values else None

        first = await newest()
        assert first is not None
        # Idleness is measured against the newest event: somebody must go on.
        others = iter(range(1_000))

        async def is_marked() -> bool:
            later = {**click, "event_id": f"later-{next(others)}", "event_time": now_ms(), "user_id": "u2"}
            await made.publish([record({**later, "item_id": "item-2", "action": "click"})])
            value = await newest()
            return value is not None and bool(is_marker(decode_rows([row_of(value)]))[0])

        await wait_until(is_marked, 60, "the idle row is a marker", every_seconds=0.5)
        marker = await newest()
        assert marker is not None
        assert guard_of(marker) == guard_of(first)
        assert len(marker) < len(first)

"""On a real broker: every impression has its label exactly once in effect, and silent users have theirs too."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.examples import BY_TIMER, LabelsRecord
from models.user_value import has_block, split_value
from tests.integration.conftest import SettingsWith, read_topic, wait_until
from tests.integration.label_oracle import sent_labels
from tests.integration.oracle import assert_exact
from tests.integration.test_takeover import wait_processing
from tests.integration.traffic import load, traffic
from tests.integration.workers import World, now_ms, record, world

pytestmark = pytest.mark.integration

SHORT_WINDOW: dict[str, Any] = {"user_state": {"attribution_window_seconds": 3}, "joiner": {"grace_seconds": 60}}


def shown(user: str, items: list[str], at_ms: int, request: str | None = None) -> tuple[bytes | None, bytes | None]:
    event: dict[str, Any] = {"type": "impression", "event_id": f"i-{user}-{at_ms}", "user_id": user}
    named = {"request_id": request} if request else {}
    return record(event | named | {"event_time": at_ms, "items": [{"item_id": item} for item in items]})


def clicked(user: str, item: str, at_ms: int) -> tuple[bytes | None, bytes | None]:
    event = {"type": "action", "event_id": f"a-{user}-{item}-{at_ms}", "user_id": user, "event_time": at_ms}
    return record(event | {"item_id": item, "action": "click"})


async def labels_of(on: World, user: str) -> list[LabelsRecord]:
    return [label for label in await sent_labels(on) if label.user_id == user]


def places(label: LabelsRecord) -> list[int]:
    return [int(place) for place in np.frombuffer(label.clicked, "<u2")]


async def test_two_kills_and_a_take_over_under_load_lose_no_label(settings_with: SettingsWith, tmp_path: Path) -> None:
    async with world(settings_with, tmp_path, worker={"commit_interval_seconds": 0.01}) as on:
        first = await on.ready_worker("first")
        async with load(on, seed=1):
            await wait_processing(first)
            first.kill()
            second = await on.ready_worker("second")
            await wait_processing(second)
            third = await on.ready_worker("third")
            await wait_processing(third)
            second.kill()
            await wait_processing(third)
        await assert_exact(on)
        assert len(await sent_labels(on)) > 100, "hardly anything was labelled: the comparison tells nothing"


@pytest.mark.parametrize("cut", ["row-only", "slate-only"])
async def test_a_death_between_a_row_and_the_label_that_it_closed_loses_neither(
    settings_with: SettingsWith, tmp_path: Path, cut: str
) -> None:
    async with world(settings_with, tmp_path) as on:
        long_ago = now_ms() - 10 * 3_600_000
        log = [shown(cut, ["item-1", "item-2"], long_ago), clicked(cut, "item-2", long_ago + 5_000)]
        await on.publish([*traffic(on, 50, 10), *log, clicked(cut, "item-1", now_ms())])
        assert await on.worker("cut-off", "tests.integration.faulty_worker").exit_code() == -signal.SIGKILL
        assert await labels_of(on, cut) == []
        await on.ready_worker("next")
        await assert_exact(on)
        assert places((await labels_of(on, cut))[-1]) == [1]


async def test_a_silent_users_label_comes_from_the_timer_and_a_late_click_corrects_it(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    async with world(settings_with, tmp_path, **SHORT_WINDOW) as on:
        worker = await on.ready_worker()
        start_ms = now_ms()
        await on.publish([shown("silent", ["item-1", "item-2"], start_ms), clicked("silent", "item-1", start_ms + 10)])

        async def labelled(times: int = 1) -> bool:
            return len(await labels_of(on, "silent")) >= times

        await wait_until(labelled, 30, "the timer sends the label")
        (by_timer,) = await labels_of(on, "silent")
        assert (by_timer.flags, by_timer.revision, places(by_timer)) == (BY_TIMER, 0, [0])

        await on.publish([clicked("silent", "item-2", start_ms + 1_000)])
        await wait_until(lambda: labelled(2), 30, "the late click is in the label")
        assert places((await labels_of(on, "silent"))[-1]) == [0, 1]

        await on.publish([clicked("silent", "item-7", now_ms())])
        await assert_exact(on)
        assert len(await labels_of(on, "silent")) == 2, "the user's own log closed it and said the same again"
        assert await worker.metric("millstream_labels_total", kind="timer") == 2
        assert await worker.metric("millstream_labels_known_total") == 1


async def test_a_label_that_a_dead_worker_owed_a_silent_user_comes_from_the_next_one(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    async with world(settings_with, tmp_path, user_state={"attribution_window_seconds": 8}) as on:
        first = await on.ready_worker("first")
        await on.publish([shown("silent", ["item-1"], now_ms())])
        await on.wait_committed()
        first.kill()
        assert await labels_of(on, "silent") == []
        await on.ready_worker("second")

        async def labelled() -> bool:
            return bool(await labels_of(on, "silent"))

        await wait_until(labelled, 40, "the next worker's timer sends the label")
        await assert_exact(on)


async def test_a_click_after_the_grace_is_counted_and_changes_no_label(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    async with world(settings_with, tmp_path) as on:
        worker = await on.ready_worker()
        start_ms = now_ms() - 6 * 3_600_000
        await on.publish([shown("u", ["item-1"], start_ms), clicked("u", "item-9", start_ms + 3 * 3_600_000)])
        await on.wait_committed()
        await on.publish([clicked("u", "item-1", start_ms + 1_000)])
        await assert_exact(on)
        assert [places(label) for label in await labels_of(on, "u")] == [[]]
        assert await worker.metric("millstream_late_actions_total") == 1


async def test_what_was_open_leaves_a_silent_users_value_when_nothing_can_change_it_any_more(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    brief: dict[str, Any] = {"user_state": {"attribution_window_seconds": 2}, "joiner": {"grace_seconds": 1}}
    async with world(settings_with, tmp_path, **brief) as on:
        await on.ready_worker()
        await on.publish([shown("silent", ["item-1"], now_ms())])

        async def newest() -> bytes:
            values = [r.value for r in await read_topic(on.settings, on.names.user_table_changelog)]
            return values[-1] if values else b""

        async def is_kept() -> bool:
            return has_block(await newest())

        await wait_until(is_kept, 20, "the impression is kept behind the row")
        row, _ = split_value(await newest())

        async def is_gone() -> bool:
            return await newest() == row

        await wait_until(is_gone, 60, "the row stands alone again", every_seconds=0.5)
        assert [label.flags for label in await labels_of(on, "silent")] == [BY_TIMER]

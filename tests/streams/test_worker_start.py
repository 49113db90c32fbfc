"""What ends a worker's start, and what does not."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytest_asyncio

from models.errors import BrokerUnavailable, SettingsError
from streams import worker as module
from streams.cpus import KeptCpu
from streams.exit_codes import ExitCode
from streams.faust_patches import LARGE_GAP, DirectConsumer
from streams.settings import Settings
from streams.worker import Worker


@pytest_asyncio.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Worker]:
    made = Worker(Settings.model_validate({"worker": {"data_folder": tmp_path, "port": 0}}), KeptCpu())
    yield made
    made.state.close()


async def _never() -> None:
    await asyncio.Event().wait()


async def test_a_failure_during_the_first_take_over_ends_the_process_with_its_code(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def start() -> None:
        worker.fail(BrokerUnavailable("partitions could not be taken over"), "take-over")
        await _never()

    monkeypatch.setattr(worker, "_start", start)
    assert await asyncio.wait_for(worker.run(), 30) is ExitCode.BROKER


async def test_a_wish_to_stop_during_the_start_is_heard(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    async def start() -> None:
        worker.stopping.set()
        await _never()

    monkeypatch.setattr(worker, "_start", start)
    assert await asyncio.wait_for(worker.run(), 30) is ExitCode.STOPPED


async def test_a_port_that_stays_taken_is_a_setting_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PORT_WAIT_SECONDS", 0.0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        made = Worker(Settings.model_validate({"worker": {"data_folder": tmp_path, "port": port}}), KeptCpu())
        with pytest.raises(SettingsError, match=f"worker.port {port}"):
            await made.run()
        made.state.close()


class _Place(NamedTuple):
    partition: int


class _Gaps:
    """As much of a consumer as ``_add_gap`` uses."""

    def __init__(self, place: _Place) -> None:
        self._acked: dict[_Place, list[int]] = {place: []}
        self._unacked_messages: set[Any] = set()
        self._committed_offset: dict[_Place, int | None] = {place: 1_000}


async def test_a_large_hole_that_retention_left_is_passed_over_at_once() -> None:
    place = _Place(partition=0)
    gaps: Any = _Gaps(place)
    await DirectConsumer._add_gap(gaps, place, 1_000, 1_000 + 50 * LARGE_GAP)
    assert gaps._committed_offset[place] == 1_000 + 50 * LARGE_GAP

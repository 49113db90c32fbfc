"""What is done between two batches: it looks beside the batch on its way, and writes when that has arrived."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from models.joiner import JoinContext, JoinerConfig
from models.user_events import UserStateConfig
from models.user_row import VERSION, decode_rows, empty_rows, encode_rows, is_marker
from streams import maintenance
from streams.delivery import Deliveries
from streams.in_flight import InFlightMark
from streams.label_timer import LabelTimer
from streams.maintenance import Maintenance
from streams.metrics import Metrics
from streams.sender import Outbox
from streams.settings import Settings

DAY_MS = 86_400_000
NOW_MS = 1_000 * DAY_MS
ANN, BEN = b"ann", b"ben"


def row(last_time_ms: int) -> bytes:
    """Return a user's value whose last event was then."""
    rows = empty_rows(1)
    rows["version"], rows["offset"], rows["last_time_ms"] = VERSION, 1, last_time_ms
    return encode_rows(rows)[0]


class Rows:
    """A table of one partition, 0, and what was staged for its changelog."""

    def __init__(self) -> None:
        self.table: dict[bytes, bytes] = {}
        self.partitions = {0}
        self.writes: list[bytes] = []

    def rows_of(self, partition: int) -> dict[bytes, bytes]:
        assert partition in self.partitions
        return self.table

    def get(self, partition: int, key: bytes) -> bytes | None:
        return self.rows_of(partition).get(key)

    def stage(self, outbox: Outbox, partition: int, key: bytes, value: bytes | None) -> None:
        outbox.add("changelog", partition, key, value)

    def put(self, partition: int, key: bytes, value: bytes | None) -> None:
        assert value is not None
        self.rows_of(partition)[key] = value


class Worker:
    """As much of a worker as housekeeping sees, with a delivery that is on its way until it is let go."""

    def __init__(self, folder: Path, held: dict[bytes, bytes]) -> None:
        self.settings = Settings.model_validate(
            {"events": {"clock": {"policy": "trusted"}}, "worker": {"idle_eviction_days": 1.0}}
        )
        self.rows = Rows()
        self.rows.table |= held
        self.deliveries = Deliveries(InFlightMark(folder), self.rows.get, lambda error: None)
        context = JoinContext.of(JoinerConfig(), UserStateConfig(), ["default"])
        self.label_timer = LabelTimer(context)
        self.label_timer.take_over(0, {}, time.monotonic())
        self.metrics = Metrics()
        self.app = SimpleNamespace(consumer_generation_id=1)
        self.owned_generation, self.is_ready, self.epoch = 1, True, 1
        self.handed: dict[int, int] = {}
        self.has_mirror_letters = False
        self.arrived = asyncio.Event()

    def take_mirror_letters(self, most: int) -> list[Any]:
        return []

    async def write(self, outbox: Outbox, generation: int) -> None:
        for records in outbox.records.values():
            self.rows.writes += [key or b"" for key, _, _ in records]

    async def send(self, rows: dict[tuple[int, bytes], bytes]) -> None:
        async def deliver() -> None:
            await self.arrived.wait()
            for (partition, key), value in rows.items():
                self.rows.put(partition, key, value)

        async with self.deliveries.batch([(0, 1)]):
            self.deliveries.start(rows, deliver())


def housekeeping(worker: Worker) -> Maintenance:
    """Return housekeeping that has seen an event of now, and has a pass over all rows before it."""
    made = Maintenance(worker)  # type: ignore[arg-type]
    made.see_times([SimpleNamespace(partition=0, time_ms=NOW_MS, broker_ms=NOW_MS)])  # type: ignore[list-item]
    made._evicted_at -= maintenance.EVICTION_SECONDS + 1
    return made


def is_marked(worker: Worker, key: bytes) -> bool:
    value = worker.rows.get(0, key)
    assert value is not None
    return bool(is_marker(decode_rows([value]))[0])


async def test_where_nothing_is_to_be_written_the_batch_on_its_way_is_not_waited_for(tmp_path: Path) -> None:
    worker = Worker(tmp_path, {BEN: row(NOW_MS)})
    await worker.send({(0, ANN): row(NOW_MS)})
    await asyncio.wait_for(housekeeping(worker).between_batches(is_idle=False), 5)
    assert worker.rows.writes == []


async def test_an_idle_row_is_written_when_the_batch_on_its_way_has_arrived(tmp_path: Path) -> None:
    worker = Worker(tmp_path, {BEN: row(NOW_MS - 2 * DAY_MS)})
    await worker.send({(0, ANN): row(NOW_MS)})
    work = asyncio.create_task(housekeeping(worker).between_batches(is_idle=False))
    for _ in range(10):
        await asyncio.sleep(0)
    assert worker.rows.writes == []
    worker.arrived.set()
    await work
    assert worker.rows.writes == [BEN]
    assert is_marked(worker, BEN)


async def test_a_user_whose_new_row_is_on_its_way_is_not_idle(tmp_path: Path) -> None:
    worker = Worker(tmp_path, {ANN: row(NOW_MS - 2 * DAY_MS)})
    await worker.send({(0, ANN): row(NOW_MS)})
    work = asyncio.create_task(housekeeping(worker).between_batches(is_idle=False))
    worker.arrived.set()
    await work
    await worker.deliveries.settled()
    assert worker.rows.writes == []
    assert not is_marked(worker, ANN)


async def test_a_row_that_another_worker_wrote_between_the_look_and_the_write_stays(tmp_path: Path) -> None:
    worker = Worker(tmp_path, {ANN: row(NOW_MS - 2 * DAY_MS), BEN: row(NOW_MS - 2 * DAY_MS)})
    await worker.send({})
    work = asyncio.create_task(housekeeping(worker).between_batches(is_idle=False))
    for _ in range(10):
        await asyncio.sleep(0)
    # The partition went to another worker and came back.
    worker.rows.table[ANN] = row(NOW_MS)
    worker.arrived.set()
    await work
    assert worker.rows.writes == [BEN]
    assert not is_marked(worker, ANN)


async def test_nothing_is_written_for_a_partition_that_went_between_the_look_and_the_write(tmp_path: Path) -> None:
    worker = Worker(tmp_path, {BEN: row(NOW_MS - 2 * DAY_MS)})
    await worker.send({})
    work = asyncio.create_task(housekeeping(worker).between_batches(is_idle=False))
    for _ in range(10):
        await asyncio.sleep(0)
    worker.rows.partitions = set()
    worker.arrived.set()
    await work
    assert worker.rows.writes == []

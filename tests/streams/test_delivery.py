"""One batch on its way while the next is prepared: what it reads, what the mark says, what a failure does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from streams.delivery import Deliveries
from streams.in_flight import InFlightMark, read_mark

A, B = b"ann", b"ben"


class Bench:
    """Deliveries over a table of rows, each delivery held until it is let go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table: dict[tuple[int, bytes], bytes] = {}
        self.failures: list[BaseException] = []
        self.deliveries = Deliveries(InFlightMark(folder), lambda p, k: self.table.get((p, k)), self.failures.append)
        self.arrived = asyncio.Event()

    async def deliver(self, rows: dict[tuple[int, bytes], bytes], error: Exception | None = None) -> None:
        await self.arrived.wait()
        if error is not None:
            raise error
        self.table.update(rows)

    async def send(self, rows: dict[tuple[int, bytes], bytes], offset: int, error: Exception | None = None) -> None:
        async with self.deliveries.batch([(0, offset)]):
            self.deliveries.start(rows, self.deliver(rows, error))


async def test_the_next_batch_reads_the_rows_that_are_on_their_way_and_those_of_the_table(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.table |= {(0, A): b"old", (0, B): b"of ben"}
    await bench.send({(0, A): b"new"}, 1)
    assert [bench.deliveries.row(0, key) for key in (A, B)] == [b"new", b"of ben"]
    assert bench.table[0, A] == b"old"
    bench.arrived.set()
    await bench.deliveries.settled()
    assert bench.deliveries.row(0, A) == bench.table[0, A] == b"new"


async def test_rows_of_another_partition_are_not_mistaken_for_those_on_their_way(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.send({(0, A): b"new"}, 1)
    assert bench.deliveries.row(1, A) is None


async def test_the_mark_names_what_is_on_its_way_and_what_is_prepared_until_each_has_arrived(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.send({}, 3)
    async with bench.deliveries.batch([(1, 7), (0, 9)]):
        assert read_mark(tmp_path) == [(0, 3, 9), (1, 7, 7)]
        bench.arrived.set()
        await bench.deliveries.settled()
        assert read_mark(tmp_path) == [(1, 7, 7), (0, 9, 9)]
        bench.deliveries.start({}, bench.deliver({}))
    await bench.deliveries.settled()
    assert read_mark(tmp_path) == []


async def test_a_change_between_batches_waits_for_the_one_in_work_to_arrive_and_holds_the_next_back(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path)
    told: list[str] = []
    prepared = asyncio.Event()

    async def deliver(name: str, arrived: asyncio.Event) -> None:
        await arrived.wait()
        told.append(f"{name} arrived")

    async def batch(name: str, arrived: asyncio.Event) -> None:
        async with bench.deliveries.batch([(0, 1)]):
            told.append(f"{name} prepared")
            prepared.set()
            await bench.deliveries.settled()
            bench.deliveries.start({}, deliver(name, arrived))

    async def change() -> None:
        async with bench.deliveries.between_batches():
            told.append("changed")

    first, second, third = (asyncio.Event() for _ in range(3))
    await batch("first", first)
    prepared.clear()
    work = [asyncio.create_task(batch("second", second))]
    await prepared.wait()
    work += [asyncio.create_task(change()), asyncio.create_task(batch("third", third))]
    for event in (first, second, third):
        for _ in range(10):
            await asyncio.sleep(0)
        event.set()
    await asyncio.gather(*work)
    await bench.deliveries.settled()
    assert told == [
        *("first prepared", "second prepared", "first arrived", "second arrived"),
        *("changed", "third prepared", "third arrived"),
    ]


async def test_nothing_is_sent_before_what_was_sent_before_it_has_arrived(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.send({(0, A): b"new"}, 1)
    with pytest.raises(RuntimeError, match="still on its way"):
        await bench.send({(0, A): b"newer"}, 2)
    assert bench.deliveries.row(0, A) == b"new"


async def test_a_failed_delivery_is_told_at_once_and_to_whoever_waits_and_leaves_rows_and_mark(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    error = ConnectionError("the broker is gone")
    await bench.send({(0, A): b"new"}, 1, error)
    bench.arrived.set()
    for _ in range(2):
        with pytest.raises(ConnectionError, match="gone"):
            await bench.deliveries.settled()
    assert bench.failures == [error]
    assert bench.table == {}
    assert read_mark(tmp_path) == [(0, 1, 1)]


async def test_a_waiter_that_is_cancelled_does_not_stop_what_is_on_its_way(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.send({(0, A): b"new"}, 1)
    waiter = asyncio.create_task(bench.deliveries.settled())
    await asyncio.sleep(0)
    waiter.cancel()
    await asyncio.gather(waiter, return_exceptions=True)
    bench.arrived.set()
    await bench.deliveries.settled()
    assert bench.table == {(0, A): b"new"}

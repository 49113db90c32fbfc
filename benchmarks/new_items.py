"""A new item: from its record on ``items`` to the first slate that holds it, and how fast many at once are encoded.

The probe is a user whose taste is the item's vector, known here beforehand: from the item's record on, a request every
PROBE_SECONDS until a slate holds the item, found by the vector index for the user's taste (the newest items are also
among the popular ones: that does not count). The slate's broker time is the end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from benchmarks.processes import BenchmarkError, WorkerProcess
from benchmarks.results import CpuAccount, Figure, percentile
from benchmarks.stage import Bench, Stage, stage
from benchmarks.world import Keyed
from models.candidates import SOURCES
from models.encoder import TextEncoder, item_text
from models.events import Item, Recommendation
from models.ranking import SHORT_TERM
from streams.topic_io import open_topic

ITEMS_A_SECOND: Final = 10
PROBE_SECONDS: Final = 0.2
LIMIT_SECONDS: Final = 30.0
BULK_LIMIT_SECONDS: Final = 900.0
SEARCHABLE_SECONDS: Final = 3.0


async def run(bench: Bench) -> None:
    """Measure single items at ITEMS_A_SECOND, then a bulk load."""
    account = CpuAccount()
    items = bench.world.new_items(bench.sizes.new_items, "probe")
    # Slates of randomised users are drawn: theirs would time the draw, not the item.
    async with stage(bench, "new-items", exploration={"randomised_share": 0.0}) as made:
        await _publish_probe_rows(made, items)
        worker = await made.worker()
        await made.encoder(worker)
        await _singles(made, worker, items)
        await _bulk(made, worker)
    bench.report.beside["new items"] = account.describe()


async def _publish_probe_rows(made: Stage, items: Sequence[Item]) -> None:
    world = made.bench.world
    encoder = TextEncoder.load(made.settings.encoder)
    vectors = world.space.vectors(encoder.encode([item_text(item) for item in items]))
    rows = [
        Keyed(f"user-of-{item.item_id}".encode(), world.probe_row(vector, made.epoch))
        for item, vector in zip(items, vectors, strict=True)
    ]
    await made.send(made.names.user_table_changelog, rows)


async def _singles(made: Stage, worker: WorkerProcess, items: Sequence[Item]) -> None:
    seen: dict[str, asyncio.Future[int]] = {}
    watching = asyncio.create_task(_watch(made, seen))
    worker.start_profile()
    try:
        tasks = []
        started = time.perf_counter()
        for n, item in enumerate(items):
            await asyncio.sleep(max(0.0, started + n / ITEMS_A_SECOND - time.perf_counter()))
            tasks.append(asyncio.create_task(_searchable_ms(made, item, seen)))
        found = await asyncio.gather(*tasks)
    finally:
        watching.cancel()
    profile = await worker.end_profile()
    if profile:
        made.bench.report.profiles["new item searchable"] = profile
    seconds = [ms / 1e3 for ms in found if ms is not None]
    missing = len(items) - len(seconds)
    worst = max(seconds, default=LIMIT_SECONDS) if not missing else LIMIT_SECONDS
    note = (
        f"p50 {percentile(seconds, 0.5):.2f} s of {len(items)} items at {ITEMS_A_SECOND}/s on one worker, {missing} "
        f"not within {LIMIT_SECONDS:.0f} s; asked every {PROBE_SECONDS} s"
    )
    made.bench.report.figures.append(
        Figure("new item searchable, slowest", worst, "s", at_most=SEARCHABLE_SECONDS, note=note)
    )


async def _searchable_ms(made: Stage, item: Item, seen: dict[str, asyncio.Future[int]]) -> int | None:
    """Publish one item and ask for slates until one holds it; None where none does in time."""
    user_id = f"user-of-{item.item_id}"
    found = seen[user_id] = asyncio.get_running_loop().create_future()
    published_ms = time.time_ns() // 1_000_000
    await made.publish_items([(item.item_id, item)])
    deadline = time.monotonic() + LIMIT_SECONDS
    while not found.done() and time.monotonic() < deadline:
        now_ms = time.time_ns() // 1_000_000
        await made.send(made.names.events, [made.bench.world.request(user_id, now_ms)])
        await asyncio.wait([found], timeout=PROBE_SECONDS)
    return found.result() - published_ms if found.done() else None


async def _watch(made: Stage, seen: dict[str, asyncio.Future[int]]) -> None:
    """Resolve the future of each user whose slate holds the item that is theirs, with the slate's broker time in ms."""
    decoder = msgspec.json.Decoder(Recommendation)
    async with open_topic(made.settings, made.names.recommendations) as tail:
        async for record in tail.read(await tail.end_offsets()):
            slate = decoder.decode(record.value)
            waiting = seen.get(slate.user_id)
            if waiting is None or waiting.done():
                continue
            wanted = slate.user_id.removeprefix("user-of-")
            if any(item.item_id == wanted and item.source == SOURCES[SHORT_TERM] for item in slate.items):
                waiting.set_result(record.timestamp)


async def _bulk(made: Stage, worker: WorkerProcess) -> None:
    """Publish many items at once and see when the index holds them."""
    items = made.bench.world.new_items(made.bench.sizes.bulk_items, "bulk")
    before = await worker.metric("millstream_index_items")
    started = time.perf_counter()
    await made.publish_items([(item.item_id, item) for item in items])
    while await worker.metric("millstream_index_items") < before + len(items):
        if worker.process.poll() is not None or time.perf_counter() - started > BULK_LIMIT_SECONDS:
            raise BenchmarkError(f"{len(items)} new items were not all indexed:\n{worker.tail()}")
        await asyncio.sleep(0.2)
    rate = len(items) / (time.perf_counter() - started)
    words = sum(len(item_text(item).split()) for item in items) / len(items)
    note = f"{len(items):,} texts of {words:.0f} words at once, to the index; nothing else to do for the worker"
    made.bench.report.figures.append(Figure("new items, bulk load", rate, "items/s", note=note))

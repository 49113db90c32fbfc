"""Speed of the item counters on one core, and how often the cap's sketch refuses wrongly.

Run: ``OMP_NUM_THREADS=1 python -m benchmarks.counters``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from models.counters import CLICKS, CountersConfig, ItemCounters, TouchBatch
from models.events import Action, Event, ImpressedItem, Impression
from models.hashing import hash64
from models.item_index import ItemIndex
from models.partition_counters import CELLS, Absolute, Int64, mix
from streams.decode import decode
from streams.item_stats import count, decode_item, encode_items
from streams.settings import EventSettings

START_MS = 1_700_000_000_000
ITEMS = 50_000
USERS = 20_000
BATCH = 256
PARTITIONS = 12
BATCHES = 40
ROUNDS = 30


def world() -> ItemCounters:
    """Return counters over a catalogue whose every item has counts in every partition."""
    index = ItemIndex()
    counters = ItemCounters(index, CountersConfig())
    rows = np.array([index.add(f"item-{i}") for i in range(ITEMS)], np.int32)
    rng = np.random.default_rng(1)
    for partition in range(PARTITIONS):
        totals = rng.integers(1, 1_000, (ITEMS, 3))
        values = np.repeat(np.pad(totals, ((0, 0), (0, 1)))[:, None, :] / 10.0, 4, axis=1)
        last = np.full(ITEMS, -1, np.int64)
        times = np.full(ITEMS, START_MS)
        counters.replace(partition, Absolute(rows, values, totals, last, times, times))
        counters.own(partition)
    return counters


def impressions(rng: np.random.Generator, count: int) -> list[Event]:
    """Return impressions of 15 items."""
    return [
        Impression(
            event_id=f"i{i}",
            event_time=START_MS,
            user_id=f"user-{rng.integers(USERS)}",
            items=[ImpressedItem(item_id=f"item-{item}") for item in rng.integers(0, ITEMS, 15)],
        )
        for i in range(count)
    ]


def clicks(rng: np.random.Generator, count: int) -> list[Event]:
    """Return clicks, each of which is two touches."""
    return [
        Action(
            event_id=f"c{i}",
            event_time=START_MS,
            user_id=f"user-{rng.integers(USERS)}",
            item_id=f"item-{rng.integers(ITEMS)}",
            action="click",
        )
        for i in range(count)
    ]


def add_seconds(counters: ItemCounters, events: list[Event]) -> float:
    """Return the median seconds per event over batches of one partition, hashes known as behind the user's row."""
    offset = counters.next_offset(0)
    taken = []
    for begin in range(0, len(events), BATCH):
        part = events[begin : begin + BATCH]
        for event in part:
            hash64(event.event_id)
            hash64(event.user_id)
        started = time.perf_counter()
        batch = TouchBatch()
        for event in part:
            batch.add_event(event, offset, START_MS + offset * 8, counters.config)
            offset += 1
        counters.add(0, batch)
        taken.append((time.perf_counter() - started) / len(part))
    return statistics.median(taken)


def call_seconds(function: Callable[[], object]) -> float:
    """Return the median seconds of one call."""
    taken = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def wrongly_refused(keys: int, cap: int) -> list[float]:
    """Return the share of first, second, … counts that a window with ``keys`` counts refuses without cause.

    A window is filled by the sketch's own rule; then users that are new to it touch an item ``cap`` times.
    """
    rng = np.random.default_rng(2)
    row_a, row_b = bytearray(CELLS), bytearray(CELLS)

    def cells(count: int) -> list[tuple[int, int]]:
        mixed: Int64 = mix(rng.integers(0, 2**63, count).astype(np.uint64)).astype(np.int64)
        return list(zip((mixed & (CELLS - 1)).tolist(), ((mixed >> 32) & (CELLS - 1)).tolist(), strict=True))

    for a, b in cells(keys):
        least = min(row_a[a], row_b[b])
        if least < cap:
            row_a[a], row_b[b] = max(row_a[a], least + 1), max(row_b[b], least + 1)
    probes = [min(row_a[a], row_b[b]) for a, b in cells(1_000_000)]
    # The n-th count of a key is refused where other keys have already raised both of its cells so far.
    return [sum(least + before >= cap for least in probes) / len(probes) for before in range(cap)]


@dataclass(slots=True)
class Read:
    """A record of ``events`` as recovery reads it."""

    topic: str
    partition: int
    offset: int
    timestamp: float
    key: bytes | None
    value: bytes | None
    headers: Any


def recount_seconds(counters: ItemCounters, events: list[Event]) -> float:
    """Return the seconds per event of recovery without Kafka: decode, check, count."""
    first = counters.next_offset(0)
    records = [
        Read("events", 0, first + i, START_MS / 1000, e.user_id.encode(), msgspec.json.encode(e), ())
        for i, e in enumerate(events)
    ]
    settings = EventSettings()
    started = time.perf_counter()
    for begin in range(0, len(records), 500):
        count(counters, [decode(r, settings, 1, is_known=False) for r in records[begin : begin + 500]])
    return (time.perf_counter() - started) / len(records)


def main() -> None:
    """Measure and print."""
    rng = np.random.default_rng(0)
    counters = world()
    shown, clicked = impressions(rng, BATCH * BATCHES), clicks(rng, BATCH * BATCHES)
    add_seconds(counters, impressions(rng, BATCH * 4))
    print(f"impression of 15 items:       {add_seconds(counters, shown) * 1e6:8.1f} µs   (target ≤ 100)")
    print(f"click (two touches):          {add_seconds(counters, clicked) * 1e6:8.1f} µs   (target ≤ 8)")
    rows = rng.integers(0, ITEMS, (64, 200)).astype(np.int32)
    now_ms = START_MS + 3_600_000
    read_ms = call_seconds(lambda: counters.read(rows, now_ms)) * 1e3
    print(f"read 64×200 rows:             {read_ms:8.2f} ms   (target ≤ 2)")
    print(f"smoothed CTR of 64×200 rows:  {call_seconds(lambda: counters.smoothed_ctr(rows, now_ms, 1)) * 1e3:8.2f} ms")
    print(
        f"top 500 of {ITEMS:,} items:      {call_seconds(lambda: counters.top(500, now_ms, 1, CLICKS)) * 1e3:8.2f} ms"
    )
    again = impressions(np.random.default_rng(9), 10_000)
    print(f"impression read again (JSON): {recount_seconds(counters, again) * 1e6:8.1f} µs")
    slots = counters.dirty(0)[0][:2_000]
    state = counters.take_dirty(0, slots)
    encode = call_seconds(lambda: encode_items(counters.index, state, 1, 1)) / len(slots)
    records = encode_items(counters.index, state, 1, 1)
    decode = call_seconds(lambda: [decode_item(value) for _, value in records]) / len(slots)
    print(f"encode / decode one record:   {encode * 1e6:8.1f} / {decode * 1e6:.1f} µs, {len(records[0][1])} bytes")
    partition_bytes = sum(a.nbytes for a in vars(counters._partition(0)).values() if isinstance(a, np.ndarray))
    print(f"one partition, {ITEMS:,} items:  {partition_bytes / 2**20:8.1f} MiB and {2 * CELLS / 2**20:.0f} MiB of cap")
    for keys in (10_000, counters.config.user_window_max_touches):
        shares = ", ".join(f"{share:.1e}" for share in wrongly_refused(keys, counters.config.user_cap))
        print(f"wrongly capped, window of {keys:,} counts, 1st, 2nd, 3rd count: {shares}")


if __name__ == "__main__":
    main()

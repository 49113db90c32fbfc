"""What the machine and Faust give before any work is done: a bare consumer and a no-op agent, each its own process.

    python -m benchmarks.baselines bare|each|take|each-asyncio EVENTS

with the settings that MILLSTREAM_CONFIG names; prints one JSON line.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any, Final

import faust
import uvloop

from benchmarks.processes import Child
from benchmarks.results import BARE, FAUST, CpuAccount, Figure
from benchmarks.stage import Bench, stage
from streams.kafka_clients import bootstrap_servers, new_consumer
from streams.settings import Settings, load
from streams.topics import TopicNames

TAKE: Final = 100
TAKE_SECONDS: Final = 0.005
LIMIT_SECONDS: Final = 300.0
KINDS: Final = {
    "bare": BARE,
    "each": FAUST,
    "take": f"no-op Faust agent, take({TAKE}), uvloop",
    "each-asyncio": "no-op Faust agent, async for, asyncio",
}


async def run(bench: Bench) -> None:
    """Measure all baselines on one topic of clicks."""
    sizes = bench.sizes
    account = CpuAccount()
    async with stage(bench, "baselines") as made:
        now_ms = time.time_ns() // 1_000_000
        clicks = [bench.world.click(i % sizes.users, now_ms) for i in range(sizes.baseline_events)]
        await made.send(made.names.events, clicks)
        mean_bytes = sum(len(c.value) for c in clicks) / len(clicks)
        for kind, name in KINDS.items():
            events = sizes.baseline_events if kind == "bare" else sizes.faust_events
            child = Child(f"baseline-{kind}", ["benchmarks.baselines", kind, str(events)], made.settings, made.folder)
            made.children.append(child)
            line = await child.wait_logged("measured", LIMIT_SECONDS)
            child.stop()
            note = f"{line['events']:,} clicks of {mean_bytes:.0f} bytes on 12 partitions"
            bench.report.figures.append(Figure(name, line["events"] / line["seconds"], "events/s", note=note))
    bench.report.beside["baselines"] = account.describe()


async def consume_bare(settings: Settings, wanted: int) -> tuple[int, float]:
    """Read events with ``getmany``; returns how many and the seconds that they took."""
    consumer = new_consumer(settings, TopicNames.of(settings).events)
    await consumer.start()
    seen, started = 0, time.perf_counter()
    try:
        while seen < wanted:
            batches = await consumer.getmany(timeout_ms=1_000)
            seen += sum(map(len, batches.values()))
        return seen, time.perf_counter() - started
    finally:
        await consumer.stop()


async def consume_faust(settings: Settings, wanted: int, *, take: bool) -> tuple[int, float]:
    """Read events with an agent that does nothing; returns how many and the seconds since the first."""
    app: Any = faust.App(
        f"noop-{'take' if take else 'each'}-{os.getpid()}",
        broker="kafka://" + bootstrap_servers(settings).replace(",", ";"),
        store="memory://",
        consumer_auto_offset_reset="earliest",
        broker_commit_interval=1.0,
        broker_commit_every=1_000,
        broker_max_poll_records=500,
        stream_buffer_maxsize=2_048,
        topic_disable_leader=True,
        topic_allow_declare=False,
        key_serializer="raw",
        value_serializer="raw",
        web_enabled=False,
    )
    name = TopicNames.of(settings).events
    topic = app.topic(name, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")
    done = asyncio.Event()
    seen, started = 0, 0.0

    def count(n: int) -> None:
        nonlocal seen, started
        started = started or time.perf_counter()
        seen += n
        if seen >= wanted:
            done.set()

    async def each(stream: Any) -> None:
        async for _ in stream:
            count(1)

    async def taken(stream: Any) -> None:
        async for values in stream.take(TAKE, within=TAKE_SECONDS):
            count(len(values))

    app.agent(topic, concurrency=1, name="noop")(taken if take else each)
    await app.start()
    await done.wait()
    return seen, time.perf_counter() - started


async def _measure(kind: str, wanted: int) -> None:
    settings = load()
    if kind == "bare":
        events, seconds = await consume_bare(settings, wanted)
    else:
        events, seconds = await consume_faust(settings, wanted, take=kind == "take")
    print(json.dumps({"event": "measured", "events": events, "seconds": seconds}), flush=True)
    # Faust's threads would hold the process for as long as its session.
    os._exit(0)


def main() -> None:
    """Measure one baseline."""
    kind, wanted = sys.argv[1], int(sys.argv[2])
    if kind not in KINDS:
        raise SystemExit(f"{kind!r} is none of {', '.join(KINDS)}")
    (asyncio.run if kind == "each-asyncio" else uvloop.run)(_measure(kind, wanted))


if __name__ == "__main__":
    main()

"""Freshness: from an event's broker time to that of the slate that it caused, at 100 evenly spaced events a second.

Both times are LogAppendTime, so they come from one clock and need no trust in the worker, at a resolution of 1 ms. The
worker's own histogram ends later, at the broker's acknowledgement of the slate, and is printed beside it.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Final

import msgspec

from benchmarks.processes import WorkerProcess
from benchmarks.results import CpuAccount, Figure, percentile
from benchmarks.stage import DEFAULTS, Bench, Setup, Stage, stage
from benchmarks.world import Keyed
from models.events import Recommendation

EVENTS_A_SECOND: Final = 100
ITEMS_A_SECOND: Final = 10
LAST_SLATES_SECONDS: Final = 5.0
P50_MS: Final = 15.0
P99_MS: Final = 60.0


async def run(bench: Bench, setup: Setup = DEFAULTS) -> None:
    """Measure alone, then with the encoder process encoding new items beside it."""
    for with_encoding in (False, True):
        name = "freshness-encoding" if with_encoding else "freshness"
        account = CpuAccount()
        async with stage(bench, name, users=bench.sizes.users, setup=setup) as made:
            worker = await made.worker()
            if with_encoding:
                await made.encoder(worker)
            await _measure(made, worker, with_encoding)
        bench.report.beside[name + setup.title] = account.describe()


async def _measure(made: Stage, worker: WorkerProcess, with_encoding: bool) -> None:
    sizes = made.bench.sizes
    await _drive(made, sizes.warm_up_seconds, with_encoding)
    before = await worker.buckets("millstream_freshness_seconds")
    begun_ms = time.time_ns() // 1_000_000
    worker.start_profile()
    lateness_ms = await _drive(made, sizes.freshness_seconds, with_encoding)
    await asyncio.sleep(LAST_SLATES_SECONDS)
    profile = await worker.end_profile()
    after = await worker.buckets("millstream_freshness_seconds")
    triggers, times_ms = await times_of(made, begun_ms)
    beside = f", {ITEMS_A_SECOND} new items/s encoded" if with_encoding else ""
    title = f"freshness at {EVENTS_A_SECOND} events/s{beside}{made.setup.title}"
    if profile:
        made.bench.report.profiles[title] = profile
    own = [(bound, late - early) for (bound, late), (_, early) in zip(after, before, strict=True)]
    note = (
        f"max {max(times_ms, default=0)} ms; {len(times_ms):,} slates, {triggers - len(times_ms)} missing; "
        f"worker's own: p50 ≤ {_bound(own, 0.5):.0f}, p99 ≤ {_bound(own, 0.99):.0f} ms; "
        f"load up to {max(lateness_ms):.0f} ms late"
    )
    figures = made.bench.report.figures
    details = {"slates": len(times_ms), "triggers": triggers, "max_ms": max(times_ms, default=0)}
    figures.append(Figure(f"{title}, p50", percentile(times_ms, 0.5), "ms", at_most=P50_MS, details=details))
    figures.append(Figure(f"{title}, p99", percentile(times_ms, 0.99), "ms", at_most=P99_MS, note=note))


async def _drive(made: Stage, seconds: float, with_encoding: bool) -> list[float]:
    """Send events, and items if asked, evenly; returns how late each event was sent, in ms."""
    if not with_encoding:
        return await send_events(made, seconds)
    lateness_ms, _ = await asyncio.gather(send_events(made, seconds), _send_items(made, seconds))
    return lateness_ms


async def send_events(made: Stage, seconds: float, until: asyncio.Task[None] | None = None) -> list[float]:
    """Send events for ``seconds``, or until a task is done: of ten, eight clicks, a request, an impression.

    Returns how late each was sent, in ms; what the task raised is raised.
    """
    world = made.bench.world
    users = made.bench.sizes.users
    started = time.perf_counter()
    lateness_ms: list[float] = []
    sending: set[asyncio.Task[object]] = set()
    for n in itertools.count():
        if n >= seconds * EVENTS_A_SECOND or (until is not None and until.done()):
            break
        due = started + n / EVENTS_A_SECOND
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        lateness_ms.append((time.perf_counter() - due) * 1e3)
        now_ms = time.time_ns() // 1_000_000
        user = (n * 7_919) % users
        record: Keyed
        if n % 10 == 0:
            record = world.impression(user, now_ms)
        elif n % 10 == 5:
            record = world.request(f"user-{user}", now_ms)
        else:
            record = world.click(user, now_ms)
        task: asyncio.Task[object] = asyncio.create_task(made.send(made.names.events, [record]))
        sending.add(task)
        task.add_done_callback(sending.discard)
    await asyncio.gather(*sending)
    if until is not None:
        await until
    return lateness_ms


async def _send_items(made: Stage, seconds: float) -> None:
    started = time.perf_counter()
    prefix = f"new-{time.time_ns()}"
    items = made.bench.world.new_items(int(seconds * ITEMS_A_SECOND), prefix)
    for n, item in enumerate(items):
        await asyncio.sleep(max(0.0, started + n / ITEMS_A_SECOND - time.perf_counter()))
        await made.publish_items([(item.item_id, item)])


async def times_of(made: Stage, begun_ms: int) -> tuple[int, list[int]]:
    """Return the number of triggers since ``begun_ms``, and slate time − trigger time of each slate, in ms."""
    triggers, timed = await timed_slates(made, begun_ms)
    return len(triggers), [took_ms for _, took_ms in timed]


async def timed_slates(made: Stage, begun_ms: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the time of each trigger since ``begun_ms``, and of each slate its trigger's time and its own after it."""
    triggers = {
        (r.partition, r.offset): r.timestamp
        for r in await made.records(made.names.events)
        if r.timestamp >= begun_ms and b'"impression"' not in r.value
    }
    decoder = msgspec.json.Decoder(Recommendation)
    times: dict[tuple[int, int], tuple[int, int]] = {}
    for record in await made.records(made.names.recommendations):
        trigger = decoder.decode(record.value).trigger
        place = (trigger.partition, trigger.offset)
        if place in triggers:
            times.setdefault(place, (triggers[place], record.timestamp - triggers[place]))
    return list(triggers.values()), list(times.values())


def _bound(buckets: list[tuple[float, float]], share: float) -> float:
    """Return the upper bound of the bucket in which ``share`` of the observations is reached, in ms."""
    total = buckets[-1][1] if buckets else 0.0
    return next((bound * 1e3 for bound, count in buckets if count >= share * total), float("inf"))

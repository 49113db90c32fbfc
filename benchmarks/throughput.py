"""How many events a worker takes that has a backlog: clicks that bring slates, clicks without, impressions.

The backlog is written in one go while the worker, ready and its graph of items built, is held by SIGSTOP: so it is a
backlog in whole, and its writing takes nothing from the worker. Slates are counted on their topic, by broker time.
What sends nothing outside is counted by the worker's metrics, which rise only when the broker has acknowledged the
rows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from benchmarks.processes import BenchmarkError, WorkerProcess
from benchmarks.results import CpuAccount, Figure
from benchmarks.stage import DEFAULTS, Bench, Setup, Stage, stage
from benchmarks.world import SLATE, Keyed
from models.user_value import row_of

POLL_SECONDS: Final = 0.25
LIMIT_SECONDS: Final = 600.0
WARM_UP_EVENTS: Final = 500
ACTIONS_A_SECOND: Final = 6_000
IMPRESSIONS_A_SECOND: Final = 1_500
ROW_BYTES: Final = 1_024
SILENT_AGE_SECONDS: Final = 1.0
"""Greatest age of a trigger where no slates are wanted: the backlog is older when the worker sees it."""


async def slates(bench: Bench, setup: Setup = DEFAULTS) -> None:
    """Clicks of many users, each of which brings a slate: 200 candidates, 20 shown."""
    sizes = bench.sizes
    account = CpuAccount()
    async with stage(bench, "slates", users=sizes.users, setup=setup) as made:
        worker = await made.worker()
        await _warm_up(made, worker)
        clicks = _clicks(bench, sizes.slates)
        begun_ms = time.time_ns() // 1_000_000
        profile, used_seconds = await _take_in(made, worker, clicks, "action")
        sent = [r for r in await made.records(made.names.recommendations) if r.timestamp >= begun_ms]
        first, last = min(r.timestamp for r in sent), max(r.timestamp for r in sent)
        rate = (len(sent) - 1) / max(last - first, 1) * 1e3
        mean_bytes = sum(len(r.value) for r in sent) / len(sent)
        note = (
            f"{len(sent):,} slates for {len(clicks):,} clicks of {sizes.users:,} users, {sizes.items:,} items; "
            f"a slate has {mean_bytes:.0f} bytes; {_processor_time(used_seconds, len(sent), 'a slate')}; "
            f"{await _stages(worker)}"
        )
        name = f"refreshed slates{setup.title}"
        figure = Figure(name, rate, "slates/s", at_least=setup.slates_a_second, note=note, is_event_rate=True)
        await _finish(made, worker, figure, profile)
    bench.report.beside["slates" + setup.title] = account.describe()


async def actions(bench: Bench, setup: Setup = DEFAULTS) -> None:
    """Clicks that change rows and counters and are too old for a slate."""
    silent = {"max_trigger_age_seconds": SILENT_AGE_SECONDS}
    account = CpuAccount()
    async with stage(bench, "actions", users=bench.sizes.users, setup=setup, worker=silent) as made:
        worker = await made.worker()
        await rate(made, worker, _clicks(bench, bench.sizes.actions), "action", f"actions without a slate{setup.title}")
    bench.report.beside["actions" + setup.title] = account.describe()


async def impressions(bench: Bench, setup: Setup = DEFAULTS) -> None:
    """Impressions of 15 items."""
    sizes = bench.sizes
    account = CpuAccount()
    async with stage(bench, "impressions", users=sizes.users, setup=setup) as made:
        worker = await made.worker()
        now_ms = time.time_ns() // 1_000_000
        shown = [bench.world.impression(_user(i, sizes.users), now_ms) for i in range(sizes.impressions)]
        await rate(made, worker, shown, "impression", f"impressions of {SLATE} items{setup.title}")
    bench.report.beside["impressions" + setup.title] = account.describe()


def _user(n: int, users: int) -> int:
    # A prime step: neighbours in the log are different users of different topics.
    return (n * 7_919) % users


def _clicks(bench: Bench, n: int) -> list[Keyed]:
    now_ms = time.time_ns() // 1_000_000
    return [bench.world.click(_user(i, bench.sizes.users), now_ms) for i in range(n)]


async def _warm_up(made: Stage, worker: WorkerProcess) -> None:
    """Have counters and code warm: impressions for the popular list, then some slates."""
    now_ms = time.time_ns() // 1_000_000
    users = made.bench.sizes.users
    shown = [made.bench.world.impression(_user(i, users), now_ms) for i in range(WARM_UP_EVENTS)]
    await made.send(made.names.events, shown)
    await made.send(made.names.events, _clicks(made.bench, WARM_UP_EVENTS))
    await _until(worker, WARM_UP_EVENTS, "action", [(time.perf_counter(), 0.0)])


async def rate(
    made: Stage, worker: WorkerProcess, records: Sequence[Keyed], kind: str, name: str, counted: int | None = None
) -> None:
    """Measure events of a kind per second by the worker's counter, from its first reading above zero to its last.

    ``counted``: how many of ``records`` are of that kind; default: all.
    """
    counted = len(records) if counted is None else counted
    target = {"action": ACTIONS_A_SECOND, "impression": IMPRESSIONS_A_SECOND}[kind]
    before = await worker.metric("millstream_slates_total")
    readings: list[tuple[float, float]] = []
    profile, used_seconds = await _take_in(made, worker, records, kind, readings, counted)
    base = readings[0][1]
    moving = [(at, count) for at, count in readings if base < count < base + counted]
    if len(moving) < 2:
        raise BenchmarkError(f"{name}: over before it was read twice; take more than {counted} events")
    per_second = (moving[-1][1] - moving[0][1]) / (moving[-1][0] - moving[0][0])
    slates_sent = await worker.metric("millstream_slates_total") - before
    note = (
        f"{len(records):,} events, {slates_sent:.0f} slates; "
        f"{_processor_time(used_seconds, len(records), 'an event')}; {await _stages(worker)}"
    )
    figure = Figure(name, per_second, "events/s", at_least=target, note=note, is_event_rate=True)
    await _finish(made, worker, figure, profile)


async def _take_in(
    made: Stage,
    worker: WorkerProcess,
    records: Sequence[Keyed],
    kind: str,
    readings: list[tuple[float, float]] | None = None,
    counted: int | None = None,
) -> tuple[str, float]:
    """Write the backlog and return when the worker has acknowledged it.

    Returns the profile, "" without one, and the processor seconds that the worker used.
    ``readings`` gets (time, events done so far), the first one from before.
    """
    before = await worker.metric("millstream_events_total", type=kind)
    used_seconds = -await worker.metric("process_cpu_seconds_total")
    readings = [] if readings is None else readings
    readings.append((time.perf_counter(), before))
    with worker.paused():
        await made.send(made.names.events, records)
        await asyncio.sleep(2 * SILENT_AGE_SECONDS)
        worker.start_profile()
    await _until(worker, int(before) + (counted or len(records)), kind, readings)
    used_seconds += await worker.metric("process_cpu_seconds_total")
    return await worker.end_profile(), used_seconds


def _processor_time(seconds: float, n: int, what: str) -> str:
    """Return the processor time of one slate or event: what a busy machine stretches least."""
    return f"{seconds / max(n, 1) * 1e6:.0f} µs of the worker's processor time {what}"


async def _until(worker: WorkerProcess, wanted: int, kind: str, readings: list[tuple[float, float]]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while readings[-1][1] < wanted:
        if worker.process.poll() is not None or time.monotonic() > deadline:
            raise BenchmarkError(f"the worker did not take {wanted} events in:\n{worker.tail()}")
        await asyncio.sleep(POLL_SECONDS)
        count = await worker.metric("millstream_events_total", type=kind)
        readings.append((time.perf_counter(), count))


async def _stages(worker: WorkerProcess) -> str:
    """Return where a micro-batch's time goes, by the worker's histograms since its start."""
    parts = []
    for name in ("decode", "update", "features", "retrieve", "rank", "send"):
        seconds = await worker.metric("millstream_stage_seconds_sum", stage=name)
        batches = await worker.metric("millstream_stage_seconds_count", stage=name)
        if batches:
            parts.append(f"{name} {seconds / batches * 1e3:.1f}")
    events = await worker.metric("millstream_batch_events_sum")
    batches = await worker.metric("millstream_batch_events_count")
    return f"ms a batch of {events / max(batches, 1):.0f}: {', '.join(parts)}"


async def _finish(made: Stage, worker: WorkerProcess, figure: Figure, profile: str) -> None:
    """Add the figure, the bytes of the rows that it left, and the profile."""
    report = made.bench.report
    figure.note += f"; RSS {worker.rss_bytes() / 2**20:.0f} MiB"
    report.figures.append(figure)
    values = {r.key: r.value for r in await made.records(made.names.user_table_changelog) if r.value}
    rows = {key: len(row_of(value) or b"") for key, value in values.items()}
    beside = (sum(map(len, values.values())) - sum(rows.values())) / len(rows)
    note = (
        f"mean {sum(rows.values()) / len(rows):.0f} bytes of {len(rows):,} rows; for labels that are open, "
        f"{beside:.0f} beside each"
    )
    report.figures.append(
        Figure(f"user row after {figure.name}, longest", max(rows.values()), "bytes", at_most=ROW_BYTES, note=note)
    )
    if profile:
        report.profiles[figure.name] = profile

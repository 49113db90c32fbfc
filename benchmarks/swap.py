"""Hot swap: freshness at 100 evenly spaced events a second while ten bundles are prepared and swapped, against before.

Both halves of the measurement are of one worker in one run, the first with a bundle that serves and nothing to
prepare. Swaps alternate between a new head in the space that is served and a new projection, for which the vectors
of the whole catalogue and their index are built aside.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

from benchmarks.bundles import Announcer, registry_of
from benchmarks.freshness import send_events, timed_slates
from benchmarks.processes import BenchmarkError, WorkerProcess
from benchmarks.results import CpuAccount, Figure, percentile
from benchmarks.stage import Bench, Stage, stage

SWAPS: Final = 10
AFTERMATH_SECONDS: Final = 1.0
"""After each swap, counted to it: rows are rebuilt, what is freed is freed."""
PAUSE_SECONDS: Final = 5.0
"""Quiet between two swaps: tells a machine that became busy from a swap that costs."""
GAP_MS: Final = round(PAUSE_SECONDS * 1000)
LAST_SLATES_SECONDS: Final = 5.0
MOST_TIMES: Final = 2.0


async def run(bench: Bench) -> None:
    """Measure before and during ten swaps."""
    account = CpuAccount()
    async with stage(bench, "swap", users=bench.sizes.users, models=registry_of(bench, "swap")) as made:
        worker = await made.worker()
        await _measure(made, worker)
    bench.report.beside["swap"] = account.describe()


async def _measure(made: Stage, worker: WorkerProcess) -> None:
    seconds = made.bench.sizes.freshness_seconds
    announcer = Announcer(made, worker)
    await announcer.swap(0, new_space=False)
    await send_events(made, made.bench.sizes.warm_up_seconds)
    before_ms = _now_ms()
    await send_events(made, seconds)
    rss_before = worker.rss_bytes()
    during_ms = _now_ms()
    took: list[float] = []
    spans_ms: list[tuple[int, int]] = []

    async def swaps() -> None:
        for number in range(1, SWAPS + 1):
            begun_ms = _now_ms()
            took.append(await announcer.swap(number, new_space=number % 2 == 0))
            await asyncio.sleep(AFTERMATH_SECONDS)
            spans_ms.append((begun_ms, _now_ms()))
            await asyncio.sleep(PAUSE_SECONDS)

    await send_events(made, float("inf"), until=asyncio.create_task(swaps()))
    await asyncio.sleep(LAST_SLATES_SECONDS)
    triggers, timed = await timed_slates(made, before_ms)
    missing = len(triggers) - len(timed)
    quiet = [took_ms for at_ms, took_ms in timed if at_ms < during_ms]
    busy = [took_ms for at_ms, took_ms in timed if any(begin <= at_ms < end for begin, end in spans_ms)]
    between = [took_ms for at_ms, took_ms in timed if any(0 <= at_ms - end < GAP_MS for _, end in spans_ms)]
    swapped = await worker.metric("millstream_model_swap_seconds_count")
    if swapped < SWAPS + 1:
        raise BenchmarkError(f"{swapped:.0f} swaps of {SWAPS + 1}:\n{worker.tail()}")
    swap_ms = 1e3 * await worker.metric("millstream_model_swap_seconds_sum") / swapped
    p99_before, p99_during = percentile(quiet, 0.99), percentile(busy, 0.99)
    figures = made.bench.report.figures
    figures.append(Figure("freshness before the swaps, p99", p99_before, "ms", note=f"{len(quiet):,} slates"))
    note = (
        f"p50 {percentile(busy, 0.5):.0f} ms, max {max(busy, default=0)} ms, {len(busy):,} slates; between the swaps "
        f"p99 {percentile(between, 0.99):.0f} ms, {len(between):,} slates; {missing} missing; a swap itself "
        f"{swap_ms:.2f} ms, announced to live {min(took):.1f} to {max(took):.1f} s; worker RSS "
        f"{rss_before >> 20} MiB before, {worker.rss_bytes() >> 20} MiB after"
    )
    figures.append(Figure("freshness during ten swaps, p99", p99_during, "ms", note=note))
    figures.append(
        Figure("freshness during swaps ÷ before, p99", p99_during / max(p99_before, 1.0), "×", at_most=MOST_TIMES)
    )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000

"""The user table: rows per second read back after kill -9, seconds until events flow again, and memory.

Rows go to the changelog through the real codec before a worker starts. Memory of a row is the difference of two
workers' resident memory, the second with the rows; rows may fill holes that the first one has too, so a row counts for
no less than its Python objects.
"""

from __future__ import annotations

import sys
from typing import Final

from benchmarks.processes import WorkerProcess
from benchmarks.results import CpuAccount, Figure
from benchmarks.stage import Bench, Stage, stage

ROWS_A_SECOND: Final = 30_000
MILLION: Final = 1_000_000
TABLE_GIB: Final = 1.5
RECOVERED: Final = "rows_recovered"
"""The line that a worker logs when it has read its changelog."""


async def run(bench: Bench) -> None:
    """Measure an empty worker, one that finds the rows, and one that follows a killed one."""
    account = CpuAccount()
    rows = bench.sizes.rows
    async with stage(bench, "recovery") as made:
        empty = await made.worker("worker-empty")
        empty_rss = empty.rss_bytes()
        empty.stop()
        await made.publish_rows(rows)
        first = await made.worker("worker-first")
        full_rss = first.rss_bytes()
        row_bytes = await first.metric("millstream_table_bytes")
        held = await first.metric("millstream_table_rows")
        peak_rss = first.peak_rss_bytes()
        earlier = _read_a_second(first)
        first.kill()
        await _after_kill(made, earlier)
        by_memory = (full_rss - empty_rss) / rows
        by_objects = _object_bytes(made, rows)
        each = max(by_memory, by_objects)
        mean_bytes = row_bytes / max(held, 1)
        note = (
            f"for a row of {mean_bytes:.0f} bytes and its key: {by_memory:.0f} bytes by resident memory of {rows:,} "
            f"rows, {by_objects:.0f} by the size of Python's objects; the larger counts"
        )
        figures = bench.report.figures
        figures.append(
            Figure("table of 1 M users, extrapolated", each * MILLION / 2**30, "GiB", at_most=TABLE_GIB, note=note)
        )
        name = f"RSS with {rows:,} users and {bench.sizes.items:,} items"
        note = f"{empty_rss / 2**20:.0f} MiB without users; most ever {peak_rss / 2**20:.0f} MiB, while it recovered"
        figures.append(Figure(name, full_rss / 2**20, "MiB", note=note))
    bench.report.beside["recovery"] = account.describe()


def _object_bytes(made: Stage, rows: int) -> float:
    """Return the bytes of a row, its key and its place in a dict, as Python states them."""
    world = made.bench.world
    templates = world.rows(made.epoch)
    keys = [world.user_key(user) for user in range(rows)]
    objects = sum(sys.getsizeof(key) + sys.getsizeof(templates[n % len(templates)]) for n, key in enumerate(keys))
    return (objects + sys.getsizeof(dict.fromkeys(keys))) / rows


async def _after_kill(made: Stage, earlier: float) -> None:
    """Measure a worker that starts right after one was killed: the group waits for the dead one's session first."""
    worker = WorkerProcess(made.settings, made.folder, name="worker-after-kill", profile=made.bench.profile)
    made.children.append(worker)
    worker.start_profile()
    ready_seconds = await worker.wait_ready()
    profile = await worker.end_profile()
    title = "user table recovery after kill -9"
    if profile:
        made.bench.report.profiles[title] = profile
    line = worker.logged(RECOVERED)[0]
    rows = made.bench.sizes.rows
    note = (
        f"{line['records']:,} changelog records in {line['seconds']:.1f} s; {earlier:,.0f} rows/s at the start before"
    )
    figures = made.bench.report.figures
    rate = _read_a_second(worker)
    figures.append(Figure(title, rate, "rows/s", at_least=ROWS_A_SECOND, note=note, is_event_rate=True))
    session = made.settings.worker.session_timeout_seconds
    note = f"{rows:,} rows, {made.bench.sizes.items:,} items; with the dead worker's session of {session:.0f} s"
    figures.append(Figure("from start after kill -9 to /ready", ready_seconds, "s", note=note))


def _read_a_second(worker: WorkerProcess) -> float:
    line = worker.logged(RECOVERED)[0]
    return float(line["records"]) / max(float(line["seconds"]), 1e-3)

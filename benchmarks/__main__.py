"""``python -m benchmarks``: measure the numbers of docs/benchmarks.md on a real Kafka, here and now.

    python -m benchmarks [--only NAME …] [--quick] [--profile] [--json FILE] [--write]

A Kafka of its own is started in a temporary folder, unless MILLSTREAM_KAFKA__BOOTSTRAP_SERVERS names one: topics with
the prefix bench- are made and deleted there. The parts have benchmarks of their own, without Kafka: benchmarks.index,
.recommender and .user_state.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

# Before NumPy, torch or faiss is imported: the load must not spread over the worker's core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console

from benchmarks import (
    baselines,
    emergency,
    everything,
    examples,
    freshness,
    new_items,
    recovery,
    swap,
    throughput,
    training,
)
from benchmarks.processes import REPOSITORY, BenchmarkError
from benchmarks.results import Report, machine, print_report
from benchmarks.stage import QUICK, Bench, Sizes
from benchmarks.world import World
from models.bootstrap import find_space
from models.encoder import identify
from models.errors import MillstreamError
from streams.broker import KafkaCluster, fetch_jars
from streams.settings import Settings

Run = Callable[[Bench], Awaitable[None]]
BENCHMARKS: Final[dict[str, Run]] = {
    "baselines": baselines.run,
    "freshness": freshness.run,
    "slates": throughput.slates,
    "actions": throughput.actions,
    "impressions": throughput.impressions,
    "examples": examples.run,
    "everything": everything.run,
    "emergency-block": emergency.run,
    "swap": swap.run,
    "new-items": new_items.run,
    "recovery": recovery.run,
    "training": training.run,
}
DOCUMENT: Final = REPOSITORY / "docs" / "benchmarks.md"
JARS: Final = REPOSITORY / ".millstream" / "kafka"
CLUSTER_VARIABLE: Final = "MILLSTREAM_KAFKA__BOOTSTRAP_SERVERS"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure Millstream's numbers.")
    parser.add_argument("--only", action="append", choices=list(BENCHMARKS), help="only this one; may be repeated")
    parser.add_argument("--quick", action="store_true", help="small sizes: to see that it runs, not how fast")
    parser.add_argument("--profile", action="store_true", help="sample the worker and print where its time goes")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--write", action="store_true", help="write the figures into docs/benchmarks.md")
    return parser.parse_args()


@asynccontextmanager
async def kafka(folder: Path) -> AsyncIterator[str]:
    """Give host:port of the cluster that the environment names, else of one started here and stopped at the end."""
    named = os.environ.get(CLUSTER_VARIABLE)
    if named:
        yield named
        return
    cluster = KafkaCluster(folder / "kafka", jars=fetch_jars(JARS))
    try:
        await cluster.start()
        yield cluster.bootstrap_servers
    finally:
        cluster.stop()


def only_kafka_variables(console: Console) -> None:
    """Take every setting but the cluster's from the environment, so that the figures are those of the defaults."""
    ignored = [n for n in os.environ if n.startswith("MILLSTREAM_") and not n.startswith("MILLSTREAM_KAFKA__")]
    for name in ignored:
        del os.environ[name]
    if ignored:
        console.print(f"ignored, to measure the defaults: {', '.join(sorted(ignored))}")


async def measure(options: argparse.Namespace, console: Console) -> Report:
    """Run the benchmarks that are asked for."""
    sizes = QUICK if options.quick else Sizes()
    wanted = options.only or list(BENCHMARKS)
    report = Report(machine=machine(), command=_command(options))
    with tempfile.TemporaryDirectory(prefix="millstream-bench-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        async with kafka(folder) as servers:
            space = find_space(identify(Settings().encoder), folder)
            if space is None:
                raise BenchmarkError("no projection of the encoder is shipped; the benchmarks need the default encoder")
            world = World(sizes.items, space, time.time_ns() // 1_000_000)
            bench = Bench(servers, folder, sizes, world, report, console, options.profile)
            for name in BENCHMARKS:
                if name in wanted:
                    await one(bench, name)
    return report


def _command(options: argparse.Namespace) -> str:
    """Return the command that repeats the measurement; where its results went is nobody's concern."""
    words = ["python -m benchmarks", *(f"--only {name}" for name in options.only or ())]
    return " ".join(words + [f"--{flag}" for flag in ("quick", "profile") if getattr(options, flag)])


async def one(bench: Bench, name: str) -> None:
    """Run one benchmark; a failure is a line in the report, and the others go on."""
    console = bench.console
    console.print(f"{name} …")
    started = time.perf_counter()
    before = len(bench.report.figures)
    try:
        await BENCHMARKS[name](bench)
    except MillstreamError as error:
        console.print(f"[red]{name} was not measured:[/] ", end="")
        console.print(str(error), markup=False)
        bench.report.beside[name] = f"NOT MEASURED: {str(error).splitlines()[0]}"
    for figure in bench.report.figures[before:]:
        console.print(f"  {figure.name}: {figure.value:,.3g} {figure.unit} {figure.verdict}", markup=False)
    console.print(f"  took {time.perf_counter() - started:.0f} s", markup=False)


def main() -> int:
    """Measure, print, write; returns 1 where something was not measured, whatever the figures are."""
    options = arguments()
    console = Console(width=None if sys.stdout.isatty() else 200)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    # So that broker and workers are ended by the same way out.
    signal.signal(signal.SIGTERM, stop)
    # A new topic's first produce requests are refused until its leaders are there; aiokafka says so and repeats them.
    logging.getLogger("aiokafka").setLevel(logging.ERROR)
    only_kafka_variables(console)
    if options.write and (options.quick or options.only):
        raise BenchmarkError("--write wants a whole run: docs/benchmarks.md was kept; leave --quick and --only out")
    report = asyncio.run(measure(options, console))
    for name, profile in report.profiles.items():
        console.rule(f"profile: {name}")
        console.print(profile, markup=False, highlight=False)
    print_report(report, console)
    if options.json:
        report.write_json(options.json)
    if options.write:
        report.write_markdown(DOCUMENT)
    return int(any(what.startswith("NOT MEASURED") for what in report.beside.values()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MillstreamError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        sys.exit(1)

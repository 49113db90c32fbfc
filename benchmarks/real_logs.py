"""``python -m benchmarks.real_logs ebnerd PATH``: a recorded log through a real Kafka and a real worker, and a check.

    python -m benchmarks.real_logs KIND PATH [--limit N] [--requests] [--encode]

The worker runs while the log is imported at full speed under the policy `trusted`. Afterwards nothing may be missing:
every offset is committed, every event was counted once, every user has a row, and the last action of each user has a
slate with a trigger not before it. ``--encode`` runs the encoder process too and waits until every item that has a
text is searchable, before the events.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import msgspec
from rich.console import Console

from benchmarks.__main__ import kafka, only_kafka_variables
from benchmarks.processes import BenchmarkError, Child, EncoderChild, WorkerProcess
from models.errors import MillstreamError
from models.events import EVENT_CODEC, Action, Request
from models.logs import KINDS, open_log
from streams import topics
from streams.importer import Importer, ImportOptions
from streams.kafka_clients import new_admin
from streams.settings import Settings
from streams.topic_io import open_topic
from streams.topics import TopicNames

LIMIT_SECONDS = 3_600.0


def _settings(servers: str, folder: Path) -> Settings:
    return Settings.model_validate(
        {
            "kafka": {"bootstrap_servers": servers},
            "topics": {"prefix": "real-logs"},
            "events": {"clock": {"policy": "trusted"}},
            "worker": {
                "group": "real-logs",
                "data_folder": folder / "data",
                "port": 0,
                "log_format": "json",
                "max_trigger_age_seconds": LIMIT_SECONDS,
            },
        }
    )


async def _until_committed(settings: Settings, worker: WorkerProcess) -> None:
    """Return when the group has committed the end of every partition."""
    names = TopicNames.of(settings)
    admin = new_admin(settings)
    await admin.start()
    try:
        async with open_topic(settings, names.events) as topic:
            ends = await topic.end_offsets()
        deadline = time.monotonic() + LIMIT_SECONDS
        while True:
            found = await admin.list_consumer_group_offsets(settings.worker.group)
            done = {tp.partition: at.offset for tp, at in found.items() if tp.topic == names.events}
            if all(done.get(partition, 0) >= end for partition, end in ends.items() if end):
                return
            if worker.process.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkError(f"not everything was committed: {done} of {ends}\n{worker.tail()}")
            await asyncio.sleep(0.5)
    finally:
        await admin.close()


async def _until_encoded(worker: WorkerProcess, wanted: int) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while await worker.metric("millstream_index_items") < wanted:
        if worker.process.poll() is not None or time.monotonic() > deadline:
            raise BenchmarkError(f"{wanted} items were not encoded\n{worker.tail()}")
        await asyncio.sleep(1.0)


async def _check(settings: Settings, worker: WorkerProcess) -> list[tuple[str, int, int]]:
    """Return (what, wanted, found) of everything that must agree."""
    names = TopicNames.of(settings)
    kinds: Counter[str] = Counter()
    last: dict[str, tuple[int, int]] = {}
    users = set()
    requests = 0
    async with open_topic(settings, names.events) as topic:
        async for record in topic.read(await topic.begin_offsets(), await topic.end_offsets()):
            event = EVENT_CODEC.decode(record.value)
            kinds[type(event).__name__.lower()] += 1
            users.add(event.user_id)
            requests += isinstance(event, Request)
            if isinstance(event, Action | Request):
                last[event.user_id] = (record.partition, record.offset)
    answered: dict[str, int] = {}
    asked = set()
    async with open_topic(settings, names.recommendations) as topic:
        async for record in topic.read(await topic.begin_offsets(), await topic.end_offsets()):
            slate = msgspec.json.decode(record.value)
            answered[slate["user_id"]] = max(answered.get(slate["user_id"], -1), slate["trigger"]["offset"])
            if slate["request_id"] is not None:
                asked.add(slate["recommendation_id"])
    rows = [
        (f"{kind}s counted once", n, int(await worker.metric("millstream_events_total", type=kind, outcome="applied")))
        for kind, n in sorted(kinds.items())
    ]
    return [
        *rows,
        ("users with a row", len(users), int(await worker.metric("millstream_table_rows"))),
        ("requests answered", requests, len(asked)),
        (
            "users whose last trigger has a slate",
            len(last),
            sum(answered.get(u, -1) >= at for u, (_, at) in last.items()),
        ),
        ("dead letters", 0, int(await worker.metric("millstream_dead_letters_total"))),
    ]


async def run(options: argparse.Namespace, console: Console) -> bool:
    """Run one log and print the account; returns whether everything agrees."""
    with tempfile.TemporaryDirectory(prefix="millstream-logs-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        async with kafka(folder) as servers:
            settings = _settings(servers, folder)
            await topics.create(settings)
            reader = open_log(options.kind, options.path)
            worker = WorkerProcess(settings, folder)
            children: list[Child] = [worker]
            try:
                await worker.wait_ready()
                begun = time.monotonic()
                if options.encode:
                    children.append(EncoderChild(settings, folder))
                    await Importer(settings, reader, ImportOptions(limit=0)).run()
                    wanted = sum(bool(item.title or item.text) for item in reader.items())
                    await _until_encoded(worker, wanted)
                    seconds = time.monotonic() - begun
                    console.print(f"{wanted:,} items encoded and searchable in {seconds:.0f} s")
                    begun = time.monotonic()
                imported = await Importer(
                    settings,
                    open_log(options.kind, options.path),
                    ImportOptions(requests=options.requests, limit=options.limit),
                ).run()
                await _until_committed(settings, worker)
                seconds = time.monotonic() - begun
                account = await _check(settings, worker)
                slates = await worker.metric("millstream_slates_total")
                console.print(
                    f"{options.kind}: {imported.items:,} items and {imported.events:,} events in {seconds:.0f} s, "
                    f"{imported.events / seconds:,.0f} events/s and {slates / seconds:,.0f} slates/s through Kafka and "
                    f"one worker; {slates:,.0f} slates, RSS {worker.rss_bytes() >> 20} MiB"
                )
                for what, wanted, found in account:
                    console.print(f"  {'ok  ' if wanted == found else 'LOST'} {what}: {found:,} of {wanted:,}")
                return all(wanted == found for _, wanted, found in account)
            finally:
                for child in children:
                    child.stop()


def main() -> int:
    """Run; exit status 1 where something is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_logs", description="A recorded log, end to end.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("path", type=Path)
    parser.add_argument("--limit", type=int, help="at most this many events")
    parser.add_argument("--requests", action="store_true", help="ask for a slate before each impression")
    parser.add_argument("--encode", action="store_true", help="encode the items first")
    console = Console()
    only_kafka_variables(console)
    try:
        return 0 if asyncio.run(run(parser.parse_args(), console)) else 1
    except MillstreamError as error:
        console.print(f"real_logs: {error}", markup=False)
        return 1


if __name__ == "__main__":
    sys.exit(main())

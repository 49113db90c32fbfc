"""One benchmark's stage: topics of its own, the catalogue and user rows on them, a worker that is warm."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
from aiokafka import ConsumerRecord
from aiokafka.errors import KafkaError
from rich.console import Console

from benchmarks.processes import BenchmarkError, Child, EncoderChild, WorkerProcess
from benchmarks.results import Report
from benchmarks.world import Keyed, World
from streams import topics
from streams.kafka_clients import new_admin
from streams.sender import Delivered, Outbox
from streams.settings import Settings
from streams.topic_ids import epoch, topic_ids
from streams.topic_io import TopicWriter, open_topic, partition_of
from streams.topics import TopicNames

CHUNK: Final = 5_000
SETTLE_SECONDS: Final = 240.0
BUILD_SECONDS: Final = 900.0
"""Graphs are built at low priority: on a machine with much else, slowly."""
ASK_AGAIN_SECONDS: Final = 3.0
WARM_UP_USER: Final = "warm-up-user"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    items: int = 50_000
    baseline_events: int = 200_000
    faust_events: int = 60_000
    freshness_seconds: float = 60.0
    warm_up_seconds: float = 10.0
    users: int = 20_000
    slates: int = 20_000
    actions: int = 60_000
    impressions: int = 20_000
    new_items: int = 50
    bulk_items: int = 2_000
    rows: int = 200_000
    blocks: int = 50
    blocks_behind_loads: int = 5


QUICK: Final = Sizes(
    items=5_000,
    baseline_events=20_000,
    faust_events=10_000,
    freshness_seconds=8.0,
    warm_up_seconds=3.0,
    users=2_000,
    slates=2_000,
    actions=10_000,
    impressions=3_000,
    new_items=10,
    bulk_items=64,
    rows=20_000,
    blocks=8,
    blocks_behind_loads=2,
)


@dataclass(slots=True)
class Bench:
    """What every benchmark gets."""

    bootstrap_servers: str
    folder: Path
    sizes: Sizes
    world: World
    report: Report
    console: Console
    profile: bool = False

    def settings(self, name: str, **sections: dict[str, Any]) -> Settings:
        """Return settings for the benchmark ``name``: a prefix, a group and a folder of its own, else the defaults."""
        values: dict[str, Any] = {
            "kafka": {"bootstrap_servers": self.bootstrap_servers},
            "topics": {"prefix": f"bench-{name}"},
            "worker": {
                "group": f"bench-{name}",
                "data_folder": self.folder / name / "data",
                "port": 0,
                "log_format": "json",
            },
        }
        for section, fields in sections.items():
            values[section] = {**values.get(section, {}), **fields}
        return Settings(**values)


Sections = Mapping[str, Mapping[str, Any]]
"""Values of settings that are not the defaults, by section."""


def _no_sections(_bench: Bench, _name: str) -> Sections:
    return {}


async def _nothing(_made: Stage, _worker: WorkerProcess) -> None:
    """Leave the worker as it started."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What the workers of a leg are like: the same leg measures the defaults and anything else."""

    suffix: str = ""
    """Behind the names of topics and folders."""
    title: str = ""
    """Behind the names of figures."""
    slates_a_second: float = 1_000
    """The least that is aimed at."""
    sections: Callable[[Bench, str], Sections] = _no_sections
    """Of a stage, by its name."""
    prepare: Callable[[Stage, WorkerProcess], Awaitable[None]] = _nothing
    """Awaited when a worker is ready, before anything is measured."""


DEFAULTS: Final = Setup()


@dataclass(slots=True)
class Stage:
    """Topics with a catalogue, and the processes started on them."""

    bench: Bench
    name: str
    settings: Settings
    names: TopicNames
    writer: TopicWriter
    epoch: int
    children: list[Child] = field(default_factory=list)
    setup: Setup = DEFAULTS

    @property
    def folder(self) -> Path:
        """Where logs and settings lie."""
        return self.bench.folder / self.name

    async def worker(self, name: str = "worker") -> WorkerProcess:
        """Start a worker and return it ready, its graph of items built, as the setup wants it."""
        started = WorkerProcess(self.settings, self.folder, name=name, profile=self.bench.profile)
        self.children.append(started)
        await started.wait_ready()
        await self.settle(started)
        await self.setup.prepare(self, started)
        return started

    async def encoder(self, worker: WorkerProcess) -> EncoderChild:
        """Start the encoder process and return it when it has passed the catalogue and encoded a first item."""
        started = EncoderChild(self.settings, self.folder)
        self.children.append(started)
        before = await worker.metric("millstream_index_items")
        await self.publish_items([(i.item_id, i) for i in self.bench.world.new_items(1, f"first-{self.name}")])
        deadline = time.monotonic() + SETTLE_SECONDS
        while await worker.metric("millstream_index_items") <= before:
            if started.process.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkError(f"the encoder process encoded no item:\n{started.tail()}")
            await asyncio.sleep(0.2)
        return started

    async def settle(self, worker: WorkerProcess) -> None:
        """Return when no graph is built or waits to be built: a search takes it over and may start the next build."""
        deadline = time.monotonic() + SETTLE_SECONDS
        quiet = 0
        while quiet < 2:
            before = await worker.metric("millstream_slates_total")
            asked = float("-inf")
            while await worker.metric("millstream_slates_total") <= before:
                if worker.process.poll() is not None or time.monotonic() > deadline:
                    raise BenchmarkError(f"a ready worker sent no slate:\n{worker.tail()}")
                if time.monotonic() - asked >= ASK_AGAIN_SECONDS:
                    # Again, because on a busy machine a leg's greatest age of a trigger may be over before its slate.
                    asked = time.monotonic()
                    request = self.bench.world.request(WARM_UP_USER, time.time_ns() // 1_000_000)
                    await self.send(self.names.events, [request])
                await asyncio.sleep(0.2)
            quiet = 0 if worker.is_building() else quiet + 1
            begun = time.monotonic()
            while worker.is_building():
                if time.monotonic() - begun > BUILD_SECONDS:
                    raise BenchmarkError(f"a graph was not built in {BUILD_SECONDS:.0f} s:\n{worker.tail()}")
                await asyncio.sleep(0.2)
            deadline += time.monotonic() - begun

    async def publish_items(self, items: Iterable[tuple[str, Any]]) -> None:
        """Publish items as their owner does."""
        await self.send(self.names.items, [Keyed(key.encode(), msgspec.json.encode(item)) for key, item in items])

    async def send(self, topic: str, records: Sequence[Keyed]) -> list[Delivered]:
        """Send records at full speed; returns when all are acknowledged."""
        delivered: list[Delivered] = []
        for start in range(0, len(records), CHUNK):
            outbox = Outbox()
            for record in records[start : start + CHUNK]:
                self.writer.add(outbox, topic, record.key, record.value)
            delivered += await self.writer.send(outbox)
        return delivered

    async def publish_rows(self, users: int) -> None:
        """Fill the user table's changelog with ``users`` rows, as workers before this one left them."""
        templates = self.bench.world.rows(self.epoch)
        world = self.bench.world
        for start in range(0, users, CHUNK):
            block = range(start, min(start + CHUNK, users))
            await self.send(
                self.names.user_table_changelog,
                [Keyed(world.user_key(user), templates[user % len(templates)]) for user in block],
            )

    async def records(self, topic: str) -> list[ConsumerRecord]:
        """Return all records of a topic up to its end now."""
        async with open_topic(self.settings, topic) as tail:
            starts, ends = await tail.begin_offsets(), await tail.end_offsets()
            return [record async for record in tail.read(starts, ends)]

    async def _publish_catalogue(self) -> None:
        await self.send(self.names.items, self.bench.world.item_records())
        partitions = self.writer.partitions[self.names.item_vectors]
        outbox = Outbox()
        for item_key, record in self.bench.world.vector_records():
            outbox.add(self.names.item_vectors, partition_of(item_key, partitions), record.key, record.value)
        await self.writer.send(outbox)


@asynccontextmanager
async def stage(
    bench: Bench, name: str, *, users: int = 0, setup: Setup = DEFAULTS, **sections: dict[str, Any]
) -> AsyncIterator[Stage]:
    """Set the stage, and clear it afterwards: processes ended, topics deleted."""
    name += setup.suffix
    usual = setup.sections(bench, name)
    merged = {section: {**usual.get(section, {}), **sections.get(section, {})} for section in {**usual, **sections}}
    settings = bench.settings(name, **merged)
    names = TopicNames.of(settings)
    await topics.create(settings)
    children: list[Child] = []
    try:
        found = epoch((await topic_ids(settings, [names.events]))[names.events])
        wanted = (names.events, names.items, names.item_vectors, names.user_table_changelog)
        async with TopicWriter(settings, *wanted) as writer:
            made = Stage(bench, name, settings, names, writer, found, children, setup)
            await made._publish_catalogue()
            # Only a user with a taste has the index searched.
            warm_up = Keyed(WARM_UP_USER.encode(), bench.world.rows(found)[0])
            await made.send(names.user_table_changelog, [warm_up])
            if users:
                await made.publish_rows(users)
            yield made
    finally:
        for child in children:
            child.stop()
        await _delete(settings, names)


async def _delete(settings: Settings, names: TopicNames) -> None:
    admin = new_admin(settings)
    try:
        await admin.start()
        await admin.delete_topics(sorted(set(names.all()) & set(await admin.list_topics())))
    except (KafkaError, OSError) as error:
        raise BenchmarkError(f"the benchmark's topics could not be deleted: {error!r}; delete {names.all()}") from error
    finally:
        await admin.close()

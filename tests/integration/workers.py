"""Worker processes for the tests: a frozen catalogue to work on, and processes to kill, freeze, thaw and ask.

The encoder process is not needed: the items and their base encodings are put on the topics here, before any worker
starts, so that the oracle (tests/integration/oracle.py) knows every vector.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError
from prometheus_client.parser import text_string_to_metric_families

from models.bootstrap import Space, _kept_file, find_space, save_space, space_id
from models.encoder import EncoderConfig, content_hash, identify
from models.events import Item
from streams import item_vectors, topics
from streams.broker import free_ports
from streams.dead_letters import Letter
from streams.kafka_clients import new_admin, new_consumer
from streams.sender import Headers, Outbox
from streams.settings import Settings
from streams.topic_io import TopicWriter
from streams.topics import TopicNames
from tests.integration.conftest import REPOSITORY, SettingsWith, delete_topics, environment, read_topic, wait_until

READY_SECONDS = 90.0
BASE_DIM = 384
TRAFFIC_BEGINS_MS = 23 * 3_600_000
"""How long before now made-up traffic begins: less than what the live clock policy moves up."""
JSON: Headers = (("content-type", b"application/json"),)

Record = tuple[bytes | None, bytes | None]
"""Key and value of a record to send."""


@cache
def encoder_id() -> str:
    """Return the id of the default encoder; hashing its weights takes a second, so once."""
    return identify(EncoderConfig())


def record(event: dict[str, Any]) -> Record:
    """Return the record of an event given as a literal, its key the user id."""
    return event["user_id"].encode(), msgspec.json.encode(event)


class WorkerProcess:
    """One worker process, its output in a file."""

    def __init__(self, settings: Settings, folder: Path, name: str, module: str) -> None:
        self.name = name
        worker = settings.worker.model_copy(
            update={"port": free_ports(1)[0], "data_folder": folder / name, "log_format": "json"}
        )
        self.settings = settings.model_copy(update={"worker": worker})
        self.log_file = folder / f"{name}.log"
        self._environment = environment(self.settings, folder / f"{name}-settings")
        self._command = [sys.executable, "-m", module]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The id of the process that was started last."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        assert self._process is not None, "not started"
        return self._process.poll()

    @property
    def log(self) -> str:
        """Everything that it wrote, over all its starts."""
        return self.log_file.read_text("utf-8", "replace") if self.log_file.exists() else ""

    def start(self) -> None:
        """Start it (again)."""
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=subprocess.STDOUT, cwd=REPOSITORY
            )

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it with kill -9 and reap it; nothing where it is not running."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(30)

    async def exit_code(self, timeout_seconds: float = 60.0) -> int:
        """Return its exit code when it has ended by itself or by a signal."""
        await wait_until(lambda: self.returncode is not None, timeout_seconds, f"{self.name} ends")
        code = self.returncode
        assert code is not None
        return code

    async def stop(self) -> int:
        """Ask it to stop with SIGTERM; returns its exit code."""
        self.send(signal.SIGTERM)
        return await self.exit_code()

    async def is_ready(self) -> bool:
        """Whether it processes events now."""
        return await self._get("/ready") is not None

    async def wait_ready(self, timeout_seconds: float = READY_SECONDS) -> None:
        """Return when it processes events; AssertionError when it ends before that."""

        async def ready() -> bool:
            assert self.returncode is None, f"{self.name} ended with {self.returncode}:\n{self.log[-4000:]}"
            return await self.is_ready()

        await wait_until(ready, timeout_seconds, f"{self.name} is ready")

    async def metric(self, name: str, **labels: str) -> float:
        """Return a metric, summed over the label values that are not given; 0 where there is none."""
        text = await self._get("/metrics")
        assert text is not None, f"{self.name} has no metrics"
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    async def _get(self, path: str) -> str | None:
        url = f"http://127.0.0.1:{self.settings.worker.port}{path}"

        def fetch() -> str | None:
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    return str(answer.read().decode())
            except (urllib.error.URLError, OSError):
                return None

        return await asyncio.to_thread(fetch)


class World:
    """Topics of one test, a frozen catalogue on them, and the workers that the test starts."""

    def __init__(self, settings: Settings, folder: Path, item_ids: Sequence[str]) -> None:
        self.settings = settings
        self.names = TopicNames.of(settings)
        self.folder = folder
        self.item_ids = list(item_ids)
        self.workers: list[WorkerProcess] = []
        self.traffic_ms = now_ms() - TRAFFIC_BEGINS_MS
        """Event time that the made-up traffic has reached."""

    def worker(self, name: str = "worker", module: str = "streams.worker") -> WorkerProcess:
        """Start a worker and return it at once."""
        made = WorkerProcess(self.settings, self.folder, name, module)
        save_space(self.space(), _space_file(made.settings.worker.data_folder))
        self.workers.append(made)
        made.start()
        return made

    async def ready_worker(self, name: str = "worker", module: str = "streams.worker") -> WorkerProcess:
        """Start a worker and return it when it processes events."""
        made = self.worker(name, module)
        await made.wait_ready()
        return made

    def space(self) -> Space:
        """Return the space that the workers serve in: the shipped one, or one that is made up."""
        return find_space(encoder_id(), self.folder / "nothing-kept") or _made_up_space()

    async def publish(self, records: Iterable[Record], *, partition: int | None = None) -> None:
        """Send records to the events topic and return when all are acknowledged."""
        outbox = Outbox()
        async with TopicWriter(self.settings, self.names.events) as writer:
            for key, value in records:
                if partition is None:
                    assert key is not None, "a record without a key needs a partition"
                    writer.add(outbox, self.names.events, key, value)
                else:
                    outbox.add(self.names.events, partition, key, value)
            await writer.send(outbox)

    async def end_offsets(self, topic: str) -> dict[int, int]:
        """Return the end offset of each partition of a topic."""
        consumer = new_consumer(self.settings)
        await consumer.start()
        try:
            await consumer._client.set_topics([topic])
            tps = [TopicPartition(topic, p) for p in consumer.partitions_for_topic(topic) or ()]
            return {tp.partition: end for tp, end in (await consumer.end_offsets(tps)).items()}
        finally:
            await consumer.stop()

    async def committed(self) -> dict[int, int]:
        """Return the group's committed offsets of the events topic; nothing for a partition without one."""
        admin = new_admin(self.settings)
        await admin.start()
        try:
            found = await admin.list_consumer_group_offsets(self.settings.worker.group)
            return {tp.partition: at.offset for tp, at in found.items() if tp.topic == self.names.events}
        finally:
            await admin.close()

    async def wait_committed(self, timeout_seconds: float = 60.0) -> None:
        """Return when every event that stands on the topic now is committed."""
        ends = {p: end for p, end in (await self.end_offsets(self.names.events)).items() if end}

        async def all_committed() -> bool:
            try:
                done = await self.committed()
            except KafkaError:
                # A broker that has just come back may not know the group's coordinator yet.
                return False
            return all(done.get(p, 0) >= end for p, end in ends.items())

        await wait_until(all_committed, timeout_seconds, f"offsets {ends} are committed", every_seconds=0.2)

    async def letters(self) -> list[Letter]:
        """Return the dead letters."""
        return [Letter.of(r) for r in await read_topic(self.settings, self.names.dead_letters)]

    async def slates(self) -> list[Any]:
        """Return the slates as plain data, in the order of partitions and offsets."""
        return [msgspec.json.decode(r.value) for r in await read_topic(self.settings, self.names.recommendations)]

    def show_logs(self) -> None:
        """Print the end of each worker's output: pytest shows it with the failure."""
        for worker in self.workers:
            print(f"----- {worker.name} (exit code {worker.returncode}) -----\n{worker.log[-8000:]}")


@asynccontextmanager
async def world(settings_with: SettingsWith, folder: Path, *, items: int = 40, **sections: Any) -> AsyncIterator[World]:
    """Make a world: topics and a catalogue of ``items`` items; afterwards every worker is dead and the topics gone."""
    sections["counters"] = {"publish_interval_seconds": 0.2, "checkpoint_interval_seconds": 1.0} | sections.get(
        "counters", {}
    )
    settings = settings_with(**sections)
    await topics.create(settings)
    made = World(settings, folder, [f"item-{i}" for i in range(items)])
    try:
        await publish_catalogue(made)
        yield made
    except BaseException:
        made.show_logs()
        raise
    finally:
        for worker in made.workers:
            worker.kill()
    await delete_topics(settings)


async def publish_catalogue(made: World) -> None:
    """Put the items and random base encodings of them on their topics."""
    random = np.random.default_rng(7)
    items, vectors = made.names.items, made.names.item_vectors
    outbox = Outbox()
    async with TopicWriter(made.settings, items, vectors) as writer:
        for item_id in made.item_ids:
            item = Item(item_id=item_id, title=f"title of {item_id}")
            base = random.standard_normal(BASE_DIM).astype(np.float32)
            writer.add(outbox, items, item_id.encode(), msgspec.json.encode(item), JSON)
            key = item_vectors.key(encoder_id(), item_id)
            writer.add(outbox, vectors, key, item_vectors.value(content_hash(item), base / np.linalg.norm(base)))
        await writer.send(outbox)


def now_ms() -> int:
    """Return the time, epoch milliseconds."""
    return time.time_ns() // 1_000_000


def _made_up_space() -> Space:
    projection = np.random.default_rng(3).standard_normal((BASE_DIM, 64)).astype(np.float32)
    return Space(space_id(encoder_id()), encoder_id(), projection)


def _space_file(folder: Path) -> Path:
    return _kept_file(encoder_id(), folder, 64)

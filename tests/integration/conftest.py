"""A real Apache Kafka for the tests: one for the session, topics and consumer group of its own for each test.

MILLSTREAM_TEST_BOOTSTRAP names a cluster to use instead of starting one.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiokafka import AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from models.errors import BrokerUnavailable
from streams import topics
from streams.broker import KafkaCluster, fetch_jars
from streams.kafka_clients import new_admin, new_consumer, new_producer
from streams.settings import Settings, render_toml

REPOSITORY = Path(__file__).resolve().parents[2]
JARS_FOLDER = REPOSITORY / ".millstream" / "kafka"
"""Kept between runs, ignored by git: the jars are fetched once."""
PARTITIONS = 4

NewCluster = Callable[[int], KafkaCluster]
SettingsWith = Callable[..., Settings]


@pytest.fixture(scope="session")
def kafka_jars() -> Path:
    """Kafka's jars; skips where there is neither Java nor Maven."""
    try:
        return fetch_jars(JARS_FOLDER)
    except BrokerUnavailable as error:
        pytest.skip(f"no local Kafka: {error}")


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[str]:
    """host:port of a ready broker, stopped at the end by its pid."""
    named = os.environ.get("MILLSTREAM_TEST_BOOTSTRAP")
    if named:
        yield named
        return
    jars = request.getfixturevalue("kafka_jars")
    cluster = KafkaCluster(tmp_path_factory.mktemp("kafka"), jars=jars)
    try:
        cluster.start_processes()
        # A thread of its own: the test that asks first may already run a loop in this one.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(lambda: asyncio.run(cluster.wait_ready())).result()
        yield cluster.bootstrap_servers
    finally:
        cluster.stop()


@pytest.fixture
def new_cluster(kafka_jars: Path, tmp_path: Path) -> Iterator[NewCluster]:
    """Make a cluster of 1 or 3 nodes for one test alone, to stop, pause, kill and restart; not started yet."""
    made: list[KafkaCluster] = []

    def new(size: int = 1) -> KafkaCluster:
        made.append(KafkaCluster(tmp_path / f"cluster-{len(made)}", jars=kafka_jars, size=size))
        return made[-1]

    try:
        yield new
    finally:
        for cluster in made:
            cluster.stop(5.0)


@pytest.fixture
def settings_with(tmp_path: Path, request: pytest.FixtureRequest) -> SettingsWith:
    """Make settings for this test: unique topic prefix and group, few partitions, short time-outs.

    Each keyword is a section with the fields to set: ``settings_with(topics={"partitions": 2})``. Without
    ``kafka={"bootstrap_servers": …}`` the session's broker is used. No topic is created.
    """
    return settings_maker(tmp_path, lambda: request.getfixturevalue("kafka"))


def settings_maker(folder: Path, default_bootstrap: Callable[[], str]) -> SettingsWith:
    """Return what the fixture ``settings_with`` is, for a scenario that several tests look at."""
    name = f"t{uuid.uuid4().hex[:12]}"

    def build(**sections: dict[str, Any]) -> Settings:
        values: dict[str, Any] = {
            "kafka": {"request_timeout_seconds": 10.0},
            "broker": {"folder": folder / "kafka"},
            "topics": {"prefix": name, "partitions": PARTITIONS},
            # Who is randomised changes with the week: a test that wants it says so.
            "exploration": {"randomised_share": 0.0},
            "worker": {
                "group": f"{name}-group",
                "data_folder": folder / "worker",
                "session_timeout_seconds": 6.0,
                "rebalance_timeout_seconds": 6.0,
                "heartbeat_interval_seconds": 0.5,
                "commit_interval_seconds": 0.2,
                "restart_backoff_seconds": 0.2,
                "port": 0,
            },
            "models": {"url": str(folder / "registry"), "cache_folder": folder / "bundles"},
        }
        for section, fields in sections.items():
            values[section] = {**values.get(section, {}), **fields}
        if "bootstrap_servers" not in values["kafka"]:
            values["kafka"]["bootstrap_servers"] = default_bootstrap()
        return Settings(**values)

    return build


@pytest_asyncio.fixture
async def settings(settings_with: SettingsWith) -> AsyncIterator[Settings]:
    """Settings of this test alone, its topics created; the topics are deleted afterwards."""
    made = settings_with()
    await topics.create(made)
    yield made
    await delete_topics(made)


@pytest_asyncio.fixture
async def producer(settings: Settings) -> AsyncIterator[AIOKafkaProducer]:
    """A started producer on the test's cluster."""
    started = new_producer(settings)
    await started.start()
    yield started
    await started.stop()


async def delete_topics(settings: Settings, names: Sequence[str] | None = None) -> None:
    """Delete these topics (default: all of ``settings``) and return when the broker no longer lists them."""
    admin = new_admin(settings)
    try:
        await admin.start()
        doomed = set(names if names is not None else topics.TopicNames.of(settings).all())
        present = doomed & set(await admin.list_topics())
        if present:
            await admin.delete_topics(sorted(present))

        async def gone() -> bool:
            return not doomed & set(await admin.list_topics())

        await wait_until(gone, 30.0, "the topics are deleted")
    except KafkaError as error:
        raise AssertionError(f"the test's topics could not be deleted: {error!r}") from error
    finally:
        await admin.close()


async def wait_until(
    condition: Callable[[], bool] | Callable[[], Awaitable[bool]],
    timeout_seconds: float = 30.0,
    what: str = "the condition",
    *,
    every_seconds: float = 0.05,
) -> None:
    """Return when ``condition`` (plain or async) is true; AssertionError when it is not within the time."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        result = condition()
        if await result if inspect.isawaitable(result) else result:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout_seconds} s")
        await asyncio.sleep(every_seconds)


async def read_topic(
    settings: Settings, topic: str, *, partition: int | None = None, timeout_seconds: float = 30.0
) -> list[ConsumerRecord]:
    """Return all records from the beginning to the end offsets that stand now: by partition, each in order."""
    consumer = new_consumer(settings)
    records: list[ConsumerRecord] = []
    try:
        await consumer.start()
        await consumer._client.set_topics([topic])
        found = sorted(consumer.partitions_for_topic(topic) or ())
        wanted = [TopicPartition(topic, p) for p in found if partition in (None, p)]
        ends = await consumer.end_offsets(wanted)
        consumer.assign(wanted)
        await consumer.seek_to_beginning(*wanted)
        deadline = time.monotonic() + timeout_seconds
        left = [tp for tp in wanted if await consumer.position(tp) < ends[tp]]
        while left:
            if time.monotonic() > deadline:
                raise AssertionError(f"{topic} was not read to its end within {timeout_seconds} s")
            for tp, batch in (await consumer.getmany(*left, timeout_ms=100)).items():
                records += [r for r in batch if r.offset < ends[tp]]
            left = [tp for tp in left if await consumer.position(tp) < ends[tp]]
    finally:
        await consumer.stop()
    return sorted(records, key=lambda r: (r.partition, r.offset))


def environment(settings: Settings, folder: Path) -> dict[str, str]:
    """Return the environment of a subprocess that must run with ``settings``: a TOML file in ``folder`` names them."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "millstream.toml"
    file.write_text(render_toml(settings), "utf-8")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MILLSTREAM_")}
    return {**kept, "MILLSTREAM_CONFIG": str(file), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}

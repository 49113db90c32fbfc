"""Lanes of the encoder process: what is encoded, what is left, what is taken away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest

from models.events import Item
from models.hashing import hash64
from streams import item_vectors
from streams.encode_queue import EncodeQueue
from streams.item_encoder import Forgetting, ItemEncoder, KnownEncodings, Partitions
from streams.mirror import Mirror
from streams.sender import Outbox, Sender
from streams.settings import Settings

OLD, NEW = "old@1/mean64", "new@1/mean64"


@dataclass
class Read:
    """A record as a mirror or a consumer hands it on."""

    key: bytes | None
    value: bytes | None
    partition: int = 0
    topic: str = "items"
    offset: int = 0
    timestamp: int = 0
    headers: Sequence[tuple[str, bytes]] = ()


class Delivered(Sender):
    """A sender that delivers everything at once, into a list of (partition, key, is a tombstone)."""

    def __init__(self) -> None:
        self.records: list[tuple[int, bytes, bool]] = []

    async def send(self, outbox: Outbox) -> list[object]:  # type: ignore[override]
        for (_, partition), records in outbox.records.items():
            self.records += [(partition, key or b"", value is None) for key, value, _ in records]
        return []


@dataclass
class Lengths:
    """Encodes a text as its length."""

    encoder_id: str
    texts: list[str] = field(default_factory=list)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        self.texts += texts
        return np.array([[len(t)] for t in texts], np.float32)


def encoding(encoder_id: str, item_id: str, text: str | None, partition: int = 0) -> Read:
    value = None if text is None else item_vectors.value(hash64(text), np.ones(1, np.float32))
    return Read(item_vectors.key(encoder_id, item_id), value, partition)


def item(item_id: str, title: str | None) -> Read:
    value = None if title is None else msgspec.json.encode(Item(item_id=item_id, title=title))
    return Read(item_id.encode(), value)


@asynccontextmanager
async def lane(
    known: KnownEncodings, is_brought: Callable[[str, int], bool] = lambda item_id, hashed: False
) -> AsyncIterator[tuple[ItemEncoder, Lengths, Delivered]]:
    encoder, sender = Lengths(NEW), Delivered()
    queue = EncodeQueue(encoder.encode, 16)
    task = asyncio.create_task(queue.run())
    try:
        yield ItemEncoder(Settings(), encoder, queue, sender, known, is_brought=is_brought), encoder, sender
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def test_encodings_are_known_by_encoder_and_partition() -> None:
    known = KnownEncodings()
    known.apply([encoding(OLD, "a", "apple"), encoding(NEW, "a", "pear", 1), encoding(OLD, "b", "plum")])
    assert known.of(OLD, 0) == {"a": hash64("apple"), "b": hash64("plum")}
    assert known.of(NEW, 1) == {"a": hash64("pear")}
    assert known.of(NEW, 0) == {}
    assert known.encoders() == {OLD, NEW}


def test_an_encoder_whose_last_encoding_went_is_forgotten() -> None:
    known = KnownEncodings()
    known.apply([encoding(OLD, "a", "apple"), encoding(OLD, "a", None), encoding(NEW, "never there", None)])
    assert known.encoders() == set()


def test_records_that_are_no_encodings_are_passed_over() -> None:
    known = KnownEncodings()
    known.apply([Read(None, b"x"), Read(b"no zero byte", b"x"), Read(b"\0a", b"x"), Read(b"e\0a", b"no value of ours")])
    assert known.encoders() == set()


async def test_an_item_is_encoded_although_another_encoder_has_encoded_it() -> None:
    known = KnownEncodings()
    known.apply([encoding(OLD, "a", "apple")])
    async with lane(known) as (items, encoder, sender):
        await items.handle({0: [item("a", "apple")]})
        assert encoder.texts == ["apple"]
        assert sender.records == [(0, item_vectors.key(NEW, "a"), False)]
        await items.handle({0: [item("a", "apple")]})
        assert encoder.texts == ["apple"], "once"


async def test_items_of_all_partitions_are_encoded_together_and_published_each_to_its_own() -> None:
    async with lane(KnownEncodings()) as (items, encoder, sender):
        batches: list[int] = []
        encode = encoder.encode

        def counted(texts: Sequence[str]) -> np.ndarray:
            batches.append(len(texts))
            return encode(texts)

        encoder.encode = counted  # type: ignore[method-assign]
        await items.handle({0: [item("a", "apple")], 1: [item("b", "plum"), item("a", "apple")]})
        assert batches == [3]
        placed = {(0, item_vectors.key(NEW, "a")), (1, item_vectors.key(NEW, "b")), (1, item_vectors.key(NEW, "a"))}
        assert {(partition, key) for partition, key, _ in sender.records} == placed


async def test_what_bundles_bring_is_not_encoded_until_its_text_changes() -> None:
    async with lane(KnownEncodings(), lambda item_id, hashed: hashed == hash64("apple")) as (items, encoder, _):
        await items.handle({0: [item("a", "apple")]})
        assert encoder.texts == []
        await items.handle({0: [item("a", "pear")]})
        assert encoder.texts == ["pear"]


async def test_a_text_that_goes_back_to_what_a_bundle_brought_is_encoded_again() -> None:
    async with lane(KnownEncodings(), lambda item_id, hashed: hashed == hash64("apple")) as (items, encoder, _):
        await items.handle({0: [item("a", "pear")]})
        await items.handle({0: [item("a", "apple")]})
        # The topic holds the pear: a worker that read it needs the apple there too.
        assert encoder.texts == ["pear", "apple"]


async def test_a_removed_item_loses_the_encoding_of_this_encoder_alone() -> None:
    known = KnownEncodings()
    known.apply([encoding(OLD, "a", "apple"), encoding(NEW, "a", "apple")])
    async with lane(known) as (items, _, sender):
        await items.handle({0: [item("a", None)]})
        assert sender.records == [(0, item_vectors.key(NEW, "a"), True)]
        assert known.encoders() == {OLD}


def mirror_of(*partitions: int) -> Mirror:
    mirror = Mirror(Settings(), "item-vectors", lambda records: None)
    mirror.positions.update(dict.fromkeys(partitions, 1))
    return mirror


def test_the_shared_mirror_follows_the_partitions_of_all_lanes() -> None:
    mirror, known = mirror_of(), KnownEncodings()
    partitions = Partitions(mirror, known, 4)
    one, two = object(), object()
    partitions.assign(one, [0, 1])
    partitions.assign(two, [1, 2, 7])
    assert mirror._wanted == {0, 1, 2, 3}
    partitions.drop(one)
    assert mirror._wanted == {1, 2, 3}


def test_what_was_known_of_a_partition_goes_with_it() -> None:
    mirror, known = mirror_of(), KnownEncodings()
    partitions = Partitions(mirror, known, 4)
    lane = object()
    partitions.assign(lane, [0, 1])
    known.apply([encoding(OLD, "a", "apple", 0), encoding(OLD, "b", "pear", 1)])
    partitions.assign(lane, [1])
    assert known.of(OLD, 0) == {}
    assert known.of(OLD, 1) == {"b": hash64("pear")}


def forgetting(
    known: KnownEncodings, named: Callable[[], set[str] | None], *partitions: int
) -> tuple[Forgetting, Delivered]:
    sender = Delivered()
    settings = Settings(models={"forget_encodings_hours": 1})
    return Forgetting(settings, sender, known, mirror_of(*partitions), named), sender


@pytest.fixture
def known() -> KnownEncodings:
    known = KnownEncodings()
    known.apply([encoding(OLD, "a", "apple"), encoding(OLD, "b", "pear", 1), encoding(NEW, "a", "apple")])
    return known


async def test_encodings_that_no_role_names_go_after_a_while(known: KnownEncodings) -> None:
    forget, sender = forgetting(known, lambda: {NEW}, 0, 1)
    await forget.look(0.0)
    await forget.look(3_599.0)
    assert sender.records == []
    await forget.look(3_600.0)
    assert sender.records == [(0, item_vectors.key(OLD, "a"), True), (1, item_vectors.key(OLD, "b"), True)]
    assert known.encoders() == {NEW}


async def test_partitions_that_this_process_does_not_mirror_are_left_to_others(known: KnownEncodings) -> None:
    forget, sender = forgetting(known, lambda: {NEW}, 1)
    await forget.look(0.0)
    await forget.look(3_600.0)
    assert sender.records == [(1, item_vectors.key(OLD, "b"), True)]


async def test_an_encoder_that_is_named_again_starts_its_time_anew(known: KnownEncodings) -> None:
    named = {NEW}
    forget, sender = forgetting(known, lambda: named, 0, 1)
    await forget.look(0.0)
    named = {NEW, OLD}
    await forget.look(1_800.0)
    named = {NEW}
    await forget.look(3_700.0)
    await forget.look(7_200.0)
    assert sender.records == []


async def test_nothing_goes_while_a_role_names_what_is_not_known(known: KnownEncodings) -> None:
    named: set[str] | None = {NEW}
    forget, sender = forgetting(known, lambda: named, 0, 1)
    await forget.look(0.0)
    named = None
    await forget.look(4_000.0)
    named = {NEW}
    await forget.look(4_001.0)
    assert sender.records == []

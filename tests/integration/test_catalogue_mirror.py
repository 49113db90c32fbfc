"""Encodings of an encoder that a worker hears of late: the topic had them before."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest

from models.bootstrap import Space
from models.catalogue import Catalogue
from models.events import Item
from models.item_index import ItemIndex
from models.retrieval import VectorIndex
from streams import item_vectors
from streams.catalogue_mirror import CatalogueMirror
from streams.sender import Outbox
from streams.settings import Settings
from streams.topic_io import TopicWriter
from streams.topics import TopicNames
from tests.integration.conftest import wait_until

pytestmark = pytest.mark.integration

EAST, NORTH = np.eye(4, dtype=np.float32)[:2]
OWN, OTHER = "own@1/mean64", "other@2/mean64"


async def test_encoder_that_is_added_late_has_what_the_topic_held_before_and_what_came_since(
    settings: Settings,
) -> None:
    names = TopicNames.of(settings)
    space = Space("a-space", OWN, np.eye(4, dtype=np.float32))
    catalogue = Catalogue(ItemIndex(), 4)
    with ThreadPoolExecutor(1) as executor:
        mirror = CatalogueMirror(
            settings, catalogue, VectorIndex(4), space, executor, on_refused=lambda record, error: None
        )
        async with TopicWriter(settings, names.items, names.item_vectors) as writer:

            async def publish(item_id: str, **vectors: np.ndarray) -> None:
                outbox = Outbox()
                record = msgspec.json.encode(Item(item_id=item_id, title="t"))
                writer.add(outbox, names.items, item_id.encode(), record)
                for encoder, vector in vectors.items():
                    key = item_vectors.key({"own": OWN, "other": OTHER}[encoder], item_id)
                    writer.add(outbox, names.item_vectors, key, item_vectors.value(1, vector))
                await writer.send(outbox)

            await publish("a", own=EAST, other=NORTH)
            await publish("b", own=EAST)
            task = asyncio.create_task(mirror.run())
            try:
                await asyncio.wait_for(mirror.caught_up(), 30)
                assert mirror.state.encodings.keys() == {OWN}
                await asyncio.wait_for(mirror.add_encoder(OTHER, 4), 30)
                await publish("c", own=EAST, other=NORTH)
                rows = catalogue.index.rows(["a", "b"])
                taken = mirror.state.encodings[OTHER].take(rows)[0].astype(np.float32)
                assert taken.tolist() == [NORTH.tolist(), [0, 0, 0, 0]]
                assert mirror.state.without_encoding(OTHER, time.time_ns() // 1_000_000) >= 1

                def has_c() -> bool:
                    return bool(mirror.state.encodings[OTHER].take(catalogue.index.rows(["c"]))[1][0])

                await wait_until(has_c, what="the record that came since is applied")
                assert mirror.state.encodings[OTHER].seen is None
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

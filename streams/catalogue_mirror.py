"""Keeps catalogue and vector index equal to the ``items`` and ``item-vectors`` topics.

All changes of state run in the worker's one state thread, a chunk at a time, so that a bulk load neither holds the
event loop nor stands before a slate for long.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Final

import numpy as np
import numpy.typing as npt

from models.bootstrap import Space
from models.catalogue import Catalogue
from models.errors import RecordError
from models.events import ITEM_CODEC, Item
from models.item_index import UNKNOWN
from models.retrieval import VectorIndex
from streams import item_vectors
from streams.mirror import Mirror, Record
from streams.profiles import OnRefused, content_type
from streams.settings import Settings
from streams.topics import TopicNames

CHUNK_RECORDS: Final = 128
SWEEP_SECONDS: Final = 10.0

Rows = npt.NDArray[np.int32]
Refused = list[tuple[Record, RecordError]]


class CatalogueState:
    """The two topics applied to catalogue and index: what the mirror does in the state thread.

    Records of the two topics come in any order: an encoding may be there before its item.
    """

    def __init__(self, catalogue: Catalogue, index: VectorIndex, space: Space) -> None:
        self.catalogue = catalogue
        self.index = index
        self.space = space
        self._prefix = item_vectors.key_prefix(space.encoder_id)
        self._base: npt.NDArray[np.float16] = np.zeros((1_024, space.base_dim), np.float16)
        self._base_hash: npt.NDArray[np.uint64] = np.zeros(1_024, np.uint64)  # 0 = no encoding
        self._embeddings: dict[int, list[float]] = {}
        self._indexed: npt.NDArray[np.bool_] = np.zeros(1_024, np.bool_)

    def apply_items(self, records: Sequence[Record], now_ms: int) -> Refused:
        """Apply records of ``items`` in order; returns those that are refused, which change nothing."""
        refused: Refused = []
        touched: dict[int, None] = {}
        for record in records:
            try:
                row = self._apply_item(record)
            except RecordError as error:
                refused.append((record, error))
                continue
            if row != UNKNOWN:
                touched[row] = None
        self._reindex(touched, now_ms)
        return refused

    def apply_vectors(self, records: Sequence[Record], now_ms: int) -> Refused:
        """Apply records of ``item-vectors`` in order; those of another encoder are passed over."""
        refused: Refused = []
        hashes: dict[int, int] = {}
        for record in records:
            item_id = item_vectors.item_id_of(record.key, self._prefix)
            if item_id is None:
                continue
            try:
                encoding = None if record.value is None else item_vectors.decode(record.value, self.space.base_dim)
            except RecordError as error:
                refused.append((record, error))
                continue
            row = self.catalogue.index.add(item_id)
            self._grow(row)
            self._base[row] = 0 if encoding is None else encoding.vector
            self._base_hash[row] = hashes[row] = 0 if encoding is None else encoding.content_hash
        self._set_vectors(hashes)
        self._reindex(hashes, now_ms)
        return refused

    def sweep(self, now_ms: int) -> int:
        """Take expired items out of the index and return their number. Slates leave them out without this."""
        n = min(len(self._indexed), self.catalogue.capacity)
        expired = np.flatnonzero(self._indexed[:n] & (self.catalogue.expires_at_ms[:n] <= now_ms)).astype(np.int32)
        if len(expired):
            self._indexed[expired] = False
            self.index.remove(expired)
        return len(expired)

    def base_encodings(self, rows: Rows) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.bool_]]:
        """Return base encodings float16 [n, B] and whether each is there: what a swap of bundles projects anew."""
        return self._base[rows], self._base_hash[rows] != 0

    def _apply_item(self, record: Record) -> int:
        item_id = (record.key or b"").decode("utf-8", "replace")
        if record.value is None:
            row = self.catalogue.remove(item_id)
            self._embeddings.pop(row, None)
            return row
        item = ITEM_CODEC.decode(record.value, content_type(record.headers))
        if item.item_id != item_id:
            raise RecordError("key-mismatch", f"the key is {item_id!r}, item_id is {item.item_id!r}")
        row = self.catalogue.upsert(item)
        self._grow(row)
        self._set_embedding(row, item)
        return row

    def _set_embedding(self, row: int, item: Item) -> None:
        before = self._embeddings.get(row)
        if item.embedding == before:
            return
        if item.embedding is None:
            del self._embeddings[row]
        else:
            self._embeddings[row] = item.embedding
        self._set_vector(row)

    def _set_vectors(self, hashes: dict[int, int]) -> None:
        rows = np.fromiter(hashes, np.int64, len(hashes))
        vectors = self.space.vectors(self._base[rows]) if len(rows) else ()
        for row, vector in zip(hashes, vectors, strict=True):
            if row in self._embeddings:
                self._set_vector(row)
            else:
                self.catalogue.set_vector(row, vector, hashes[row])

    def _set_vector(self, row: int) -> None:
        encoded = int(self._base_hash[row])
        vector = self.space.item_vector(self._base[row] if encoded else None, self._embeddings.get(row))
        self.catalogue.set_vector(row, np.zeros(self.space.dim, np.float32) if vector is None else vector, encoded)

    def _reindex(self, rows: dict[int, None] | dict[int, int], now_ms: int) -> None:
        touched = np.fromiter(rows, np.int32, len(rows))
        if not len(touched):
            return
        catalogue = self.catalogue
        self._grow(int(touched.max()))
        findable = catalogue.servable(touched, now_ms) & catalogue.vectors_of(touched)[1]
        there, gone = touched[findable], touched[~findable & self._indexed[touched]]
        if len(gone):
            self.index.remove(gone)
            self._indexed[gone] = False
        # A changed title with its old vector would be a change for nothing, but a rare one.
        if len(there):
            self.index.add(there, catalogue.vectors[there])
            self._indexed[there] = True

    def _grow(self, row: int) -> None:
        size = len(self._base_hash)
        if row < size:
            return
        extra = max(row + 1, 2 * size) - size
        self._base = np.concatenate([self._base, np.zeros((extra, self.space.base_dim), np.float16)])
        self._base_hash = np.concatenate([self._base_hash, np.zeros(extra, np.uint64)])
        self._indexed = np.concatenate([self._indexed, np.zeros(extra, np.bool_)])


class CatalogueMirror:
    """Mirrors ``items`` and ``item-vectors`` into a CatalogueState, through the state thread's executor."""

    def __init__(
        self,
        settings: Settings,
        catalogue: Catalogue,
        index: VectorIndex,
        space: Space,
        executor: Executor,
        on_refused: OnRefused,
    ) -> None:
        """``on_refused`` is called in the event loop for each refused record; it must not raise."""
        names = TopicNames.of(settings)
        self.state = CatalogueState(catalogue, index, space)
        self.items = Mirror(settings, names.items, self._on_items)
        self.vectors = Mirror(settings, names.item_vectors, self._on_vectors)
        self._executor = executor
        self._on_refused = on_refused

    @property
    def is_caught_up(self) -> bool:
        """Whether both topics were read up to the end offsets that stood when reading began."""
        return self.items.caught_up.is_set() and self.vectors.caught_up.is_set()

    async def caught_up(self) -> None:
        """Return when both topics were read up to those end offsets."""
        await self.items.caught_up.wait()
        await self.vectors.caught_up.wait()

    async def run(self) -> None:
        """Mirror until cancelled; an error of our own code is raised."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.items.run(), name="mirror-items")
            group.create_task(self.vectors.run(), name="mirror-item-vectors")
            group.create_task(self._sweep(), name="sweep-expired-items")

    async def _on_items(self, records: Sequence[Record]) -> None:
        await self._apply(self.state.apply_items, records)

    async def _on_vectors(self, records: Sequence[Record]) -> None:
        await self._apply(self.state.apply_vectors, records)

    async def _apply(self, apply: Callable[[Sequence[Record], int], Refused], records: Sequence[Record]) -> None:
        loop = asyncio.get_running_loop()
        for start in range(0, len(records), CHUNK_RECORDS):
            chunk = records[start : start + CHUNK_RECORDS]
            for record, error in await loop.run_in_executor(self._executor, apply, chunk, _now_ms()):
                self._on_refused(record, error)

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            await loop.run_in_executor(self._executor, self.state.sweep, _now_ms())


def _now_ms() -> int:
    return time.time_ns() // 1_000_000

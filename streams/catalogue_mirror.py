"""Keeps catalogue and vector index equal to the ``items`` and ``item-vectors`` topics.

All changes of state run in the worker's one state thread, a chunk at a time, so that a bulk load neither holds the
event loop nor stands before a slate for long.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt

from models.bootstrap import Halves, Hashes, Space
from models.catalogue import Catalogue, SpaceVectors
from models.errors import RecordError
from models.events import ITEM_CODEC, Item
from models.item_index import UNKNOWN
from models.item_space import BaseEncodings, ItemSpace
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
    """The two topics applied to catalogue, encodings and spaces: what the mirror does in the state thread.

    Records of the two topics come in any order: an encoding may be there before its item. Base encodings are kept by
    encoder; each space that a model serves or is scored in has its own vectors and index, and follows every record.
    """

    def __init__(self, catalogue: Catalogue, index: VectorIndex, space: Space) -> None:
        """Begin with one space: that of the catalogue's vectors and of ``index``."""
        self.catalogue = catalogue
        self.encodings: dict[str, BaseEncodings] = {}
        self.spaces: dict[str, ItemSpace] = {}
        """By space id; those that are whole."""
        self._building: list[ItemSpace] = []
        self._embeddings: dict[int, list[float]] = {}
        encodings = self._encodings_of(space)
        first = ItemSpace(space, encodings, catalogue, catalogue.space_vectors, index)
        self.spaces[space.space_id] = first
        self.space = space
        """The space that it began with."""

    @property
    def index(self) -> VectorIndex:
        """Return the index of the space that it began with. Raises KeyError once that was freed."""
        return self.spaces[self.space.space_id].index

    def apply_items(self, records: Sequence[Record], now_ms: int) -> Refused:
        """Apply records of ``items`` in order; returns those that are refused, which change nothing."""
        refused: Refused = []
        touched: dict[int, None] = {}
        fresh: dict[int, None] = {}
        for record in records:
            try:
                row = self._apply_item(record, fresh)
            except RecordError as error:
                refused.append((record, error))
                continue
            if row != UNKNOWN:
                touched[row] = None
        rows = _rows(touched)
        for space in self.spaces.values():
            space.refresh(_rows(fresh), self._embeddings)
            space.reindex(rows, now_ms)
        for space in self._building:
            space.changed.update(touched)
        return refused

    def apply_vectors(self, records: Sequence[Record], now_ms: int) -> Refused:
        """Apply records of ``item-vectors`` in order; those of encoders that no space is of are passed over."""
        return self._apply_vectors(records, now_ms, self.encodings)

    def apply_older_vectors(self, encoder_id: str, records: Sequence[Record], now_ms: int) -> Refused:
        """Apply what the topic held of one encoder before it was added; rows that have been set since keep theirs."""
        encodings = self.encodings.get(encoder_id)
        return [] if encodings is None else self._apply_vectors(records, now_ms, {encoder_id: encodings}, older=True)

    def sweep(self, now_ms: int) -> int:
        """Take expired items out of every index and return their number. Slates leave them out without this."""
        return sum(space.sweep(now_ms) for space in self.spaces.values())

    def add_encoder(self, encoder_id: str, base_dim: int) -> bool:
        """Keep the encodings of one more encoder; True where it is new: what the topic held before is to be read."""
        if encoder_id in self.encodings:
            return False
        made = self.encodings[encoder_id] = BaseEncodings(encoder_id, base_dim)
        made.seen = set()
        return True

    def end_backfill(self, encoder_id: str) -> None:
        """Say that what the topic held before ``add_encoder`` was applied."""
        if encoder_id in self.encodings:
            self.encodings[encoder_id].seen = None

    def bring(self, encoder_id: str, items: Hashes, content_hashes: Hashes, base: Halves, now_ms: int) -> None:
        """Take encodings that a bundle brings: hashes uint64 [n], base encodings float16 [n, B]."""
        encodings = self.encodings[encoder_id]
        rows = self.catalogue.index.rows_by_hash(items.tolist(), len(items))
        self._changed_in(encodings, dict.fromkeys(encodings.bring(rows, items, content_hashes, base)), now_ms)

    def begin(self, space: Space, index: VectorIndex) -> tuple[ItemSpace, dict[int, list[float]]]:
        """Return an empty space to be built aside, and a copy of the items' own embeddings to build it with."""
        made = ItemSpace(space, self._encodings_of(space), self.catalogue, SpaceVectors(space.dim), index)
        self._building.append(made)
        return made, dict(self._embeddings)

    def catch_up(self, space: ItemSpace, now_ms: int) -> bool:
        """Bring a built space nearer to the present; once it is there, True: it follows every record from now on."""
        # Twice what the mirror applies at once: it converges while records keep coming.
        if not space.catch_up(self._embeddings, now_ms, 2 * CHUNK_RECORDS):
            return False
        self._building.remove(space)
        self.spaces[space.space.space_id] = space
        return True

    def forget(self, space: ItemSpace) -> None:
        """Give up a space that is being built."""
        if space in self._building:
            self._building.remove(space)

    def keep_only(self, space_ids: Collection[str], encoder_ids: Collection[str]) -> list[ItemSpace]:
        """Keep these spaces, and the encodings of their encoders and of ``encoder_ids``; return the spaces that went.

        The caller closes their indexes: that may wait for a build.
        """
        gone = [self.spaces.pop(space_id) for space_id in list(self.spaces) if space_id not in space_ids]
        used = {*encoder_ids, *(space.space.encoder_id for space in [*self.spaces.values(), *self._building])}
        for encoder_id in [encoder_id for encoder_id in self.encodings if encoder_id not in used]:
            del self.encodings[encoder_id]
        return gone

    def without_encoding(self, encoder_id: str, now_ms: int) -> int:
        """Return how many servable items with text have no encoding of their present text by this encoder."""
        rows = self.catalogue.servable_rows(now_ms)
        content = self.catalogue.content_hashes(rows)
        encoded = self.encodings[encoder_id].contents(rows)
        return int(((content != 0) & (content != encoded)).sum())

    def _apply_vectors(
        self, records: Sequence[Record], now_ms: int, known: Mapping[str, BaseEncodings], *, older: bool = False
    ) -> Refused:
        refused: Refused = []
        touched: dict[str, dict[int, None]] = {}
        for record in records:
            encoder_id = item_vectors.encoder_id_of(record.key)
            encodings = None if encoder_id is None else known.get(encoder_id)
            if encoder_id is None or encodings is None:
                continue
            try:
                encoding = None if record.value is None else item_vectors.decode(record.value, encodings.dim)
            except RecordError as error:
                refused.append((record, error))
                continue
            item_id = item_vectors.item_id_of(record.key, item_vectors.key_prefix(encoder_id))
            assert item_id is not None, "the key begins with the encoder's id"
            row = self.catalogue.index.add(item_id)
            if older and encodings.seen is not None and row in encodings.seen:
                continue
            content_hash = 0 if encoding is None else encoding.content_hash
            encodings.set(row, None if encoding is None else encoding.vector, content_hash, older=older)
            touched.setdefault(encoder_id, {})[row] = None
        for encoder_id, rows in touched.items():
            self._changed_in(known[encoder_id], rows, now_ms)
        return refused

    def _changed_in(self, encodings: BaseEncodings, touched: dict[int, None], now_ms: int) -> None:
        rows = _rows(touched)
        for space in self.spaces.values():
            if space.encodings is encodings:
                space.refresh(rows, self._embeddings)
                space.reindex(rows, now_ms)
        for space in self._building:
            if space.encodings is encodings:
                space.changed.update(touched)

    def _apply_item(self, record: Record, fresh: dict[int, None]) -> int:
        """Apply one record and return its row; into ``fresh`` where its vectors are to be made anew."""
        item_id = (record.key or b"").decode("utf-8", "replace")
        if record.value is None:
            row = self.catalogue.remove(item_id)
            self._embeddings.pop(row, None)
            return row
        item = ITEM_CODEC.decode(record.value, content_type(record.headers))
        if item.item_id != item_id:
            raise RecordError("key-mismatch", f"the key is {item_id!r}, item_id is {item.item_id!r}")
        row = self.catalogue.upsert(item)
        welcomed = [encodings.welcome(row, item_id) for encodings in self.encodings.values()]
        if self._set_embedding(row, item) or any(welcomed):
            fresh[row] = None
        return row

    def _set_embedding(self, row: int, item: Item) -> bool:
        if item.embedding == self._embeddings.get(row):
            return False
        if item.embedding is None:
            del self._embeddings[row]
        else:
            self._embeddings[row] = item.embedding
        return True

    def _encodings_of(self, space: Space) -> BaseEncodings:
        known = self.encodings.get(space.encoder_id)
        if known is None:
            known = self.encodings[space.encoder_id] = BaseEncodings(space.encoder_id, space.base_dim)
        return known


def _rows(touched: Collection[int]) -> Rows:
    return np.fromiter(touched, np.int32, len(touched))


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
        self._settings = settings
        self._names = names
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

    async def add_encoder(self, encoder_id: str, base_dim: int) -> None:
        """Keep the encodings of one more encoder, and return when what the topic already holds of it was read.

        The mirror has passed those records by: they are read again, from the beginning, by a reader of their own.
        Cancelled in the middle, a later call begins again.
        """
        loop = asyncio.get_running_loop()
        state = self.state
        is_new = await loop.run_in_executor(self._executor, state.add_encoder, encoder_id, base_dim)
        if not is_new and state.encodings[encoder_id].seen is None:
            return

        async def older(records: Sequence[Record]) -> None:
            await self._apply(partial(state.apply_older_vectors, encoder_id), records)

        reader = Mirror(self._settings, self._names.item_vectors, older)
        reading = asyncio.create_task(reader.run(), name="read-item-vectors-again")
        caught_up = asyncio.create_task(reader.caught_up.wait())
        try:
            await asyncio.wait({reading, caught_up}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
        finally:
            for task in (reading, caught_up):
                task.cancel()
            await asyncio.gather(reading, caught_up, return_exceptions=True)
        await loop.run_in_executor(self._executor, state.end_backfill, encoder_id)

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

"""From records of ``items`` to records of ``item-vectors``, one lane for each encoder that a role names.

A lane has a consumer group of its own, so that each item is encoded by one process for each encoder. What the topic
holds already, of any encoder, is known from one mirror that all lanes share.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, RebalanceInProgressError

from models.encoder import item_text
from models.errors import EncoderError, RecordError
from models.events import ITEM_CODEC
from models.hashing import hash64
from streams import item_vectors
from streams.encode_queue import EncodeQueue
from streams.kafka_clients import new_consumer
from streams.mirror import Mirror, Record
from streams.profiles import content_type
from streams.sender import Outbox, Sender
from streams.settings import Settings
from streams.topics import TopicNames

log = structlog.get_logger(__name__)

MAX_RECORDS: Final = 256
"""Records of ``items`` handled between two commits."""
FORGET_RECORDS: Final = 1_000
"""Encodings taken away between two looks at whether they still may be."""
NOTHING: Final[Mapping[str, int]] = {}

Place = tuple[int, str]
"""(partition, item id)."""
IsBrought = Callable[[str, int], bool]
"""Whether bundles bring the encoding of an item (id) whose text has a content hash."""


class Encoder(Protocol):
    """The part of ``TextEncoder`` that is used here."""

    encoder_id: str

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return base encodings, float32 [n, B]."""
        ...


class KnownEncodings:
    """Which content of which item ``item-vectors`` holds, by encoder and partition: only the hashes are kept."""

    def __init__(self) -> None:
        self._hashes: dict[tuple[str, int], dict[str, int]] = {}

    def encoders(self) -> set[str]:
        """Return the ids of encoders that have an encoding."""
        return {encoder_id for encoder_id, _ in self._hashes}

    def of(self, encoder_id: str, partition: int) -> Mapping[str, int]:
        """Return the content hashes of an encoder's encodings in one partition, by item."""
        return self._hashes.get((encoder_id, partition), NOTHING)

    def set(self, encoder_id: str, partition: int, item_id: str, hashed: int | None) -> None:
        """Note an encoding that was delivered, or with None that it was taken away."""
        place = (encoder_id, partition)
        if hashed is not None:
            self._hashes.setdefault(place, {})[item_id] = hashed
        elif place in self._hashes:
            self._hashes[place].pop(item_id, None)
            if not self._hashes[place]:
                del self._hashes[place]

    def drop(self, partition: int) -> None:
        """Forget what is known of a partition that is no longer mirrored: it is read again when it comes back."""
        for place in [place for place in self._hashes if place[1] == partition]:
            del self._hashes[place]

    def apply(self, records: Sequence[Record]) -> None:
        """Apply records of ``item-vectors``."""
        for record in records:
            encoder_id = item_vectors.encoder_id_of(record.key)
            item_id = item_vectors.item_id_of(record.key, item_vectors.key_prefix(encoder_id or ""))
            if not encoder_id or item_id is None:
                continue
            if record.value is None:
                self.set(encoder_id, record.partition, item_id, None)
                continue
            try:
                self.set(encoder_id, record.partition, item_id, item_vectors.content_hash_of(record.value))
            except RecordError as error:
                # Encoded anew when its item is read again; the worker's mirror reports it.
                log.warning("item_vector_refused", item=item_id, error=str(error))


class Partitions:
    """Which partitions the lanes of this process have; the shared mirror follows all of them."""

    def __init__(self, mirror: Mirror, known: KnownEncodings, partitions: int) -> None:
        self.count = partitions
        self._mirror = mirror
        self._known = known
        self._by_lane: dict[object, set[int]] = {}
        self._mirrored: set[int] = set()

    def assign(self, lane: object, partitions: Iterable[int]) -> None:
        """Note what a lane has now: partitions of ``items``."""
        self._by_lane[lane] = {p % self.count for p in partitions}
        self._follow()

    def drop(self, lane: object) -> None:
        """Forget a lane that ended."""
        self._by_lane.pop(lane, None)
        self._follow()

    def _follow(self) -> None:
        wanted = set().union(*self._by_lane.values())
        if wanted == self._mirrored:
            return
        for partition in self._mirrored - wanted:
            self._known.drop(partition)
        self._mirrored = wanted
        self._mirror.assign(wanted)


class _Assignment(ConsumerRebalanceListener):  # type: ignore[misc]
    """Has the mirror of ``item-vectors`` follow the partitions of ``items``: encodings lie in the same one."""

    def __init__(self, partitions: Partitions, lane: object) -> None:
        self._partitions = partitions
        self._lane = lane

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Nothing to do: what was delivered stays, what was not is read by the next owner."""

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Mirror the partitions that hold the encodings of these."""
        self._partitions.assign(self._lane, (tp.partition for tp in assigned))


class ItemEncoder:
    """From records of ``items`` to delivered records of ``item-vectors``, with one encoder."""

    def __init__(
        self,
        settings: Settings,
        encoder: Encoder,
        queue: EncodeQueue,
        sender: Sender,
        known: KnownEncodings,
        *,
        is_brought: IsBrought = lambda item_id, hashed: False,
        rank: Callable[[], int] = lambda: 0,
    ) -> None:
        """``rank`` is asked for each batch: the items of the lowest one go first."""
        self.encoded = 0
        """Texts encoded so far."""
        self.encoder_id = encoder.encoder_id
        self._encoder = encoder
        self._queue = queue
        self._sender = sender
        self._known = known
        self._is_brought = is_brought
        self._rank = rank
        self._topic = TopicNames.of(settings).item_vectors
        self._batch_texts = settings.encoder.batch_texts

    async def handle(self, records: Mapping[int, Iterable[Record]]) -> None:
        """Encode what is new in records by partition, and publish it to the same partitions of ``item-vectors``.

        Returns when the broker has acknowledged all of it. Raises DeliveryError.
        """
        wanted: dict[Place, str] = {}
        for partition, read in records.items():
            texts, gone = self._changes(read, partition)
            wanted |= {(partition, item_id): text for item_id, text in texts.items()}
            if gone:
                await take_away(self._sender, self._topic, self._known, self.encoder_id, partition, gone)
        # By length, so that a batch is not padded to its one long text.
        order = sorted(wanted, key=lambda place: len(wanted[place]))
        for start in range(0, len(order), self._batch_texts):
            part = order[start : start + self._batch_texts]
            await self._publish(await self._encode({place: wanted[place] for place in part}))

    def _changes(self, records: Iterable[Record], partition: int) -> tuple[dict[str, str], list[str]]:
        """Return the texts to encode by item, and the items whose encoding must go; the last record wins."""
        wanted: dict[str, str] = {}
        gone: dict[str, None] = {}
        held = self._known.of(self.encoder_id, partition)
        for record in records:
            item_id = (record.key or b"").decode("utf-8", "replace")
            text = ""
            if record.value is not None:
                try:
                    item = ITEM_CODEC.decode(record.value, content_type(record.headers))
                except RecordError:
                    continue  # the worker's mirror sends it to the dead letters
                if item.item_id != item_id:
                    continue
                text = item_text(item)
            wanted.pop(item_id, None)
            gone.pop(item_id, None)
            known = held.get(item_id)
            if not text:
                if known is not None:
                    gone[item_id] = None
            elif known is None:
                # What the topic says of an item goes before what a bundle brought.
                if not self._is_brought(item_id, hash64(text)):
                    wanted[item_id] = text
            elif known != hash64(text):
                wanted[item_id] = text
        return wanted, list(gone)

    async def _encode(self, texts: dict[Place, str]) -> dict[Place, tuple[int, Any]]:
        try:
            vectors = await self._queue.encode(
                list(texts.values()), urgent=False, using=self._encoder.encode, rank=self._rank()
            )
        except EncoderError as error:
            if len(texts) == 1:
                log.error("item_not_encoded", item=next(iter(texts))[1], error=str(error))
                return {}
            # One text must not cost the others of its batch their encodings.
            singles = [await self._encode({place: text}) for place, text in texts.items()]
            return {place: found for single in singles for place, found in single.items()}
        return {place: (hash64(t), v) for (place, t), v in zip(texts.items(), vectors, strict=True)}

    async def _publish(self, encoded: dict[Place, tuple[int, Any]]) -> None:
        outbox = Outbox()
        for (partition, item_id), (hashed, vector) in encoded.items():
            key = item_vectors.key(self.encoder_id, item_id)
            outbox.add(self._topic, partition, key, item_vectors.value(hashed, vector))
        await self._sender.send(outbox)
        for (partition, item_id), (hashed, _) in encoded.items():
            self._known.set(self.encoder_id, partition, item_id, hashed)
        self.encoded += len(encoded)


async def take_away(
    sender: Sender, topic: str, known: KnownEncodings, encoder_id: str, partition: int, item_ids: Sequence[str]
) -> None:
    """Remove encodings from ``item-vectors``. Raises DeliveryError."""
    outbox = Outbox()
    for item_id in item_ids:
        outbox.add(topic, partition, item_vectors.key(encoder_id, item_id), None)
    await sender.send(outbox)
    for item_id in item_ids:
        known.set(encoder_id, partition, item_id, None)


async def run_lane(
    settings: Settings, encoder: ItemEncoder, mirror: Mirror, partitions: Partitions, *, commits: bool
) -> None:
    """Encode the items of this process's share until cancelled. Raises DeliveryError.

    Without ``commits`` each start reads all items: then what was encoded is known by its hash alone, and an encoder
    whose encodings were taken away meanwhile starts anew.
    """
    names = TopicNames.of(settings)
    # The encoder is a part of the group's name: another one must read all items from their beginning.
    group = f"{settings.worker.group}-encoder-{hash64(encoder.encoder_id):016x}"
    session_ms = int(settings.worker.session_timeout_seconds * 1000)
    consumer = new_consumer(settings, group_id=group, session_timeout_ms=session_ms)
    lane = object()
    try:
        await consumer.start()
        consumer.subscribe([names.items], listener=_Assignment(partitions, lane))
        await _consume(consumer, mirror, encoder, settings, partitions.count, commits)
    finally:
        partitions.drop(lane)
        await consumer.stop()


async def _consume(
    consumer: AIOKafkaConsumer, mirror: Mirror, encoder: ItemEncoder, settings: Settings, partitions: int, commits: bool
) -> None:
    """Handle ``items`` until cancelled; offsets are committed after delivery."""
    while True:
        batches = await consumer.getmany(timeout_ms=500, max_records=MAX_RECORDS)
        if not batches:
            continue
        # Else a restart would encode again what the part of the topic not read yet already holds.
        await mirror.caught_up.wait()
        # What went to another process meanwhile is encoded there, maybe with a newer text already.
        owned = consumer.assignment()
        batches = {tp: records for tp, records in batches.items() if tp in owned}
        began, before = time.monotonic(), encoder.encoded
        by_partition: dict[int, list[Record]] = {}
        for tp, records in batches.items():
            by_partition.setdefault(tp.partition % partitions, []).extend(records)
        await encoder.handle(by_partition)
        count = encoder.encoded - before
        if count:
            seconds = round(time.monotonic() - began, 2)
            log.info("items_encoded", items=count, seconds=seconds, encoder=encoder.encoder_id)
        if commits and batches:
            with contextlib.suppress(CommitFailedError, IllegalStateError, RebalanceInProgressError):
                # A partition that went to another process meanwhile: that one knows the encodings by their hashes.
                await consumer.commit({tp: records[-1].offset + 1 for tp, records in batches.items()})
        if sum(map(len, batches.values())) < settings.encoder.batch_texts:
            # Nothing is held meanwhile: a partition that goes to another process takes its items along.
            await asyncio.sleep(settings.encoder.linger_seconds)


class Forgetting:
    """Takes the encodings of encoders that no role names off ``item-vectors``, after a while.

    Each process looks after the partitions that it mirrors; two that take the same one away do no harm.
    """

    def __init__(
        self,
        settings: Settings,
        sender: Sender,
        known: KnownEncodings,
        mirror: Mirror,
        named: Callable[[], set[str] | None],
        on_forgotten: Callable[[int], None] = lambda records: None,
    ) -> None:
        """``named``: ids of encoders that may be needed; None while one of a role's bundles is not known."""
        self._topic = TopicNames.of(settings).item_vectors
        self._patience_seconds = settings.models.forget_encodings_hours * 3_600
        self._sender = sender
        self._known = known
        self._mirror = mirror
        self._named = named
        self._on_forgotten = on_forgotten
        self._unnamed_since: dict[str, float] = {}

    async def run(self) -> None:
        """Look until cancelled. Raises DeliveryError."""
        pause_seconds = max(0.05, min(60.0, self._patience_seconds / 4))
        while True:
            await self._mirror.caught_up.wait()
            await self.look(time.monotonic())
            await asyncio.sleep(pause_seconds)

    async def look(self, now_seconds: float) -> None:
        """Take away what was named by no role for long enough at ``now_seconds``, a monotonic time."""
        named = self._named()
        if named is None:
            self._unnamed_since.clear()
            return
        unnamed = self._known.encoders() - named
        self._unnamed_since = {e: self._unnamed_since.get(e, now_seconds) for e in unnamed}
        for encoder_id, since in sorted(self._unnamed_since.items()):
            if now_seconds - since >= self._patience_seconds:
                await self._forget(encoder_id)

    async def _forget(self, encoder_id: str) -> None:
        forgotten = 0
        for partition in sorted(self._mirror.positions):
            while item_ids := list(self._known.of(encoder_id, partition))[:FORGET_RECORDS]:
                named = self._named()
                if named is None or encoder_id in named:
                    return
                await take_away(self._sender, self._topic, self._known, encoder_id, partition, item_ids)
                forgotten += len(item_ids)
                self._on_forgotten(len(item_ids))
        if forgotten:
            log.info("encodings_forgotten", encoder=encoder_id, items=forgotten)

"""``python -m streams.encoder_process``: the low-priority process in which BERT runs.

Consumes ``items`` in a group of its own, so that each item is encoded by one process, and publishes base encodings to
``item-vectors``. Answers the worker's questions (queries, profiles) first. An encoding batch can never stand before a
slate: this process has the lowest priority that the system gives, and the worker does not wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaConnectionError, RebalanceInProgressError

from models.bootstrap import find_or_compute_space
from models.encoder import TextEncoder, item_text
from models.errors import BrokerUnavailable, EncoderError, MillstreamError, RecordError
from models.events import ITEM_CODEC
from models.hashing import hash64
from streams import item_vectors, query_protocol
from streams.encode_queue import EncodeQueue
from streams.exit_codes import ExitCode, exit_code
from streams.health import HealthServer
from streams.kafka_clients import new_consumer, new_producer
from streams.logs import configure
from streams.metrics import EncoderMetrics
from streams.mirror import Mirror, Record
from streams.parent import die_with_parent, is_orphan, supervisor_pid
from streams.profiles import content_type
from streams.query_protocol import Answer, Ask
from streams.sender import Outbox, Sender
from streams.settings import Settings, load
from streams.topics import TopicNames

log = structlog.get_logger(__name__)

NICENESS: Final = 19
MAX_RECORDS: Final = 256
"""Records of ``items`` handled between two commits."""


class Encoder(Protocol):
    """The part of ``TextEncoder`` that is used here."""

    encoder_id: str

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return base encodings, float32 [n, B]."""
        ...


class KnownEncodings:
    """Which content of which item ``item-vectors`` holds for our encoder: only the hashes are kept."""

    def __init__(self, encoder_id: str) -> None:
        self._prefix = item_vectors.key_prefix(encoder_id)
        self._hashes: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._hashes)

    def get(self, item_id: str) -> int | None:
        """Return the content hash of an item's encoding, or None where it has none."""
        return self._hashes.get(item_id)

    def set(self, item_id: str, hashed: int | None) -> None:
        """Note an encoding that was delivered, or with None that it was taken away."""
        if hashed is None:
            self._hashes.pop(item_id, None)
        else:
            self._hashes[item_id] = hashed

    def apply(self, records: Sequence[Record]) -> None:
        """Apply records of ``item-vectors``."""
        for record in records:
            item_id = item_vectors.item_id_of(record.key, self._prefix)
            if item_id is None:
                continue
            if record.value is None:
                self.set(item_id, None)
                continue
            try:
                self.set(item_id, item_vectors.content_hash_of(record.value))
            except RecordError as error:
                # Encoded anew when its item is read again; the worker's mirror reports it.
                log.warning("item_vector_refused", item=item_id, error=str(error))


class ItemEncoder:
    """From records of ``items`` to delivered records of ``item-vectors``."""

    def __init__(
        self, settings: Settings, encoder_id: str, queue: EncodeQueue, sender: Sender, known: KnownEncodings
    ) -> None:
        self.encoded = 0
        """Texts encoded so far."""
        self._encoder_id = encoder_id
        self._queue = queue
        self._sender = sender
        self._known = known
        self._topic = TopicNames.of(settings).item_vectors
        self._batch_texts = settings.encoder.batch_texts

    async def handle(self, records: Iterable[Record], partition: int) -> None:
        """Encode what is new in records of one partition and publish it to partition ``partition``.

        Returns when the broker has acknowledged all of it. Raises DeliveryError.
        """
        wanted, gone = self._changes(records)
        if gone:
            outbox = Outbox()
            for item_id in gone:
                outbox.add(self._topic, partition, item_vectors.key(self._encoder_id, item_id), None)
            await self._sender.send(outbox)
            for item_id in gone:
                self._known.set(item_id, None)
        # By length, so that a batch is not padded to its one long text.
        order = sorted(wanted, key=lambda item_id: len(wanted[item_id]))
        for start in range(0, len(order), self._batch_texts):
            part = order[start : start + self._batch_texts]
            await self._publish(await self._encode({i: wanted[i] for i in part}), partition)

    def _changes(self, records: Iterable[Record]) -> tuple[dict[str, str], list[str]]:
        """Return the texts to encode by item, and the items whose encoding must go; the last record wins."""
        wanted: dict[str, str] = {}
        gone: dict[str, None] = {}
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
            known = self._known.get(item_id)
            if not text:
                if known is not None:
                    gone[item_id] = None
            elif known != hash64(text):
                wanted[item_id] = text
        return wanted, list(gone)

    async def _encode(self, texts: dict[str, str]) -> dict[str, tuple[int, Any]]:
        try:
            vectors = await self._queue.encode(list(texts.values()), urgent=False)
        except EncoderError as error:
            if len(texts) == 1:
                log.error("item_not_encoded", item=next(iter(texts)), error=str(error))
                return {}
            # One text must not cost the others of its batch their encodings.
            singles = [await self._encode({item_id: text}) for item_id, text in texts.items()]
            return {item_id: found for single in singles for item_id, found in single.items()}
        return {i: (hash64(t), v) for (i, t), v in zip(texts.items(), vectors, strict=True)}

    async def _publish(self, encoded: dict[str, tuple[int, Any]], partition: int) -> None:
        outbox = Outbox()
        for item_id, (hashed, vector) in encoded.items():
            key = item_vectors.key(self._encoder_id, item_id)
            outbox.add(self._topic, partition, key, item_vectors.value(hashed, vector))
        await self._sender.send(outbox)
        for item_id, (hashed, _) in encoded.items():
            self._known.set(item_id, hashed)
        self.encoded += len(encoded)


class QueryServer:
    """Answers ``Ask`` frames on the unix socket in the data folder."""

    def __init__(self, folder: Path, encoder_id: str, queue: EncodeQueue) -> None:
        self._folder = folder
        self._encoder_id = encoder_id
        self._queue = queue
        self._answers: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until cancelled."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = query_protocol.socket_path(self._folder)
        path.unlink(missing_ok=True)  # left by a process that was killed
        server = await asyncio.start_unix_server(self._serve, path)
        path.chmod(0o600)
        query_protocol.write_address(self._folder, path)
        try:
            await asyncio.Event().wait()
        finally:
            server.close()
            query_protocol.remove_socket(path, self._folder)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                ask = await query_protocol.read(reader, Ask)
                task = asyncio.create_task(self._answer(ask, writer))
                self._answers.add(task)
                task.add_done_callback(self._answers.discard)
        except asyncio.IncompleteReadError:
            pass  # the worker went away
        except (OSError, ValueError) as error:
            log.warning("query_connection_refused", error=str(error))
        finally:
            writer.close()

    async def _answer(self, ask: Ask, writer: asyncio.StreamWriter) -> None:
        try:
            vectors = await self._queue.encode(ask.texts, urgent=True)
            answer = Answer(ask.number, self._encoder_id, vectors.astype("<f4").tobytes())
        except EncoderError as error:
            answer = Answer(ask.number, self._encoder_id, error=str(error))
        with contextlib.suppress(ConnectionError):  # the worker went away while its text was encoded
            writer.write(query_protocol.pack(answer))
            await writer.drain()


class _Assignment(ConsumerRebalanceListener):  # type: ignore[misc]
    """Has the mirror of ``item-vectors`` follow the partitions of ``items``: encodings lie in the same one."""

    def __init__(self, mirror: Mirror, partitions: int) -> None:
        self._mirror = mirror
        self._partitions = partitions

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Nothing to do: what was delivered stays, what was not is read by the next owner."""

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Mirror the partitions that hold the encodings of these."""
        self._mirror.assign({tp.partition % self._partitions for tp in assigned})


async def consume(consumer: AIOKafkaConsumer, mirror: Mirror, encoder: ItemEncoder, partitions: int) -> None:
    """Handle ``items`` until cancelled; offsets are committed after delivery. Raises DeliveryError."""
    while True:
        batches = await consumer.getmany(timeout_ms=500, max_records=MAX_RECORDS)
        if not batches:
            continue
        # Else a restart would encode again what the part of the topic not read yet already holds.
        await mirror.caught_up.wait()
        began, before = time.monotonic(), encoder.encoded
        for tp, records in batches.items():
            await encoder.handle(records, tp.partition % partitions)
        count = encoder.encoded - before
        if count:
            log.info("items_encoded", items=count, seconds=round(time.monotonic() - began, 2))
        with contextlib.suppress(CommitFailedError, IllegalStateError, RebalanceInProgressError):
            # A partition that went to another process meanwhile: that one knows the encodings by their hashes.
            await consumer.commit({tp: records[-1].offset + 1 for tp, records in batches.items()})


async def run(settings: Settings, encoder: Encoder) -> None:
    """Consume and answer until cancelled. Raises DeliveryError, BrokerUnavailable and what else ends the process."""
    names = TopicNames.of(settings)
    folder = settings.worker.data_folder
    metrics = EncoderMetrics(encoder.encoder_id)
    queue = EncodeQueue(encoder.encode, settings.encoder.batch_texts, metrics.on_batch)
    metrics.waiting.set_function(lambda: queue.waiting)
    known = KnownEncodings(encoder.encoder_id)
    mirror = Mirror(settings, names.item_vectors, known.apply)
    # The encoder is a part of the group's name: another one must read all items from their beginning.
    group = f"{settings.worker.group}-encoder-{hash64(encoder.encoder_id):016x}"
    consumer = new_consumer(settings, group_id=group, session_timeout_ms=_session_ms(settings))
    producer = new_producer(settings)
    health = HealthServer(
        settings.worker.host,
        encoder_port(settings),
        metrics.registry,
        live=lambda: None,
        ready=lambda: None if mirror.caught_up.is_set() else "not encoding yet",
    )
    try:
        await _listen(health)
        await producer.start()
        await consumer.start()
        partitions = len(await producer.partitions_for(names.item_vectors))
        consumer.subscribe([names.items], listener=_Assignment(mirror, partitions))
        items = ItemEncoder(settings, encoder.encoder_id, queue, Sender(producer), known)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(queue.run(), name="encode")
            tasks.create_task(QueryServer(folder, encoder.encoder_id, queue).run(), name="query-server")
            tasks.create_task(mirror.run(all_partitions=False), name="mirror-item-vectors")
            tasks.create_task(consume(consumer, mirror, items, partitions), name="consume-items")
            tasks.create_task(_watch_parent(supervisor_pid()), name="watch-parent")
    except KafkaConnectionError as error:
        raise BrokerUnavailable(f"the encoder process cannot reach Kafka: {error}") from error
    finally:
        await consumer.stop()
        await producer.stop()
        await health.stop()


def encoder_port(settings: Settings) -> int:
    """Return the port of this process's metrics: as set, else the one after the worker's, or a free one beside 0."""
    if settings.worker.encoder_port is not None:
        return settings.worker.encoder_port
    return settings.worker.port + 1 if 0 < settings.worker.port < 65_535 else 0


async def _listen(health: HealthServer) -> None:
    """Serve the metrics; encoding goes on without them where the port is taken."""
    try:
        await health.start()
        log.info("health_listens", port=health.port)
    except OSError as error:
        log.error("encoder_metrics_off", error=str(error), mend="set worker.encoder_port to another port")


def _session_ms(settings: Settings) -> int:
    return int(settings.worker.session_timeout_seconds * 1000)


async def _watch_parent(parent_pid: int) -> None:
    # Linux tells us itself (die_with_parent); elsewhere somebody has to look.
    while not is_orphan(parent_pid):  # noqa: ASYNC110 - the parent's death is no event here
        await asyncio.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


async def _until_signal(work: Coroutine[Any, Any, None]) -> None:
    """Run ``work`` until it ends or SIGTERM or SIGINT comes."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


def main() -> int:
    """Run the process and return its exit code."""
    try:
        settings = load()
    except MillstreamError as error:
        print(f"millstream: {error}", file=sys.stderr)
        return exit_code(error)
    configure(settings.worker.log_level, settings.worker.log_format)
    die_with_parent(supervisor_pid())
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    try:
        began = time.monotonic()
        encoder = TextEncoder.load(settings.encoder)
        space = find_or_compute_space(encoder, settings.worker.data_folder)
        log.info(
            "encoder_ready",
            encoder=encoder.encoder_id,
            space=space.space_id,
            seconds=round(time.monotonic() - began, 1),
        )
        asyncio.run(_until_signal(run(settings, encoder)))
    except (MillstreamError, BaseExceptionGroup) as raised:
        cause = _first(raised)
        if not isinstance(cause, MillstreamError):
            raise
        log.error("encoder_process_ended", error=str(cause), kind=type(cause).__name__)
        return exit_code(cause)
    return ExitCode.STOPPED


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    sys.exit(main())

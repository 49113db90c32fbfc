"""``python -m streams.encoder_process``: the low-priority process in which BERT runs.

Consumes ``items`` in a group of its own, so that each item is encoded by one process, and publishes base encodings to
``item-vectors``. Answers the worker's questions (queries, profiles) first. An encoding batch can never stand before a
slate: this process has the lowest priority that the system gives, and the worker does not wait for it.

Where a bundle that a role or an arm of the experiment names brings another encoder, that one is loaded too, and the
items that it has not encoded yet are encoded under its id: those of the live bundle first.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

import structlog
from aiokafka.errors import KafkaConnectionError

from models.bootstrap import find_or_compute_space
from models.encoder import TextEncoder
from models.errors import BrokerUnavailable, EncoderError, MillstreamError
from streams import query_protocol
from streams.encode_queue import EncodeQueue
from streams.encoder_models import EncoderModels, Key, LoadDelta, lanes_of
from streams.exit_codes import ExitCode, exit_code
from streams.health import HealthServer
from streams.item_encoder import Encoder, Forgetting, ItemEncoder, KnownEncodings, Partitions, run_lane
from streams.kafka_clients import new_producer
from streams.logs import configure
from streams.metrics import EncoderMetrics
from streams.mirror import Mirror
from streams.parent import die_with_parent, is_orphan, supervisor_pid
from streams.query_protocol import Answer, Ask
from streams.sender import Sender
from streams.settings import Settings, file_in_force, load
from streams.settings_watch import SettingsWatch
from streams.topics import TopicNames

log = structlog.get_logger(__name__)

NICENESS: Final = 19


class QueryServer:
    """Answers ``Ask`` frames on the unix socket in the data folder."""

    def __init__(self, folder: Path, models: EncoderModels, queue: EncodeQueue) -> None:
        self._folder = folder
        self._models = models
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
        encoder_id = ask.encoder_id or self._models.base.encoder_id
        encoder = self._models.encoders.get(encoder_id)
        try:
            if encoder is None:
                raise EncoderError(f"{encoder_id} is not loaded")
            vectors = await self._queue.encode(ask.texts, urgent=True, using=encoder.encode)
            answer = Answer(ask.number, encoder_id, vectors.astype("<f4").tobytes())
        except EncoderError as error:
            answer = Answer(ask.number, encoder_id, error=str(error))
        with contextlib.suppress(ConnectionError):  # the worker went away while its text was encoded
            writer.write(query_protocol.pack(answer))
            await writer.drain()


class Lanes:
    """Runs a lane for each encoder that a bundle brings, as long as a role needs it."""

    def __init__(
        self,
        settings: Settings,
        models: EncoderModels,
        queue: EncodeQueue,
        sender: Sender,
        known: KnownEncodings,
        mirror: Mirror,
        partitions: Partitions,
    ) -> None:
        self._settings = settings
        self._models = models
        self._queue = queue
        self._sender = sender
        self._known = known
        self._mirror = mirror
        self._partitions = partitions

    async def run(self) -> None:
        """Run the lane of the settings' encoder and those that are needed, until cancelled. Raises what ends a lane."""
        base = self._models.base
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._lane(base, commits=True), name="encode-items")
            running: dict[str, tuple[frozenset[Key], asyncio.Task[None]]] = {}
            while True:
                self._models.changed.clear()
                needed = lanes_of(self._models)
                for encoder_id, (bundles, task) in list(running.items()):
                    # Other bundles may bring other encodings: the lane looks at all items again.
                    if needed.get(encoder_id) != bundles:
                        del running[encoder_id]
                        task.cancel()
                        await asyncio.wait({task})
                for encoder_id in needed.keys() - running.keys():
                    lane = self._lane(self._models.encoders[encoder_id], commits=False)
                    running[encoder_id] = needed[encoder_id], tasks.create_task(lane, name=f"encode-{encoder_id}")
                await self._models.changed.wait()

    async def _lane(self, encoder: Encoder, *, commits: bool) -> None:
        models, encoder_id = self._models, encoder.encoder_id
        items = ItemEncoder(
            self._settings,
            encoder,
            self._queue,
            self._sender,
            self._known,
            is_brought=lambda item_id, hashed: not commits and models.is_brought(encoder_id, item_id, hashed),
            rank=lambda: models.rank(encoder_id),
        )
        await run_lane(self._settings, items, self._mirror, self._partitions, commits=commits)


async def run(settings: Settings, encoder: Encoder, load_delta: LoadDelta | None = None) -> None:
    """Consume and answer until cancelled. Raises DeliveryError, BrokerUnavailable and what else ends the process.

    ``load_delta``: how a bundle's encoder is loaded; default: over the encoder of the settings.
    """
    names = TopicNames.of(settings)
    metrics = EncoderMetrics(encoder.encoder_id)
    queue = EncodeQueue(encoder.encode, settings.encoder.batch_texts, metrics.on_batch)
    metrics.waiting.set_function(lambda: queue.waiting)
    known = KnownEncodings()
    mirror = Mirror(settings, names.item_vectors, known.apply)
    models = EncoderModels(
        settings,
        encoder,
        load_delta or (lambda folder: TextEncoder.load_delta(settings.encoder, folder)),
        lambda reason: metrics.refused.labels(reason).inc(),
    )
    metrics.loaded.set_function(lambda: len(models.encoders))

    async def name_arms(changed: Settings) -> None:
        models.name_arms(changed.recommender.experiment.bundles)

    settings_watch = SettingsWatch(settings, file_in_force(), name_arms, metrics.registry)
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
        sender = Sender(producer)
        partitions = Partitions(mirror, known, len(await producer.partitions_for(names.item_vectors)))
        lanes = Lanes(settings, models, queue, sender, known, mirror, partitions)
        forgetting = Forgetting(settings, sender, known, mirror, models.named, metrics.forgotten.inc)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(queue.run(), name="encode")
            tasks.create_task(QueryServer(settings.worker.data_folder, models, queue).run(), name="query-server")
            tasks.create_task(mirror.run(all_partitions=False), name="mirror-item-vectors")
            tasks.create_task(models.run(), name="models")
            tasks.create_task(settings_watch.run(), name="settings")
            tasks.create_task(lanes.run(), name="lanes")
            tasks.create_task(forgetting.run(), name="forget-encodings")
            tasks.create_task(_watch_parent(supervisor_pid()), name="watch-parent")
    except KafkaConnectionError as error:
        raise BrokerUnavailable(f"the encoder process cannot reach Kafka: {error}") from error
    finally:
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


def _run() -> None:
    """Run the process; never returns: a fetch that hangs in its thread would hold an ordinary exit for as long."""
    try:
        code = main()
    except BaseException:
        log.exception("encoder_process_failed")
        code = ExitCode.UNEXPECTED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _run()

"""The worker process: Kafka on one side, the pure core on the other, and the barrier between them.

Started by the supervisor as ``python -m streams.worker``. An error that leaves doubt about what the broker has ends
the process before the batch is acknowledged; the next start reads it again, and the guards make that harmless.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

import msgspec
import structlog
from aiokafka.errors import KafkaError

from models.counters import ItemCounters
from models.errors import BrokerUnavailable, FencedError, MillstreamError, SettingsError
from models.events import Impression
from models.recommender import Recommender
from models.serving import ServingModel
from models.user_state import UserReader
from streams import faust_patches
from streams.app import build
from streams.catalogue_mirror import CatalogueMirror
from streams.co_click_fill import CoClickFill
from streams.cpus import KeptCpu, keep_to
from streams.dead_letters import DeadLetters
from streams.decode import Decoded, Message
from streams.delivery import Deliveries
from streams.exit_codes import ExitCode, exit_code
from streams.health import HealthServer
from streams.in_flight import InFlightMark, Suspects
from streams.item_stats import ItemStats
from streams.kafka_clients import bootstrap_servers, new_admin, new_producer
from streams.label_timer import LabelTimer
from streams.labels import LabelMetrics, SentLabels
from streams.logs import configure
from streams.maintenance import Maintenance
from streams.metrics import Metrics
from streams.mirror import Mirror, Record
from streams.model_metrics import ModelMetrics
from streams.model_slot import ModelSlot
from streams.model_status import StatusWriter
from streams.model_watch import ModelWatch
from streams.ownership import Ownership
from streams.parent import die_with_parent, supervisor_pid
from streams.pipeline import Pipeline, Prepared, Refused, TextVectors, decode_batch
from streams.profiles import Profiles
from streams.query_client import QueryEncoderClient
from streams.sender import Outbox, Sender
from streams.settings import Settings, file_in_force, load
from streams.settings_watch import SettingsWatch
from streams.state_thread import StateThread
from streams.topic_ids import epoch, topic_ids
from streams.topics import TopicNames, require_layout
from streams.user_table import TABLE_NAME, UserRows

log = structlog.get_logger(__name__)

JSON = (("content-type", b"application/json"),)
IDLE_SECONDS = 0.5
TICK_SECONDS = 0.25
PORT_WAIT_SECONDS = 30.0
START_GRACE_SECONDS = 10.0
SWITCH_SECONDS = 0.0005


class Worker:
    """One worker process."""

    def __init__(self, settings: Settings, cpu: KeptCpu) -> None:
        self.settings = settings
        self.cpu = cpu
        self.names = TopicNames.of(settings)
        self.metrics = Metrics()
        self.state = StateThread()
        self.suspects = Suspects.load(settings.worker.data_folder)
        self.mark = InFlightMark(settings.worker.data_folder)
        self.model = ModelSlot.bootstrap(settings)
        self.catalogue = self.model.catalogue
        self.counters = ItemCounters(
            self.model.index, settings.counters, is_named=lambda row: self.catalogue.item(row) is not None
        )
        self.recommender = Recommender(
            settings.recommender,
            self.catalogue,
            self.counters,
            self.model.vector_index,
            UserReader(settings.user_state, self.catalogue, self.model.space_hash),
        )
        self.letters = DeadLetters(self.names.dead_letters, settings.topics.partitions)
        self.profiles = Profiles(self._refuse_mirrored)
        self.stopping = asyncio.Event()
        self.failure: asyncio.Future[ExitCode] = asyncio.get_running_loop().create_future()
        self.is_ready = False
        self.owned_generation = -1
        """Group generation of the last take-over."""
        self.handed: dict[int, int] = {}
        """Per partition the offset after the newest event that was taken from Faust."""
        self._ticked_at = time.monotonic()
        self._mirror_letters: list[tuple[Record, MillstreamError]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._drained = asyncio.Event()

    # -- life ----------------------------------------------------------------------------------------------------

    async def run(self) -> ExitCode:
        """Start everything, work until asked to stop or until something fails; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stopping.set)
        health = HealthServer(
            self.settings.worker.host,
            self.settings.worker.port,
            self.metrics.registry,
            live=lambda: None,
            ready=lambda: None if self.is_ready else "not processing events yet",
        )
        await self._listen(health)
        asked = asyncio.create_task(self.stopping.wait())
        # The start ends with the first take-over: it must not hide a failure or a wish to stop until then.
        starting = asyncio.create_task(self._start())
        try:
            ended: set[asyncio.Future[Any]] = {self.failure, asked}
            await asyncio.wait({starting, *ended}, return_when=asyncio.FIRST_COMPLETED)
            if self.is_ready and not starting.done():
                # Events flow a moment before Faust's start returns: stop in order then too.
                either: set[asyncio.Future[Any]] = {starting, self.failure}
                await asyncio.wait(either, timeout=START_GRACE_SECONDS)
            if starting.done():
                starting.result()
                await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
            if not self.failure.done() and starting.done():
                await self._stop_gracefully()
            # Stopped in the middle of the start: nothing was acknowledged, nothing is to be saved.
            return self.failure.result() if self.failure.done() else ExitCode.STOPPED
        finally:
            self.is_ready = False
            await health.stop()

    async def _listen(self, health: HealthServer) -> None:
        """Listen; wait a while for a port that the worker before this one still holds."""
        deadline = time.monotonic() + PORT_WAIT_SECONDS
        while True:
            try:
                await health.start()
                break
            except OSError as error:
                await health.stop()
                if time.monotonic() > deadline:
                    raise SettingsError(
                        f"worker.port {self.settings.worker.port} cannot be listened on ({error}); set "
                        "MILLSTREAM_WORKER__PORT to another one, 0 takes a free one"
                    ) from error
                log.warning("port_in_use", port=self.settings.worker.port, waits_seconds=PORT_WAIT_SECONDS)
                await asyncio.sleep(2.0)
        log.info("health_listens", port=health.port)

    async def _start(self) -> None:
        settings = self.settings
        try:
            await require_layout(settings)
            self.epoch = epoch((await topic_ids(settings, [self.names.events]))[self.names.events])
            self.producer = new_producer(settings, client_id=f"{settings.worker.group}-outputs")
            await self.producer.start()
            self.admin = new_admin(settings)
            await self.admin.start()
        except (KafkaError, OSError) as error:
            raise BrokerUnavailable(f"Kafka at {bootstrap_servers(settings)} cannot be reached: {error!r}") from error
        self.sender = Sender(self.producer)
        self.item_stats = ItemStats(
            settings,
            self.names,
            self.counters,
            self.sender,
            self.state,
            self.epoch,
            may_write=self.may_write,
            is_refused=self.suspects.is_refused,
        )
        self.pipeline = Pipeline(
            settings,
            self.catalogue,
            self.counters,
            self.recommender,
            self.metrics,
            epoch=self.epoch,
            space_id=self.model.space_hash,
            generation=self.model.generation,
            model_version=self.model.version,
            space_name=self.model.space_id,
        )
        self.label_timer = LabelTimer(self.pipeline.labels.context)
        self.label_metrics = LabelMetrics(self.metrics.registry)
        self.pipeline.use(self.model.live, [])
        self.metrics.set_build(model_version=self.model.version, space_id=self.model.space_id)
        self.encoder = QueryEncoderClient(settings.worker.data_folder, self.model.space)
        self.catalogue_mirror = CatalogueMirror(
            settings,
            self.catalogue,
            self.model.vector_index,
            self.model.space,
            self.state.executor,
            self._refuse_mirrored,
        )
        self.model_metrics = ModelMetrics(self.metrics.registry)
        self.models = ModelWatch(
            settings, self.model, self.catalogue_mirror, self.state, self.model_metrics, self._switch_model
        )
        self.settings_watch = SettingsWatch(settings, file_in_force(), self._use_settings, self.metrics.registry)
        self.model_status = StatusWriter(settings, self.model, self.models, self.producer)
        self.users_mirror = Mirror(settings, self.names.users, self.profiles.apply)
        self.users_mirror.assign([])
        self.ownership = Ownership(self)
        self.app: Any = build(
            settings, self.names, self._agent, self.ownership.take_over, self.ownership.committed, self.fail
        )
        self.rows = UserRows(settings, self.app.tables[TABLE_NAME].data, self.names.user_table_changelog)
        self.deliveries = Deliveries(self.mark, self.rows.get, lambda error: self.fail(error, "delivery"))
        self.co_click_fill = CoClickFill(self.rows.rows_of, self.state)
        self.maintenance = Maintenance(self)
        self.mirrors = (
            self.catalogue_mirror.items,
            self.catalogue_mirror.vectors,
            self.item_stats.mirror,
            self.users_mirror,
            self.models.mirror,
        )
        self._spawn(self.catalogue_mirror.run(), "mirror catalogue")
        self._spawn(self.item_stats.mirror.run(), "mirror item-stats")
        self._spawn(self.users_mirror.run(all_partitions=False), "mirror users")
        self._spawn(self.models.run(), "models")
        self._spawn(self.model_status.run(), "model status")
        self._spawn(self.item_stats.run(), "item-stats")
        self._spawn(self.settings_watch.run(), "settings")
        self._spawn(self.co_click_fill.run(), "co-clicks")
        self._spawn(self._tick(), "tick")
        self._spawn(self.maintenance.watch_commits(), "commit watchdog")
        self._spawn(self.maintenance.report(), "metrics")
        self._spawn(self.maintenance.watch_recall(), "recall")
        self._spawn(self.ownership.watch_epoch(), "epoch")
        self._spawn(self._watch_faust(), "faust")
        await self.app.start()

    def become_ready(self) -> None:
        """Say that events are processed from now on."""
        self.handed.clear()
        self._ticked_at = time.monotonic()
        self.is_ready = True

    def _spawn(self, coroutine: Awaitable[None], name: str) -> None:
        async def guarded() -> None:
            try:
                await coroutine
            except asyncio.CancelledError:
                raise
            except BaseException as error:
                self.fail(error, name)

        self._tasks.append(asyncio.create_task(guarded(), name=name))

    def fail(self, error: BaseException, where: str) -> None:
        """End the process because of ``error``; the batch in work is not acknowledged."""
        code = exit_code(error)
        if not self.failure.done():
            if code is ExitCode.UNEXPECTED:
                log.error("worker_failed", where=where, code=int(code), exc_info=error)
            else:
                log.error("worker_failed", where=where, code=int(code), why=code.name.lower(), error=str(error))
            self.failure.set_result(code)

    async def _stop_gracefully(self) -> None:
        """Finish the batch in work, commit, publish the counters, leave the group."""
        log.info("stopping")
        self.is_ready = False
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._drained.wait(), self.settings.worker.session_timeout_seconds)
        if self.failure.done():
            return
        await self.app.consumer.commit()
        await self.item_stats.publish(everything=True)
        for task in self._tasks:
            task.cancel()
        await self.app.stop()
        await self.model_status.say_goodbye()
        await self.producer.stop()
        await self.admin.close()
        await self.encoder.close()
        await self.rows.close()
        self.state.close()
        log.info("stopped")

    # -- events --------------------------------------------------------------------------------------------------

    async def _agent(self, stream: Any) -> None:
        try:
            async for events in faust_patches.batches(stream, self.settings.worker.batch_max_events, IDLE_SECONDS):
                for part in self._parts(events) if events else ():
                    await self._process(part)
                stops = self.stopping.is_set()
                if not events or stops or self.maintenance.is_due():
                    await self.maintenance.between_batches(is_idle=not events)
                if stops:
                    await self.deliveries.settled()
                    self._drained.set()
                    await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self.fail(error, "agent")
            # An agent that returns or raises would let Faust acknowledge or restart: wait for the end instead.
            await asyncio.Event().wait()

    async def _switch_model(
        self, live: ServingModel, shadows: list[ServingModel], arms: Mapping[str, ServingModel]
    ) -> None:
        """Serve with another model from the next batch on; where that fails, with the one in use, and raise why."""
        async with self.deliveries.between_batches():
            old, old_shadows, old_arms = self.model.live, self.pipeline.shadows, self.model.arms
            started = time.perf_counter()
            try:
                await self._use_model(live, shadows, arms)
            except Exception:
                await self._use_model(old, old_shadows, old_arms)
                raise
            if (live.version, live.generation) != (old.version, old.generation):
                self.model_metrics.swap_seconds.observe(time.perf_counter() - started)

    async def _use_model(
        self, live: ServingModel, shadows: list[ServingModel], arms: Mapping[str, ServingModel]
    ) -> None:
        self.encoder.use(live.space)
        await self.state.run(self.pipeline.use, live, shadows, arms)
        self.metrics.set_build(model_version=live.version, space_id=live.space_id)

    async def _use_settings(self, settings: Settings) -> None:
        async with self.deliveries.between_batches():
            await self.state.run(self.pipeline.reconfigure, settings)
            self.fill_co_clicks(self.rows.partitions)
        self.models.name_arms(settings.recommender.experiment.bundles)

    def fill_co_clicks(self, partitions: set[int]) -> None:
        """Have the pairs learned that rows of ``partitions``, all that are owned, hold; while no event is processed."""
        self.co_click_fill.follow(self.pipeline.co_clicks, partitions, time.time_ns() // 1_000_000)

    def _parts(self, events: Sequence[Any]) -> list[list[Any]]:
        """Split a batch so that each suspect of an earlier death is alone."""
        if not self.suspects.one_by_one:
            return [list(events)]
        parts: list[list[Any]] = []
        open_part: list[Any] = []
        for event in events:
            if self.suspects.is_one_by_one(event.message.partition, event.message.offset):
                parts += [open_part, [event]] if open_part else [[event]]
                open_part = []
            else:
                open_part.append(event)
        return [*parts, open_part] if open_part else parts

    async def _process(self, events: Sequence[Any]) -> None:
        """Prepare one micro-batch while the one before is delivered, then have it delivered."""
        messages: list[Message] = [event.message for event in events]
        generation = self.app.consumer_generation_id
        self.metrics.batch_events.observe(len(messages))
        # A suspect is alone: what kills the process beside it would be taken for it.
        is_alone = any(self.suspects.is_one_by_one(m.partition, m.offset) for m in messages)
        if is_alone:
            await self.deliveries.settled()
        async with self.deliveries.batch([(m.partition, m.offset) for m in messages]):
            prepared, accepted, now_ms = await self._prepare(messages)
            # What this batch says depends on what the timer knows, which the one before still tells.
            await self.deliveries.settled()
            self.pipeline.drop_hidden(prepared, now_ms)
            labels = self.label_timer.unsaid(prepared.closings.labels)
            outbox = self._outbox(prepared, labels, now_ms)
            delivery = self._deliver(events, outbox, prepared, accepted, len(labels), generation)
            self.deliveries.start(prepared.rows, delivery)
        if is_alone:
            await self.deliveries.settled()

    async def _prepare(self, messages: Sequence[Message]) -> tuple[Prepared, list[Decoded], int]:
        """Decide what a batch changes and sends; returns it, the accepted events and the time."""
        for message in messages:
            self.handed[message.partition] = message.offset + 1
        started = time.perf_counter()
        accepted, refused = decode_batch(
            messages,
            self.settings,
            lambda partition, key: self.deliveries.row(partition, key) is not None,
            self.suspects.is_refused,
        )
        self.metrics.stage.labels("decode").observe(time.perf_counter() - started)
        texts = await self._texts(accepted)
        now_ms = time.time_ns() // 1_000_000
        prepared = await self.state.run(
            self.pipeline.prepare, accepted, self.deliveries.row, self.profiles.text, texts, now_ms
        )
        prepared.refused += refused
        return prepared, accepted, now_ms

    def _outbox(self, prepared: Prepared, labels: Sequence[SentLabels], now_ms: int) -> Outbox:
        outbox = Outbox()
        for (partition, key), row in prepared.rows.items():
            self.rows.stage(outbox, partition, key, row)
        for slate in prepared.slates:
            value = msgspec.json.encode(slate.record)
            outbox.add(self.names.recommendations, slate.partition, slate.key, value, JSON)
        for example in prepared.features:
            outbox.add(self.names.features, example.partition, example.key, example.value)
        for label in labels:
            outbox.add(self.names.labels, label.partition, label.key, label.value)
        for letter in prepared.refused:
            self._stage_letter(outbox, letter, now_ms)
        return outbox

    async def _deliver(
        self,
        events: Sequence[Any],
        outbox: Outbox,
        prepared: Prepared,
        accepted: Sequence[Decoded],
        labels: int,
        generation: int,
    ) -> None:
        """Send a batch, await every acknowledgement, take its rows over and acknowledge its events."""
        await self.write(outbox, generation)
        for (partition, key), row in prepared.rows.items():
            self.rows.put(partition, key, row)
        self.maintenance.see_times(accepted)
        self.label_timer.touch(prepared.closings.next_close_ms, time.monotonic())
        self.label_metrics.count(prepared.closings.counts, len(prepared.closings.labels) - labels)
        self._count(prepared)
        faust_patches.acknowledge(list(events))

    async def write(self, outbox: Outbox, generation: int) -> None:
        """Check the fence, send, and await every acknowledgement. Raises FencedError or DeliveryError."""
        if not len(outbox):
            return
        self._check_fence(generation)
        started = time.perf_counter()
        delivered = await self.sender.send(outbox)
        self.rows.on_delivered(delivered)
        self.metrics.stage.labels("send").observe(time.perf_counter() - started)

    def may_write(self) -> bool:
        """Whether this process may be sure to own its partitions now."""
        gap = time.monotonic() - self._ticked_at
        return not self.failure.done() and gap <= self.settings.worker.session_timeout_seconds / 2

    def _check_fence(self, generation: int) -> None:
        if self.app.consumer_generation_id != generation:
            raise FencedError(
                f"the group moved from generation {generation} to {self.app.consumer_generation_id} while a batch was "
                "in work; nothing of it was written, its owner reads it again"
            )
        gap = time.monotonic() - self._ticked_at
        if gap > self.settings.worker.session_timeout_seconds / 2:
            raise FencedError(
                f"this process did not run for {gap:.1f} s, more than half its session: another worker may own its "
                "partitions by now; nothing was written"
            )

    async def _texts(self, accepted: Sequence[Decoded]) -> TextVectors:
        """Ask the encoder process for the texts that a slate of this batch needs, all at once, for a bounded time."""
        oldest_ms = time.time() * 1000 - self.settings.worker.max_trigger_age_seconds * 1000
        wanted: set[str] = set()
        for decoded in accepted:
            if isinstance(decoded.event, Impression) or decoded.broker_ms < oldest_ms:
                continue
            query = getattr(decoded.event, "query", None)
            if query:
                wanted.add(query)
            profile = self.profiles.text(decoded.partition, decoded.event.user_id)
            if profile:
                wanted.add(profile)
        if not wanted:
            return TextVectors()
        asked = sorted(wanted)
        vectors = await self.encoder.vectors(asked)
        found = {text: vector for text, vector in zip(asked, vectors, strict=True) if vector is not None}
        self.metrics.encoder_requests.labels("answered").inc(len(found))
        self.metrics.encoder_requests.labels("late").inc(len(wanted) - len(found))
        return TextVectors(found)

    def _stage_letter(self, outbox: Outbox, letter: Refused, now_ms: int) -> None:
        self.letters.add(outbox, letter.message, letter.error, refused_at_ms=now_ms, traceback=letter.traceback)
        self.metrics.dead_letters.labels("events", letter.error.reason).inc()
        log.warning(
            "event_refused",
            partition=letter.message.partition,
            offset=letter.message.offset,
            reason=letter.error.reason,
            detail=letter.error.detail[:200],
        )

    def _refuse_mirrored(self, record: Record, error: MillstreamError) -> None:
        self._mirror_letters.append((record, error))

    @property
    def has_mirror_letters(self) -> bool:
        """Whether mirrors refused records that are not in the dead letters yet."""
        return bool(self._mirror_letters)

    def take_mirror_letters(self, most: int) -> list[tuple[Record, MillstreamError]]:
        """Return and forget the oldest ``most`` records that mirrors refused."""
        letters, self._mirror_letters = self._mirror_letters[:most], self._mirror_letters[most:]
        return letters

    def _count(self, prepared: Prepared) -> None:
        metrics = self.metrics
        now = time.time()
        for kind, outcome in prepared.outcomes:
            metrics.events.labels(kind, outcome).inc()
        for letter in prepared.refused:
            metrics.events.labels("unknown", "refused").inc()
            del letter
        for slate in prepared.slates:
            metrics.slates.labels(slate.kind).inc()
            if slate.record.experiment is not None:
                metrics.slates_by_experiment.labels(slate.record.experiment).inc()
            metrics.freshness.observe(max(0.0, now - slate.broker_ms / 1000))
        metrics.unknown_items.inc(prepared.unknown_items)
        metrics.slates_suppressed.inc(prepared.suppressed)

    # -- watches -------------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        """Note that the loop runs; a gap means that the process was stopped or starved."""
        limit = self.settings.worker.session_timeout_seconds / 2
        while True:
            gap = time.monotonic() - self._ticked_at
            if gap > limit and self.is_ready:
                raise FencedError(f"this process did not run for {gap:.1f} s, more than half its session")
            self._ticked_at = time.monotonic()
            await asyncio.sleep(TICK_SECONDS)

    async def _watch_faust(self) -> None:
        """Notice that Faust crashed or stopped by itself."""
        while not self.stopping.is_set():
            await asyncio.sleep(TICK_SECONDS)
            if self.app.crashed or self.app.should_stop:
                log.error("faust_crashed", exc_info=self.app.crash_reason)
                if not self.failure.done():
                    self.failure.set_result(ExitCode.FAUST)
                return


async def _main(settings: Settings, cpu: KeptCpu) -> None:
    try:
        code = await Worker(settings, cpu).run()
    except MillstreamError as error:
        code = exit_code(error)
        log.error("worker_failed", code=int(code), why=code.name.lower(), error=str(error))
    except Exception:
        code = ExitCode.UNEXPECTED
        log.exception("worker_failed", code=int(code))
    sys.stderr.flush()
    # Not a return: tearing Faust down cleanly could commit what was not acknowledged, and its consumer thread may
    # hold the process for as long as its session.
    os._exit(code)


def main() -> None:
    """Run the worker process; never returns."""
    try:
        settings = load()
        configure(settings.worker.log_level, settings.worker.log_format)
        # Before there is another thread of ours: they inherit it.
        cpu = keep_to(settings.worker.cpu, max(settings.worker.threads, settings.retrieval.threads))
    except MillstreamError as error:
        print(f"millstream: {error}", file=sys.stderr)
        os._exit(exit_code(error))
    die_with_parent(supervisor_pid())
    try:
        import uvloop

        runner: Any = uvloop.run
        # Faust's consumer thread makes a loop of its own, by the policy.
        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    except ImportError:
        runner = asyncio.run
    # The event loop, Faust's consumer thread and the state thread take turns: at the default of 5 ms each turn of the
    # loop waits that long whenever the state thread is busy, which is most of freshness.
    sys.setswitchinterval(SWITCH_SECONDS)
    runner(_main(settings, cpu))


if __name__ == "__main__":
    main()

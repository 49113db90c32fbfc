"""The users on a real Kafka: publishes what they do, hands them the slates that arrive."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any, Final

import msgspec
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from models.errors import BrokerUnavailable, DeliveryError, RecordError
from models.events import RECOMMENDATION_CODEC, Action, Event, ImpressedItem, Impression, Request
from streams.demo.statistics import Statistics
from streams.demo.users import Ask, Click, Deed, Half, Simulation
from streams.kafka_clients import new_consumer, new_producer
from streams.settings import Settings
from streams.topics import TopicNames

SURFACE: Final = "home"
JSON: Final = [("content-type", b"application/json")]
TICK_SECONDS: Final = 0.01
LAST_SLATES_SECONDS: Final = 5.0
"""How long the last slates are waited for when the users have stopped."""


class Traffic:
    """Runs a simulation for a time. ``now`` of simulation and statistics is ``time.monotonic()``."""

    def __init__(self, settings: Settings, simulation: Simulation, statistics: Statistics) -> None:
        self._settings = settings
        self._names = TopicNames.of(settings)
        self._simulation = simulation
        self._statistics = statistics
        self._producer: Any = None
        self._consumer: Any = None
        self._sending: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._count = 0

    async def run(self, until: asyncio.Task[None]) -> None:
        """Let the users act until ``until`` is done, then wait shortly for the last slates.

        Raises BrokerUnavailable or DeliveryError where Kafka does not take or give records any more.
        """
        self._producer = new_producer(self._settings, client_id="millstream-demo")
        self._consumer = new_consumer(self._settings, client_id="millstream-demo", fetch_max_wait_ms=100)
        try:
            await self._open()
            reading = asyncio.create_task(self._read())
            acting = asyncio.create_task(self._act())
            await asyncio.wait([reading, acting, until, self._failed], return_when=asyncio.FIRST_COMPLETED)
            acting.cancel()
            until.cancel()
            if not reading.done() and not self._failed.done():
                await self._last_slates()
            reading.cancel()
            for task in (acting, reading):
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            if self._failed.done():
                self._failed.result()
        except KafkaError as error:
            raise BrokerUnavailable(f"Kafka went away under the users: {error!r}") from error
        finally:
            for task in self._sending:
                task.cancel()
            await asyncio.gather(*self._sending, return_exceptions=True)
            await self._consumer.stop()
            await self._producer.stop()

    async def _open(self) -> None:
        await self._producer.start()
        await self._consumer.start()
        topic = self._names.recommendations
        partitions = await self._producer.partitions_for(topic)
        found = [TopicPartition(topic, p) for p in sorted(partitions)]
        self._consumer.assign(found)
        await self._consumer.seek_to_end(*found)
        # Fixes the offsets now: a slate that comes before the first poll must not be passed over.
        for tp in found:
            await self._consumer.position(tp)

    async def _act(self) -> None:
        simulation = self._simulation
        now = self._statistics.started_at = time.monotonic()
        simulation.start(now)
        while True:
            for deed in simulation.due(time.monotonic()):
                task = asyncio.create_task(self._publish(deed))
                self._sending.add(task)
                task.add_done_callback(self._sent)
            wait = simulation.next_at() - time.monotonic()
            # Short enough for a plan that a slate brings forward meanwhile.
            await asyncio.sleep(min(max(wait, 0.0), TICK_SECONDS))

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._failed.done():
            self._failed.set_exception(error)

    async def _publish(self, deed: Deed) -> None:
        person, statistics = deed.person, self._statistics
        event = self._event(deed)
        try:
            future = await self._producer.send(
                self._names.events, msgspec.json.encode(event), person.user_id.encode(), headers=JSON
            )
            if isinstance(deed, Click) and person.user_id == statistics.story.user_id:
                statistics.story.click(time.time(), deed.item_id)
            written = await future
        except KafkaError as error:
            raise DeliveryError(f"Kafka did not take an event of a simulated user: {error!r}") from error
        now = time.monotonic()
        statistics.event(now)
        if isinstance(deed, Ask | Click):
            took_ms = statistics.freshness.sent(now, person.user_id, written.offset, written.timestamp)
            if took_ms is not None and isinstance(deed, Click) and person.user_id == statistics.story.user_id:
                statistics.story.took_ms = took_ms
        if isinstance(deed, Click):
            statistics.clicks.click(now, person.half, person.taste)
        elif not isinstance(deed, Ask):
            statistics.clicks.show(now, person.half, person.taste)

    def _event(self, deed: Deed) -> Event:
        self._count += 1
        person = deed.person
        event_id, event_time = f"demo-{self._count}", time.time_ns() // 1_000_000
        if isinstance(deed, Ask):
            return Request(
                event_id=event_id,
                event_time=event_time,
                user_id=person.user_id,
                request_id=f"visit-{self._count}",
                surface=SURFACE,
            )
        if isinstance(deed, Click):
            return Action(
                event_id=event_id,
                event_time=event_time,
                user_id=person.user_id,
                item_id=deed.item_id,
                action="click",
                request_id=deed.slate_id,
                surface=SURFACE,
            )
        return Impression(
            event_id=event_id,
            event_time=event_time,
            user_id=person.user_id,
            request_id=deed.slate_id,
            surface=SURFACE,
            items=[ImpressedItem(item_id, position) for position, item_id in enumerate(deed.items, 1)],
            # Ours is echoed as it came, so that the trainer knows whose choice was shown.
            experiment=deed.experiment if person.half is Half.OURS else person.half.value,
        )

    async def _read(self) -> None:
        while True:
            for records in (await self._consumer.getmany(timeout_ms=200)).values():
                arrived_ms = time.time() * 1000
                for record in records:
                    self._on_slate(record.value, arrived_ms)

    def _on_slate(self, value: bytes | None, arrived_ms: float) -> None:
        statistics = self._statistics
        try:
            slate = RECOMMENDATION_CODEC.decode(value)
        except RecordError as error:
            # Our own topic of this run: what cannot be read is a bug to be seen, not to be counted away.
            if not self._failed.done():
                self._failed.set_exception(error)
            return
        now = time.monotonic()
        statistics.slates += 1
        statistics.degraded += slate.degraded
        took_ms = statistics.freshness.arrived(now, slate.user_id, slate.trigger.offset, arrived_ms)
        if statistics.learning.slate(slate.model_version, slate.experiment, now, time.time(), statistics.started_at):
            statistics.clicks.begin_after()
        items = [i.item_id for i in slate.items]
        self._simulation.slate(slate.user_id, items, slate.recommendation_id, now, slate.experiment)
        if slate.user_id == statistics.story.user_id:
            statistics.story.slate(slate, took_ms[-1] if took_ms else float("nan"))

    async def _last_slates(self) -> None:
        deadline = time.monotonic() + LAST_SLATES_SECONDS
        if self._sending:
            _, left = await asyncio.wait(self._sending, timeout=LAST_SLATES_SECONDS)
            if left:
                raise DeliveryError(f"Kafka did not take {len(left)} events within {LAST_SLATES_SECONDS:.0f} s")
        while self._statistics.freshness.unanswered and time.monotonic() < deadline:  # noqa: ASYNC110 - a count, no event
            await asyncio.sleep(TICK_SECONDS)

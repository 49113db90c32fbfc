"""Taking over partitions: what must be true before their events are delivered, and what is given back."""

from __future__ import annotations

import asyncio
import gc
import time
from typing import TYPE_CHECKING

import structlog
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from models.errors import BrokerUnavailable, LayoutError, TopicRecreatedError
from streams.topic_ids import epoch, topic_ids

if TYPE_CHECKING:
    from streams.worker import Worker

log = structlog.get_logger(__name__)

EPOCH_CHECK_SECONDS = 2.0
TAKE_OVERS_AT_ONCE = 6


class Ownership:
    """The partitions of one worker, as Faust's recovery hands them over."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._counted: set[int] = set()
        # Faust cancels a recovery without waiting for its end, and a client's stop may swallow the cancellation: an
        # older take-over must never write behind a newer one.
        self._one_at_a_time = asyncio.Lock()

    async def take_over(self, partitions: set[int], generation: int) -> None:
        """Own ``partitions`` and return, or end the process with the code of what went wrong."""
        worker = self._worker
        try:
            async with self._one_at_a_time:
                await self._own(partitions, generation)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if isinstance(error, TopicRecreatedError):
                await worker.app.consumer.rewind(worker.names.events)
            if isinstance(error, KafkaError | OSError | LayoutError):
                error = BrokerUnavailable(f"partitions could not be taken over: {error!r}; nothing was changed")
            worker.fail(error, "take-over")
            # Faust would take an error for one of its own, and a return for leave to deliver events.
            await asyncio.Event().wait()

    def _is_over(self, generation: int) -> bool:
        return bool(self._worker.app.consumer_generation_id != generation)

    async def _own(self, partitions: set[int], generation: int) -> None:
        """Make this process the owner of ``partitions``: rows, profiles, counters; returns when they may be served."""
        worker = self._worker
        worker.is_ready = False
        if self._is_over(generation):
            return
        if partitions:
            # A deleted topic that comes back brings a rebalance with it: none of its events is taken for an old one.
            await self.require_epoch()
        worker.metrics.rebalances.inc()
        stale = await worker.rows.keep_current(partitions)
        gained = partitions - worker.rows.partitions
        worker.profiles.keep_only(partitions)
        worker.label_timer.keep_only(partitions - gained)
        worker.users_mirror.assign(partitions)
        # Counters are taken over last and apart: a rebalance in the middle leaves rows that are whole and counters
        # that are not.
        self._counted &= partitions - gained
        await worker.item_stats.keep_only(self._counted)
        log.info("taking_over", partitions=sorted(partitions), gained=sorted(gained), stale=sorted(stale))
        if self._is_over(generation):
            return
        worker.metrics.recovered.inc(await worker.rows.recover(gained))
        await worker.state.run(self._begin_labels, gained)
        await self._gate()
        if self._is_over(generation):
            return
        await self._count(partitions - self._counted, generation)
        if self._is_over(generation):
            return
        # What was loaded stays: without this every collection walks the whole catalogue and table.
        gc.collect()
        gc.freeze()
        worker.owned_generation = generation
        worker.fill_co_clicks(partitions)
        worker.become_ready()
        log.info("ready", partitions=sorted(partitions), rows=sum(len(worker.rows.rows_of(p)) for p in partitions))

    def _begin_labels(self, partitions: set[int]) -> None:
        worker = self._worker
        for partition in partitions & worker.rows.partitions:
            worker.label_timer.take_over(partition, worker.rows.rows_of(partition), time.monotonic())

    async def _gate(self) -> None:
        """Wait until every mirror has passed the end offsets that stood when it started."""
        worker = self._worker
        for mirror in worker.mirrors:
            while not mirror.caught_up.is_set():
                try:
                    await asyncio.wait_for(mirror.caught_up.wait(), worker.settings.worker.mirror_timeout_seconds)
                except TimeoutError:
                    log.warning("mirror_is_late", topic=mirror.topic, lag=mirror.lag)
        # The newest live bundle, or the word that it is refused: before the first slate.
        await worker.models.decided.wait()

    async def _count(self, partitions: set[int], generation: int) -> None:
        """Take over the counters of ``partitions``, several at once."""
        worker = self._worker
        committed = await self.committed(partitions)
        at_once = asyncio.Semaphore(TAKE_OVERS_AT_ONCE)

        async def one(partition: int) -> None:
            async with at_once:
                if self._is_over(generation):
                    return
                await worker.item_stats.take_over(partition, committed[partition])
                if not self._is_over(generation):
                    self._counted.add(partition)

        await asyncio.gather(*map(one, sorted(partitions)))

    async def committed(self, partitions: set[int]) -> dict[int, int]:
        """Return the group's committed offset of each partition, 0 where there is none.

        The partitions are named: asked for all, aiokafka takes a coordinator's refusal for a group without offsets.
        Raises BrokerUnavailable where one is missing from the answer.
        """
        wanted = [TopicPartition(self._worker.names.events, p) for p in sorted(partitions)]
        if not wanted:
            return {}
        group = self._worker.settings.worker.group
        found = await self._worker.admin.list_consumer_group_offsets(group, partitions=wanted)
        missing = [tp.partition for tp in wanted if tp not in found]
        if missing:
            raise BrokerUnavailable(
                f"the committed offsets of partitions {missing} could not be read; nothing was changed, try again"
            )
        return {tp.partition: max(0, found[tp].offset) for tp in wanted}

    async def require_epoch(self) -> None:
        """Raise TopicRecreatedError when the events topic is not the one that this process started on."""
        worker = self._worker
        found = await topic_ids(worker.settings, [worker.names.events])
        if epoch(found[worker.names.events]) != worker.epoch:
            raise TopicRecreatedError(
                f"{worker.names.events} was deleted and created again; rows and counters are kept, their guards "
                "start again with the new topic's first offset"
            )

    async def watch_epoch(self) -> None:
        """End the process when the events topic was created again; while it is missing, say so and wait for it."""
        worker = self._worker
        while True:
            await asyncio.sleep(EPOCH_CHECK_SECONDS)
            try:
                await self.require_epoch()
            except (KafkaError, OSError, BrokerUnavailable) as error:
                worker.metrics.kafka_errors.labels("epoch").inc()
                log.warning("epoch_unknown", error=repr(error))
            except LayoutError as error:
                worker.is_ready = False
                log.error("events_topic_missing", error=str(error))
            except TopicRecreatedError:
                await worker.app.consumer.rewind(worker.names.events)
                raise

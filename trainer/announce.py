"""Reads and writes the roles on the ``models`` topic, and reads what workers say on ``model-status``.

One decider: a lock keeps a second trainer off one machine. Of two on different machines the one whose record comes
later in the topic loses: it finds a record of the same or a higher generation before its own, puts that record back as
the last one of its key, and says so. Workers have refused its pointer by then, since their guards know the generation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
import structlog
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError

from models.errors import BrokerUnavailable, BundleError, TrainingError
from models.manifest import OffsetRange
from models.pointer import Pointer, Pointers, decode, newest
from models.signing import PrivateKey
from trainer.connection import Connection
from trainer.window import Stopped, Stopping, consumer, last_values, read_range

log = structlog.get_logger(__name__)

ANNOUNCER: Final = "trainer"
ANOTHER_DECIDER: Final = "another-decider"
SILENT_INTERVALS: Final = 3.0
"""A worker that said nothing for so many status intervals is gone."""


class VersionStatus(msgspec.Struct, frozen=True):
    """One version as a worker has it."""

    version: str
    generation: int = 0
    role: str = ""
    reason: str = ""
    detail: str = ""


class WorkerStatus(msgspec.Struct, frozen=True):
    """What a worker says of itself. Unknown fields are ignored."""

    worker_id: str
    time_ms: int
    live: VersionStatus | None = None
    prepared: list[VersionStatus] = []
    refused: list[VersionStatus] = []

    def has(self, version: str) -> bool:
        """Return whether it could serve a version at once."""
        return any(p.version == version for p in self.prepared) or (
            self.live is not None and self.live.version == version
        )

    def refusal(self, version: str) -> VersionStatus | None:
        """Return why it refused a version, None where it did not."""
        return None if self.has(version) else next((r for r in self.refused if r.version == version), None)


class Preparation(msgspec.Struct, frozen=True):
    """How far the workers that live are with a version."""

    workers: int
    prepared: int
    refusals: tuple[VersionStatus, ...] = ()

    @property
    def is_done(self) -> bool:
        """Return whether waiting longer changes nothing: each worker is prepared or has refused."""
        return self.prepared + len(self.refusals) >= self.workers


def preparation(
    statuses: Iterable[WorkerStatus],
    version: str,
    now_ms: int,
    interval_seconds: float,
    heard: Collection[str] = (),
) -> Preparation:
    """Return how far the workers are that said something within SILENT_INTERVALS status intervals.

    ``heard``: ids of workers that spoke meanwhile, whatever their clocks say.
    """
    silent_ms = SILENT_INTERVALS * interval_seconds * 1000
    alive = [s for s in statuses if now_ms - s.time_ms <= silent_ms or s.worker_id in heard]
    refusals = tuple(r for s in alive if (r := s.refusal(version)) is not None)
    return Preparation(len(alive), sum(s.has(version) for s in alive), refusals)


def read_status(values: Iterable[bytes]) -> list[WorkerStatus]:
    """Return the statuses among the values of ``model-status``; a value that is none is passed over."""
    found = []
    for value in values:
        try:
            found.append(msgspec.json.decode(value, type=WorkerStatus))
        except msgspec.DecodeError as error:
            log.warning("model_status_unreadable", error=str(error))
    return found


class Announcer:
    """The trainer's side of the two topics. Each call runs on ``runner``; all raise BrokerUnavailable."""

    def __init__(
        self,
        connection: Connection,
        name: str,
        private_key: PrivateKey | None,
        runner: asyncio.Runner,
        stopping: Stopping,
    ) -> None:
        self._connection = connection
        self._name = name
        self._private_key = private_key
        self._runner = runner
        self._stopping = stopping

    def pointers(self) -> Pointers:
        """Return the roles as the topic has them now."""
        return newest(self._runner.run(last_values(self._connection, self._connection.topics.models)), self._name)

    def statuses(self) -> list[WorkerStatus]:
        """Return what each worker said last."""
        values = self._runner.run(last_values(self._connection, self._connection.topics.model_status))
        return read_status(values.values())

    def announce(self, planned: Sequence[Pointer]) -> None:
        """Send pointers, in their order, signed where there is a key; returns when the broker has all of them.

        Raises TrainingError (``another-decider``) where somebody else announced that generation first, and Stopped
        before the first one only: a stop does not end a promotion half way.
        """
        if self._stopping():
            raise Stopped
        self._runner.run(self._announce([p.signed(self._private_key) for p in planned]))

    async def _announce(self, planned: Sequence[Pointer]) -> None:
        topic = self._connection.topics.models
        producer = AIOKafkaProducer(**self._connection.client_options, enable_idempotence=True, acks="all")
        try:
            await producer.start()
            async with consumer(self._connection, topic) as opened:
                for pointer in planned:
                    # Since the roles were read: from before the plan was made there may be newer ones.
                    await self._send(producer, opened, topic, pointer)
        except KafkaError as error:
            raise BrokerUnavailable(f"the roles could not be announced: {error!r}; they are as they were") from error
        finally:
            await producer.stop()

    async def _send(self, producer: Any, opened: Any, topic: str, pointer: Pointer) -> None:
        value = pointer.encode()
        sent = await producer.send_and_wait(topic, value, key=pointer.key)
        tp = TopicPartition(topic, sent.partition)
        begin = (await opened.beginning_offsets([tp]))[tp]
        before: bytes | None = None
        highest = 0
        async for records, _ in read_range(
            opened, OffsetRange(topic, sent.partition, begin, sent.offset), lambda: False
        ):
            for record in records:
                found = _pointer(record.key, record.value)
                if found is not None and found.name == self._name:
                    highest = max(highest, found.generation)
                    if found.key == pointer.key:
                        before = record.value
        if highest < pointer.generation:
            return
        await producer.send_and_wait(topic, before, key=pointer.key)
        raise TrainingError(
            ANOTHER_DECIDER,
            f"generation {highest} of {self._name!r} was announced before generation {pointer.generation} of this "
            "trainer: another trainer or an operator decides too. What stood there was put back, workers have refused "
            "this one's; end one of the trainers",
        )


def _pointer(key: bytes | None, value: bytes | None) -> Pointer | None:
    if value is None:
        return None
    try:
        return decode(key, value)
    except BundleError:
        return None


def described(pointers: Pointers) -> Mapping[str, str]:
    """Return role → version for a line of log."""
    return {role: pointer.version for role, pointer in pointers.roles.items()}

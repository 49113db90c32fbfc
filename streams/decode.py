"""From a consumed message to a decoded event, or the reason why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from aiokafka.partitioner import murmur2

from models.errors import RecordError
from models.events import EVENT_CODEC, Action, Event, Impression, epoch_ms
from streams.profiles import content_type
from streams.settings import EventSettings


class Message(Protocol):
    """The part of Faust's message that is used."""

    topic: str
    partition: int
    offset: int
    timestamp: float
    """Broker time (LogAppendTime), epoch seconds."""
    key: bytes | None
    value: bytes | None
    headers: Any


@dataclass(frozen=True, slots=True)
class Decoded:
    """One accepted event with its place in the log."""

    event: Event
    message: Message
    partition: int
    offset: int
    key: bytes
    broker_ms: int
    time_ms: int
    """Event time under the clock policy."""

    @property
    def kind(self) -> str:
        """Return the event's type, as a metric label."""
        return event_type(self.event)


def event_type(event: Event) -> str:
    """Return "impression", "action" or "request"."""
    if isinstance(event, Action):
        return "action"
    return "impression" if isinstance(event, Impression) else "request"


def partition_of(key: bytes, partitions: int) -> int:
    """Return the partition that murmur2 gives a key, as the Java client and aiokafka do."""
    return int((murmur2(key) & 0x7FFFFFFF) % partitions)


def decode(message: Message, settings: EventSettings, partitions: int, *, is_known: bool) -> Decoded:
    """Decode and check one message.

    ``is_known`` says that the key has a row in this partition already: then its partition was checked before.
    Raises RecordError with the reason for which the message goes to the dead letters. That is also what an error of
    our own becomes: one record must not end the process, and live processing and recovery must refuse the same ones.
    """
    try:
        return _decode(message, settings, partitions, is_known=is_known)
    except RecordError:
        raise
    except Exception as error:
        raise RecordError("processing-error", f"decoding failed: {error!r}") from error


def _decode(message: Message, settings: EventSettings, partitions: int, *, is_known: bool) -> Decoded:
    event = EVENT_CODEC.decode(message.value, content_type(message.headers))
    key = event.user_id.encode("utf-8")
    if message.key != key:
        shown = "null" if message.key is None else repr(bytes(message.key[:64]))
        raise RecordError("key-mismatch", f"the key must be the user_id {event.user_id!r}, it is {shown}")
    if not is_known and settings.wrong_partition == "refuse":
        right = partition_of(key, partitions)
        if right != message.partition:
            raise RecordError(
                "wrong-partition",
                f"user_id {event.user_id!r} belongs to partition {right}, not {message.partition}: "
                "set the producer's partitioner to murmur2 (librdkafka: partitioner=murmur2_random)",
            )
    broker_ms = round(message.timestamp * 1000)
    time_ms = settings.clock.event_time_ms(epoch_ms(event.event_time), broker_ms)
    return Decoded(event, message, message.partition, message.offset, key, broker_ms, time_ms)

"""Sends what one micro-batch produced: one Kafka batch per partition, every delivery awaited.

``producer.send`` costs tens of microseconds of asyncio work per record; building the batch of each partition by
hand costs two or three, and makes "await every delivery" a handful of futures.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from models.errors import DeliveryError

Headers = Sequence[tuple[str, bytes]]


@dataclass(slots=True)
class Outbox:
    """Records to send, grouped by (topic, partition), in the order in which they were added."""

    records: dict[tuple[str, int], list[tuple[bytes | None, bytes | None, Headers]]] = field(default_factory=dict)

    def add(self, topic: str, partition: int, key: bytes | None, value: bytes | None, headers: Headers = ()) -> None:
        """Queue one record; nothing is sent before ``Sender.send``."""
        self.records.setdefault((topic, partition), []).append((key, value, headers))

    def __len__(self) -> int:
        return sum(map(len, self.records.values()))


@dataclass(frozen=True, slots=True)
class Delivered:
    """One acknowledged Kafka batch: its records have the offsets base_offset … base_offset + count - 1."""

    topic: str
    partition: int
    base_offset: int
    count: int


class Sender:
    """Sends outboxes through one producer; a record that is not acknowledged is an error, never a warning."""

    def __init__(self, producer: AIOKafkaProducer) -> None:
        self._producer = producer

    async def send(self, outbox: Outbox) -> list[Delivered]:
        """Send everything in ``outbox`` and return when the broker has acknowledged all of it.

        Raises DeliveryError if one record was not acknowledged; others may have been.
        """
        try:
            waiting: list[tuple[str, int, int, asyncio.Future[Any]]] = []
            for (topic, partition), records in outbox.records.items():
                batch = self._producer.create_batch()
                count = 0
                for key, value, headers in records:
                    if batch.append(timestamp=None, key=key, value=value, headers=list(headers)) is None:
                        future = await self._producer.send_batch(batch, topic, partition=partition)
                        waiting.append((topic, partition, count, future))
                        batch, count = self._producer.create_batch(), 0
                        if batch.append(timestamp=None, key=key, value=value, headers=list(headers)) is None:
                            size = len(key or b"") + len(value or b"")
                            raise DeliveryError(f"a record of {size} bytes for {topic} is larger than a batch may be")
                    count += 1
                if count:
                    batch.close()
                    future = await self._producer.send_batch(batch, topic, partition=partition)
                    waiting.append((topic, partition, count, future))
            delivered = []
            for topic, partition, count, future in waiting:
                metadata = await future
                delivered.append(Delivered(topic, partition, metadata.offset, count))
            return delivered
        except KafkaError as error:
            raise DeliveryError(f"{len(outbox)} records were not all acknowledged: {error!r}") from error

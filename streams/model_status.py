"""What a worker says on ``model-status``: which version it serves with, what it has prepared, what it refused.

Key: the worker's id, kept in its data folder over restarts. Value: JSON of ``WorkerStatus``; null after a graceful
stop. A record older than a few intervals is of a worker that is not there any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog
from aiokafka.errors import KafkaError

from models.atomic import replace_file
from streams.model_slot import ModelSlot
from streams.model_watch import ModelWatch
from streams.settings import Settings
from streams.topics import TopicNames

log = structlog.get_logger(__name__)

ID_FILE: Final = "worker-id"
MAX_DETAIL_CHARACTERS: Final = 2_000
SEND_SECONDS: Final = 10.0


class LiveModel(msgspec.Struct):
    """The version that a worker serves with."""

    version: str
    generation: int
    space_id: str


class PreparedModel(msgspec.Struct):
    """A version that a worker could serve with at once, and its role."""

    role: str
    version: str
    generation: int


class RefusedModel(msgspec.Struct):
    """The last pointer of a role that a worker did not follow, and why."""

    role: str
    version: str
    generation: int
    reason: str
    detail: str


class ArmModel(msgspec.Struct):
    """A version that an arm of the experiment names; where it is not ready, the live one scores for the arm."""

    version: str
    is_ready: bool
    reason: str = ""
    """Why it is not ready, where it is known: that of a refusal, or ``unreachable``."""
    detail: str = ""


class WorkerStatus(msgspec.Struct):
    """One worker's record."""

    worker_id: str
    time_ms: int
    group: str
    live: LiveModel
    prepared: list[PreparedModel]
    refused: list[RefusedModel]
    arms: list[ArmModel] = []

    @classmethod
    def of(cls, worker_id: str, group: str, slot: ModelSlot, watch: ModelWatch, time_ms: int) -> WorkerStatus:
        """Return what is so now."""
        shadows = [(role, model) for role, model in slot.by_role().items() if role != "live"]
        return cls(
            worker_id=worker_id,
            time_ms=time_ms,
            group=group,
            live=LiveModel(slot.live.version, slot.live.generation, slot.live.space_id),
            prepared=[PreparedModel(role, model.version, model.generation) for role, model in shadows],
            refused=[
                RefusedModel(r.role, r.version, r.generation, r.reason, r.detail[:MAX_DETAIL_CHARACTERS])
                for r in watch.refused.values()
            ],
            arms=[_arm(version, slot, watch) for version in watch.arms],
        )


def _arm(version: str, slot: ModelSlot, watch: ModelWatch) -> ArmModel:
    why = watch.arms_refused.get(version)
    if version in slot.arms or why is None:
        return ArmModel(version, version in slot.arms)
    return ArmModel(version, False, why.reason, why.detail[:MAX_DETAIL_CHARACTERS])


def kept_worker_id(folder: Path) -> str:
    """Return the id of the worker that has this data folder; made at the first call. Raises OSError."""
    file = folder / ID_FILE
    with contextlib.suppress(FileNotFoundError):
        found = file.read_text("utf-8", "replace").strip()
        if found.isalnum() and len(found) <= 64:
            return found
    made = uuid.uuid4().hex[:16]
    replace_file(file, made.encode())
    return made


class StatusWriter:
    """Writes this worker's record at each change and every ``models.status_interval_seconds``.

    A record that cannot be sent costs nothing but its news: it is logged, and the next one follows.
    """

    def __init__(self, settings: Settings, slot: ModelSlot, watch: ModelWatch, producer: Any) -> None:
        self.worker_id = kept_worker_id(settings.worker.data_folder)
        self._topic = TopicNames.of(settings).model_status
        self._group = settings.worker.group
        self._interval_seconds = settings.models.status_interval_seconds
        self._slot = slot
        self._watch = watch
        self._producer = producer

    async def run(self) -> None:
        """Write until cancelled, from the first choice of a model on."""
        await self._watch.decided.wait()
        while True:
            self._watch.changed.clear()
            status = WorkerStatus.of(self.worker_id, self._group, self._slot, self._watch, time.time_ns() // 1_000_000)
            await self._send(msgspec.json.encode(status))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._watch.changed.wait(), self._interval_seconds)

    async def say_goodbye(self) -> None:
        """Take the record away: this worker serves nothing any more."""
        await self._send(None)

    async def _send(self, value: bytes | None) -> None:
        try:
            # TimeoutError is an OSError: a stop must not wait for a broker that is away.
            async with asyncio.timeout(SEND_SECONDS):
                await self._producer.send_and_wait(self._topic, key=self.worker_id.encode(), value=value)
        except (KafkaError, OSError) as error:
            log.warning("model_status_not_sent", error=repr(error))

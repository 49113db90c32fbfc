"""`millstream import`: a recorded log to the topics, catalogue first, then events in event-time order.

At full speed or at N times real speed; resumable. The state file names, after each acknowledged chunk, how far the
log was sent and the next offset of each partition. A crash between an acknowledgement and the state file leaves
records on the topic that the state does not know: a resumed import reads the events topic on from the offsets of the
state, and leaves out what it finds there by event_id. So nothing is lost and nothing is sent twice.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import msgspec

from models.errors import LogFormatError, RecordError
from models.events import EVENT_CODEC, ITEM_CODEC, USER_CODEC, Event, Impression, Item, Request, User
from models.logs import LogReader, fingerprint
from streams.sender import Delivered, Outbox
from streams.settings import Settings
from streams.topic_io import TopicWriter, open_topic
from streams.topics import TopicNames

CHUNK_EVENTS: Final = 2_000
CHUNK_BYTES: Final = 2 << 20
PACE_SECONDS: Final = 0.02
"""At N times real speed: events due within this time go together."""
SAVE_SECONDS: Final = 1.0
_YIELD_EVERY: Final = 250
_STATE_VERSION: Final = 1

Phase = Literal["items", "users", "events"]
OnProgress = Callable[[Phase, int, int | None], None]
"""Called with the phase, records done in it and their number where it is known."""


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """How to import."""

    speed: float = 0.0
    """Times real speed; 0: as fast as possible."""
    requests: bool = False
    """Ask for a slate right before each impression."""
    limit: int | None = None
    """Send at most this many events (requests included)."""
    resume: bool = False
    state_file: Path | None = None
    """Default: `<data folder>/imports/<fingerprint>.json` beside the worker's folder."""


@dataclass(slots=True)
class ImportResult:
    """What was sent by this run."""

    items: int = 0
    users: int = 0
    events: int = 0
    resumed_at: int = 0
    """Events of the log that an earlier run had sent."""
    seconds: float = 0.0
    skipped: dict[str, int] = field(default_factory=dict)
    """Rows of the log that carry no event, and records that the worker would refuse, by reason."""


class ImportState(msgspec.Struct):
    """The state file: JSON, replaced as a whole."""

    version: int
    fingerprint: str
    topic: str
    is_catalogue_sent: bool = False
    position: int = 0
    """Records of the sequence of events that are acknowledged."""
    next_offsets: dict[int, int] = {}
    """Where the events topic stood, per partition, when `position` was reached."""
    is_finished: bool = False


def sequence_fingerprint(reader: LogReader, requests: bool) -> str:
    """Return what identifies a sequence of records: the log, and whether requests stand in it."""
    return f"{fingerprint(reader)}{'-requests' if requests else ''}"


def with_requests(events: Iterable[Event]) -> Iterator[Event]:
    """Put a request right before each impression, for the same user at the same time."""
    for event in events:
        if isinstance(event, Impression):
            event_id = f"{event.event_id}:request"[:256]
            yield Request(
                event_id=event_id,
                event_time=event.event_time,
                user_id=event.user_id,
                request_id=event_id,
                surface=event.surface,
            )
        yield event


class Importer:
    """One import of one log; `run` does all of it."""

    def __init__(
        self, settings: Settings, reader: LogReader, options: ImportOptions, on_progress: OnProgress | None = None
    ) -> None:
        self._settings = settings
        self._reader = reader
        self._options = options
        self._on_progress = on_progress or (lambda phase, done, total: None)
        self._names = TopicNames.of(settings)
        self._identity = sequence_fingerprint(reader, options.requests)
        self.state_file = options.state_file or (
            settings.worker.data_folder.parent / "imports" / f"{self._identity}.json"
        )
        self._state = ImportState(_STATE_VERSION, self._identity, self._names.events)
        self._saved_at = 0.0
        self.result = ImportResult()

    async def run(self) -> ImportResult:
        """Send everything. Raises DeliveryError, BrokerUnavailable, LayoutError or LogFormatError; `resume` goes on."""
        start = time.monotonic()
        names = self._names
        found_ids = await self._prepare()
        async with TopicWriter(self._settings, names.items, names.users, names.events) as writer:
            if not self._state.is_catalogue_sent:
                self.result.items = await self._send_catalogue(writer, "items")
                self.result.users = await self._send_catalogue(writer, "users")
                self._state.is_catalogue_sent = True
                self._save()
            await self._send_events(writer, found_ids)
        self._state.is_finished = self._options.limit is None
        self._save()
        for reason, count in self._reader.skipped.items():
            self.result.skipped[reason] = self.result.skipped.get(reason, 0) + count
        self.result.seconds = time.monotonic() - start
        return self.result

    async def _prepare(self) -> set[str]:
        """Load or begin the state; return the event ids that stand on the topic beyond it."""
        async with open_topic(self._settings, self._names.events) as tail:
            ends = await tail.end_offsets()
            state = read_state(self.state_file) if self._options.resume else None
            if state is None:
                self._state.next_offsets = ends
                self._save()
                return set()
            if state.fingerprint != self._identity or state.topic != self._names.events:
                raise LogFormatError(
                    f"{self.state_file} belongs to another log, topic or `--requests`; nothing was sent. "
                    "Import without --resume, or name the right state file"
                )
            begins = await tail.begin_offsets()
            for partition, offset in state.next_offsets.items():
                if offset > ends.get(partition, -1):
                    raise LogFormatError(
                        f"{self.state_file} says offset {offset} of partition {partition} was reached, the topic ends "
                        f"at {ends.get(partition)}: it was created anew. Nothing was sent; import without --resume"
                    )
            self._state = state
            self.result.resumed_at = state.position
            starts = {p: max(offset, begins[p]) for p, offset in state.next_offsets.items()}
            found: set[str] = set()
            async for record in tail.read(starts, ends):
                try:
                    found.add(EVENT_CODEC.decode(record.value).event_id)
                except RecordError:
                    continue  # Another producer's refused record is no event of this log.
            return found

    async def _send_catalogue(self, writer: TopicWriter, phase: Literal["items", "users"]) -> int:
        topic = self._names.items if phase == "items" else self._names.users
        codec = ITEM_CODEC if phase == "items" else USER_CODEC
        records: Iterator[Item] | Iterator[User] = self._reader.items() if phase == "items" else self._reader.users()
        encode = msgspec.msgpack.Encoder().encode
        sent = 0
        outbox, size = Outbox(), 0
        for record in records:
            value = encode(record)
            try:
                codec.decode(value)
            except RecordError as error:
                self._skip(f"{phase}: {error.reason}")
                continue
            key = (record.item_id if isinstance(record, Item) else record.user_id).encode()
            writer.add(outbox, topic, key, value)
            size += len(value)
            if len(outbox) >= CHUNK_EVENTS or size >= CHUNK_BYTES:
                await writer.send(outbox)
                sent += len(outbox)
                self._on_progress(phase, sent, None)
                outbox, size = Outbox(), 0
        await writer.send(outbox)
        sent += len(outbox)
        if sent:
            self._on_progress(phase, sent, sent)
        return sent

    def _skip(self, reason: str) -> None:
        self.result.skipped[reason] = self.result.skipped.get(reason, 0) + 1

    async def _send_events(self, writer: TopicWriter, found_ids: set[str]) -> None:
        total = self._reader.count_events() if not self._options.requests else None
        limit = self._options.limit
        if limit is not None:
            total = limit if total is None else min(limit, total)
        pace = _Pace(self._options.speed)
        encode = msgspec.msgpack.Encoder().encode
        topic = self._names.events
        events: Iterator[Event] = (logged.event for logged in self._reader.events())
        if self._options.requests:
            events = with_requests(events)
        sending: asyncio.Task[list[Delivered]] | None = None
        in_flight = 0
        outbox, position, size = Outbox(), 0, 0
        try:
            for event in events:
                if limit is not None and position >= limit:
                    break
                position += 1
                if position <= self._state.position:
                    continue
                if event.event_id in found_ids:
                    continue
                due_seconds = pace.wait_seconds(event)
                if len(outbox) >= CHUNK_EVENTS or size >= CHUNK_BYTES or (due_seconds > PACE_SECONDS and outbox):
                    await self._acknowledged(sending, in_flight, total)
                    sending, in_flight = asyncio.create_task(writer.send(outbox)), position - 1
                    outbox, size = Outbox(), 0
                    await asyncio.sleep(0)
                if due_seconds > PACE_SECONDS:
                    await self._acknowledged(sending, in_flight, total)
                    sending = None
                    await asyncio.sleep(pace.wait_seconds(event))
                value = encode(event)
                writer.add(outbox, topic, event.user_id.encode(), value)
                size += len(value)
                if position % _YIELD_EVERY == 0:
                    await asyncio.sleep(0)
            await self._acknowledged(sending, in_flight, total)
            sending = asyncio.create_task(writer.send(outbox))
            await self._acknowledged(sending, position, total)
            self._on_progress("events", self._state.position, self._state.position)
        finally:
            if sending is not None and not sending.done():
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

    async def _acknowledged(
        self, sending: asyncio.Task[list[Delivered]] | None, position: int, total: int | None
    ) -> None:
        if sending is None:
            return
        for batch in await sending:
            self._state.next_offsets[batch.partition] = batch.base_offset + batch.count
            self.result.events += batch.count
        self._state.position = max(self._state.position, position)
        self._on_progress("events", self._state.position, total)
        if time.monotonic() - self._saved_at >= SAVE_SECONDS:
            self._save()

    def _save(self) -> None:
        write_state(self.state_file, self._state)
        self._saved_at = time.monotonic()


class _Pace:
    """When an event is due, with event time running ``speed`` times as fast as the clock from the first one on."""

    def __init__(self, speed: float) -> None:
        self._speed = speed
        self._first: tuple[float, int] | None = None

    def wait_seconds(self, event: Event) -> float:
        """Return the seconds until ``event`` is due, 0 where it is or where there is no pace."""
        if self._speed <= 0:
            return 0.0
        time_ms = event.event_time if isinstance(event.event_time, int) else round(event.event_time.timestamp() * 1000)
        if self._first is None:
            self._first = (time.monotonic(), time_ms)
        started, first_ms = self._first
        return max(0.0, started + (time_ms - first_ms) / 1000 / self._speed - time.monotonic())


def read_state(path: Path) -> ImportState | None:
    """Return the state of an earlier import, None where there is none. Raises LogFormatError for a broken file."""
    try:
        state = msgspec.json.decode(path.read_bytes(), type=ImportState)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise LogFormatError(
            f"{path} is not a state file of an import: {error}. Nothing was sent; import without --resume"
        ) from None
    if state.version != _STATE_VERSION:
        raise LogFormatError(f"{path} has version {state.version}, not {_STATE_VERSION}; import without --resume")
    return state


def write_state(path: Path, state: ImportState) -> None:
    """Replace the state file as a whole, so that a reader sees the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_bytes(msgspec.json.encode(state))
    os.replace(aside, path)


def advice(settings: Settings, state_file: Path, *, resume: bool) -> list[str]:
    """Return what to know before an import: the clock policy, and an earlier one that did not end."""
    lines = [
        'The workers need events.clock.policy = "trusted" (MILLSTREAM_EVENTS__CLOCK__POLICY=trusted) to take '
        "the event times of a log as they are."
    ]
    if settings.events.clock.policy != "trusted":
        lines.append(
            f"WARNING: the settings in force here say {settings.events.clock.policy!r}: a worker with these settings "
            f"refuses events older than {settings.events.clock.absurd_past_seconds / 86_400:.0f} days, and moves "
            "others to the present."
        )
    if not resume:
        try:
            state = read_state(state_file)
        except LogFormatError as error:
            lines.append(f"WARNING: {error}; it will be replaced")
            state = None
        if state is not None and not state.is_finished and state.position:
            lines.append(
                f"An earlier import of this log ended after {state.position:,} events; `--resume` would go on there. "
                "This one starts anew: events that were sent are sent again, under the same event ids."
            )
    return lines


def summary(result: ImportResult) -> list[str]:
    """Return what an import did, as lines of text."""
    rate = f", {result.events / result.seconds:,.0f} events/s over all" if result.seconds >= 0.5 else ""
    lines = [
        f"{result.items:,} items, {result.users:,} users and {result.events:,} events in {result.seconds:.1f} s{rate}"
    ]
    if result.resumed_at:
        lines.append(f"resumed after {result.resumed_at:,} events")
    lines += [f"left out: {count:,} {reason}" for reason, count in sorted(result.skipped.items())]
    return lines

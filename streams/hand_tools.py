"""`millstream publish` and `millstream tail`: put records on a topic by hand and look at what stands there."""

from __future__ import annotations

import asyncio
import base64
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec
from aiokafka import ConsumerRecord

from models.errors import RecordError, SettingsError
from models.events import Item, is_json
from models.logs.jsonl import RecordKind, Refusal, decode_line
from streams.sender import Outbox
from streams.settings import Settings
from streams.topic_io import TopicWriter, open_topic, partition_of
from streams.topics import TopicNames

Start = Literal["beginning", "end"]
STARTS: Final[tuple[Start, ...]] = ("beginning", "end")
BATCH_LINES: Final = 1_000
_JSON: Final = (("content-type", b"application/json"),)


@dataclass(slots=True)
class PublishResult:
    """What `publish` did."""

    sent: int = 0
    refused: int = 0


def topic_name(settings: Settings, name: str) -> str:
    """Return the full name of a topic given by its short name (`events`, `item-stats`) or its full one."""
    names = TopicNames.of(settings)
    short = name.replace("-", "_")
    full = getattr(names, short, name) if short in TopicNames.__slots__ else name
    if full not in names.all() and "." not in full:
        raise SettingsError(
            f"no topic {name!r}; there are {', '.join(n.replace('_', '-') for n in TopicNames.__slots__)}"
        )
    return str(full)


async def publish(
    settings: Settings,
    kind: RecordKind,
    lines: Iterable[bytes],
    *,
    remove: bool = False,
    on_refusal: Callable[[Refusal], None] | None = None,
) -> PublishResult:
    """Send JSON lines as records of ``kind``, each as it stands, keyed by the id in it.

    A line that the worker would refuse is not sent and is told to ``on_refusal``; the others are. With ``remove`` a
    null value is sent for the id of each item or user. Raises DeliveryError, BrokerUnavailable, LayoutError.
    """
    if remove and kind == "events":
        raise SettingsError("events cannot be removed; --remove is for items and users")
    topic = getattr(TopicNames.of(settings), kind)
    result = PublishResult()
    number = 0
    async with TopicWriter(settings, topic) as writer:
        async for batch in _batches(lines):
            outbox = Outbox()
            for line in batch:
                number += 1
                value = line.strip()
                if not value:
                    continue
                try:
                    record = decode_line(value, kind)
                except RecordError as error:
                    result.refused += 1
                    if on_refusal:
                        on_refusal(Refusal(number, error.reason, error.detail))
                    continue
                key = (record.item_id if isinstance(record, Item) else record.user_id).encode()
                writer.add(outbox, topic, key, None if remove else value, () if remove else _JSON)
            await writer.send(outbox)
            result.sent += len(outbox)
    return result


async def _batches(lines: Iterable[bytes]) -> AsyncIterator[list[bytes]]:
    """Yield what is there, at most BATCH_LINES: a slow pipe is sent line by line, a file in large pieces."""
    waiting: queue.Queue[bytes | BaseException | None] = queue.Queue(BATCH_LINES)

    def read() -> None:
        try:
            for line in lines:
                waiting.put(line)
            waiting.put(None)
        except (OSError, ValueError, EOFError) as error:
            waiting.put(error)

    def take() -> list[bytes | BaseException | None]:
        taken = [waiting.get()]
        while len(taken) < BATCH_LINES:
            try:
                taken.append(waiting.get_nowait())
            except queue.Empty:
                break
        return taken

    # A daemon: a read from a terminal cannot be interrupted, and must not keep the process.
    threading.Thread(target=read, name="publish-reader", daemon=True).start()
    while True:
        taken = await asyncio.to_thread(take)
        batch = [line for line in taken if isinstance(line, bytes)]
        if batch:
            yield batch
        last = taken[-1]
        if isinstance(last, BaseException):
            raise last
        if last is None:
            return


async def tail(
    settings: Settings,
    topic: str,
    *,
    start: Start = "end",
    user: str | None = None,
    limit: int | None = None,
    follow: bool = True,
    on_open: Callable[[], None] | None = None,
) -> AsyncIterator[dict[str, Any]]:
    """Yield the records of a topic as JSON-able dicts: `describe`'s form, one partition's in their order.

    ``user`` reads that key's partition alone and yields its records. Without ``follow`` it ends at the end offsets
    found at the start. ``on_open`` is called when the start offsets are fixed.
    """
    if limit is not None and limit <= 0:
        return
    name = topic_name(settings, topic)
    async with open_topic(settings, name) as opened:
        begins, ends = await opened.begin_offsets(), await opened.end_offsets()
        starts = begins if start == "beginning" else ends
        key = user.encode() if user is not None else None
        if key is not None:
            partition = partition_of(key, len(opened.partitions))
            starts = {partition: starts[partition]}
        if on_open:
            on_open()
        shown = 0
        async for record in opened.read(starts, None if follow else ends):
            if key is not None and record.key != key:
                continue
            yield describe(record)
            shown += 1
            if limit is not None and shown >= limit:
                return


def describe(record: ConsumerRecord) -> dict[str, Any]:
    """Return place, time, key, headers and decoded value of a record.

    A value that is neither JSON nor MessagePack, and any bytes that are not text, stand as {"base64": …}.
    """
    described: dict[str, Any] = {
        "partition": record.partition,
        "offset": record.offset,
        "time_ms": record.timestamp,
        "key": _text(record.key),
        "value": decode_value(record.value, dict(record.headers).get("content-type")),
    }
    if record.headers:
        described["headers"] = {name: _text(value) for name, value in record.headers}
    return described


def decode_value(value: bytes | None, content_type: bytes | None = None) -> Any:
    """Return a value as plain JSON-able data."""
    if value is None:
        return None
    kind = content_type.decode("latin-1") if content_type else None
    try:
        decoded = msgspec.json.decode(value) if is_json(value, kind) else msgspec.msgpack.decode(value, strict=False)
        return msgspec.to_builtins(decoded, str_keys=True, enc_hook=_plain)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, TypeError, ValueError, NotImplementedError):
        return {"base64": base64.b64encode(value).decode()}


def _plain(value: Any) -> Any:
    if isinstance(value, msgspec.msgpack.Ext):
        return {"ext": value.code, "base64": base64.b64encode(value.data).decode()}
    raise NotImplementedError(type(value).__name__)


def _text(value: bytes | None) -> str | dict[str, str] | None:
    if value is None:
        return None
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}

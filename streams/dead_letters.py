"""Dead letters: what was refused, with its original bytes and the reason; how to list and replay it.

A letter's key and value are those of the refused record. What the record itself cannot say stands in headers that
start with ``millstream-dlq-``; the record's own headers follow, each with ``millstream-original-`` before its name,
so that a replay gives them back as they were.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeAlias

import structlog

from models.errors import RecordError
from models.events import MAX_RECORD_BYTES
from streams.sender import Headers, Outbox
from streams.settings import Settings
from streams.topic_io import TopicWriter, open_topic
from streams.topics import TopicNames

log = structlog.get_logger(__name__)

MAX_VALUE_BYTES: Final = MAX_RECORD_BYTES + 65_536
"""A value above this is cut. Above the events topic's own limit, so that whatever got in there is kept whole."""
MAX_KEY_BYTES: Final = 65_536
MAX_HEADER_BYTES: Final = 65_536
"""Names and values of the original headers together; what does not fit is left out and named in `cut`."""
REPLAY_LETTERS: Final = 500
REPLAY_BYTES: Final = 4 << 20
MAX_DETAIL_BYTES: Final = 2_000
MAX_TRACEBACK_BYTES: Final = 16_000

PREFIX: Final = "millstream-dlq-"
ORIGINAL: Final = "millstream-original-"
REPLAYS_HEADER: Final = "millstream-replays"
"""On a record that `millstream dlq replay` sent: how often it was sent again, decimal."""

AnyHeaders: TypeAlias = Sequence[tuple[str, bytes | None]] | Mapping[str, bytes | None] | None


class Source(Protocol):
    """The part of a consumed record that a letter needs; aiokafka's and Faust's messages both have it."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def key(self) -> Any: ...
    @property
    def value(self) -> Any: ...
    @property
    def headers(self) -> Any: ...


def header_pairs(headers: AnyHeaders) -> list[tuple[str, bytes]]:
    """Return headers as a list of pairs: aiokafka has a sequence, Faust a mapping, a list or None."""
    if not headers:
        return []
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    return [(name, bytes(value) if value is not None else b"") for name, value in pairs]


class DeadLetters:
    """Makes letters for one dead-letter topic. It sends nothing: the caller's outbox does, and awaits delivery."""

    def __init__(self, topic: str, partitions: int, *, max_value_bytes: int = MAX_VALUE_BYTES) -> None:
        self.topic = topic
        self.partitions = partitions
        self._max_value_bytes = max_value_bytes

    def letter(
        self, message: Source, error: RecordError, *, refused_at_ms: int, traceback: str | None = None
    ) -> tuple[bytes | None, bytes | None, Headers]:
        """Return key, value and headers of the letter for ``message``, refused at ``refused_at_ms`` (epoch ms)."""
        key: bytes | None = message.key
        value: bytes | None = message.value
        own = header_pairs(message.headers)
        cut: list[str] = []
        headers: list[tuple[str, bytes]] = [
            (PREFIX + "topic", message.topic.encode()),
            (PREFIX + "partition", b"%d" % message.partition),
            (PREFIX + "offset", b"%d" % message.offset),
            (PREFIX + "reason", error.reason.encode()),
            (PREFIX + "detail", _cut_text(error.detail, MAX_DETAIL_BYTES)),
            (PREFIX + "refused-at-ms", b"%d" % refused_at_ms),
        ]
        if value is not None:
            headers.append((PREFIX + "value-bytes", b"%d" % len(value)))
            headers.append((PREFIX + "value-sha256", hashlib.sha256(value).hexdigest().encode()))
            if len(value) > self._max_value_bytes:
                cut.append("value")
                value = bytes(value[: self._max_value_bytes])
        if key is not None and len(key) > MAX_KEY_BYTES:
            cut.append("key")
            headers.append((PREFIX + "key-bytes", b"%d" % len(key)))
            headers.append((PREFIX + "key-sha256", hashlib.sha256(key).hexdigest().encode()))
            key = bytes(key[:MAX_KEY_BYTES])
        if traceback:
            # The end of a traceback names the error.
            headers.append((PREFIX + "traceback", traceback.encode("utf-8", "replace")[-MAX_TRACEBACK_BYTES:]))
        room = MAX_HEADER_BYTES
        for name, content in own:
            room -= len(name) + len(content)
            if room < 0:
                cut.append("headers")
                break
            headers.append((ORIGINAL + name, content))
        if cut:
            headers.append((PREFIX + "cut", ",".join(cut).encode()))
        return key, value, headers

    def add(
        self,
        outbox: Outbox,
        message: Source,
        error: RecordError,
        *,
        refused_at_ms: int,
        traceback: str | None = None,
    ) -> None:
        """Add the letter to ``outbox``, on the partition of the same number, so that letters keep their order."""
        key, value, headers = self.letter(message, error, refused_at_ms=refused_at_ms, traceback=traceback)
        outbox.add(self.topic, message.partition % self.partitions, key, value, headers)


def _cut_text(text: str, limit: int) -> bytes:
    return text.encode("utf-8", "replace")[:limit]


@dataclass(frozen=True, slots=True)
class Letter:
    """A letter as it stands on the dead-letter topic."""

    partition: int
    """Of the letter itself, as is ``offset``; the refused record's place has ``source_`` before it."""
    offset: int
    key: bytes | None
    value: bytes | None
    source_topic: str
    source_partition: int
    source_offset: int
    reason: str
    detail: str
    refused_at_ms: int
    value_bytes: int | None
    value_sha256: str | None
    traceback: str | None
    cut: tuple[str, ...]
    """Which of value, key, headers are not whole; such a letter cannot be replayed."""
    headers: tuple[tuple[str, bytes], ...]
    """The refused record's own."""

    @property
    def replays(self) -> int:
        """How often the refused record had been sent again before it was refused."""
        text = dict(self.headers).get(REPLAYS_HEADER, b"0")
        return int(text) if text.isdigit() else 0

    @classmethod
    def of(cls, record: Any) -> Letter:
        """Read a record of the dead-letter topic. Raises RecordError for one that Millstream did not write."""
        own = {name: value or b"" for name, value in record.headers if name.startswith(PREFIX)}

        def text(name: str) -> str:
            return own[PREFIX + name].decode("utf-8", "replace")

        def optional(name: str) -> str | None:
            return text(name) if PREFIX + name in own else None

        try:
            length, cut = optional("value-bytes"), optional("cut")
            return cls(
                partition=record.partition,
                offset=record.offset,
                key=record.key,
                value=record.value,
                source_topic=text("topic"),
                source_partition=int(text("partition")),
                source_offset=int(text("offset")),
                reason=text("reason"),
                detail=text("detail"),
                refused_at_ms=int(text("refused-at-ms")),
                value_bytes=int(length) if length is not None else None,
                value_sha256=optional("value-sha256"),
                traceback=optional("traceback"),
                cut=tuple(cut.split(",")) if cut else (),
                headers=tuple(
                    (name.removeprefix(ORIGINAL), value or b"")
                    for name, value in record.headers
                    if name.startswith(ORIGINAL)
                ),
            )
        except (KeyError, ValueError) as error:
            raise RecordError("invalid", f"not a letter of Millstream: {error!r}") from None

    def line(self) -> str:
        """Return the letter as one line of text: place, time, source, reason, key, the beginning of its value."""
        at = dt.datetime.fromtimestamp(self.refused_at_ms / 1000, dt.UTC).isoformat(timespec="seconds")
        source = f"{self.source_topic}/{self.source_partition}/{self.source_offset}"
        notes = [f"cut: {', '.join(self.cut)}"] if self.cut else []
        notes += [f"replayed {self.replays} times"] if self.replays else []
        shown = "null" if self.value is None else repr(self.value[:80].decode("utf-8", "backslashreplace"))
        line = f"{self.partition}/{self.offset} {at} {source} {self.reason}: {self.detail[:200]} {shown}"
        return f"{line} ({'; '.join(notes)})" if notes else line

    def described(self) -> dict[str, Any]:
        """Return the letter as JSON-able data; bytes as text where they are UTF-8, else in base64."""
        return {
            "partition": self.partition,
            "offset": self.offset,
            "reason": self.reason,
            "detail": self.detail,
            "refused_at_ms": self.refused_at_ms,
            "source": {"topic": self.source_topic, "partition": self.source_partition, "offset": self.source_offset},
            "key": _shown(self.key),
            "value": _shown(self.value),
            "value_bytes": self.value_bytes,
            "value_sha256": self.value_sha256,
            "cut": list(self.cut),
            "replays": self.replays,
            "headers": {name: _shown(value) for name, value in self.headers},
            "traceback": self.traceback,
        }


def _shown(content: bytes | None) -> str | dict[str, str] | None:
    if content is None:
        return None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode()}


@dataclass(frozen=True, slots=True)
class Selection:
    """Which letters; each field narrows."""

    reason: str | None = None
    partition: int | None = None
    offset: int | None = None
    limit: int | None = None

    def holds(self, letter: Letter) -> bool:
        """Tell whether the letter is selected, its limit aside."""
        return (
            self.reason in (None, letter.reason)
            and self.partition in (None, letter.partition)
            and self.offset in (None, letter.offset)
        )


async def letters(settings: Settings, selection: Selection) -> AsyncIterator[Letter]:
    """Yield the selected letters that stand on the topic now, partition by partition in their order.

    A record that is not a letter is left out with a warning in the log.
    """
    async with open_topic(settings, TopicNames.of(settings).dead_letters) as opened:
        starts, ends = await opened.begin_offsets(), await opened.end_offsets()
        if selection.partition is not None:
            starts = {p: at for p, at in starts.items() if p == selection.partition}
        if selection.offset is not None:
            starts = {p: max(at, selection.offset) for p, at in starts.items()}
            ends = {p: min(at, selection.offset + 1) for p, at in ends.items()}
        given = 0
        for partition, start in starts.items():
            async for record in opened.read({partition: start}, ends):
                try:
                    letter = Letter.of(record)
                except RecordError as error:
                    log.warning(
                        "not_a_dead_letter", partition=record.partition, offset=record.offset, detail=error.detail
                    )
                    continue
                if not selection.holds(letter):
                    continue
                if selection.limit is not None and given >= selection.limit:
                    return
                given += 1
                yield letter


@dataclass(slots=True)
class ReplayResult:
    """What a replay did."""

    sent: int = 0
    kept: list[tuple[Letter, str]] = field(default_factory=list)
    """Letters that were not sent, and why."""


def replayed(letter: Letter) -> tuple[bytes | None, bytes | None, Headers]:
    """Return key, value and headers of the record to send again: the original ones and the count of replays."""
    headers = [(name, value) for name, value in letter.headers if name != REPLAYS_HEADER]
    headers.append((REPLAYS_HEADER, b"%d" % (letter.replays + 1)))
    return letter.key, letter.value, headers


async def replay(settings: Settings, selection: Selection) -> ReplayResult:
    """Send the original bytes of the selected letters to their original topic, on the partition of their key.

    A letter that was cut is never sent. Letters stay on the topic, so a second replay sends them again; event ids
    are kept, so that a worker recognises an event that it took already (as far back as a user's row remembers).
    Raises DeliveryError: some were sent, the same replay may be run again.
    """
    result = ReplayResult()
    names = TopicNames.of(settings)
    public = (names.events, names.items, names.users)
    async with TopicWriter(settings, *public) as writer:
        outbox, size = Outbox(), 0
        async for letter in letters(settings, selection):
            if letter.cut:
                result.kept.append((letter, f"its {' and '.join(letter.cut)} was cut when it was kept"))
                continue
            if letter.source_topic not in public:
                result.kept.append((letter, f"{letter.source_topic} is not a topic that clients write to"))
                continue
            key, value, headers = replayed(letter)
            if key is None:
                outbox.add(letter.source_topic, letter.source_partition, key, value, headers)
            else:
                writer.add(outbox, letter.source_topic, key, value, headers)
            size += len(value or b"")
            if len(outbox) >= REPLAY_LETTERS or size >= REPLAY_BYTES:
                await writer.send(outbox)
                result.sent += len(outbox)
                outbox, size = Outbox(), 0
        await writer.send(outbox)
        result.sent += len(outbox)
    return result

"""Dead letters: what was refused, with its original bytes and the reason; how to list and replay it.

A letter's key and value are those of the refused record. What the record itself cannot say stands in headers that
start with ``millstream-dlq-``; the record's own headers follow, each with ``millstream-original-`` before its name,
so that a replay gives them back as they were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol, TypeAlias

from models.errors import RecordError
from models.events import MAX_RECORD_BYTES
from streams.sender import Headers, Outbox

MAX_VALUE_BYTES: Final = MAX_RECORD_BYTES + 65_536
"""A value above this is cut. Above the events topic's own limit, so that whatever got in there is kept whole."""
MAX_KEY_BYTES: Final = 65_536
MAX_HEADER_BYTES: Final = 65_536
"""Names and values of the original headers together; what does not fit is left out and named in `cut`."""
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

"""Our own public records as JSON lines: a folder with items.jsonl, users.jsonl, events.jsonl, or one file of any.

Plain or gzip. In one file a record with ``type`` is an event, else one with ``item_id`` an item, else a user.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import msgspec

from models.errors import LogFormatError, RecordError
from models.events import (
    EVENT_CODEC,
    ITEM_CODEC,
    MAX_RECORD_BYTES,
    USER_CODEC,
    ClockPolicy,
    Event,
    Item,
    User,
    epoch_ms,
)
from models.logs.log import LogEvent, TimeOrderedLines, find, open_bytes

RecordKind = Literal["events", "items", "users"]
RECORD_KINDS: Final[tuple[RecordKind, ...]] = ("events", "items", "users")


class _Marks(msgspec.Struct):
    """The fields that tell what a record is; of any type, so that a wrong one is named by the real decoder."""

    type: Any = None
    item_id: Any = None
    user_id: Any = None


_MARKS: Final = msgspec.json.Decoder(_Marks)


def record_kind(line: bytes) -> RecordKind:
    """Tell what kind of record a JSON line is. Raises RecordError where it has none of the fields that tell."""
    try:
        marks = _MARKS.decode(line)
    except msgspec.ValidationError as error:
        raise RecordError("invalid", str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecordError("malformed", str(error)) from None
    if marks.type is not None:
        return "events"
    if marks.item_id is not None:
        return "items"
    if marks.user_id is not None:
        return "users"
    raise RecordError("invalid", "neither `type` (an event) nor `item_id` (an item) nor `user_id` (a user)")


def decode_line(line: bytes, kind: RecordKind | None = None) -> Event | Item | User:
    """Decode and validate one JSON line with the worker's own codecs, of ``kind`` or of the kind that it shows.

    Raises RecordError as the worker would.
    """
    if len(line) > MAX_RECORD_BYTES:
        raise RecordError("too-large", f"{len(line)} bytes; the limit is {MAX_RECORD_BYTES}")
    kind = kind or record_kind(line)
    if kind == "events":
        return EVENT_CODEC.decode(line, "application/json")
    if kind == "items":
        return ITEM_CODEC.decode(line, "application/json")
    return USER_CODEC.decode(line, "application/json")


class Refusal(NamedTuple):
    """One line that would be refused; ``line`` counts from 1."""

    line: int
    reason: str
    detail: str


def check_lines(
    lines: Iterable[bytes], kind: RecordKind | None, policy: ClockPolicy, broker_ms: int
) -> Iterator[Refusal | None]:
    """Yield for each line that is not blank None where the worker would take it, else its refusal.

    Codec, size limit and clock policy are the worker's; ``broker_ms`` stands for the time at which the broker
    would receive the line. Partition and key cannot be wrong here: `publish` and `import` set them.
    """
    for number, line in enumerate(lines, 1):
        stripped = line.strip()
        if not stripped:
            continue
        try:
            record = decode_line(stripped, kind)
            if not isinstance(record, Item | User):
                policy.event_time_ms(epoch_ms(record.event_time), broker_ms)
        except RecordError as error:
            yield Refusal(number, error.reason, error.detail)
        else:
            yield None


class JsonlLog:
    """Reader of JSON lines of public records; a line that is not valid ends it with its place."""

    kind = "jsonl"

    def __init__(self, *paths: Path) -> None:
        """``paths``: folders or files, read as one log."""
        self._files: dict[Path, RecordKind | None] = {}
        for path in paths:
            if not path.exists():
                raise LogFormatError(f"{path} does not exist")
            found = {kind: find(path, f"{kind}.jsonl") for kind in RECORD_KINDS} if path.is_dir() else {}
            if path.is_dir() and not any(found.values()):
                raise LogFormatError(f"{path} has none of items.jsonl, users.jsonl, events.jsonl (plain or .gz)")
            self._files |= {file: kind for kind, file in found.items() if file} if path.is_dir() else {path: None}
        self.files = tuple(self._files)
        self.skipped: Counter[str] = Counter()
        self._ordered: TimeOrderedLines | None = None

    def items(self) -> Iterator[Item]:
        """Items in file order; one that comes twice is given twice."""
        return (record for record in self._records("items") if isinstance(record, Item))

    def users(self) -> Iterator[User]:
        """Profiles in file order."""
        return (record for record in self._records("users") if isinstance(record, User))

    def events(self) -> Iterator[LogEvent]:
        """Events in event-time order, ties in file order; without outcomes: the log does not join them."""
        self.skipped.clear()
        for time_ms, place, line in self._lines():
            try:
                event = EVENT_CODEC.decode(line, "application/json")
            except RecordError as error:
                raise LogFormatError(f"{place}: {error}") from None
            yield LogEvent(time_ms, event)

    def count_events(self) -> int | None:
        """Exact: the first pass has counted them."""
        return len(self._lines())

    def _lines(self) -> TimeOrderedLines:
        if self._ordered is None:
            files = [file for file, kind in self._files.items() if kind in (None, "events")]
            self._ordered = TimeOrderedLines(files, self._time)
        return self._ordered

    def _time(self, line: bytes) -> int | None:
        stripped = line.strip()
        if not stripped:
            return None
        try:
            kind = None if any(k is None for k in self._files.values()) else "events"
            if kind is None and record_kind(stripped) != "events":
                return None
            return epoch_ms(EVENT_CODEC.decode(stripped, "application/json").event_time)
        except RecordError as error:
            raise ValueError(f"{error} (`millstream validate` lists every such line)") from None

    def _records(self, wanted: RecordKind) -> Iterator[Event | Item | User]:
        for path, kind in self._files.items():
            if kind not in (None, wanted):
                continue
            with open_bytes(path) as file:
                for number, line in enumerate(file, 1):
                    stripped = line.strip()
                    if not stripped:
                        continue
                    try:
                        if kind is None and record_kind(stripped) != wanted:
                            continue
                        yield decode_line(stripped, wanted)
                    except RecordError as error:
                        raise LogFormatError(
                            f"{path}, line {number}: {error} (`millstream validate` lists every such line)"
                        ) from None

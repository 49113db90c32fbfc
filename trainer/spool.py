"""Records of ``features`` and ``labels`` on disk, so that a window is read from Kafka once and can be read again.

One Parquet file for a range of offsets of one partition, the records' bytes as they were. Its name says everything
that is asked without opening it: ``<topic>/<partition>/<start>-<end>-<newest broker time, ms>.parquet``. Files appear
whole or not at all and are deleted by age.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import structlog

from models.atomic import remove_partials, replace_file
from models.errors import TrainingError
from models.manifest import OffsetRange

log = structlog.get_logger(__name__)

_NAME: Final = re.compile(r"(\d{20})-(\d{20})-(\d{15})\.parquet")
_SCHEMA: Final = pa.schema([("offset", pa.int64()), ("broker_ms", pa.int64()), ("value", pa.large_binary())])


class SpooledRecord(NamedTuple):
    """One record as it stood on its topic."""

    offset: int
    broker_ms: int
    value: bytes


@dataclass(frozen=True, slots=True, order=True)
class _File:
    start: int
    end: int
    newest_ms: int
    path: Path


class Spool:
    """The spooled records below one folder; one process at a time (the trainer's lock sees to it)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, covered: OffsetRange, records: Sequence[SpooledRecord]) -> None:
        """Keep the records of a range of offsets, in their order; the range may hold offsets without a record.

        Raises OSError for a disk that is full or gone: nothing of the range is kept then.
        """
        newest = max((r.broker_ms for r in records), default=0)
        content = io.BytesIO()
        pq.write_table(_table_of(records), content, compression="zstd")
        name = f"{covered.start:020d}-{covered.end:020d}-{newest:015d}.parquet"
        replace_file(self._partition(covered.topic, covered.partition) / name, content.getvalue())

    def missing(self, wanted: OffsetRange) -> list[OffsetRange]:
        """Return the parts of a range that are not spooled, in order."""
        found, at = [], wanted.start
        for file in self._files(wanted.topic, wanted.partition):
            if file.end <= at or at >= wanted.end:
                continue
            if file.start > at:
                found.append(OffsetRange(wanted.topic, wanted.partition, at, min(file.start, wanted.end)))
            at = file.end
        if at < wanted.end:
            found.append(OffsetRange(wanted.topic, wanted.partition, at, wanted.end))
        return found

    def read(self, wanted: OffsetRange) -> Iterator[SpooledRecord]:
        """Yield the spooled records of a range, by offset, each once.

        Raises TrainingError (``spool-unreadable``) for a damaged file, which is deleted: the next round reads its
        offsets from Kafka again.
        """
        at = wanted.start
        for file in self._files(wanted.topic, wanted.partition):
            if file.end <= at or file.start >= wanted.end:
                continue
            table = _table(file.path)
            rows = zip(*(table.column(name).to_pylist() for name in _SCHEMA.names), strict=True)
            for offset, broker_ms, value in rows:
                if at <= offset < wanted.end:
                    yield SpooledRecord(offset, broker_ms, value)
            at = file.end

    def first_offset(self, topic: str, partition: int, since_ms: int) -> int | None:
        """Return the first spooled offset of a file with a record of this broker time or later, None without one.

        To a file, not to a record: a window may begin a little early, never late.
        """
        return next((f.start for f in self._files(topic, partition) if f.newest_ms >= since_ms), None)

    def end(self, topic: str, partition: int) -> int:
        """Return the offset after the last one that is spooled, 0 where nothing is."""
        return max((f.end for f in self._files(topic, partition)), default=0)

    def delete_before(self, time_ms: int) -> int:
        """Delete files with nothing of this broker time or later, and what killed processes left; return how many."""
        count = 0
        for folder in self._folder.glob("*/*"):
            remove_partials(folder)
            for file in _files_in(folder):
                if file.newest_ms < time_ms:
                    file.path.unlink(missing_ok=True)
                    count += 1
        return count

    def forget(self, topic: str) -> None:
        """Delete every file of a topic: it was created again, and its offsets mean other records now."""
        for folder in (self._folder / topic).glob("*"):
            for file in _files_in(folder):
                file.path.unlink(missing_ok=True)

    def _partition(self, topic: str, partition: int) -> Path:
        return self._folder / topic / f"{partition:05d}"

    def _files(self, topic: str, partition: int) -> list[_File]:
        return _files_in(self._partition(topic, partition))


def _files_in(folder: Path) -> list[_File]:
    if not folder.is_dir():
        return []
    matches = ((path, _NAME.fullmatch(path.name)) for path in folder.iterdir())
    return sorted(_File(int(m[1]), int(m[2]), int(m[3]), path) for path, m in matches if m)


def _table_of(records: Sequence[SpooledRecord]) -> pa.Table:
    """Return the records as columns, made of buffers: ``pa.array`` of a list imports pandas, which takes seconds."""

    def integers(values: list[int]) -> pa.Array:
        return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(np.array(values, np.int64))])

    ends = np.cumsum([0, *(len(r.value) for r in records)], dtype=np.int64)
    value_buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(r.value for r in records))]
    columns = [
        integers([r.offset for r in records]),
        integers([r.broker_ms for r in records]),
        pa.Array.from_buffers(pa.large_binary(), len(records), value_buffers),
    ]
    return pa.Table.from_arrays(columns, schema=_SCHEMA)


def _table(path: Path) -> pa.Table:
    try:
        # Not pq.read_table: it imports pandas as well.
        with pq.ParquetFile(path) as file:
            return file.read(columns=_SCHEMA.names)
    except (OSError, pa.ArrowInvalid) as error:
        log.error("spool_file_deleted", file=path.name, error=str(error))
        path.unlink(missing_ok=True)
        raise TrainingError(
            "spool-unreadable", f"{path} is damaged and was deleted; its offsets are read from Kafka in the next round"
        ) from error

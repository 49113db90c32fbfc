"""What every log reader gives: items, users, and events in event-time order; and helpers to read its files."""

from __future__ import annotations

import gzip
import hashlib
import mmap
import shutil
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Final, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from models.errors import LogFormatError
from models.events import Event, Item, User

CLICK_DELAY_MS: Final = 1_000
"""A click is dated this long after its impression where the log does not say when it happened."""
_SAMPLE_BYTES: Final = 65_536


class LogEvent(msgspec.Struct, frozen=True):
    """One event of a log.

    ``event`` holds only what was known when it happened. What became known later stands beside it.
    """

    time_ms: int
    event: Event
    outcome: tuple[str, ...] | None = None
    """For an impression: the items that were clicked, known only afterwards. None where the log does not say."""
    is_history: bool = False
    """True for an action from a user's history, of which the log has no impression."""


class LogReader(Protocol):
    """A log on disk. Each iterator starts anew on each call and always gives the same sequence."""

    kind: str
    files: tuple[Path, ...]
    skipped: Counter[str]
    """Rows that carry no event, by reason; filled while iterating."""

    def items(self) -> Iterator[Item]:
        """Every item that the log names; once, but for JSON lines, which give what the file has."""

    def users(self) -> Iterator[User]:
        """Every user profile that the log has."""

    def events(self) -> Iterator[LogEvent]:
        """Every event in event-time order.

        At equal times histories, then impressions, then actions; JSON lines in the order of the file.
        """

    def count_events(self) -> int | None:
        """How many events there are, or None where only reading them all would tell."""


def find(folder: Path, name: str) -> Path | None:
    """Return ``folder/name`` or its gzip form, or None where neither is a file."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def split_folders(path: Path, name: str) -> list[Path]:
    """Return ``path`` itself, or its subfolders in order of name, that have a file ``name``.

    Raises LogFormatError where there is none.
    """
    if not path.exists():
        raise LogFormatError(f"{path} does not exist")
    if path.is_dir():
        if find(path, name):
            return [path]
        folders = sorted(child for child in path.iterdir() if child.is_dir() and find(child, name))
        if folders:
            return folders
    raise LogFormatError(f"no {name} in {path} or in a folder directly below it; name the folder of the unpacked set")


def open_bytes(path: Path) -> IO[bytes]:
    """Open a plain or gzip file for reading bytes."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def fingerprint(reader: LogReader) -> str:
    """Return a hash of the reader's kind and its files' names, sizes, first and last bytes: the same log or not."""
    digest = hashlib.blake2b(reader.kind.encode(), digest_size=16)
    for path in reader.files:
        size = path.stat().st_size
        digest.update(f"\0{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


class TimeOrderedLines:
    """Lines of text files in time order, ties in file order, in 24 bytes of memory a line.

    One pass reads the time of each line; iterating then maps the files and jumps. A gzip file is unpacked to a
    temporary file for as long as an iterator runs.
    """

    def __init__(self, files: Sequence[Path], time_of: Callable[[bytes], int | None]) -> None:
        """``time_of`` gives epoch ms, None to leave a line out, or raises ValueError to refuse it."""
        self._files = list(files)
        times, starts, numbers, file_numbers = array("q"), array("q"), array("i"), array("b")
        for file_number, path in enumerate(self._files):
            with open_bytes(path) as file:
                start = 0
                for number, line in enumerate(file, 1):
                    try:
                        time_ms = time_of(line)
                    except (ValueError, msgspec.MsgspecError) as error:
                        raise LogFormatError(f"{path}, line {number}: {error}") from None
                    if time_ms is not None:
                        times.append(time_ms)
                        starts.append(start)
                        numbers.append(number)
                        file_numbers.append(file_number)
                    start += len(line)
        self._times: npt.NDArray[np.int64] = np.frombuffer(times, np.int64) if times else np.empty(0, np.int64)
        self._starts, self._numbers, self._file_numbers = starts, numbers, file_numbers
        self._order = np.argsort(self._times, kind="stable")

    def __len__(self) -> int:
        return len(self._order)

    @property
    def first_ms(self) -> int | None:
        """Epoch ms of the earliest line, None where there is none."""
        return int(self._times[self._order[0]]) if len(self._order) else None

    def __iter__(self) -> Iterator[tuple[int, str, bytes]]:
        """Yield (time in epoch ms, "file, line n" for messages, line without its end)."""
        with ExitStack() as stack:
            maps = [_mapped(path, stack) for path in self._files]
            for at in range(0, len(self._order), 8_192):
                for i in self._order[at : at + 8_192].tolist():
                    file_number = self._file_numbers[i]
                    text = maps[file_number]
                    start = self._starts[i]
                    end = text.find(b"\n", start)
                    line = text[start:end] if end >= 0 else text[start:]
                    place = f"{self._files[file_number]}, line {self._numbers[i]}"
                    yield int(self._times[i]), place, line.rstrip(b"\r")


def _mapped(path: Path, stack: ExitStack) -> mmap.mmap | bytes:
    file: IO[bytes] = tempfile.TemporaryFile() if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115
    stack.enter_context(file)
    if path.suffix == ".gz":
        with gzip.open(path, "rb") as packed:
            shutil.copyfileobj(packed, file, 1 << 20)
        file.flush()
    if file.seek(0, 2) == 0:
        return b""
    return stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

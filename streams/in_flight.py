"""Which offsets a worker was processing when it died, kept where the next process finds it.

Written before each micro-batch into a small memory-mapped file: it survives the process (kill -9, a segfault, the
kernel's out-of-memory killer), not the machine, and costs microseconds. The supervisor counts deaths at the same
offsets; the worker that it starts next takes suspects one by one, and a suspect that kills again goes to the dead
letters unprocessed.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_MARK_BYTES = 1 << 16
MARK_FILE = "in-flight"
SUSPECTS_FILE = "suspects.json"

Span = tuple[int, int, int]
"""(partition, first offset, last offset), both ends included."""


class InFlightMark:
    """The memory-mapped mark of one worker."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / MARK_FILE
        path.touch()
        with path.open("r+b") as file:
            file.truncate(_MARK_BYTES)
            self._map = mmap.mmap(file.fileno(), _MARK_BYTES)
        self.clear()

    def set(self, offsets: Iterable[tuple[int, int]]) -> None:
        """Say that these (partition, offset) pairs are being processed."""
        spans: dict[int, tuple[int, int]] = {}
        for partition, offset in offsets:
            low, high = spans.get(partition, (offset, offset))
            spans[partition] = (min(low, offset), max(high, offset))
        data = json.dumps([[p, low, high] for p, (low, high) in spans.items()]).encode()
        # The length is written last: a reader sees the old mark or the whole new one.
        self._map[:4] = b"\0\0\0\0"
        self._map[4 : 4 + len(data)] = data
        self._map[:4] = len(data).to_bytes(4, "little")

    def clear(self) -> None:
        """Say that nothing is being processed."""
        self._map[:4] = b"\0\0\0\0"


def read_mark(folder: Path) -> list[Span]:
    """Return what a dead worker was processing, an empty list if nothing."""
    try:
        data = (folder / MARK_FILE).read_bytes()
    except FileNotFoundError:
        return []
    length = int.from_bytes(data[:4], "little")
    return [(p, low, high) for p, low, high in json.loads(data[4 : 4 + length])] if length else []


@dataclass(slots=True)
class Suspects:
    """What the next worker must treat with care; kept by the supervisor beside the mark."""

    one_by_one: list[Span] = field(default_factory=list)
    """Offsets that go in a batch of their own."""
    refused: list[tuple[int, int]] = field(default_factory=list)
    """(partition, offset) that go to the dead letters without being processed."""

    def save(self, folder: Path) -> None:
        """Write the suspects for the next worker."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SUSPECTS_FILE).write_text(json.dumps({"one_by_one": self.one_by_one, "refused": self.refused}))

    @classmethod
    def load(cls, folder: Path) -> Suspects:
        """Read what the supervisor left, empty if nothing."""
        try:
            data = json.loads((folder / SUSPECTS_FILE).read_text())
        except FileNotFoundError:
            return cls()
        return cls([tuple(s) for s in data["one_by_one"]], [tuple(r) for r in data["refused"]])

    def is_one_by_one(self, partition: int, offset: int) -> bool:
        """Whether this event must be alone in its batch."""
        return any(p == partition and low <= offset <= high for p, low, high in self.one_by_one)

    def is_refused(self, partition: int, offset: int) -> bool:
        """Whether this event must not be processed at all."""
        return (partition, offset) in self.refused


class DeathLedger:
    """Counts deaths at the same offsets and decides who is suspect. Pure: spans in, suspects out."""

    def __init__(self, deaths: int) -> None:
        self._deaths = deaths
        self._spans: list[Span] = []
        self._count = 0
        self.suspects = Suspects()

    def died(self, spans: list[Span]) -> bool:
        """Take note of a death while ``spans`` were in flight; True if the suspects changed.

        Offsets in flight at each of ``deaths`` deaths in a row become suspects that go one by one; a single suspect
        that is in flight alone at as many deaths in a row is refused.
        """
        common = _intersection(self._spans, spans)
        if common and self._count:
            self._spans, self._count = common, self._count + 1
        else:
            self._spans, self._count = spans, 1 if spans else 0
        if not self._spans or self._count < self._deaths:
            return False
        self._count = 0
        alone = len(self._spans) == 1 and self._spans[0][1] == self._spans[0][2]
        if alone and self.suspects.is_one_by_one(self._spans[0][0], self._spans[0][1]):
            self.suspects.refused.append((self._spans[0][0], self._spans[0][1]))
        else:
            self.suspects.one_by_one = list(self._spans)
        self._spans = []
        return True


def _intersection(left: list[Span], right: list[Span]) -> list[Span]:
    both = []
    for partition, low, high in left:
        for other, other_low, other_high in right:
            if partition == other and max(low, other_low) <= min(high, other_high):
                both.append((partition, max(low, other_low), min(high, other_high)))
    return both

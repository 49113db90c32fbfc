"""How far a long command is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS: Final = 5.0
Show = Callable[[str, int, int | None], None]


@contextmanager
def progress(stream: IO[str] = sys.stderr, *, line_seconds: float = LINE_SECONDS) -> Iterator[Show]:
    """Give a function that shows (phase, done, total or None) on ``stream``."""
    if stream.isatty():
        with _bar(stream) as show:
            yield show
    else:
        yield _Lines(stream, line_seconds).show


@contextmanager
def _bar(stream: IO[str]) -> Iterator[Show]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=stream)) as bar:
        tasks = {}
        starts: dict[str, tuple[float, int]] = {}

        def show(phase: str, done: int, total: int | None) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total, rate="")
                starts[phase] = (time.monotonic(), done)
            bar.update(tasks[phase], completed=done, total=total, rate=_rate(starts[phase], done))

        yield show


class _Lines:
    def __init__(self, stream: IO[str], line_seconds: float) -> None:
        self._stream = stream
        self._line_seconds = line_seconds
        self._starts: dict[str, tuple[float, int]] = {}
        self._written_at = 0.0

    def show(self, phase: str, done: int, total: int | None) -> None:
        start = self._starts.setdefault(phase, (time.monotonic(), done))
        now = time.monotonic()
        if now - self._written_at < self._line_seconds and done != total:
            return
        self._written_at = now
        of = f" of {total:,}" if total is not None else ""
        print(f"{phase}: {done:,}{of} {_rate(start, done)}".rstrip(), file=self._stream, flush=True)


def _rate(start: tuple[float, int], done: int) -> str:
    seconds = time.monotonic() - start[0]
    return f"{(done - start[1]) / seconds:,.0f}/s" if seconds >= 0.5 else ""

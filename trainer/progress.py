"""How far a round is: a bar for each step on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

LINE_SECONDS: Final = 5.0
Show = Callable[[str, int, int | None], None]
"""Takes what is being done, how much of it is done, and how much there is (None: not known)."""


def silent(_step: str, _done: int, _total: int | None) -> None:
    """Show nothing."""


@contextmanager
def progress(stream: IO[str] = sys.stderr, *, line_seconds: float = LINE_SECONDS) -> Iterator[Show]:
    """Give a function that shows steps on ``stream``; a line every ``line_seconds`` at most, and at a step's end."""
    if stream.isatty():
        with _bars(stream) as show:
            yield show
    else:
        yield _Lines(stream, line_seconds).show


@contextmanager
def _bars(stream: IO[str]) -> Iterator[Show]:
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=stream)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(step: str, done: int, total: int | None) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield show


class _Lines:
    def __init__(self, stream: IO[str], line_seconds: float) -> None:
        self._stream = stream
        self._line_seconds = line_seconds
        self._written_at: dict[str, float] = {}

    def show(self, step: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if done != total and now - self._written_at.get(step, -self._line_seconds) < self._line_seconds:
            return
        self._written_at[step] = now
        of = f" of {total:,}" if total is not None else ""
        print(f"{step}: {done:,}{of}", file=self._stream, flush=True)

"""``python -m benchmarks.profiled_worker FILE``: the worker with a thread that samples what the others do. Linux only.

Sampling begins when FILE.go is there and ends with FILE.stop. A sample counts for the processor time that its thread
used since the last one, so that waiting costs nothing. What a thread used before it began to wait cannot be placed any
more and is shown as such. Figures measured under the sampler are lower than without.

Stacks come from ``faulthandler``: it writes them in one go. Walking ``sys._current_frames()`` gives the interpreter
away between two frames, and what was a frame may then be something else.
"""

from __future__ import annotations

import contextlib
import faulthandler
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

INTERVAL_SECONDS: Final = 0.01
SWITCH_SECONDS: Final = 0.0003
"""How long a thread may keep the interpreter when the sampler wants it: else it is only seen where it lets go."""
TOP: Final = 25
_THREAD: Final = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)")
_FRAME: Final = re.compile(r'^  File "([^"]*)", line (\d+) in (.*)$')
WAITING: Final = {
    ("thread.py", "_worker"): "(before it waited for work)",
    ("runners.py", "run"): "(in uvloop's C code, or before it waited for input)",
    ("selectors.py", "select"): "(before it waited for input)",
}
OURS: Final = ("models", "streams", "faust", "aiokafka")
"""Packages whose functions are listed with what they call; the rest is plumbing around them."""


@dataclass(frozen=True, slots=True)
class Place:
    """A function in one kind of thread."""

    thread: str
    file: str
    function: str

    @property
    def package(self) -> str:
        """Return the package that it belongs to."""
        parts = Path(self.file).parts
        start = parts.index("site-packages") + 1 if "site-packages" in parts else len(parts) - 2
        return parts[max(start, 0)] if parts else ""

    def __str__(self) -> str:
        return f"{self.function} ({'/'.join(Path(self.file).parts[-2:])}) [{self.thread}]"


class Sampler:
    """Adds up processor nanoseconds by function: its own, by its current line, and with those that it called."""

    def __init__(self) -> None:
        self.own: Counter[Place] = Counter()
        self.lines: Counter[tuple[Place, int]] = Counter()
        self.inclusive: Counter[Place] = Counter()
        self.threads: Counter[str] = Counter()
        self.samples = 0
        self._used_ns: dict[int, int] = {}
        self._dump = tempfile.TemporaryFile()  # noqa: SIM115 - open for as long as the process runs

    def sample(self) -> None:
        """Take one sample of every other thread."""
        self.samples += 1
        self._dump.seek(0)
        self._dump.truncate()
        faulthandler.dump_traceback(self._dump, all_threads=True)
        self._dump.seek(0)
        stacks = self._stacks(self._dump.read().decode("utf-8", "replace"))
        for thread in threading.enumerate():
            used_ns = self._newly_used_ns(thread.native_id or 0)
            stack = stacks.get(thread.ident or 0)
            if used_ns > 0 and stack and thread is not threading.current_thread():
                self._add(thread.name.rstrip("0123456789_-") or thread.name, stack, used_ns)

    def _stacks(self, text: str) -> dict[int, list[tuple[str, int, str]]]:
        """Return (file, line, function) of each frame by thread, innermost first."""
        stacks: dict[int, list[tuple[str, int, str]]] = {}
        stack: list[tuple[str, int, str]] = []
        for line in text.splitlines():
            if header := _THREAD.match(line):
                stack = stacks[int(header[1], 16)] = []
            elif frame := _FRAME.match(line):
                stack.append((frame[1], int(frame[2]), frame[3]))
        return stacks

    def _newly_used_ns(self, native_id: int) -> int:
        now_ns = self._used_ns.get(native_id, 0)
        with contextlib.suppress(OSError):  # the thread has ended
            now_ns = int(Path(f"/proc/self/task/{native_id}/schedstat").read_text().split()[0])
        used_ns = now_ns - self._used_ns.get(native_id, now_ns)
        self._used_ns[native_id] = now_ns
        return used_ns

    def _add(self, thread: str, stack: list[tuple[str, int, str]], used_ns: int) -> None:
        self.threads[thread] += used_ns
        file, line, function = stack[0]
        innermost = Place(thread, file, function)
        self.own[innermost] += used_ns
        self.lines[innermost, line] += used_ns
        for place in {Place(thread, file, function) for file, _, function in stack}:
            self.inclusive[place] += used_ns

    def report(self, wall_seconds: float) -> str:
        """Return threads and functions with their share of the processor time that was sampled."""
        total = max(self.threads.total(), 1)
        lines = [f"{wall_seconds:.1f} s sampled, {total / 1e9:.1f} s of processor time, {self.samples} samples"]
        lines += [f"  thread {name}: {used / total:.0%}" for name, used in self.threads.most_common(6)]
        lines.append("own time, and the line with most of it:")
        for place, used in self.own.most_common(TOP):
            what = WAITING.get((Path(place.file).name, place.function))
            line = max((at for at in self.lines if at[0] == place), key=self.lines.__getitem__)[1]
            lines.append(f"  {used / total:6.1%}  {f'{what} [{place.thread}]' if what else f'{place} line {line}'}")
        lines.append("with what it calls:")
        ours = Counter({place: used for place, used in self.inclusive.items() if place.package in OURS})
        lines += [f"  {used / total:6.1%}  {place}" for place, used in ours.most_common(TOP)]
        return "\n".join(lines)


def _run(file: Path) -> None:
    go, stop = file.with_suffix(".go"), file.with_suffix(".stop")
    while not go.exists():
        time.sleep(0.02)
    sampler = Sampler()
    started = time.monotonic()
    while not stop.exists():
        sampler.sample()
        time.sleep(INTERVAL_SECONDS)
    aside = file.with_suffix(".part")
    aside.write_text(sampler.report(time.monotonic() - started), "utf-8")
    aside.replace(file)


def main() -> None:
    """Start the sampling thread and run the worker; never returns."""
    sys.setswitchinterval(SWITCH_SECONDS)
    threading.Thread(target=_run, args=(Path(sys.argv[1]),), name="sampler", daemon=True).start()
    from streams.worker import main as worker

    worker()


if __name__ == "__main__":
    main()

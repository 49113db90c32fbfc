"""``python -m benchmarks.profiled_worker FILE``: the worker with a thread that samples what the others do.

Sampling begins when FILE.go is there and ends with FILE.stop. A sample counts for the processor time that its thread
used since the last one, so that waiting costs nothing. What a thread used before it began to wait cannot be placed any
more and is shown as such. The sampler takes the interpreter from the others 500 times a second: figures measured under
it are lower than without.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Final

INTERVAL_SECONDS: Final = 0.002
SWITCH_SECONDS: Final = 0.0003
"""How long a thread may keep the interpreter when the sampler wants it: else it is only seen where it lets go."""
TOP: Final = 25
WAITING: Final = {
    ("thread.py", "_worker"): "(before it waited for work)",
    ("runners.py", "Runner.run"): "(in uvloop's C code, or before it waited for input)",
    ("selectors.py", "EpollSelector.select"): "(before it waited for input)",
}
OURS: Final = ("models", "streams", "faust", "aiokafka")
"""Packages whose functions are listed with what they call; the rest is plumbing around them."""


class Sampler:
    """Adds up processor seconds by function: its own, and with those that it called."""

    def __init__(self) -> None:
        self.own: Counter[tuple[str, CodeType]] = Counter()
        self.inclusive: Counter[tuple[str, CodeType]] = Counter()
        self.threads: Counter[str] = Counter()
        self.samples = 0
        self._last: dict[int, float] = {}

    def sample(self) -> None:
        """Take one sample of every other thread."""
        names = {t.ident: t.name for t in threading.enumerate()}
        me = threading.get_ident()
        self.samples += 1
        for ident, frame in sys._current_frames().items():
            if ident == me:
                continue
            now = time.clock_gettime(time.pthread_getcpuclockid(ident))
            used = now - self._last.get(ident, now)
            self._last[ident] = now
            if used > 0:
                self._add(names.get(ident, "other"), frame, used)

    def _add(self, thread: str, frame: FrameType | None, seconds: float) -> None:
        thread = thread.rstrip("0123456789_-") or thread
        self.threads[thread] += seconds  # type: ignore[assignment]  # a Counter of seconds
        seen: set[CodeType] = set()
        at = frame
        while at is not None:
            if at is frame:
                self.own[thread, at.f_code] += seconds  # type: ignore[assignment]
            if at.f_code not in seen:
                seen.add(at.f_code)
                self.inclusive[thread, at.f_code] += seconds  # type: ignore[assignment]
            at = at.f_back

    def report(self, wall_seconds: float) -> str:
        """Return threads and functions with their share of the processor time that was sampled."""
        total = sum(self.threads.values()) or 1e-9
        lines = [f"{wall_seconds:.1f} s sampled, {total:.1f} s of processor time, {self.samples} samples"]
        lines += [f"  thread {name}: {seconds / total:.0%}" for name, seconds in self.threads.most_common(6)]
        ours = Counter({key: s for key, s in self.inclusive.items() if _package(key[1]) in OURS})
        for title, counts in (("own time", self.own), ("with what it calls", ours)):
            lines.append(f"{title}:")
            for (thread, code), seconds in counts.most_common(TOP):
                what = WAITING.get((Path(code.co_filename).name, code.co_qualname)) if counts is self.own else None
                lines.append(f"  {seconds / total:6.1%}  {what or f'{code.co_qualname} ({_place(code)})'} [{thread}]")
        return "\n".join(lines)


def _package(code: CodeType) -> str:
    parts = Path(code.co_filename).parts
    start = parts.index("site-packages") + 1 if "site-packages" in parts else len(parts) - 2
    return parts[max(start, 0)] if parts else ""


def _place(code: CodeType) -> str:
    return f"{'/'.join(Path(code.co_filename).parts[-2:])}:{code.co_firstlineno}"


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

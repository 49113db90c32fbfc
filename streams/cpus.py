"""One processor for a worker's event threads.

Event loop, consumer thread and state thread share one interpreter lock: only one of them runs at a time. Spread over
processors they wake each other across them, find cold caches, and whoever holds the lock is preempted by a broker
while another processor idles: three times the p99 of freshness. Threads that work behind the events run anywhere
(``models.retrieval.lower_priority``).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Final, Literal

import structlog

from models.errors import SettingsError

log = structlog.get_logger(__name__)

WINDOW_SECONDS: Final = 10.0
CROWDED_SHARE: Final = 0.5
CROWDED_WINDOWS: Final = 2
"""A processor is given up when others used more than that share of it in so many windows in a row."""


class KeptCpu:
    """The processor that this process keeps to, and whether others want it too. All calls come from one thread.

    Locks keep the workers of one user and host apart; a container sees the locks of no other, but shares processors
    with them unless it was given its own. So what others use of it is watched, and it is given up for all that this
    process may use. A number that the settings name is kept.
    """

    def __init__(
        self,
        number: int | None = None,
        allowed: Iterable[int] = (),
        *,
        busy_seconds: Callable[[int], float | None] | None = None,
        own_seconds: Callable[[], float] = time.process_time,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """``allowed``: what to give it up for; with none it is kept. The rest: clocks, see ``busy_seconds``."""
        self.number = number
        """None: any."""
        self._allowed = set(allowed)
        self._busy_seconds = busy_seconds or processor_seconds
        self._own_seconds = own_seconds
        self._now = now
        self._last: tuple[float, float, float] | None = None
        self._crowded = 0

    def look(self) -> None:
        """Give the processor up where others use it; cheap when a window is not over."""
        if self.number is None or not self._allowed:
            return
        now = self._now()
        if self._last is not None and now - self._last[0] < WINDOW_SECONDS:
            return
        busy = self._busy_seconds(self.number)
        if busy is None:
            return
        last, self._last = self._last, (now, busy, self._own_seconds())
        if last is None:
            return
        # What this process used elsewhere counts as used here: rather kept for too long than given up for nothing.
        others = (busy - last[1]) - (self._last[2] - last[2])
        share = others / (now - last[0])
        self._crowded = self._crowded + 1 if share > CROWDED_SHARE else 0
        if self._crowded >= CROWDED_WINDOWS:
            log.warning("cpu_given_up", cpu=self.number, others_share=round(share, 2), may_use=len(self._allowed))
            _widen({self.number}, self._allowed)
            self.number = None


def keep_to(cpu: int | Literal["any", "auto"]) -> KeptCpu:
    """Have this thread, and those that it starts, run on one processor only, where the setting asks for it.

    ``auto`` takes one that no other worker of this user and host has, and needs two of them to choose from. Raises
    SettingsError for a number that this process may not use.
    """
    if cpu == "any":
        return KeptCpu()
    if sys.platform != "linux":
        log.info("cpu_not_kept", why="only Linux lets a thread choose its processor")
        return KeptCpu()
    allowed = os.sched_getaffinity(0)
    if cpu == "auto":
        number = _claim(allowed) if len(allowed) > 1 else None
        if number is None:
            log.info("cpu_not_kept", why="other workers have the processors that there are", processors=len(allowed))
            return KeptCpu()
    elif cpu in allowed:
        number = cpu
    else:
        raise SettingsError(
            f"worker.cpu is {cpu}, but this process may run on these only: {', '.join(map(str, sorted(allowed)))}; the "
            "worker was not started: name one of these, or set worker.cpu = auto or any"
        )
    os.sched_setaffinity(0, {number})
    log.info("cpu_kept", cpu=number)
    return KeptCpu(number, allowed if cpu == "auto" else ())


def processor_seconds(number: int) -> float | None:
    """Return the seconds that a processor has worked since the start; None where this host does not tell.

    Without work at a lower priority, which gives way, and without what the hypervisor took.
    """
    with contextlib.suppress(OSError), open("/proc/stat", encoding="ascii") as file:
        for line in file:
            if line.startswith(f"cpu{number} "):
                user, _nice, system, _idle, _iowait, irq, softirq = map(int, line.split()[1:8])
                return (user + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return None


_claims: Final[list[IO[bytes]]] = []
"""Lock files of what was claimed, open for as long as this process lives; the kernel frees them, whatever kills it."""


def _claim(allowed: set[int]) -> int | None:
    """Return a processor that no other process has the lock of: in no order, so that containers differ.

    Second threads of a core come last.
    """
    folder = Path(tempfile.gettempdir()) / f"millstream-cpus-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        for number in sorted(allowed, key=lambda n: (not _is_first_of_core(n), random.random())):
            file = (folder / str(number)).open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            _claims.append(file)
            return number
    except OSError as error:
        log.warning("cpus_not_claimed", folder=str(folder), error=repr(error))
    return None


def _is_first_of_core(number: int) -> bool:
    """Whether it is the first hardware thread of its core, or the only one that this host tells of."""
    file = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
    try:
        first = file.read_text("ascii").replace("-", ",").split(",")[0]
        return int(first) == number
    except (OSError, ValueError):
        return True


def _widen(kept: set[int], allowed: set[int]) -> None:
    """Let each thread of this process that has to stay on ``kept`` run on ``allowed``."""
    for task in Path("/proc/self/task").iterdir():
        # A thread may have ended since.
        with contextlib.suppress(OSError):
            if os.sched_getaffinity(int(task.name)) == kept:
                os.sched_setaffinity(int(task.name), allowed)

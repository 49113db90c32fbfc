"""One processor for a worker's event threads.

Event loop, consumer thread and state thread share one interpreter lock: only one of them runs at a time. Spread over
processors they wake each other across them, find cold caches, and whoever holds the lock is preempted by a broker
while another processor idles: docs/LOG.md has what it costs. Threads that work behind the events run anywhere
(``models.retrieval.lower_priority``).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, Literal, NamedTuple

import structlog

from models.errors import SettingsError
from models.retrieval import run_behind_on

log = structlog.get_logger(__name__)

WINDOW_SECONDS: Final = 10.0
CROWDED_WINDOWS: Final = 2
FULL_SHARE: Final = 0.8
OTHERS_SHARE: Final = 0.35
"""A processor is given up when it worked more than the one, and for others more than the other, so often in a row.

Two busy workers that keep to the same one see half of it used by the other.
"""
SLOW_SHARE: Final = 0.8
"""A processor is slow where it has less than this share of the fastest one's speed."""


class ProcessorTimes(NamedTuple):
    """What a processor did since the start, in seconds."""

    worked: float
    """Without work of a lower priority than this process has, such as an encoder process's."""
    stolen: float
    """By the hypervisor: time in which it could not work."""


class KeptCpu:
    """The processor that this process keeps to, and whether others want it too. All calls come from one thread.

    Locks keep the workers of one user and host apart; a container sees the locks of no other, but shares processors
    with them unless it was given its own. So what others use of it is watched, and it is given up for all that this
    process may use, until the next start. A number that the settings name is kept.
    """

    def __init__(
        self,
        number: int | None = None,
        allowed: Iterable[int] = (),
        *,
        claim: int | None = None,
        times: Callable[[int], ProcessorTimes | None] | None = None,
        own_seconds: Callable[[int], Mapping[int, float]] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """``allowed``: what to give it up for; with none it is kept. ``claim``: the lock's file. The rest: clocks."""
        self.number = number
        """None: any."""
        self._allowed = set(allowed)
        self._claim = claim
        self._times = times or processor_times
        self._own_seconds = own_seconds or kept_threads_seconds
        self._now = now
        self._last: tuple[float, ProcessorTimes, Mapping[int, float]] | None = None
        self._crowded = 0

    def look(self) -> None:
        """Give the processor up where others use it; cheap when a window is not over."""
        if self.number is None or not self._allowed:
            return
        now = self._now()
        if self._last is not None and now - self._last[0] < WINDOW_SECONDS:
            return
        times, own_now = self._times(self.number), self._own_seconds(self.number)
        if not own_now:
            # The host took it away and let the threads run elsewhere: a cpuset was changed.
            self._give_up("the host moved the threads")
            return
        if times is None:
            return
        last, self._last = self._last, (now, times, own_now)
        if last is None:
            return
        began, before, own_before = last
        own = sum(seconds - own_before.get(thread, 0.0) for thread, seconds in own_now.items())
        could_work = max(now - began - (times.stolen - before.stolen), 1e-3)
        full = (times.worked - before.worked) / could_work
        others = full - own / could_work
        self._crowded = self._crowded + 1 if full > FULL_SHARE and others > OTHERS_SHARE else 0
        if self._crowded >= CROWDED_WINDOWS:
            self._give_up(f"others use {others:.0%} of it")

    def _give_up(self, why: str) -> None:
        log.warning("cpu_given_up", cpu=self.number, why=why)
        for thread in _threads():
            # It may have ended since, or the cpuset was changed.
            with contextlib.suppress(OSError):
                if os.sched_getaffinity(thread) == {self.number}:
                    os.sched_setaffinity(thread, self._allowed)
        self.number = None
        if self._claim is not None:
            os.close(self._claim)


def keep_to(cpu: int | Literal["any", "auto"], threads: int = 1) -> KeptCpu:
    """Have this thread, and those that it starts, run on one processor only, where the setting asks for it.

    ``auto`` takes one that no other worker of this user and host has, where there are two to choose from and nothing
    here runs in more than one of ``threads``. Raises SettingsError for a number that this process may not use.
    """
    if cpu == "any":
        return KeptCpu()
    if sys.platform != "linux":
        return _not_kept("only Linux lets a thread choose its processor")
    allowed = os.sched_getaffinity(0)
    if cpu != "auto":
        try:
            os.sched_setaffinity(0, {cpu})
        except OSError as error:
            raise SettingsError(
                f"worker.cpu is {cpu}, but this process may run on these only: {', '.join(map(str, sorted(allowed)))} "
                f"({error}); the worker was not started: name one of these, or set worker.cpu = auto or any"
            ) from error
        return _kept(KeptCpu(cpu), allowed)
    if len(allowed) < 2:
        return _not_kept("there is one processor only")
    if threads > 1:
        return _not_kept("worker.threads or retrieval.threads asks for more than one thread")
    try:
        claimed = _claim(allowed)
    except OSError as error:
        return _not_kept(repr(error))
    if claimed is None:
        return _not_kept("other workers have the processors that there are")
    number, claim = claimed
    why = "/proc/stat does not say what others use of it"
    try:
        if processor_times(number) is not None:
            os.sched_setaffinity(0, {number})
            return _kept(KeptCpu(number, allowed, claim=claim), allowed)
    except OSError as error:
        why = repr(error)
    os.close(claim)
    return _not_kept(why)


def _kept(cpu: KeptCpu, allowed: set[int]) -> KeptCpu:
    run_behind_on(allowed)
    log.info("cpu_kept", cpu=cpu.number)
    return cpu


def _not_kept(why: str) -> KeptCpu:
    log.info("cpu_not_kept", why=why)
    return KeptCpu()


def processor_times(number: int, file: Path = Path("/proc/stat")) -> ProcessorTimes | None:
    """Return what a processor did since the start; None where this host does not tell."""
    with contextlib.suppress(OSError):
        for line in file.read_text("ascii").splitlines():
            if line.startswith(f"cpu{number} "):
                user, nice, system, _idle, _iowait, irq, softirq, stolen = map(int, line.split()[1:9])
                # This process is counted there itself where it has a lower priority.
                worked = user + system + irq + softirq + (nice if os.getpriority(os.PRIO_PROCESS, 0) > 0 else 0)
                ticks = os.sysconf("SC_CLK_TCK")
                return ProcessorTimes(worked / ticks, stolen / ticks)
    return None


def kept_threads_seconds(number: int) -> dict[int, float]:
    """Return the processor seconds of each thread of this process that has to stay on this processor."""
    found = {}
    for thread in _threads():
        with contextlib.suppress(OSError):
            if os.sched_getaffinity(thread) == {number}:
                # Behind its name, which may hold anything.
                fields = Path(f"/proc/self/task/{thread}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
                found[thread] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def _threads() -> list[int]:
    return [int(task.name) for task in Path("/proc/self/task").iterdir()]


def _claim(allowed: set[int]) -> tuple[int, int] | None:
    """Return a processor that no other process has the lock of, and the lock's open file; None where all are taken.

    Slow ones last, second threads of a core after the first ones, else in no order, so that containers differ.
    The kernel frees the lock, whatever ends this process. Raises OSError.
    """
    folder = Path(tempfile.gettempdir()) / f"millstream-cpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else")
    speeds = {number: _speed(number) for number in allowed}
    slow = SLOW_SHARE * max(speeds.values())
    for number in sorted(allowed, key=lambda n: (speeds[n] < slow, not _is_first_of_core(n), random.random())):
        file = os.open(folder / str(number), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            continue
        return number, file
    return None


def _speed(number: int) -> int:
    """Return a number that is higher for the fast ones of unequal processors, 0 where this host does not tell."""
    folder = Path(f"/sys/devices/system/cpu/cpu{number}")
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        with contextlib.suppress(OSError, ValueError):
            return int((folder / name).read_text("ascii"))
    return 0


def _is_first_of_core(number: int) -> bool:
    """Whether it is the first hardware thread of its core, or the only one that this host tells of."""
    file = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
    try:
        return int(file.read_text("ascii").replace("-", ",").split(",")[0]) == number
    except (OSError, ValueError):
        return True

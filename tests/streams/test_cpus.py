"""Which processor a worker's event threads keep to, and when it is given up."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from models.errors import SettingsError
from streams.cpus import (
    CROWDED_WINDOWS,
    OTHERS_SHARE,
    WINDOW_SECONDS,
    KeptCpu,
    ProcessorTimes,
    keep_to,
    processor_times,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a thread choose its processor")
needs_two = pytest.mark.skipif(
    sys.platform == "linux" and len(os.sched_getaffinity(0)) < 2, reason="this host has one processor to choose from"
)
WAIT_SECONDS = 60

TAKE = """
import json, os, sys, threading
from models.retrieval import lower_priority
from streams.cpus import keep_to

allowed = set(sorted(os.sched_getaffinity(0))[:2])
os.sched_setaffinity(0, allowed)
cpu = keep_to("auto")
found = {}

def event_thread():
    found["event_thread"] = sorted(os.sched_getaffinity(0))

def building_thread():
    lower_priority()
    found["building_thread"] = sorted(os.sched_getaffinity(0))

for run in (event_thread, building_thread):
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
print(json.dumps({"number": cpu.number, "own": sorted(os.sched_getaffinity(0)), "allowed": sorted(allowed), **found}))
sys.stdout.flush()
sys.stdin.read()
"""
GIVE_UP = """
import json, os, threading
from streams.cpus import CROWDED_WINDOWS, WINDOW_SECONDS, KeptCpu, ProcessorTimes

allowed = os.sched_getaffinity(0)
number = min(allowed)
os.sched_setaffinity(0, {number})
done = threading.Event()
other = threading.Thread(target=done.wait, daemon=True)
other.start()
before = sorted(os.sched_getaffinity(other.native_id))
now = 0.0
cpu = KeptCpu(
    number, allowed, times=lambda _: ProcessorTimes(now, 0.0), own_seconds=lambda _: {1: now / 2}, now=lambda: now
)
for _ in range(CROWDED_WINDOWS + 1):
    cpu.look()
    now += WINDOW_SECONDS
own, after = sorted(os.sched_getaffinity(0)), sorted(os.sched_getaffinity(other.native_id))
done.set()
print(json.dumps({"number": cpu.number, "own": own, "allowed": sorted(allowed), "before": before, "after": after}))
"""
OWN = """
import json, os, time
from streams.cpus import kept_threads_seconds, processor_times

number = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, {number})
began, own_began = processor_times(number), time.thread_time()
while time.thread_time() - own_began < 0.5:
    pass
seconds = kept_threads_seconds(number)
print(json.dumps({
    "own": seconds[os.getpid()], "used": time.thread_time(), "worked": processor_times(number).worked - began.worked,
    "elsewhere": len(kept_threads_seconds(number + 1)),
}))
"""


@contextmanager
def process(folder: Path, program: str = TAKE) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Give a process whose locks lie in ``folder``, and what it printed."""
    environment = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as started:
        try:
            assert started.stdout is not None
            # The log goes to the same pipe, in front.
            line = next(line for line in started.stdout if line.startswith("{") and '"own"' in line)
            yield started, json.loads(line)
        finally:
            started.kill()


@needs_two
def test_workers_of_one_host_take_different_processors_and_the_one_too_many_takes_none(tmp_path: Path) -> None:
    with ExitStack() as stack:
        first, second, third = (stack.enter_context(process(tmp_path))[1] for _ in range(3))
    assert {first["number"], second["number"]} == set(first["allowed"])
    assert [first["own"], second["own"]] == [[first["number"]], [second["number"]]]
    assert third["number"] is None
    assert third["own"] == third["allowed"]


@needs_two
def test_what_a_killed_worker_had_is_free_again(tmp_path: Path) -> None:
    with process(tmp_path) as (one, first), process(tmp_path) as (_, second):
        one.kill()
        one.wait(WAIT_SECONDS)
        with process(tmp_path) as (_, third):
            assert third["number"] == first["number"] != second["number"]


@needs_two
def test_threads_that_build_run_on_every_processor_and_others_where_they_were_started(tmp_path: Path) -> None:
    with process(tmp_path) as (_, found):
        pass
    assert found["event_thread"] == found["own"] == [found["number"]]
    assert found["building_thread"] == found["allowed"]


@needs_two
def test_a_processor_that_others_use_is_given_up_for_all_that_the_process_may_use(tmp_path: Path) -> None:
    with process(tmp_path, GIVE_UP) as (_, found):
        pass
    assert found["before"] == [min(found["allowed"])]
    assert found["number"] is None
    assert found["own"] == found["after"] == found["allowed"]


def test_a_number_that_the_process_may_not_use_is_a_setting_to_change() -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(SettingsError, match=rf"worker.cpu is 60000, .* {max(before)} .*; the worker was not started"):
        keep_to(60_000)
    assert os.sched_getaffinity(0) == before


def test_any_leaves_every_thread_where_it_may_run() -> None:
    before = os.sched_getaffinity(0)
    assert keep_to("any").number is None
    assert os.sched_getaffinity(0) == before


def test_a_search_in_several_threads_keeps_every_processor() -> None:
    before = os.sched_getaffinity(0)
    assert keep_to("auto", threads=2).number is None
    assert os.sched_getaffinity(0) == before


class Host:
    """A processor whose clocks are set by hand."""

    def __init__(self) -> None:
        self.seconds = self.busy = self.stolen = self.own = 0.0
        self.is_there = True

    def kept(self, *, is_watched: bool = True) -> KeptCpu:
        # No thread of this process keeps to it, so that giving it up moves none.
        kept = KeptCpu(
            10_000,
            os.sched_getaffinity(0) if is_watched else (),
            times=lambda _: ProcessorTimes(self.busy, self.stolen),
            own_seconds=lambda _: {1: self.own} if self.is_there else {},
            now=lambda: self.seconds,
        )
        kept.look()
        return kept

    def window(self, kept: KeptCpu, *, own: float, others: float, stolen: float = 0.0) -> int | None:
        """Let a window pass in which these shares of it were used; returns what is kept then."""
        self.seconds += WINDOW_SECONDS
        self.own += own * WINDOW_SECONDS
        self.busy += (own + others) * WINDOW_SECONDS
        self.stolen += stolen * WINDOW_SECONDS
        kept.look()
        return kept.number


@pytest.mark.parametrize(
    ("own", "others", "why"),
    [
        (0.9, 0.1, "it is the worker itself"),
        (0.05, 0.7, "there is room for both"),
        (0.66, OTHERS_SHARE - 0.01, "others take little"),
    ],
)
def test_a_processor_is_kept_where(own: float, others: float, why: str) -> None:
    host = Host()
    kept = host.kept()
    assert [host.window(kept, own=own, others=others) for _ in range(5)] == [10_000] * 5, why


def test_two_busy_workers_that_cannot_see_each_others_locks_part() -> None:
    host = Host()
    kept = host.kept()
    assert [host.window(kept, own=0.5, others=0.5) for _ in range(CROWDED_WINDOWS)][-1] is None


def test_what_the_hypervisor_takes_does_not_hide_that_two_workers_want_the_rest() -> None:
    host = Host()
    kept = host.kept()
    assert [host.window(kept, own=0.3, others=0.3, stolen=0.4) for _ in range(CROWDED_WINDOWS)][-1] is None


def test_a_processor_that_the_host_took_away_is_not_said_to_be_kept() -> None:
    host = Host()
    kept = host.kept()
    host.is_there = False
    assert host.window(kept, own=0.1, others=0.0) is None


def test_one_crowded_window_is_no_reason_to_move() -> None:
    host = Host()
    kept = host.kept()
    for _ in range(5):
        for _ in range(CROWDED_WINDOWS - 1):
            assert host.window(kept, own=0.5, others=0.5) == 10_000
        assert host.window(kept, own=0.5, others=0.1) == 10_000


def test_a_number_that_the_settings_name_is_kept_whoever_uses_it() -> None:
    host = Host()
    kept = host.kept(is_watched=False)
    assert [host.window(kept, own=0.1, others=0.9) for _ in range(5)] == [10_000] * 5


def test_a_processor_has_worked_for_users_and_the_kernel_not_for_niced_programs_or_the_hypervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "stat"
    file.write_text("cpu  9 9 9 9 9 9 9 9 9 9\ncpu1 1 16 2 9 9 4 8 7 9 9\ncpu11 7 7 7 7 7 7 7 7 7 7\nintr 5\n")
    ticks = os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(os, "getpriority", lambda *_: 0)
    assert processor_times(1, file) == (15 / ticks, 7 / ticks)
    assert processor_times(111, file) is None
    assert processor_times(1, tmp_path / "nothing") is None
    monkeypatch.setattr(os, "getpriority", lambda *_: 10)
    assert processor_times(1, file) == (31 / ticks, 7 / ticks), "a niced worker is counted there itself"


def test_what_kept_threads_used_is_told_apart_from_what_others_did(tmp_path: Path) -> None:
    with process(tmp_path, OWN) as (_, found):
        pass
    assert found["own"] == pytest.approx(found["used"], abs=0.05)
    assert found["worked"] >= 0.45
    assert found["elsewhere"] == 0


@needs_two
def test_a_processor_that_the_host_refuses_is_left_to_other_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    assert keep_to("auto").number is None
    (lock,) = (tmp_path / f"millstream-cpus-{os.getuid()}").iterdir()
    with lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_somebody_elses_folder_of_locks_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"millstream-cpus-{os.getuid()}").symlink_to(tmp_path / "theirs")
    before = os.sched_getaffinity(0)
    assert keep_to("auto").number is None
    assert os.sched_getaffinity(0) == before
    assert not any((tmp_path / "theirs").iterdir())

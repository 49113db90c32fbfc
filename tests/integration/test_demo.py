"""`millstream demo` as a user runs it: a real Kafka, a worker, simulated users."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from streams.kafka_clients import new_admin
from streams.settings import Settings
from tests.integration.conftest import REPOSITORY

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

RUN_SECONDS = 300.0
"""An upper bound: the encoder alone takes half a minute to load on a busy machine."""
SMALL = ("--items", "60", "--users", "40", "--rate", "40", "--plain")

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(kafka: str, tmp_path: Path) -> Iterator[Start]:
    """Start the demo in an empty folder with extra arguments; what is left of it is ended."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str, **variables: str) -> subprocess.Popen[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MILLSTREAM_")}
        with (tmp_path / "output").open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "millstream", "demo", *SMALL, *arguments],
                cwd=tmp_path,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                env={
                    **kept,
                    "PYTHONPATH": str(REPOSITORY),
                    "OMP_NUM_THREADS": "1",
                    "MILLSTREAM_KAFKA__BOOTSTRAP_SERVERS": kafka,
                    **variables,
                },
            )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(60.0)


def until_output(folder: Path, text: str, process: subprocess.Popen[str]) -> None:
    """Return when the demo has printed ``text``."""
    deadline = time.monotonic() + RUN_SECONDS
    while text not in (folder / "output").read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"{text!r} was not printed:\n{(folder / 'output').read_text()}")
        time.sleep(0.1)


def processes_in(folder: Path) -> list[psutil.Process]:
    """Return the processes that were started in ``folder``: the demo and whatever it started."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def child(process: subprocess.Popen[str], *words: str) -> psutil.Process:
    """Return the demo's own child whose command line has these words."""
    (found,) = [p for p in psutil.Process(process.pid).children() if set(words) <= set(p.cmdline())]
    return found


def demo_topics(kafka: str, output: str) -> list[str]:
    """Return the topics of this run that the broker still lists."""
    found = re.search(r"creating topics (demo-\w+)", output)
    assert found, output

    async def listed() -> list[str]:
        admin = new_admin(Settings(kafka={"bootstrap_servers": kafka}))
        await admin.start()
        try:
            return [name for name in await admin.list_topics() if name.startswith(found[1])]
        finally:
            await admin.close()

    return asyncio.run(listed())


def test_a_run_ends_by_itself_with_slates_a_summary_and_nothing_left(start: Start, kafka: str, tmp_path: Path) -> None:
    process = start("--duration", "10")
    code = process.wait(RUN_SECONDS)
    output = (tmp_path / "output").read_text()
    assert code == 0, output
    assert re.search(r"slates received +[1-9]", output), output
    assert re.search(r"freshness +p50 \d+ ms, p99 ", output), output
    assert re.search(r"click rate +millstream [\d.]+%", output), output
    # Too short to learn anything: that is said.
    assert "no bundle was promoted: " in output
    assert processes_in(tmp_path) == []
    assert demo_topics(kafka, output) == []


def test_a_run_whose_worker_is_killed_fails_and_leaves_nothing(start: Start, kafka: str, tmp_path: Path) -> None:
    process = start("--duration", "200")
    until_output(tmp_path, "events/s", process)
    child(process, "streams.demo.worker_process").kill()
    code = process.wait(RUN_SECONDS)
    output = (tmp_path / "output").read_text()
    assert code == 1, output
    assert "failed: the worker ended by signal 9" in output
    assert processes_in(tmp_path) == []
    assert demo_topics(kafka, output) == []


def test_a_bundle_is_learned_from_the_users_clicks_and_swapped_in_while_they_go_on(
    start: Start, kafka: str, tmp_path: Path
) -> None:
    # Films enough that nobody has seen them all before the gate has judged.
    process = start("--duration", "170", "--users", "200", "--rate", "80", "--items", "500")
    code = process.wait(RUN_SECONDS + 200)
    output = (tmp_path / "output").read_text()
    assert code == 0, output
    assert re.search(r"trainer: candidate: \S+ learned from [\d,]+ impressions", output), output
    assert re.search(r"\*\*\* .* learned from these clicks, makes the slates now", output), output
    assert re.search(r"model +20\S+Z live \d+ s after the users started", output), output
    assert re.search(r"before the swap +click rate millstream [\d.]+% .*, popularity [\d.]+%", output), output
    assert re.search(r"after the swap +click rate millstream [\d.]+% .*, popularity [\d.]+%", output), output
    assert processes_in(tmp_path) == []
    assert demo_topics(kafka, output) == []


def test_a_run_whose_trainer_is_killed_goes_on_and_fails_at_the_end_with_the_reason(
    start: Start, kafka: str, tmp_path: Path
) -> None:
    process = start("--duration", "15")
    until_output(tmp_path, "events/s", process)
    child(process, "millstream", "trainer").kill()
    code = process.wait(RUN_SECONDS)
    output = (tmp_path / "output").read_text()
    assert code == 1, output
    assert "failed: the trainer ended by signal 9" in output
    assert re.search(r"slates received +[1-9]", output), output
    assert processes_in(tmp_path) == []
    assert demo_topics(kafka, output) == []


def test_ctrl_c_before_the_users_start_ends_everything(start: Start, kafka: str, tmp_path: Path) -> None:
    process = start("--duration", "200")
    until_output(tmp_path, "waiting for the worker", process)
    process.send_signal(signal.SIGINT)
    code = process.wait(RUN_SECONDS)
    output = (tmp_path / "output").read_text()
    assert code == 130, output
    assert "stopped before the users started" in output
    assert processes_in(tmp_path) == []
    assert demo_topics(kafka, output) == []


def test_a_run_whose_worker_cannot_start_fails_and_says_why(start: Start, tmp_path: Path) -> None:
    (tmp_path / "no-model-here").mkdir()
    process = start(MILLSTREAM_ENCODER__MODEL=str(tmp_path / "no-model-here"))
    code = process.wait(RUN_SECONDS)
    output = (tmp_path / "output").read_text()
    assert code == 1, output
    assert "the worker ended with exit code 11, encoder" in output
    assert processes_in(tmp_path) == []

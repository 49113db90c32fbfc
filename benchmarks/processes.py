"""The processes of a benchmark: local Kafka, worker, encoder; what they log, count and occupy."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psutil
from prometheus_client.parser import text_string_to_metric_families

from models.errors import MillstreamError
from streams.settings import CONFIG_FILE_VARIABLE, Settings, render_toml

REPOSITORY: Final = Path(__file__).resolve().parents[1]
BUILD_NICENESS: Final = 10
"""Of the threads in which a worker builds its graph of items (models/retrieval.py)."""
STOP_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.05


class BenchmarkError(MillstreamError):
    """A benchmark could not be measured; the message says what did not happen and where the log is."""


class Child:
    """A process of ours that logs to a file; it dies with this process."""

    def __init__(self, name: str, arguments: list[str], settings: Settings, folder: Path) -> None:
        self.name = name
        self.log_file = folder / f"{name}.log"
        folder.mkdir(parents=True, exist_ok=True)
        self.started_at = time.monotonic()
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments], stdout=log, stderr=log, env=_environment(settings, folder)
            )

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Return the log lines of one event so far."""
        found = []
        for line in self.log_file.read_text("utf-8", "replace").splitlines():
            if line.startswith("{") and f'"{event}"' in line:
                record = json.loads(line)
                if record.get("event") == event:
                    found.append(record)
        return found

    async def wait_for(self, condition: Callable[[], bool], timeout_seconds: float, what: str) -> None:
        """Return when ``condition`` holds. Raises BenchmarkError when it does not, or when the process ended."""
        deadline = time.monotonic() + timeout_seconds
        while not await asyncio.to_thread(condition):
            if self.process.poll() is not None:
                raise BenchmarkError(f"{self.name} ended with {self.process.returncode} before {what}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{self.name}: {what} not within {timeout_seconds:.0f} s:\n{self.tail()}")
            await asyncio.sleep(POLL_SECONDS)

    async def wait_logged(self, event: str, timeout_seconds: float = 120.0) -> dict[str, Any]:
        """Return the first log line of ``event``."""
        await self.wait_for(lambda: bool(self.logged(event)), timeout_seconds, f"it logged {event}")
        return self.logged(event)[0]

    def tail(self, lines: int = 15) -> str:
        """Return the end of its log."""
        return "\n".join(self.log_file.read_text("utf-8", "replace").splitlines()[-lines:])

    def stop(self) -> None:
        """End by SIGTERM, by SIGKILL where that does not help."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End by SIGKILL."""
        self.process.kill()
        self.process.wait()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hold the process by SIGSTOP; for less than half its session, or it takes itself for fenced off."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def rss_bytes(self) -> int:
        """Return its resident memory now."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def peak_rss_bytes(self) -> int:
        """Return the most resident memory that it ever had (Linux; elsewhere the memory now)."""
        status = Path(f"/proc/{self.process.pid}/status")
        if status.is_file():
            for line in status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) << 10
        return self.rss_bytes()


class WorkerProcess(Child):
    """``python -m streams.worker``, or with ``profile`` the same under the sampling thread."""

    def __init__(self, settings: Settings, folder: Path, *, name: str = "worker", profile: bool = False) -> None:
        self.profile_file = folder / f"{name}-profile.json"
        module = ["benchmarks.profiled_worker", str(self.profile_file)] if profile else ["streams.worker"]
        super().__init__(name, module, settings, folder)
        self._url = ""
        self._profile = profile

    async def wait_ready(self, timeout_seconds: float = 180.0) -> float:
        """Return when /ready answers 200: the seconds since the process was started."""
        line = await self.wait_logged("health_listens")
        self._url = f"http://127.0.0.1:{line['port']}"
        await self.wait_for(lambda: self._get("/ready") is not None, timeout_seconds, "/ready")
        return time.monotonic() - self.started_at

    async def metric(self, name: str, **labels: str) -> float:
        """Return a metric, summed over the series that have these labels."""
        text = await asyncio.to_thread(self._get, "/metrics")
        total = 0.0
        for family in text_string_to_metric_families(text or ""):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    total += sample.value
        return total

    async def buckets(self, name: str) -> list[tuple[float, float]]:
        """Return (upper bound, cumulative count) of a histogram without labels."""
        text = await asyncio.to_thread(self._get, "/metrics")
        samples = [s for f in text_string_to_metric_families(text or "") for s in f.samples]
        return [(float(s.labels["le"]), s.value) for s in samples if s.name == f"{name}_bucket"]

    def is_building(self) -> bool:
        """Whether a graph of items is being built (Linux: the thread has a niceness of its own)."""
        for stat in Path(f"/proc/{self.process.pid}/task").glob("*/stat"):
            try:
                niceness = int(stat.read_text().rpartition(")")[2].split()[16])
            except OSError:
                continue  # the thread ended meanwhile
            if niceness == BUILD_NICENESS:
                return True
        return False

    def start_profile(self) -> None:
        """Have the sampling begin; nothing without ``profile``."""
        if self._profile:
            self.profile_file.with_suffix(".go").touch()

    async def end_profile(self) -> str:
        """End the sampling and return its report, "" without ``profile``."""
        if not self._profile:
            return ""
        self.profile_file.with_suffix(".stop").touch()
        await self.wait_for(self.profile_file.is_file, 30.0, "its profile")
        return self.profile_file.read_text("utf-8")

    def _get(self, path: str) -> str | None:
        try:
            with urllib.request.urlopen(self._url + path, timeout=10) as answer:
                text: str = answer.read().decode()
                return text
        except (urllib.error.URLError, TimeoutError):
            return None


class EncoderChild(Child):
    """``python -m streams.encoder_process``."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        super().__init__("encoder", ["streams.encoder_process"], settings, folder)


def _environment(settings: Settings, folder: Path) -> dict[str, str]:
    file = folder / "millstream.toml"
    file.write_text(render_toml(settings), "utf-8")
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {
        **os.environ,
        **threads,
        CONFIG_FILE_VARIABLE: str(file),
        "PYTHONPATH": str(REPOSITORY),
        "TOKENIZERS_PARALLELISM": "false",
    }

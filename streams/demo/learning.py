"""The demo's trainer: its settings, its process, and what it says. The trainer itself is another program."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from models.exploration import RANDOMISED
from streams.demo.users import EVENTS_PER_VIEW
from streams.settings import Settings

WINDOW_SECONDS: Final = 8
"""Least attribution window: labels are known this long after a slate was shown."""
CLICK_PAUSES: Final = 0.8
"""A user clicks up to this share of their pause after they looked."""
GRACE_SECONDS: Final = 4
STOP_SECONDS: Final = 20.0
LOG_LINES: Final = 8

GATE_IMPRESSIONS: Final = 1_200
GATE_USERS: Final = 20
GATE_MARGIN_AUC: Final = 0.05
"""Wide: users look at the first films most, so that clicks agree with whoever ordered the slate, the live model."""
GATE_WORDS: Final = (
    f"its gate here: {GATE_IMPRESSIONS:,} labelled impressions that it has not learned from, AUC not worse by "
    f"{GATE_MARGIN_AUC}, and log loss or AUC better beyond chance"
)


def attribution_window_seconds(users: int, events_per_second: float) -> int:
    """Return a window in which the simulated users click what they click."""
    return max(WINDOW_SECONDS, round(CLICK_PAUSES * users * EVENTS_PER_VIEW / events_per_second) + 2)


def learning_settings(settings: Settings, folder: Path, window_seconds: int) -> Settings:
    """Return ``settings`` with a short attribution window and a registry of this run alone."""
    window = {"attribution_window_seconds": window_seconds, "attribution_windows_seconds": {}}
    return settings.model_copy(
        update={
            "user_state": settings.user_state.model_copy(update=window),
            "joiner": settings.joiner.model_copy(update={"grace_seconds": GRACE_SECONDS}),
            "models": settings.models.model_copy(
                update={
                    "name": "demo",
                    "url": str(folder / "registry"),
                    "storage_options": {},
                    "cache_folder": folder / "bundles",
                    "public_key": None,
                    "private_key_file": None,
                    "status_interval_seconds": 1.0,
                }
            ),
        }
    )


def trainer_section(folder: Path) -> str:
    """Return the section ``[trainer]`` of the demo's settings file: small rounds, head and projection alone."""
    return f"""
[trainer]
data_folder = {json.dumps(str(folder / "trainer"))}
port = 0
tensorboard = false
log_format = "console"
round_minutes = 0.1
poll_seconds = 1.0
window_hours = 1.0
min_impressions = 1500
min_clicks = 200
prepare_timeout_seconds = 30.0

[trainer.training]
encoder = "frozen"
projection = true
residuals = false
epochs = 6
batch_impressions = 32
hidden = [64]
projection_learning_rate = 1e-4
held_back_share = 0.15
calibration_share = 0.15

[trainer.gate]
min_impressions = {GATE_IMPRESSIONS}
min_users = {GATE_USERS}
margin_auc = {GATE_MARGIN_AUC}
max_auc_fall = 0.1
min_shadow_impressions = 50
cool_down_minutes = 0.5
resamples = 1000
"""


@dataclass(frozen=True, slots=True)
class Swap:
    """The first slate of a new version, as a user got it."""

    version: str
    at: float
    """``time.monotonic()``."""
    clock: float
    """``time.time()``."""
    after_seconds: float
    """Since the users started."""


@dataclass(slots=True)
class Learning:
    """What the trainer said so far, and which versions made the slates."""

    said: list[tuple[str, str]] = field(default_factory=list)
    """(outcome, sentence), as the trainer prints them."""
    version: str = ""
    swaps: list[Swap] = field(default_factory=list)

    @property
    def doing(self) -> str:
        """The trainer's last word, in short."""
        if not self.said:
            return "the trainer collects examples"
        outcome, sentence = self.said[-1]
        return f"{outcome}: {sentence}"

    def hear(self, lines: list[str]) -> None:
        """Take what the trainer printed; of an outcome that comes again and again the last sentence is kept."""
        for line in lines:
            outcome, found, sentence = line.partition(": ")
            if not found:
                continue
            if self.said and self.said[-1][0] == outcome:
                self.said.pop()
            self.said.append((outcome, sentence))

    def slate(self, version: str, experiment: str | None, at: float, clock: float, started_at: float) -> Swap | None:
        """Take note of who made a slate; returns the swap that it is the first sign of.

        Randomised slates are drawn, not made by a model.
        """
        if experiment == RANDOMISED or version == self.version:
            return None
        first, self.version = not self.version, version
        if first:
            return None
        swap = Swap(version, at, clock, at - started_at)
        self.swaps.append(swap)
        return swap

    def why_not(self) -> str:
        """Return why no bundle was promoted, in the trainer's words."""
        decided = [sentence for outcome, sentence in self.said if outcome == "refused"]
        if decided:
            return decided[-1]
        return self.doing if self.said else "the trainer had no round yet"


class TrainerProcess:
    """`millstream trainer` beside the worker, for as long as the demo runs."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "trainer.log"
        self._said = folder / "trainer-said.log"
        self._read = 0
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, environment: Mapping[str, str]) -> None:
        """Start it with ``environment``, which names the settings file."""
        with self.log.open("wb") as log_file, self._said.open("wb") as said_file:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "streams.demo.trainer_process",
                str(os.getpid()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=said_file,
                stderr=log_file,
                env=dict(environment),
                start_new_session=True,
            )

    def problem(self) -> str | None:
        """Return why it no longer runs, None while it does."""
        if self._process is None or self._process.returncode is None:
            return None
        code = self._process.returncode
        how = f"with exit code {code}" if code >= 0 else f"by signal {-code}"
        return f"the trainer ended {how}; its log ends with:\n{self._last_words()}"

    def new_lines(self) -> list[str]:
        """Return the whole lines that it printed since the last call."""
        with contextlib.suppress(FileNotFoundError), self._said.open("rb") as said:
            said.seek(self._read)
            text = said.read()
            end = text.rfind(b"\n") + 1
            self._read += end
            return text[:end].decode("utf-8", "replace").splitlines()
        return []

    async def stop(self) -> None:
        """End it: in order, or after a while at once."""
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
            except TimeoutError:
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                    process.kill()
        await process.wait()

    def _last_words(self) -> str:
        try:
            lines = self.log.read_text("utf-8", "replace").splitlines()[-LOG_LINES:]
        except FileNotFoundError:
            return "(no log)"
        return "\n".join(f"  {line}" for line in lines)

"""`millstream worker`: starts the worker and its encoder process, and starts them again when they die.

Not Faust's command line: that one ignores ``web_enabled=False`` and exits when the broker is away. A child that ends
is started again after a growing wait; an exit code that a restart cannot mend (settings, layout, encoder) ends the
supervisor with the same code. Deaths at the same offsets are counted and the suspects handed to the next worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
import time
from pathlib import Path
from typing import IO

import structlog

from models.errors import SettingsError
from streams.exit_codes import FINAL, ExitCode
from streams.in_flight import DeathLedger, Suspects, read_mark
from streams.logs import configure
from streams.parent import SUPERVISOR_VARIABLE
from streams.settings import CONFIG_FILE_VARIABLE, Settings

log = structlog.get_logger(__name__)

LOCK_FILE = "lock"
STABLE_SECONDS = 60.0
"""A child that lived this long starts the wait from the beginning again."""
STOP_SECONDS = 60.0
"""How long a child may take to stop before it is killed."""


class Child:
    """One child process, started again when it dies."""

    def __init__(self, name: str, module: str, settings: Settings, config_file: Path | None) -> None:
        self.name = name
        self._module = module
        self._settings = settings
        self._config_file = config_file
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()

    async def run(self) -> int:
        """Run until stopped or until a code that a restart cannot mend; returns the last exit code."""
        wait = self._settings.worker.restart_backoff_seconds
        while True:
            self.before_start()
            started = time.monotonic()
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", self._module, env=self._environment()
            )
            log.info("child_started", child=self.name, pid=self._process.pid)
            if self._stopping.is_set():
                self.stop()
            code = await self._process.wait()
            if self._stopping.is_set():
                log.info("child_stopped", child=self.name, code=code)
                return code
            self.after_death(code)
            if code in FINAL:
                log.error("child_gave_up", child=self.name, code=code, why=ExitCode(code).name.lower())
                return code
            if time.monotonic() - started > STABLE_SECONDS:
                wait = self._settings.worker.restart_backoff_seconds
            why = ExitCode(code).name.lower() if code in ExitCode._value2member_map_ else f"signal {-code}"
            log.warning("child_died", child=self.name, code=code, why=why, restart_in_seconds=round(wait, 1))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait)
                return code
            wait = min(wait * 2, self._settings.worker.restart_backoff_max_seconds)

    def stop(self) -> None:
        """Ask the child to stop; it is not started again."""
        self._stopping.set()
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the child at once."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def before_start(self) -> None:
        """Prepare a start."""

    def after_death(self, code: int) -> None:
        """Take note of a death."""

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        if self._config_file is not None:
            environment[CONFIG_FILE_VARIABLE] = str(self._config_file.resolve())
        environment[SUPERVISOR_VARIABLE] = str(os.getpid())
        # The libraries read these at import, before any setting can reach them.
        threads = str(self._settings.worker.threads)
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment.setdefault(variable, threads)
        environment.setdefault("TOKENIZERS_PARALLELISM", "false")
        return environment


class WorkerChild(Child):
    """The worker: its deaths in the middle of a batch are counted."""

    def __init__(self, settings: Settings, config_file: Path | None, module: str = "streams.worker") -> None:
        super().__init__("worker", module, settings, config_file)
        self._folder = settings.worker.data_folder
        self._ledger = DeathLedger(settings.worker.poison_deaths)

    def before_start(self) -> None:
        """Leave the suspects where the worker reads them."""
        self._ledger.suspects.save(self._folder)

    def after_death(self, code: int) -> None:
        """Count deaths that our own code did not ask for: a delivery error at some offsets accuses no event."""
        asked = code in ExitCode._value2member_map_ and code not in (ExitCode.UNEXPECTED, ExitCode.POISON)
        if asked:
            return
        if self._ledger.died(read_mark(self._folder)):
            suspects = self._ledger.suspects
            log.error("poison_suspected", one_by_one=suspects.one_by_one, refused=suspects.refused)


async def supervise(settings: Settings, config_file: Path | None = None) -> int:
    """Run worker and encoder until SIGTERM or SIGINT; returns the exit code of the command."""
    configure(settings.worker.log_level, settings.worker.log_format)
    lock = _lock(settings.worker.data_folder)
    Suspects().save(settings.worker.data_folder)
    worker = WorkerChild(settings, config_file)
    encoder = Child("encoder", "streams.encoder_process", settings, config_file)
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    tasks = {asyncio.create_task(child.run(), name=child.name): child for child in (worker, encoder)}
    stopped = asyncio.create_task(stopping.wait())
    await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
    code = next((task.result() for task in tasks if task.done()), int(ExitCode.STOPPED))
    for child in tasks.values():
        child.stop()
    _, late = await asyncio.wait(tasks, timeout=STOP_SECONDS)
    for task in late:
        log.error("child_killed", child=tasks[task].name, after_seconds=STOP_SECONDS)
        tasks[task].kill()
        await task
    stopped.cancel()
    if stopping.is_set():
        codes = [task.result() for task in tasks]
        code = next((c for c in codes if c not in (0, -signal.SIGTERM, -signal.SIGINT)), 0)
    lock.close()
    return code if code >= 0 else 128 - code


def _lock(folder: Path) -> IO[str]:
    """Hold the data folder for this supervisor; the kernel lets go when it ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK_FILE).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise SettingsError(
            f"another worker uses the data folder {folder}; give each its own: MILLSTREAM_WORKER__DATA_FOLDER, and "
            "MILLSTREAM_WORKER__PORT"
        ) from None
    return file

"""Follows the settings file: what the recommender may change while it serves is changed between two batches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram

from models.errors import SettingsError
from streams.settings import Settings, load

log = structlog.get_logger(__name__)

DELAY_BUCKETS = (0.1, 0.3, 1, 2, 3, 5, 10, 30, 60)

Stamp = tuple[int, int]
"""Modification time in nanoseconds, and bytes."""


class SettingsWatch:
    """Looks at the file every ``worker.settings_poll_seconds``; without a file it has nothing to do.

    Only the section ``recommender`` is taken: rules, quotas, weights, experiments. Surfaces can be changed, not added
    or removed: user rows and open labels keep their numbers. A file that cannot be used changes nothing.
    """

    def __init__(
        self,
        settings: Settings,
        file: Path,
        use: Callable[[Settings], Awaitable[None]],
        registry: CollectorRegistry,
    ) -> None:
        self.settings = settings
        """What is in force."""
        self._file = file
        self._use = use
        self._seen = _stamp(file)
        self._reloads = Counter(
            "millstream_settings_reloads",
            "Changes of the settings file that were taken, refused, or need a restart.",
            ["outcome"],
            registry=registry,
        )
        self._delay = Histogram(
            "millstream_settings_reload_seconds",
            "From the file's modification to the first batch under it: how fast an emergency block is.",
            buckets=DELAY_BUCKETS,
            registry=registry,
        )

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(self.settings.worker.settings_poll_seconds)
            await self.look()

    async def look(self) -> bool:
        """Take the file's settings if it has changed; return whether anything is in force now that was not."""
        stamp = _stamp(self._file)
        if stamp is None or stamp == self._seen:
            return False
        try:
            found = load(self._file)
            wanted = self._taken(found)
        except (SettingsError, OSError) as error:
            self._seen = stamp
            self._reloads.labels("refused").inc()
            log.warning("settings_refused", file=str(self._file), why=str(error), kept="the settings in force")
            return False
        self._seen = stamp
        sections = [n for n in Settings.model_fields if n != "recommender" and getattr(found, n) != getattr(wanted, n)]
        if sections:
            self._reloads.labels("needs-restart").inc()
            log.warning("settings_need_restart", sections=sections)
        if wanted.recommender == self.settings.recommender:
            return False
        await self._use(wanted)
        self.settings = wanted
        self._reloads.labels("taken").inc()
        delay = max(0.0, time.time() - stamp[0] / 1e9)
        self._delay.observe(delay)
        log.info("settings_taken", file=str(self._file), delay_seconds=round(delay, 3))
        return True

    def _taken(self, found: Settings) -> Settings:
        """Return the settings in force with what may change of ``found``. Raises SettingsError."""
        old, new = self.settings.recommender, found.recommender
        if set(old.surfaces) != set(new.surfaces) or old.default_surface != new.default_surface:
            raise SettingsError("recommender.surfaces: surfaces were added, removed or renamed; that needs a restart")
        return self.settings.model_copy(update={"recommender": new})


def _stamp(file: Path) -> Stamp | None:
    try:
        status = file.stat()
    except OSError:
        # No file, or one that is being replaced: there is nothing to take now.
        return None
    return status.st_mtime_ns, status.st_size

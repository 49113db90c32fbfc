"""What a changed settings file does to a worker that serves, and what it does not."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from streams.settings import Settings, load
from streams.settings_watch import SettingsWatch

BLOCK = '[recommender.surfaces.default.rules]\nblocked_items = ["item-7"]\n'


@dataclass
class Followed:
    """A watch over a file, with what it has put into use."""

    file: Path
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    used: list[Settings] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.write("")
        self.watch = SettingsWatch(load(self.file), self.file, self.use, self.registry)

    async def use(self, settings: Settings) -> None:
        self.used.append(settings)

    def write(self, text: str) -> None:
        """Write the file with a time of its own, so that no clock's coarseness hides the change."""
        before = self.file.stat().st_mtime_ns if self.file.exists() else 1_000_000_000
        self.file.write_text(text)
        os.utime(self.file, ns=(before + 1_000_000, before + 1_000_000))

    def count(self, outcome: str) -> float:
        return self.registry.get_sample_value("millstream_settings_reloads_total", {"outcome": outcome}) or 0.0


@pytest.fixture
def followed(tmp_path: Path) -> Followed:
    return Followed(tmp_path / "millstream.toml")


async def test_a_file_that_does_not_change_is_not_read_again(followed: Followed) -> None:
    assert not await followed.watch.look()
    assert followed.used == []


async def test_a_changed_rule_is_in_force_at_the_next_look_and_its_delay_measured(followed: Followed) -> None:
    followed.write(BLOCK)
    assert await followed.watch.look()
    (settings,) = followed.used
    assert settings.recommender.surface(None).rules.blocked_items == ("item-7",)
    assert followed.registry.get_sample_value("millstream_settings_reload_seconds_count") == 1
    assert not await followed.watch.look()


@pytest.mark.parametrize("text", ["[recommender\n", "[recommender]\nunknown = 1\n", "[nonsense]\n"])
async def test_a_file_that_cannot_be_used_changes_nothing_and_is_refused_once(followed: Followed, text: str) -> None:
    followed.write(text)
    assert not await followed.watch.look()
    assert not await followed.watch.look()
    assert (followed.used, followed.count("refused")) == ([], 1)


async def test_a_good_file_after_a_bad_one_is_taken(followed: Followed) -> None:
    followed.write("[recommender\n")
    await followed.watch.look()
    followed.write(BLOCK)
    assert await followed.watch.look()


async def test_other_sections_wait_for_a_restart_but_do_not_hold_up_the_rules(followed: Followed) -> None:
    followed.write(BLOCK + "[worker]\nbatch_max_events = 7\n")
    assert await followed.watch.look()
    assert followed.used[0].worker.batch_max_events == 256
    assert followed.count("needs-restart") == 1


async def test_a_new_surface_is_refused(followed: Followed) -> None:
    followed.write("[recommender.surfaces.default]\n[recommender.surfaces.front]\nk = 5\n")
    assert not await followed.watch.look()
    assert followed.count("refused") == 1


async def test_a_file_that_is_gone_changes_nothing(followed: Followed) -> None:
    followed.file.unlink()
    assert not await followed.watch.look()

"""The benchmarks of everything switched on and of an emergency block: what they measure is what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import emergency
from benchmarks.everything import SETUP, SWITCHED_ON, TITLE, ratios, settings_lines
from benchmarks.results import Figure, Report
from benchmarks.stage import QUICK, Bench
from models.surfaces import SurfaceConfig
from streams.settings import Settings


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A benchmark of which nothing runs: no settings and no figure needs the world."""
    nothing: Any = None
    return Bench("localhost:1", tmp_path, QUICK, nothing, Report(), Console())


def test_every_section_of_a_surface_that_is_off_at_the_defaults_is_on() -> None:
    surface = Settings(**SWITCHED_ON).recommender.surface(None)  # type: ignore[arg-type]
    sizes = {"k", "candidates", "reason_language"}
    usual = SurfaceConfig()
    same = {n for n in SurfaceConfig.model_fields if getattr(surface, n) == getattr(usual, n)}
    assert same == sizes
    for section in (surface.quotas, surface.diversity):
        assert all(value > 0 for value in section.model_dump().values()), section
    assert all(surface.rules.model_dump().values())


def test_the_experiment_has_two_arms_a_hold_out_and_users_left_for_control() -> None:
    experiment = Settings(**SWITCHED_ON).recommender.experiment  # type: ignore[arg-type]
    arms = {experiment.arm_of(f"user-{i}") for i in range(1_000)}
    assert arms == {"diverse", "trusting", "hold_out", "control"}


def test_a_leg_keeps_its_own_settings_beside_those_of_the_setup(bench: Bench) -> None:
    sections = SETUP.sections(bench, "actions-everything")
    settings = bench.settings("actions-everything", **{**sections, "worker": {"max_trigger_age_seconds": 1.0}})  # type: ignore[arg-type]
    assert settings.worker.max_trigger_age_seconds == 1.0
    assert settings.recommender.ranking.half_trust_exposure == 2.0
    assert settings.models.url.endswith("actions-everything/registry")


def test_a_figure_stands_beside_the_same_one_with_everything_off() -> None:
    figures = [
        Figure("freshness, p50", 8.0, "ms"),
        Figure(f"freshness{TITLE}, p50", 12.0, "ms"),
        Figure(f"without a counterpart{TITLE}", 1.0, "ms"),
    ]
    (ratio,) = ratios(figures)
    assert (ratio.name, ratio.value, ratio.unit) == (f"freshness{TITLE}, p50 ÷ off", 1.5, "×")


def test_settings_are_told_one_a_line() -> None:
    assert settings_lines({"a": {"b": 1, "c": {"d": [2]}}}) == ["a.b = 1", "a.c.d = [2]"]


def _watch(*slates: tuple[int, int, str]) -> emergency.Watch:
    made: Any = None
    seen = [emergency.Seen(at_ms, block, frozenset(items.split())) for at_ms, block, items in slates]
    return emergency.Watch(made, seen)


def test_a_block_took_until_the_first_slate_of_its_probe_without_the_item(bench: Bench) -> None:
    watch = _watch((90, -1, "bad good"), (110, 0, "bad good"), (115, -1, "good"), (130, 0, "good"), (140, 0, "good"))
    emergency.report(bench, watch, [emergency.Block(0, "bad", 100)], "block")
    assert [(f.name, f.value) for f in bench.report.figures] == [
        ("block, p50", 30.0),
        ("block, p99", 30.0),
        ("block, slates with it after one without", 0),
    ]
    assert bench.report.figures[0].details["until_ms"] == [10.0]


def test_a_slate_with_the_item_after_one_without_it_is_counted(bench: Bench) -> None:
    watch = _watch((110, 0, "good"), (111, -1, "bad"), (112, -1, "good"))
    emergency.report(bench, watch, [emergency.Block(0, "bad", 100)], "block")
    assert bench.report.figures[2].value == 1
    assert bench.report.figures[2].verdict == "missed"

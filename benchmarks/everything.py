"""The worker with everything on that is off at the defaults, by the legs that measure the defaults.

A CTR model is live, another one in a space of its own is scored in shadow, and slates have rules, diversity, slots for
new items, quotas of all sources, doubt of the model, arms of an experiment with a hold-out, and more randomised users.
Every figure stands beside the same leg with everything off, of the same run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from benchmarks import baselines, freshness, throughput
from benchmarks.bundles import Announcer, registry_of
from benchmarks.processes import WorkerProcess
from benchmarks.results import BARE, Figure
from benchmarks.stage import DEFAULTS, Bench, Sections, Setup, Stage

SURFACE: Final[dict[str, Any]] = {
    "rules": {
        "allowed": {"max_age_seconds": 365 * 86_400.0},
        "blocked": {"adult": {"tags": ["18+"]}, "dear": {"min_price": 1_000.0}},
        "blocked_items": ["item-7", "item-49"],
        "boosts": {
            "topic": {"categories": ["topic-1", "c1"], "boost": 0.1},
            "new": {"max_age_seconds": 7_200.0, "boost": 0.2},
        },
        "pinned": ["item-3"],
    },
    "quotas": {"trending": 0.25, "trending_category": 0.25, "fresh": 0.25, "co_click": 0.25},
    "diversity": {"sameness": 0.3, "popularity_debias": 0.1, "max_per_category": 10},
    "fresh_slots": {"slots": [5, 10]},
}
"""A surface with everything that is off at the defaults."""
RANKING: Final[dict[str, Any]] = {"half_trust_exposure": 2.0}
EXPERIMENT: Final[dict[str, Any]] = {
    "name": "everything",
    "hold_out_share": 0.05,
    "arms": {
        "diverse": {"share": 0.3, "surface": {"diversity": {"sameness": 0.5}}},
        "trusting": {"share": 0.3, "ranking": {"half_trust_exposure": 1.0}, "surface": {"quotas": {"trending": 0.5}}},
    },
}
SWITCHED_ON: Final[Sections] = {
    "recommender": {
        "surfaces": {"default": SURFACE},
        "ranking": RANKING,
        "experiment": EXPERIMENT,
        "popularity_context": ["surface"],
    },
    "exploration": {"randomised_share": 0.02},
}
LEGS: Final = {
    "freshness": freshness.run,
    "slates": throughput.slates,
    "actions": throughput.actions,
    "impressions": throughput.impressions,
}
TITLE: Final = ", everything on"
SLATES_A_SECOND: Final = 600
LIVE, CANDIDATE = 0, 2


def _sections(bench: Bench, name: str) -> Sections:
    return {**SWITCHED_ON, "models": registry_of(bench, name)}


async def _prepare(made: Stage, worker: WorkerProcess) -> None:
    """Have a CTR model live and a candidate with a projection of its own, as a training makes it, in shadow."""
    announcer = Announcer(made, worker)
    await announcer.swap(LIVE, new_space=False)
    await announcer.candidate(CANDIDATE, new_space=True)
    await made.settle(worker)


SETUP: Final = Setup("-everything", TITLE, SLATES_A_SECOND, _sections, _prepare)


async def run(bench: Bench) -> None:
    """Measure every leg with everything on; with everything off, and the baselines, where this run did not yet."""
    report = bench.report
    if report.baseline(BARE) is None:
        await baselines.run(bench)
    for name, leg in LEGS.items():
        if name not in report.beside:
            await leg(bench, DEFAULTS)
        await leg(bench, SETUP)
    report.settings[TITLE.removeprefix(", ")] = [
        *settings_lines(SWITCHED_ON),
        "beside the defaults: features and labels of every impression, with the scores of all models; reasons",
        "live: a CTR model with random weights, hidden layers of 128 and 32",
        "in shadow: a candidate with a projection of its own, and the version before the live one",
    ]
    report.figures += ratios(report.figures)


def settings_lines(values: Mapping[str, Any], path: str = "") -> list[str]:
    """Return settings as one line each, ``a.b.c = value``."""
    lines: list[str] = []
    for name, value in values.items():
        at = f"{path}.{name}" if path else name
        lines += settings_lines(value, at) if isinstance(value, Mapping) else [f"{at} = {value}"]
    return lines


def ratios(figures: list[Figure]) -> list[Figure]:
    """Return a figure ÷ the same with everything off, for each that both were measured of."""
    off = {figure.name: figure.value for figure in figures}
    found = []
    for figure in figures:
        # A freshness has its percentile behind the title.
        base = off.get(figure.name.replace(TITLE, ""))
        if TITLE in figure.name and base:
            note = f"{figure.value:,.3g} ÷ {base:,.3g} {figure.unit}"
            found.append(Figure(f"{figure.name} ÷ off", figure.value / base, "×", note=note))
    return found

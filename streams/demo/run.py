"""The whole demo, from the start of Kafka to the summary."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import numpy as np

from streams.demo.catalogue import make_films
from streams.demo.learning import GATE_WORDS, attribution_window_seconds
from streams.demo.stage import SLATE_ITEMS, Stage
from streams.demo.statistics import Statistics, Story
from streams.demo.traffic import Traffic
from streams.demo.users import Half, Simulation, World, people
from streams.demo.view import REFRESHES_PER_SECOND, Scene, View, milliseconds, story_lines
from streams.settings import Settings

ENOUGH_FILMS: Final = 250
"""Films that must be searchable before the users start, where all of them take too long."""
INTERRUPTED: Final = 130
STORY_FILMS: Final = 100
TOLD: Final = frozenset({"promoted", "rolled-back"})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the command line gives."""

    duration_seconds: float = 180.0
    users: int = 240
    events_per_second: float = 80.0
    items: int = 1_200
    seed: int = 7
    plain: bool = False


class _Stopped(Exception):
    """Ctrl-C before the users started."""


async def run(settings: Settings, options: DemoOptions) -> tuple[int, list[str]]:
    """Run the demo and return its exit code and the lines of its summary. Everything started is ended, whatever comes.

    Raises MillstreamError where it could not start or go on.
    """
    stopping = asyncio.Event()
    films = make_films(options.items, options.seed)
    persons = people(options.users)
    world = World.make(films, len(persons) // 2, options.seed)
    simulation = Simulation(
        world, persons, k=SLATE_ITEMS, events_per_second=options.events_per_second, seed=options.seed
    )
    # Whose tastes are sharpest makes the clearest story; the slates know nothing of it.
    hero = int(np.sort(world.attraction, axis=1)[:, -STORY_FILMS:].mean(axis=1).argmax())
    hero_id = next(p.user_id for p in persons if p.taste == hero and p.half is Half.OURS)
    statistics = Statistics(len(persons) // 2, Story(hero_id))
    window_seconds = attribution_window_seconds(len(persons), options.events_per_second)
    stage = Stage(settings, lambda step: view.say(step), window_seconds)
    scene = Scene(
        statistics,
        {film.item_id: film for film in films},
        world.tastes[hero],
        len(persons),
        options.duration_seconds,
        stage.metrics,
    )
    with _signals(stopping), _logs_to(stage.log), View(scene, plain=options.plain) as view:
        showing = asyncio.create_task(_show(view))
        try:
            await _unless(stopping, stage.up(films, min(ENOUGH_FILMS, options.items)))
            await _act(stage, scene, Traffic(stage.settings, simulation, statistics), view, stopping)
            problem = stage.worker_problem() or stage.trainer.problem()
        except _Stopped:
            return INTERRUPTED, ["stopped before the users started; nothing is left running"]
        finally:
            showing.cancel()
            view.say("stopping the worker, deleting the topics")
            view.update(time.monotonic())
            await stage.down()
    return _verdict(scene, stage, problem, interrupted=stopping.is_set())


async def _act(stage: Stage, scene: Scene, traffic: Traffic, view: View, stopping: asyncio.Event) -> None:
    """Let the users act for the set time, until Ctrl-C, or until the worker is gone; hear the trainer meanwhile."""
    view.say(f"{scene.persons} users start; this goes on for {scene.duration_seconds:.0f} s")
    ends_at = scene.ends_at = time.monotonic() + scene.duration_seconds

    async def until() -> None:
        while time.monotonic() < ends_at and stage.worker_problem() is None:
            scene.statistics.learning.hear(stage.trainer.new_lines())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), 1 / REFRESHES_PER_SECOND)
                break
        scene.stopping = True
        view.say("waiting for the last slates")

    await traffic.run(asyncio.create_task(until()))


async def _show(view: View) -> None:
    while True:
        view.update(time.monotonic())
        await asyncio.sleep(1 / REFRESHES_PER_SECOND)


async def _unless(stopping: asyncio.Event, work: Awaitable[T]) -> T:
    """Await ``work``; cancel it and raise _Stopped when asked to stop first."""
    task = asyncio.ensure_future(work)
    stopped = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise _Stopped
    finally:
        stopped.cancel()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.contextmanager
def _signals(stopping: asyncio.Event) -> Iterator[None]:
    """Have Ctrl-C, SIGTERM and a closed terminal stop the demo in order."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, stopping.set)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _logs_to(file: Path) -> Iterator[None]:
    """Keep what Kafka's client says out of the view: on a broker that just started it retries aloud."""
    handler = logging.FileHandler(file, "w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    root = logging.getLogger()
    before = list(root.handlers)
    root.handlers[:] = [handler]
    try:
        yield
    finally:
        root.handlers[:] = before
        handler.close()


def _verdict(scene: Scene, stage: Stage, problem: str | None, *, interrupted: bool) -> tuple[int, list[str]]:
    statistics = scene.statistics
    failure = problem or statistics.failure()
    lines = ["", *summary(scene), "", *story_lines(scene)]
    if failure and interrupted and not problem and not statistics.freshness.triggers:
        return INTERRUPTED, [*lines, failure]
    if failure:
        return 1, [*lines, f"failed: {failure}; the logs are {stage.worker_log} and {stage.trainer.log}"]
    return 0, lines


def summary(scene: Scene) -> list[str]:
    """Return the figures of the run as lines."""
    statistics, freshness = scene.statistics, scene.statistics.freshness
    p50, p99 = freshness.overall()
    lines = [
        f"events sent        {statistics.events:,} by {scene.persons} simulated users",
        f"slates received    {statistics.slates:,} ({statistics.degraded:,} degraded); {freshness.answered:,} of "
        f"{freshness.triggers:,} requests and clicks answered",
        f"freshness          p50 {milliseconds(p50)}, p99 {milliseconds(p99)} "
        "(trigger in Kafka to slate in the user's hands)",
    ]
    bounds = [scene.metrics.freshness_bound_ms(share) for share in (0.5, 0.99)]
    if all(bound is not None for bound in bounds):
        within = " and ".join(
            f"{name} within {milliseconds(bound or 0.0)}" for name, bound in zip(("p50", "p99"), bounds, strict=True)
        )
        lines.append(f"                   the worker's own metrics: {within}")
    intervals = statistics.clicks.intervals()
    if intervals is not None:
        ours, popular, difference = intervals
        lines += [
            f"click rate         millstream {ours}, popularity {popular}",
            f"                   difference {difference} (95 % interval over users)",
        ]
    return [*lines, *_learning(scene)]


def _learning(scene: Scene) -> list[str]:
    """Return what was learned from the users' clicks, and the click rates before and after it served."""
    statistics = scene.statistics
    learning = statistics.learning
    if not learning.swaps:
        return [f"model              no bundle was promoted: {learning.why_not()}", f"                   {GATE_WORDS}"]
    lines = [
        f"model              {swap.version} live {swap.after_seconds:.0f} s after the users started"
        for swap in learning.swaps
    ]
    lines += [f"                   {outcome}: {sentence}" for outcome, sentence in learning.said if outcome in TOLD]
    lines.append(f"                   {GATE_WORDS}")
    for span, ours, popular in statistics.clicks.spans():
        lines.append(f"{span + ' the swap':<18} click rate millstream {ours}, popularity {popular}")
    return [
        *lines,
        "                   (rows and counts learn all the time, swap or not; films wear out for both halves)",
    ]

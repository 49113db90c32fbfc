"""Errors of our own code on a real broker: the guilty event is set aside, and everybody else is served."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from streams.in_flight import Suspects
from streams.supervisor import WorkerChild
from tests.integration.conftest import SettingsWith, environment, read_topic, settings_maker, wait_until
from tests.integration.oracle import Scene, assert_exact, look
from tests.integration.traffic import traffic
from tests.integration.workers import World, now_ms, record, world

pytestmark = pytest.mark.integration

FAULTY = "tests.integration.faulty_worker"


def click(user_id: str, item_id: str, number: int = 0) -> dict[str, Any]:
    """Return a click."""
    return {
        "type": "action",
        "event_id": f"{user_id}-{item_id}-{number}",
        "event_time": now_ms(),
        "user_id": user_id,
        "item_id": item_id,
        "action": "click",
    }


async def places_of(on: World, item_id: str) -> frozenset[tuple[int, int]]:
    """Return where the events stand that name an item."""
    events = await read_topic(on.settings, on.names.events)
    return frozenset((r.partition, r.offset) for r in events if item_id.encode() in r.value)


@pytest.fixture(scope="module")
def scene(kafka: str, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A backlog with two poisoned events and one user that cannot be ranked, played once."""
    folder = tmp_path_factory.mktemp("poison")

    async def scenario() -> Scene:
        async with world(settings_maker(folder, lambda: kafka), folder) as on:
            await on.publish(
                [
                    *traffic(on, 100, 20),
                    record(click("unlucky", "item-1")),
                    record(click("unlucky", "poison")),
                    record(click("unlucky", "item-2")),
                    record(click("only-poison", "poison")),
                    record(click("unrankable", "item-3")),
                    *traffic(on, 100, 20, seed=2),
                ]
            )
            worker = await on.ready_worker("faulty", FAULTY)
            return await look(on, worker, refuse=await places_of(on, "poison"))

    return asyncio.run(scenario())


def test_a_poisoned_event_goes_to_the_dead_letters_with_its_traceback(scene: Scene) -> None:
    found = sorted((x.key, x.reason) for x in scene.letters)
    assert found == [(b"only-poison", "processing-error"), (b"unlucky", "processing-error")]
    assert all("ZeroDivisionError: the poison works" in (x.traceback or "") for x in scene.letters)


def test_the_user_of_a_poisoned_event_keeps_the_events_before_and_after_it(scene: Scene) -> None:
    assert scene.rows[b"unlucky"]["clicks"] == [2]


def test_a_user_with_nothing_but_a_poisoned_event_has_no_row(scene: Scene) -> None:
    assert b"only-poison" not in scene.rows


def test_everybody_else_in_the_batch_is_unharmed(scene: Scene) -> None:
    assert scene.differences == []


def test_the_worker_counts_the_errors_and_goes_on(scene: Scene) -> None:
    assert (scene.exit_code, scene.metrics["update_errors"], scene.metrics["dead_letters"]) == (None, 2, 2)


def test_a_user_who_cannot_be_ranked_gets_a_degraded_slate(scene: Scene) -> None:
    slates = [s for s in scene.slates if s["user_id"] == "unrankable"]
    assert [(s["degraded"], len(s["items"])) for s in slates] == [(True, 20)]
    assert scene.metrics["degraded"] == 1


def test_an_error_in_ranking_loses_no_event(scene: Scene) -> None:
    assert scene.rows[b"unrankable"]["clicks"] == [1]


def test_nobody_else_in_the_batch_gets_a_degraded_slate(scene: Scene) -> None:
    assert {s["user_id"] for s in scene.slates if s["degraded"]} == {"unrankable"}


async def test_an_event_that_kills_the_process_again_and_again_is_set_aside(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    async with world(settings_with, tmp_path, worker={"poison_deaths": 2}) as on:
        deadly = click("victim", "deadly")
        await on.publish([*traffic(on, 60, 10), record(deadly), *traffic(on, 60, 10, seed=2)])
        prepared = on.worker("prepared", FAULTY)
        prepared.kill()
        environment(prepared.settings, tmp_path / "child")
        child = WorkerChild(prepared.settings, tmp_path / "child" / "millstream.toml", FAULTY)
        running = asyncio.create_task(child.run())
        try:

            async def set_aside() -> bool:
                return bool(await on.letters())

            await wait_until(set_aside, 150, "the deadly event is a dead letter", every_seconds=0.5)
            await assert_exact(on, fatal=await places_of(on, "deadly"))
        finally:
            child.stop()
            code = await asyncio.wait_for(running, 30)
        suspects = Suspects.load(prepared.settings.worker.data_folder)
    assert code == 0
    assert len(suspects.refused) == 1

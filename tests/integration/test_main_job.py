"""The main job as a user runs it: `millstream worker` with its encoder process, records in, slates out."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest

from streams import topics
from streams.broker import free_ports
from streams.sender import Headers, Outbox
from streams.settings import Settings
from streams.topic_io import TopicWriter
from streams.topics import TopicNames
from tests.integration.conftest import REPOSITORY, delete_topics, environment, read_topic, wait_until
from tests.integration.workers import now_ms

pytestmark = [pytest.mark.integration, pytest.mark.timeout(330)]

JSON: Headers = (("content-type", b"application/json"),)
FILMS = {
    "space-1": "Astronauts stranded on a space station near Mars",
    "space-2": "A spaceship crew explores a distant galaxy",
    "space-3": "The first colony on the Moon fights for survival in space",
    "space-4": "Alien fleet attacks the space station above Earth",
    "cook-1": "A young chef opens a restaurant in Paris",
    "cook-2": "Grandmother's recipes and the secrets of Italian cooking",
    "cook-3": "The baker who dreamed of the perfect bread",
    "cook-4": "Street food cooks compete for the best noodle kitchen",
    "war-1": "Soldiers march through the mud of the western front",
    "war-2": "A general loses the decisive battle of the war",
    "love-1": "Two strangers fall in love on a night train",
    "love-2": "A wedding, a lost letter and an old romance",
}


class Job:
    """The supervisor of one test, and what goes in and comes out."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.names = TopicNames.of(settings)

    async def send(self, topic: str, key: str, value: dict[str, Any] | None) -> None:
        """Send one record and return when it is acknowledged."""
        outbox = Outbox()
        async with TopicWriter(self.settings, topic) as writer:
            writer.add(outbox, topic, key.encode(), None if value is None else msgspec.json.encode(value), JSON)
            await writer.send(outbox)

    async def event(self, user_id: str, **fields: Any) -> str:
        """Send one event and return its id."""
        event_id = uuid.uuid4().hex
        event = {"event_id": event_id, "event_time": now_ms(), "user_id": user_id, **fields}
        await self.send(self.names.events, user_id, event)
        return event_id

    async def answer(self, event_id: str, timeout_seconds: float = 90.0) -> Any:
        """Return the slate that an event triggered."""
        found: list[Any] = []

        async def arrived() -> bool:
            records = await read_topic(self.settings, self.names.recommendations)
            slates = [msgspec.json.decode(r.value) for r in records]
            found[:] = [s for s in slates if s["trigger"]["event_id"] == event_id]
            return bool(found)

        await wait_until(arrived, timeout_seconds, f"a slate for {event_id}", every_seconds=0.2)
        return found[0]

    async def ask(self, user_id: str, **fields: Any) -> Any:
        """Send a request and return its slate."""
        request_id = uuid.uuid4().hex
        return await self.answer(await self.event(user_id, type="request", request_id=request_id, **fields))

    async def ask_until(
        self,
        user_id: str,
        holds: Callable[[Any], bool],
        what: str,
        *,
        timeout_seconds: float = 60.0,
        **fields: Any,
    ) -> Any:
        """Ask again and again until a slate is as wanted, and return it."""
        slate: Any = None

        async def wanted() -> bool:
            nonlocal slate
            slate = await self.ask(user_id, **fields)
            return holds(slate)

        try:
            await wait_until(wanted, timeout_seconds, what, every_seconds=0.25)
        except AssertionError as error:
            raise AssertionError(f"{error}; the last slate: {slate}") from None
        return slate


def item_ids(slate: Any) -> list[str]:
    """Return the ids of a slate in order."""
    return [item["item_id"] for item in slate["items"]]


@pytest.fixture(scope="module")
def running(kafka: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Settings of a supervisor with worker and encoder, twelve films in its catalogue, all searchable."""
    folder = tmp_path_factory.mktemp("job")
    name = f"t{uuid.uuid4().hex[:12]}"
    settings = Settings.model_validate(
        {
            "kafka": {"bootstrap_servers": kafka},
            "topics": {"prefix": name, "partitions": 4},
            # Who is randomised changes with the week.
            "exploration": {"randomised_share": 0.0},
            "worker": {"group": name, "port": free_ports(1)[0], "data_folder": folder / "data", "log_format": "json"},
        }
    )
    log_file = folder / "supervisor.log"
    with ThreadPoolExecutor(1) as thread, log_file.open("wb") as log:
        thread.submit(asyncio.run, _publish_films(settings)).result()
        process = subprocess.Popen(
            [sys.executable, "-m", "millstream", "worker"],
            env={**environment(settings, folder), "HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
        )
        try:
            thread.submit(asyncio.run, _until_searchable(settings)).result()
            yield settings
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, "a supervisor that is asked to stop exits with 0"
        except BaseException:
            print(log_file.read_text("utf-8", "replace")[-8000:])
            raise
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(10)
            thread.submit(asyncio.run, delete_topics(settings)).result()


async def _publish_films(settings: Settings) -> None:
    await topics.create(settings)
    job = Job(settings)
    for item_id, title in FILMS.items():
        await job.send(job.names.items, item_id, {"item_id": item_id, "title": title})


async def _until_searchable(settings: Settings) -> None:
    wanted = {"space-2", "space-3", "space-4"}
    await Job(settings).ask_until(
        "nobody",
        lambda slate: wanted <= set(item_ids(slate)) and slate["items"][0]["source"] == "query",
        "the films found by a query",
        timeout_seconds=200,
        query="spaceship in space",
    )


@pytest.fixture
def job(running: Settings) -> Job:
    """The running supervisor, for one test."""
    return Job(running)


async def test_a_click_changes_the_next_slate_and_says_why(job: Job) -> None:
    before = await job.ask("u-click", k=4)
    after = await job.answer(await job.event("u-click", type="action", item_id="cook-1", action="click"))
    assert item_ids(before) != item_ids(after)[:4]
    assert "cook-1" not in item_ids(after)
    assert item_ids(after)[0].startswith("cook-")
    assert after["items"][0]["reason"]["kind"] == "because_clicked"
    assert after["items"][0]["reason"]["item_ids"] == ["cook-1"]
    assert after["model_version"] == "bootstrap-0"
    assert [item["position"] for item in after["items"]] == list(range(1, len(after["items"]) + 1))


async def test_a_profile_text_gives_a_new_user_a_slate_of_their_own(job: Job) -> None:
    await job.send(job.names.users, "u-new", {"user_id": "u-new", "text": "loves cooking, restaurants and good food"})
    slate = await job.ask_until("u-new", lambda s: s["items"][0]["source"] == "profile", "the source profile", k=4)
    assert item_ids(slate)[0].startswith("cook-")
    assert slate["items"][0]["reason"]["kind"] == "like_profile"


async def test_a_new_item_is_searchable_and_a_hidden_or_removed_one_is_gone(job: Job) -> None:
    await job.send(job.names.items, "space-5", {"item_id": "space-5", "title": "Space pirates of the asteroid belt"})
    query = "pirates in space among the asteroids"
    await job.ask_until("u-item", lambda s: item_ids(s)[0] == "space-5", "the new film first", query=query, k=12)
    hidden = {"item_id": "space-5", "title": "Space pirates of the asteroid belt", "is_hidden": True}
    await job.send(job.names.items, "space-5", hidden)
    await job.ask_until("u-item", lambda s: "space-5" not in item_ids(s), "the hidden film gone", query=query, k=12)
    await job.send(job.names.items, "space-4", None)
    await job.ask_until("u-item", lambda s: "space-4" not in item_ids(s), "the removed film gone", query=query, k=12)


async def test_candidates_are_ranked_and_excluded_items_never_appear(job: Job) -> None:
    asked = ["war-1", "love-1", "cook-1"]
    ranked = await job.ask("u-rank", candidates=asked)
    assert sorted(item_ids(ranked)) == sorted(asked)
    assert {item["source"] for item in ranked["items"]} == {"candidates"}
    without = await job.ask("u-rank", exclude=["war-1", "war-2"], k=12)
    assert not {"war-1", "war-2"} & set(item_ids(without))


async def test_an_old_trigger_and_a_bare_impression_send_no_slate(job: Job) -> None:
    shown = [{"item_id": "war-1", "position": 1}, {"item_id": "love-1", "position": 2}]
    impression = await job.event("u-silent", type="impression", items=shown)
    last = await job.ask("u-silent")
    triggers = {
        msgspec.json.decode(r.value)["trigger"]["event_id"]
        for r in await read_topic(job.settings, job.names.recommendations)
    }
    assert impression not in triggers
    assert last["trigger"]["event_id"] in triggers

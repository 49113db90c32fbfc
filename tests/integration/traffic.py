"""Events of made-up users, with all that a real log has: retries, late events, items nobody knows yet."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.integration.workers import Record, World, now_ms, record

SPAN_MS = 5 * 3_600_000
"""How much event time one call covers: attribution windows close in it."""
LOAD_SPAN_MS = 100_000
"""The same for each part of a load."""


def traffic(on: World, count: int, users: int, *, seed: int = 1, span_ms: int = SPAN_MS) -> list[Record]:
    """Return ``count`` records of ``users`` users in the order of their event times.

    Half are impressions, a third are actions (most on an item shown last), the rest are requests; one in fifty is a
    client's retry of an earlier event under its old id. Event time goes on from call to call, never past now: where it
    went back by hours, housekeeping would remove impressions, as behind every correction, that the oracle still
    corrects.
    """
    rng = random.Random(seed)
    item_ids = on.item_ids
    start_ms = on.traffic_ms
    span_ms = max(0, min(span_ms, now_ms() - start_ms))
    on.traffic_ms += span_ms
    shown: dict[str, list[str]] = {}
    events: list[dict[str, Any]] = []
    for number in range(count):
        if events and rng.random() < 0.02:
            events.append(rng.choice(events[-200:]))
            continue
        user = f"user-{rng.randrange(users)}"
        event: dict[str, Any] = {
            "event_id": f"{seed}-{number}",
            "event_time": start_ms + number * span_ms // count,
            "user_id": user,
        }
        kind = rng.random()
        if kind < 0.5:
            shown[user] = rng.sample(item_ids, rng.randint(2, 8))
            event |= {"type": "impression", "items": [{"item_id": item} for item in shown[user]]}
        elif kind < 0.85:
            known = rng.choice(shown.get(user, item_ids)) if rng.random() < 0.9 else f"unknown-{rng.randrange(5)}"
            action = rng.choice(["click", "click", "click", "like", "hide", "dislike", "purchase", "rating", "dwell"])
            event |= {"type": "action", "item_id": known, "action": action, "value": float(rng.randint(1, 5))}
        else:
            event |= {"type": "request", "request_id": f"r-{seed}-{number}", "k": rng.randint(1, 10)}
        events.append(event)
    return [record(event) for event in events]


@asynccontextmanager
async def load(on: World, seed: int) -> AsyncIterator[None]:
    """Publish about a hundred events a second as long as the block lasts."""
    stop = asyncio.Event()

    async def run() -> None:
        number = seed * 1_000
        while not stop.is_set():
            await on.publish(traffic(on, 20, 60, seed=number, span_ms=LOAD_SPAN_MS))
            number += 1
            await asyncio.sleep(0.15)

    task = asyncio.create_task(run())
    try:
        yield
    finally:
        stop.set()
        await task

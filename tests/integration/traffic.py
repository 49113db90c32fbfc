"""Events of made-up users, with all that a real log has: retries, late events, items nobody knows yet."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tests.integration.workers import Record, now_ms, record

SPAN_MS = 10 * 3_600_000
"""Event times of a log lie within this long before now: attribution windows close in it."""


def traffic(count: int, users: int, item_ids: Sequence[str], *, seed: int = 1) -> list[Record]:
    """Return ``count`` records of ``users`` users in the order of their event times.

    Half are impressions, a third are actions (most on an item shown last), the rest are requests; one in fifty is a
    client's retry of an earlier event under its old id.
    """
    rng = random.Random(seed)
    start_ms = now_ms() - SPAN_MS
    shown: dict[str, list[str]] = {}
    events: list[dict[str, Any]] = []
    for number in range(count):
        if events and rng.random() < 0.02:
            events.append(rng.choice(events[-200:]))
            continue
        user = f"user-{rng.randrange(users)}"
        event: dict[str, Any] = {
            "event_id": f"{seed}-{number}",
            "event_time": start_ms + number * SPAN_MS // count,
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

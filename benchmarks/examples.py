"""What the examples for the trainer cost: bytes of an impression on the topics, and impressions a second with labels.

Each user has a history of impressions further apart than the attribution window, every fourth with a click, so that
the next event of the user closes it: features and labels are written at the same rate, as in a worker that has run
for long. Bytes are those of key and value as they stand on the topics, uncompressed.
"""

from __future__ import annotations

import time
from typing import Final

import msgspec

from benchmarks.results import CpuAccount, Figure
from benchmarks.stage import Bench, Stage, stage
from benchmarks.throughput import SILENT_AGE_SECONDS, rate
from benchmarks.world import SLATE, Keyed
from models.events import EVENT_CODEC, Impression

WINDOW_SECONDS: Final = 60
APART_SECONDS: Final = 300
SHOWN_TO_EACH: Final = 10
CLICKED_EVERY: Final = 4
DAY_SECONDS: Final = 86_400
IMPRESSIONS_A_SECOND: Final = 1_000
"""For which the bytes of a day are told."""


async def run(bench: Bench) -> None:
    """Impressions of 15 items with the labels of those before them."""
    account = CpuAccount()
    window = {"attribution_window_seconds": WINDOW_SECONDS}
    silent = {"max_trigger_age_seconds": SILENT_AGE_SECONDS}
    users = max(bench.sizes.impressions // SHOWN_TO_EACH, 1)
    async with stage(bench, "examples", users=bench.sizes.users, user_state=window, worker=silent) as made:
        worker = await made.worker()
        name = f"impressions of {SLATE} items, with examples"
        await rate(made, worker, _history(bench, users), "impression", name, counted=SHOWN_TO_EACH * users)
        await _bytes(made)
    bench.report.beside["examples"] = account.describe()


def _history(bench: Bench, users: int) -> list[Keyed]:
    """Return impressions and clicks in the order of their event times."""
    start_ms = time.time_ns() // 1_000_000 - SHOWN_TO_EACH * APART_SECONDS * 1000
    records: list[Keyed] = []
    for turn in range(SHOWN_TO_EACH):
        for user in range(users):
            at_ms = start_ms + turn * APART_SECONDS * 1000 + user % 1000
            impression = bench.world.impression(user, at_ms)
            records.append(impression)
            if (turn + user) % CLICKED_EVERY == 0:
                records.append(_click_on(impression, at_ms + 5_000, f"c{turn}-{user}"))
    return records


def _click_on(shown: Keyed, at_ms: int, event_id: str) -> Keyed:
    """Return a click on the first item of an impression."""
    event = EVENT_CODEC.decode(shown.value)
    if not isinstance(event, Impression):
        raise TypeError(f"{event!r} is no impression")
    click = {"type": "action", "event_id": event_id, "event_time": at_ms, "user_id": event.user_id}
    click |= {"item_id": event.items[0].item_id, "action": "click", "surface": event.surface}
    return Keyed(shown.key, msgspec.json.encode(click))


async def _bytes(made: Stage) -> None:
    """Add what stands on the topics for one impression, and what that is a day."""
    mean: dict[str, float] = {}
    for topic in (made.names.features, made.names.labels):
        records = await made.records(topic)
        mean[topic] = sum(len(r.key or b"") + len(r.value or b"") for r in records) / max(len(records), 1)
        made.bench.report.beside[f"records on {topic}"] = f"{len(records):,}"
    each = sum(mean.values())
    gigabytes = each * IMPRESSIONS_A_SECOND * DAY_SECONDS / 1e9
    note = (
        f"features {mean[made.names.features]:.0f}, labels {mean[made.names.labels]:.0f}; the scores of each model in "
        f"shadow add {4 * SLATE}; {gigabytes:.0f} GB a day at {IMPRESSIONS_A_SECOND:,} impressions/s"
    )
    made.bench.report.figures.append(Figure(f"example of {SLATE} items", each, "bytes", note=note))

"""Cost of co-click neighbours on one core, and what they find beside popularity where tastes outlast the day.

Run: ``OMP_NUM_THREADS=1 python -m benchmarks.co_clicks [FOLDER OF MOVIELENS]``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from models.co_clicks import CoClicks, CoClicksConfig
from models.events import Action
from models.hashing import hash64
from models.item_index import ItemIndex
from models.logs import open_log
from models.user_events import ACTION, UserEvent, UserStateConfig, user_event
from models.user_row import DIM, POSITIVE, RECENT, Rows, decode_rows, empty_rows, encode_rows, recent
from models.user_state import apply

START_MS = 1_700_000_000_000
ITEMS, USERS, BATCH, ROUNDS = 50_000, 20_000, 64, 100
YEAR_SECONDS = 365 * 86_400.0
SAMPLE, WIDTH, FIRST = 1_500, 200, 10
I32 = npt.NDArray[np.int32]


class NoVectors:
    """A source of vectors that knows none: pairs need none."""

    dim = DIM

    def by_hash(self, hashes: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        return np.zeros((len(hashes), DIM), np.float32), np.zeros(len(hashes), np.bool_)

    def by_short_hash(self, hashes: npt.NDArray[np.uint32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        return np.zeros((len(hashes), DIM), np.float32), np.zeros(len(hashes), np.bool_)


def applied(rows: Rows, events: list[UserEvent]) -> tuple[Rows, npt.NDArray[np.int8]]:
    return apply(rows, events, NoVectors(), UserStateConfig(), epoch=1, space_id=1, generation=1)


def microseconds(run: Callable[[], object], units: int) -> float:
    """Return the CPU time of one unit of ``run``."""
    started = time.process_time()
    run()
    return (time.process_time() - started) / units * 1e6


def costs() -> Iterator[str]:
    """Yield what learning, reading and filling take, over 50,000 items of which some are much in demand."""
    index, rng = ItemIndex(), np.random.default_rng(1)
    hashes = np.array([hash64(index.item_id(index.add(f"item-{i}"))) for i in range(ITEMS)], np.uint64)
    share = 1 / np.arange(1, ITEMS + 1) ** 0.8
    share /= share.sum()
    rows = empty_rows(USERS)
    rows["version"] = 1
    rows["recent"]["item"] = hashes[rng.choice(ITEMS, (USERS, RECENT), p=share)]
    rows["recent"]["action"] = POSITIVE | 1
    rows["recent"]["time_s"] = START_MS // 1000 - 600 * np.arange(RECENT)
    found = CoClicks(CoClicksConfig(), index)
    stored = encode_rows(rows)

    def fill() -> None:
        for begin in range(0, USERS, 100):
            found.learn(found.steps_of_rows(decode_rows(stored[begin : begin + 100])))

    def learn() -> None:
        for n in range(ROUNDS):
            users = rng.choice(USERS, BATCH, replace=False)
            items = hashes[rng.choice(ITEMS, BATCH, p=share)]
            events = [
                UserEvent(u, ACTION, n, START_MS + n, n * BATCH + u, 0, 0, items[u : u + 1], POSITIVE | 1, 1.0, 1.0)
                for u in range(BATCH)
            ]
            found.learn(found.steps_of(rows[users], events, np.zeros(BATCH, np.int8)))

    def read() -> None:
        for _ in range(ROUNDS):
            liked: I32 = rng.choice(ITEMS, (BATCH, RECENT), p=share).astype(np.int32)
            found.candidates(liked, START_MS, WIDTH)

    yield f"filling from full rows, 100 at once: {microseconds(fill, USERS):.0f} µs a row"
    yield f"learning, {BATCH} actions at once: {microseconds(learn, ROUNDS * BATCH):.0f} µs an action"
    yield f"reading, {BATCH} slates at once: {microseconds(read, ROUNDS * BATCH):.0f} µs a slate"
    yield f"memory: {found.nbytes / 1e6:.1f} MB for {ITEMS:,} items"


def films(folder: Path) -> str:
    """Return the recall of the next film rated 4 or more, from pairs and from popularity of a year's half-life."""
    config, index = UserStateConfig(), ItemIndex()
    log = [(e.time_ms, e.event) for e in open_log("movielens", folder).events() if isinstance(e.event, Action)]
    log = [(at_ms, e) for at_ms, e in log if user_event(e, 0, 0, at_ms, config, []).action & POSITIVE]
    rows_of = [index.add(event.item_id) for _, event in log]
    found = CoClicks(CoClicksConfig(half_life_seconds=YEAR_SECONDS), index)
    rng = np.random.default_rng(0)
    asked = set(rng.choice(np.arange(int(0.7 * len(log)), len(log)), SAMPLE, replace=False).tolist())
    popular, last_ms = np.zeros(len(index)), log[0][0]
    users: dict[str, Rows] = {}
    hits: dict[str, list[tuple[bool, bool]]] = {"co_click": [], "popular": []}
    for n, ((at_ms, event), row) in enumerate(zip(log, rows_of, strict=True)):
        before = users.get(event.user_id, empty_rows(1))
        held, _, _ = recent(before)
        liked = index.rows_by_hash(held.ravel().tolist(), held.size).reshape(held.shape)
        if n in asked and (liked >= 0).any():
            seen = set(liked[0].tolist())
            both = found.candidates(liked, at_ms, WIDTH + RECENT)[0], np.argsort(-popular, kind="stable")
            for name, ranked in zip(hits, both, strict=True):
                left = [item for item in ranked[: WIDTH + RECENT].tolist() if item not in seen][:WIDTH]
                hits[name].append((row in left, row in left[:FIRST]))
        popular *= 2 ** (-(at_ms - last_ms) / 1000 / YEAR_SECONDS)
        popular[row] += 1
        last_ms = at_ms
        step = [user_event(event, 0, n, at_ms, config, [])]
        users[event.user_id], outcomes = applied(before, step)
        found.learn(found.steps_of(before, step, outcomes))
    told = (
        f"{name} {np.mean(held, axis=0)[0]:.3f} (first {FIRST}: {np.mean(held, axis=0)[1]:.3f})"
        for name, held in hits.items()
    )
    return f"MovieLens, recall@{WIDTH} of the next film rated 4 or more: " + ", ".join(told)


def main() -> None:
    """Print the figures."""
    for line in costs():
        print(line)
    for folder in sys.argv[1:]:
        print(films(Path(folder)))


if __name__ == "__main__":
    main()

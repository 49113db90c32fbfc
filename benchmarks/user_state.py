"""CPU time of the user row's update, on one core: ``python benchmarks/user_state.py``."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from models.events import Action, ImpressedItem, Impression
from models.hashing import hash64, short_hash
from models.user_row import decode_rows, encode_rows
from models.user_state import UserEvent, UserStateConfig, apply, user_event, user_vectors

ITEMS = 50_000
USERS = 200
BATCH = 256
BATCHES = 40
SLATE = 15
EVENT_GAP_MS = 500


class Catalogue:
    """Random unit vectors of ITEMS items, found through dictionaries, as in a worker."""

    dim = 64

    def __init__(self, rng: np.random.Generator) -> None:
        made = rng.standard_normal((ITEMS, self.dim)).astype(np.float32)
        self._vectors = made / np.linalg.norm(made, axis=1, keepdims=True)
        self._full = {hash64(f"item-{i}"): i for i in range(ITEMS)}
        self._short = {short_hash(h): i for h, i in self._full.items()}

    def by_hash(self, hashes: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        return self._find(self._full, hashes.tolist())

    def by_short_hash(self, hashes: npt.NDArray[np.uint32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        return self._find(self._short, hashes.tolist())

    def _find(self, table: dict[int, int], hashes: list[int]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        rows = np.fromiter((table.get(h, -1) for h in hashes), np.intp, len(hashes))
        return self._vectors[rows], rows >= 0


def main() -> None:
    """Print µs/event of decode + hash + apply + encode, for each kind of batch."""
    rng = np.random.default_rng(7)
    catalogue, config = Catalogue(rng), UserStateConfig()
    state: list[bytes | None] = [None] * USERS
    clock = {"offset": 0, "time_ms": 1_700_000_000_000}
    shown: dict[int, list[int]] = {}

    def action(user: int, offset: int, time_ms: int) -> UserEvent:
        item = int(rng.choice(shown[user])) if user in shown and rng.random() < 0.7 else int(rng.integers(ITEMS))
        record = Action(event_id=f"e{offset}", event_time=0, user_id="u", item_id=f"item-{item}", action="click")
        return user_event(record, user, offset, time_ms, config, ())

    def impression(user: int, offset: int, time_ms: int) -> UserEvent:
        shown[user] = rng.integers(0, ITEMS, SLATE).tolist()
        items = [ImpressedItem(item_id=f"item-{i}") for i in shown[user]]
        record = Impression(event_id=f"e{offset}", event_time=0, user_id="u", request_id=f"r{offset}", items=items)
        return user_event(record, user, offset, time_ms, config, ())

    def either(user: int, offset: int, time_ms: int) -> UserEvent:
        return (action if rng.random() < 0.5 else impression)(user, offset, time_ms)

    def measure(name: str, make: Callable[[int, int, int], UserEvent], users: int = USERS) -> None:
        parts = np.zeros(3)
        for _ in range(BATCHES):
            events = []
            for user in rng.integers(0, users, BATCH).tolist():
                clock["offset"] += 1
                clock["time_ms"] += EVENT_GAP_MS
                events.append(make(user, clock["offset"], clock["time_ms"]))
            marks = [time.process_time()]
            rows = decode_rows(state)
            marks.append(time.process_time())
            rows, _ = apply(rows, events, catalogue, config, epoch=1, space_id=2, generation=1)
            marks.append(time.process_time())
            state[:] = encode_rows(rows)
            marks.append(time.process_time())
            parts += np.diff(marks)
        each_us = parts / (BATCHES * BATCH) * 1e6
        print(
            f"{name:<34} apply {each_us[1]:6.1f} µs/event = {1e6 / each_us[1]:>8,.0f} events/s; "
            f"decode {each_us[0]:.1f}, encode {each_us[2]:.1f} µs/event"
        )

    print(f"batches of {BATCH} over {USERS} users, {ITEMS:,} items")
    measure("actions", action)
    measure(f"impressions of {SLATE} items", impression)
    measure("half actions, half impressions", either)
    measure("actions, all of 4 users", action, 4)
    measure("impressions, all of 4 users", impression, 4)
    rows = decode_rows(state)
    started = time.process_time()
    for _ in range(100):
        user_vectors(rows, clock["time_ms"], config)
    print(f"user_vectors {(time.process_time() - started) / 100 / USERS * 1e6:.1f} µs/user")
    sizes = [len(v or b"") for v in state]
    print(f"stored row: mean {np.mean(sizes):.0f}, most {max(sizes)} bytes")


if __name__ == "__main__":
    main()

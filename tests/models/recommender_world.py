"""A small world for tests of the recommender: real catalogue, counters, index and user rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from models.catalogue import Catalogue
from models.counters import CountersConfig, ItemCounters, TouchBatch
from models.events import Action, ActionName, Event, ImpressedItem, Impression, Item
from models.item_index import ItemIndex
from models.recommender import Recommender, RecommenderConfig, Slate, SlateRequest
from models.retrieval import VectorIndex
from models.user_state import UserReader, UserStateConfig, apply, empty_rows, user_event

DIM = 64
NOW_MS = 1_700_000_000_000
SPACE = 7


def unit_vector(*parts: float) -> npt.NDArray[np.float32]:
    """Return a vector [64] whose first numbers are ``parts``, scaled to norm 1."""
    vector = np.zeros(DIM, np.float32)
    vector[: len(parts)] = parts
    return vector / np.float32(np.linalg.norm(vector))


class World:
    """Items by name; events are applied to user rows and counters as a worker applies them."""

    def __init__(self, users: int = 1, config: RecommenderConfig | None = None) -> None:
        index = ItemIndex()
        self.catalogue = Catalogue(index, DIM)
        self.counters = ItemCounters(index, CountersConfig())
        self.counters.own(0)
        self.index = VectorIndex(DIM)
        self.state = UserStateConfig()
        reader = UserReader(self.state, self.catalogue, SPACE)
        self.recommender = Recommender(
            config or RecommenderConfig(), self.catalogue, self.counters, self.index, users=reader
        )
        self.rows = empty_rows(users)
        self._offset = 0

    def item(self, item_id: str, vector: npt.NDArray[np.float32] | None = None, **fields: Any) -> int:
        """Add or replace an item; return its row."""
        row = self.catalogue.upsert(Item(item_id=item_id, **fields))
        if vector is not None:
            self.catalogue.set_vector(row, vector)
            self.index.add(np.array([row], np.int32), self.catalogue.vectors[row : row + 1])
        return row

    def clusters(self, sizes: Mapping[str, int], seed: int = 0) -> None:
        """Add clusters of like items: ``a0``, ``a1``, … around one direction for each letter."""
        generator = np.random.default_rng(seed)
        for place, (name, size) in enumerate(sizes.items()):
            centre = np.eye(DIM, dtype=np.float32)[place]
            for i in range(size):
                noise = generator.normal(size=DIM).astype(np.float32) * 0.05
                self.item(f"{name}{i}", centre + noise, title=f"Title of {name}{i}")

    def send(self, event: Event, user: int = 0, at_ms: int = NOW_MS) -> None:
        """Apply one event to the row of ``user`` and to the counters."""
        self._offset += 1
        state_event = user_event(event, user, self._offset, at_ms, self.state, ["default"])
        self.rows, _ = apply(
            self.rows, [state_event], self.catalogue, self.state, epoch=1, space_id=SPACE, generation=1
        )
        batch = TouchBatch()
        batch.add_event(event, self._offset, at_ms, self.counters.config)
        self.counters.add(0, batch)

    def act(
        self,
        item_id: str,
        action: ActionName = "click",
        *,
        user: int = 0,
        at_ms: int = NOW_MS,
        value: float | None = None,
    ) -> None:
        """Apply an action of ``user``."""
        self.send(
            Action(
                event_id=f"event {self._offset}",
                event_time=at_ms,
                user_id=f"user {user}",
                item_id=item_id,
                action=action,
                value=value,
            ),
            user,
            at_ms,
        )

    def show(self, item_ids: Sequence[str], *, user: int = 0, at_ms: int = NOW_MS) -> None:
        """Apply an impression for ``user``."""
        self.send(
            Impression(
                event_id=f"event {self._offset}",
                event_time=at_ms,
                user_id=f"user {user}",
                items=[ImpressedItem(item_id) for item_id in item_ids],
            ),
            user,
            at_ms,
        )

    def popular(self, clicks: Mapping[str, int]) -> None:
        """Count clicks of other users on items, as the counters' own state."""
        batch = TouchBatch()
        for item_id, times in clicks.items():
            for i in range(times):
                self._offset += 1
                event = Action(
                    event_id=f"other {self._offset}",
                    event_time=NOW_MS,
                    user_id=f"other {i}",
                    item_id=item_id,
                    action="click",
                )
                batch.add_event(event, self._offset, NOW_MS, self.counters.config)
        self.counters.add(0, batch)

    def slate(self, *, now_ms: int = NOW_MS + 1_000, user: int = 0, **wishes: Any) -> Slate:
        """Return one slate for ``user``, with a fresh list of popular items."""
        self.recommender.refresh(now_ms)
        request = SlateRequest(f"user {user}", user, **wishes)
        return self.recommender.recommend(self.rows, [request], now_ms)[0]

    def ids(self, **wishes: Any) -> list[str]:
        """Return the item ids of one slate."""
        return [item.item_id for item in self.slate(**wishes).items]


def is_of(cluster: str, item_ids: Sequence[str]) -> int:
    """Return how many of the ids belong to a cluster."""
    return sum(item_id.startswith(cluster) for item_id in item_ids)

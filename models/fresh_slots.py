"""Fixed slots for new items: drawn by Thompson sampling, so that what nobody knows yet is shown, and honestly logged.

Legend of shapes: P = items of the pool, N = draws, B = requests, J = slots.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import compress
from typing import Final, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.candidates import places_of
from models.catalogue import Catalogue
from models.counter_events import CLICKS, IMPRESSIONS
from models.counters import ItemCounters
from models.events import MAX_K, ExplorationDraw
from models.exploration import U64, mixed
from models.newest import NewestFirst
from models.ranking import F32, I32, Bools

NOT_DRAWN: Final = -1
_KEPT_BYTES: Final = 4 << 20
"""Bytes of tables that a pool keeps, 2.5 KB each with two slots; beyond, it begins anew."""


class FreshSlots(BaseModel):
    """Which slots are kept for new items, and which items are new."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slots: tuple[int, ...] = Field(
        (), description="Positions, from 1, that are drawn from the fresh pool in slates that are retrieved; none: off."
    )
    pool_items: int = Field(30, ge=2, le=1_000, description="Items in the fresh pool at most: the newest.")
    max_age_seconds: float = Field(172_800.0, gt=0, description="An item published longer ago is not fresh.")
    max_impressions: int = Field(
        1_000, ge=1, description="An item that was shown this often is known well enough: not fresh."
    )
    draws: int = Field(
        500, ge=10, le=10_000, description="Draws that the propensity is counted from; logged with the slate."
    )
    prior_ctr: float = Field(0.05, gt=0, lt=1, description="Click rate that a new item is believed to have.")
    prior_strength: float = Field(20.0, gt=0, description="Impressions that this belief is worth.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if list(self.slots) != sorted(set(self.slots)) or any(not 1 <= slot <= MAX_K for slot in self.slots):
            raise ValueError(f"slots {list(self.slots)} must rise, from 1 to {MAX_K}")
        return self


@dataclass(frozen=True, slots=True)
class Table:
    """What the draws put into slots where the same may be shown: ``drawn`` int16 [N, ≤ J], places in the pool.

    ``chances`` float32 [≤ J, P]: the share of draws in which an item stands in a slot; ``ids``: of what may be drawn.
    """

    drawn: npt.NDArray[np.int16]
    chances: F32
    ids: list[str]


@dataclass(frozen=True, slots=True)
class FreshPool:
    """New items at one moment, and how ``draws`` draws of their click rates order them.

    ``rows`` int32 [P], and their ids; ``orders`` int16 [N, P]: places in ``rows``, the greatest drawn rate first.
    """

    rows: I32
    ids: list[str]
    orders: npt.NDArray[np.int16]
    _tables: dict[tuple[bytes, int], Table] = field(default_factory=dict)
    """By what is allowed and the number of slots: most users may be shown the whole pool."""

    @classmethod
    def build(
        cls,
        catalogue: Catalogue,
        counters: ItemCounters,
        config: FreshSlots,
        now_ms: int,
        newest: NewestFirst | None = None,
        refused: Callable[[I32], Bools] | None = None,
    ) -> Self:
        """Return the pool at ``now_ms``: the newest servable items that are known little, but those ``refused``.

        ``newest``: of this moment, where the caller has it. Each item's rate is drawn from Beta(a + clicks,
        b + impressions − clicks), with its exact counts and the prior a / (a + b) = prior_ctr, a + b = prior_strength
        (Thompson 1933; Chapelle and Li 2011, algorithm 2).
        """
        newest = newest or NewestFirst(catalogue, now_ms)
        oldest_ms = now_ms - config.max_age_seconds * 1000
        asked = 4 * config.pool_items
        while True:
            # Few are looked at: the newest do, as a rule, and a catalogue is long.
            looked_at = newest.first(asked)
            rows = looked_at[~refused(looked_at)] if refused is not None else looked_at
            published = catalogue.published_at_ms[rows]
            rows = rows[(published <= now_ms) & (published >= oldest_ms)]
            rows = rows[counters.totals(rows)[:, IMPRESSIONS] < config.max_impressions][: config.pool_items]
            if len(rows) == config.pool_items or len(looked_at) < asked or newest.published_ms(asked) < oldest_ms:
                break
            asked *= 4
        totals = counters.totals(rows)
        clicks = totals[:, CLICKS]
        a = config.prior_ctr * config.prior_strength + clicks
        b = (1 - config.prior_ctr) * config.prior_strength + np.maximum(totals[:, IMPRESSIONS] - clicks, 0)
        rates = np.random.default_rng(now_ms).beta(a, b, (config.draws, len(rows)))
        ids = [catalogue.index.item_id(row) for row in rows.tolist()]
        return cls(rows, ids, np.argsort(-rates, axis=1, kind="stable").astype(np.int16))

    @classmethod
    def empty(cls) -> Self:
        """Return a pool without items."""
        return cls(np.zeros(0, np.int32), [], np.zeros((0, 0), np.int16))

    def table(self, allowed: Bools, slots: int) -> Table:
        """Return what each of the N draws puts into the first ``slots`` slots.

        ``allowed`` bool [P]: what may be shown. The j-th slot gets the allowed item with the j-th greatest rate.
        """
        key = allowed.tobytes(), slots
        table = self._tables.get(key)
        if table is None:
            each = slots * (self.orders.itemsize * len(self.orders) + 4 * len(self.rows)) + 8 * len(self.rows)
            if len(self._tables) * each >= _KEPT_BYTES:
                self._tables.clear()
            table = self._tables[key] = self._made(allowed, slots)
        return table

    def _made(self, allowed: Bools, slots: int) -> Table:
        slots = min(slots, int(np.count_nonzero(allowed)))
        here = allowed.take(self.orders)
        begins = np.arange(len(here)) * here.shape[1]
        drawn = np.empty((len(here), slots), np.int16)
        chances = np.empty((slots, len(self.rows)), np.float32)
        for j in range(slots):
            at = begins + here.argmax(axis=1)
            own = self.orders.take(at)
            drawn[:, j] = own
            here.reshape(-1)[at] = False
            chances[j] = np.bincount(own, minlength=len(self.rows)) / len(drawn)
        return Table(drawn, chances, list(compress(self.ids, allowed.tolist())))

    def draw(self, seeds: U64, table: Table) -> tuple[I32, F32]:
        """Return the rows drawn for the slots of each request, int32 [n, ≤ J], and their propensities.

        A seed, uint64 [n], picks one of the N draws, each as likely, so P(item i in slot j) is the share of the N draws
        in which i is the j-th of the allowed ones. No estimate of another probability: given the N draws, this is the
        probability with which the item was chosen, and it is never 0.
        """
        mine = table.drawn.take((mixed(seeds) % np.uint64(len(table.drawn))).astype(np.intp), axis=0)
        return self.rows.take(mine), table.chances[np.arange(mine.shape[1]), mine]


@dataclass(slots=True)
class Drawn:
    """What was drawn for the requests of a batch: rows int32 [B, J], -1 for none, and propensities float32 [B, J]."""

    rows: I32
    propensities: F32
    pool: list[list[str]]
    """Of each request: ids of the items that could have been drawn."""
    config: FreshSlots

    def log(self, b: int) -> ExplorationDraw | None:
        """Return what a slate says of its draw; None where nothing was drawn."""
        if not np.count_nonzero(self.rows[b] >= 0):
            return None
        return ExplorationDraw(pool=self.pool[b], draws=self.config.draws)


def draw_slots(
    pool: FreshPool, config: FreshSlots, seeds: list[int | None], allowed: Bools, ks: list[int]
) -> Drawn | None:
    """Draw for each request of a batch; None where nothing can be drawn for any.

    ``seeds`` [B]: None draws nothing; ``allowed`` bool [B, P]; ``ks`` [B]: lengths of the slates.
    """
    if not len(pool.rows) or all(seed is None for seed in seeds):
        return None
    shape = len(seeds), len(config.slots)
    drawn = Drawn(np.full(shape, NOT_DRAWN, np.int32), np.full(shape, np.nan, np.float32), [[] for _ in seeds], config)
    # Most users may be shown the whole pool: one table does for all of them.
    alike: dict[tuple[bytes, int], list[int]] = {}
    for b, seed in enumerate(seeds):
        slots = bisect_right(config.slots, ks[b])
        if seed is not None and slots:
            alike.setdefault((allowed[b].tobytes(), slots), []).append(b)
    for (_, slots), members in alike.items():
        table = pool.table(allowed[members[0]], slots)
        rows, chances = pool.draw(np.array([seeds[b] for b in members], np.uint64), table)
        at = np.array(members)
        drawn.rows[at, : rows.shape[1]] = rows
        drawn.propensities[at, : rows.shape[1]] = chances
        for b in members:
            drawn.pool[b] = table.ids
    return drawn


def place(
    drawn: Drawn,
    pool_rows: I32,
    columns: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    ks: npt.NDArray[np.int64],
    propensities: F32,
) -> None:
    """Put what was drawn into its slots of the slates' columns [B, K], in place; all else moves down.

    An item that ranking chose too stands in its drawn slot alone. ``propensities`` [B, K] get those of the slots.
    Where a slate ends before a slot, the item stands at its end.
    """
    at, there = places_of(pool_rows, drawn.rows)
    begun, ends = counts.tolist(), ks.tolist()
    for b, (places, found) in enumerate(zip(at.tolist(), there.tolist(), strict=True)):
        taken = list(compress(places, found))
        if not taken:
            continue
        slate = [column for column in columns[b, : begun[b]].tolist() if column not in taken]
        chances = [math.nan] * len(slate)
        # Slots rise: what is put in later moves nothing that was put in before.
        for slot, column, chance in compress(
            zip(drawn.config.slots, places, drawn.propensities[b].tolist(), strict=True), found
        ):
            slate.insert(slot - 1, column)
            chances.insert(slot - 1, chance)
        # Ranked items give way at the end, drawn ones do not: their slots lie within the slate.
        n = counts[b] = min(len(slate), ends[b], columns.shape[1])
        columns[b, :n], propensities[b, :n] = slate[:n], chances[:n]

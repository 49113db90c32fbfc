"""Fixed slots for new items: drawn by Thompson sampling, so that what nobody knows yet is shown, and honestly logged.

Legend of shapes: P = items of the pool, N = draws, B = requests, J = slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.catalogue import Catalogue
from models.counter_events import CLICKS, IMPRESSIONS
from models.counters import ItemCounters
from models.events import MAX_K, ExplorationDraw
from models.exploration import mixed
from models.ranking import F32, I32, Bools

NOT_DRAWN: Final = -1


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
class FreshPool:
    """New items at one moment, and how ``draws`` draws of their click rates order them.

    ``rows`` int32 [P]; ``orders`` int16 [N, P]: places in ``rows``, the greatest drawn rate first.
    """

    rows: I32
    orders: npt.NDArray[np.int16]

    @classmethod
    def build(cls, catalogue: Catalogue, counters: ItemCounters, rows: I32, config: FreshSlots, now_ms: int) -> Self:
        """Return the pool at ``now_ms`` out of servable rows, int32 [n].

        Each item's rate is drawn from Beta(a + clicks, b + impressions − clicks), with its exact counts and the
        prior a / (a + b) = prior_ctr, a + b = prior_strength (Thompson 1933; Chapelle and Li 2011, algorithm 2).
        """
        published = catalogue.published_at_ms[rows]
        young = (published <= now_ms) & (now_ms - published <= config.max_age_seconds * 1000)
        rows, published = rows[young], published[young]
        totals = counters.totals(rows)
        little = totals[:, IMPRESSIONS] < config.max_impressions
        rows, published, totals = rows[little], published[little], totals[little]
        newest = np.lexsort((rows, -published))[: config.pool_items]
        rows, totals = rows[newest], totals[newest]
        clicks = totals[:, CLICKS]
        a = config.prior_ctr * config.prior_strength + clicks
        b = (1 - config.prior_ctr) * config.prior_strength + np.maximum(totals[:, IMPRESSIONS] - clicks, 0)
        rates = np.random.default_rng(now_ms).beta(a, b, (config.draws, len(rows)))
        return cls(rows, np.argsort(-rates, axis=1, kind="stable").astype(np.int16))

    def tables(self, allowed: Bools, slots: int) -> npt.NDArray[np.int16]:
        """Return what each of the N draws puts into the first ``slots`` slots, int16 [N, ≤ J]: places in ``rows``.

        ``allowed`` bool [P]: what may be shown. The j-th slot gets the allowed item with the j-th greatest rate.
        """
        slots = min(slots, int(allowed.sum()))
        here = allowed[self.orders]
        place = np.cumsum(here, axis=1, dtype=np.int16)
        drawn = np.empty((len(self.orders), slots), np.int16)
        for j in range(slots):
            column = (here & (place == j + 1)).argmax(axis=1)
            drawn[:, j] = np.take_along_axis(self.orders, column[:, None], axis=1)[:, 0]
        return drawn

    def draw(self, seed: int, tables: npt.NDArray[np.int16]) -> tuple[I32, F32]:
        """Return the rows drawn for the slots of one request, int32 [≤ J], and their propensities.

        ``seed`` picks one of the N draws, each as likely, so P(item i in slot j) is the share of the N draws in which
        i is the j-th of the allowed ones. No estimate of another probability: given the N draws, this is the
        probability with which the item was chosen, and it is never 0.
        """
        mine = tables[int(mixed(np.array([seed], np.uint64))[0] % np.uint64(len(tables)))]
        return self.rows[mine], (tables == mine).mean(axis=0).astype(np.float32)


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
        if not (self.rows[b] >= 0).any():
            return None
        return ExplorationDraw(pool=self.pool[b], draws=self.config.draws)


def draw_slots(
    pool: FreshPool, config: FreshSlots, seeds: list[int | None], allowed: Bools, ids: list[str], ks: list[int]
) -> Drawn | None:
    """Draw for each request of a batch; None where nothing can be drawn for any.

    ``seeds`` [B]: None draws nothing; ``allowed`` bool [B, P]; ``ids`` [P]: of the pool's items; ``ks`` [B]: lengths
    of the slates.
    """
    if not len(pool.rows) or all(seed is None for seed in seeds):
        return None
    shape = len(seeds), len(config.slots)
    drawn = Drawn(np.full(shape, NOT_DRAWN, np.int32), np.full(shape, np.nan, np.float32), [[] for _ in seeds], config)
    known: dict[tuple[bytes, int], npt.NDArray[np.int16]] = {}
    for b, seed in enumerate(seeds):
        slots = sum(slot <= ks[b] for slot in config.slots)
        if seed is None or not slots:
            continue
        # Most users may be shown the whole pool: one table does for all of them.
        key = allowed[b].tobytes(), slots
        if key not in known:
            known[key] = pool.tables(allowed[b], slots)
        rows, chances = pool.draw(seed, known[key])
        drawn.rows[b, : len(rows)] = rows
        drawn.propensities[b, : len(rows)] = chances
        drawn.pool[b] = [item_id for item_id, may in zip(ids, allowed[b].tolist(), strict=True) if may]
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
    for b, rows in enumerate(drawn.rows.tolist()):
        at = [int(np.flatnonzero(pool_rows[b] == row)[0]) for row in rows if row >= 0]
        if not at:
            continue
        rest = [column for column in columns[b, : counts[b]].tolist() if column not in at]
        slate, chances = list(rest), [float("nan")] * len(rest)
        for slot, column, chance in zip(drawn.config.slots, at, drawn.propensities[b].tolist(), strict=False):
            slate.insert(slot - 1, column)
            chances.insert(slot - 1, chance)
        k = min(int(ks[b]), columns.shape[1])
        # Ranked items give way at the end, drawn ones do not: their slots lie within the slate.
        columns[b, : min(k, len(slate))] = slate[:k]
        propensities[b, : min(k, len(slate))] = chances[:k]
        counts[b] = min(k, len(slate))

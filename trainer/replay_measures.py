"""How well impressions of a replay were ranked: measures with intervals by user, over all of them and by slice.

Axes: I impressions, K items of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from models.evaluation import (
    Interval,
    auc_per_impression,
    bootstrap_mean,
    expected_calibration_error,
    log_loss,
    ndcg_per_impression,
    reciprocal_rank_per_impression,
)
from models.log_odds import probability

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

RESAMPLES: Final = 1_000
TOP: Final = 5


@dataclass(frozen=True, slots=True)
class Slice:
    """What of the ranking a part of the impressions has; NaN where it has none."""

    impressions: int
    auc: Interval
    ndcg_10: float


@dataclass(frozen=True, slots=True)
class Measures:
    """Of one mode at one delay. Means are over impressions with a clicked and an unclicked item."""

    impressions: int
    """Those: the others have no order that could be right or wrong."""
    auc: Interval
    mrr: float
    ndcg_5: float
    ndcg_10: float
    clicks_in_top_5: float
    """Share of the clicks that the first five places of our order hold."""
    log_loss: float
    ece: float
    slices: dict[str, Slice]


@dataclass(frozen=True, slots=True)
class Ranked:
    """Scored impressions: log-odds and labels, [I] of [K] each, and their users [I]."""

    log_odds: Sequence[F32]
    labels: Sequence[F32]
    users: Sequence[str]

    def aucs(self) -> F64:
        """Return the AUC of each impression, float64 [I]; NaN without a clicked or without an unclicked item."""
        scores, labels, groups = self._flat()
        return auc_per_impression(scores, labels, groups)

    def measures(self, slices: Mapping[str, Bools], unclicked_weight: float, seed: int) -> Measures:
        """Return all measures; ``slices``: bool [I] by name. Unclicked items weigh so much in log loss and error."""
        scores, labels, groups = self._flat()
        aucs, users = self.aucs(), np.array(self.users)
        counts = ~np.isnan(aucs)
        ndcg_10 = _padded(ndcg_per_impression(scores, labels, groups, 10), len(aucs))
        weights = np.where(labels > 0, 1.0, unclicked_weight)
        chances = probability(scores)

        def mean(values: F64, chosen: Bools = counts) -> float:
            values = _padded(values, len(aucs))
            return float(values[chosen & counts].mean()) if (chosen & counts).any() else float("nan")

        by_slice = {
            name: Slice(
                impressions=int((chosen & counts).sum()),
                auc=_interval(aucs[chosen], users[chosen], seed),
                ndcg_10=mean(ndcg_10, chosen),
            )
            for name, chosen in slices.items()
        }
        return Measures(
            impressions=int(counts.sum()),
            auc=_interval(aucs, users, seed),
            mrr=mean(reciprocal_rank_per_impression(scores, labels, groups)),
            ndcg_5=mean(ndcg_per_impression(scores, labels, groups, 5)),
            ndcg_10=mean(ndcg_10),
            clicks_in_top_5=mean(_share_in_top(scores, labels, groups)),
            log_loss=log_loss(chances, labels, weights),
            ece=expected_calibration_error(chances, labels, weights=weights),
            slices=by_slice,
        )

    def _flat(self) -> tuple[F32, F32, I64]:
        sizes = [len(values) for values in self.labels]
        empty = np.zeros(0, np.float32)
        scores, labels = np.concatenate([empty, *self.log_odds]), np.concatenate([empty, *self.labels])
        return scores, labels, np.repeat(np.arange(len(sizes)), sizes)


def difference(aucs: F64, base: F64, users: Sequence[str], seed: int) -> Interval:
    """Return the mean difference of two models' AUCs [I] on the same impressions, its interval by user [I]."""
    return _interval(aucs - base, np.array(users), seed)


def _interval(values: F64, users: npt.NDArray[np.str_], seed: int) -> Interval:
    return bootstrap_mean(values, users, resamples=RESAMPLES, seed=seed)


def _share_in_top(scores: F32, labels: F32, groups: I64) -> F64:
    """Return the share of each impression's clicked items among its first TOP; of equal scores the clicked last."""
    order = np.lexsort((labels, -scores.astype(np.float64), groups))
    y, g = labels[order].astype(np.float64), groups[order]
    total = int(g.max(initial=-1)) + 1
    rank = np.arange(len(g)) - np.searchsorted(g, np.arange(total))[g]
    clicked = np.bincount(g, y, total)
    found = np.full(total, np.nan)
    np.divide(np.bincount(g, y * (rank < TOP), total), clicked, out=found, where=clicked > 0)
    return found


def _padded(values: F64, size: int) -> F64:
    """Return the values with NaN for impressions without items at the end."""
    padded: F64 = np.r_[values, np.full(size - len(values), np.nan)]
    return padded

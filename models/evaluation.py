"""Measures of rankings, probabilities and slates, with intervals that respect users.

Impressed items come flat: one entry for each item shown, [n], with the number of its impression 0 … I − 1, [n].
Labels are 0 or 1. Nothing here draws without a seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

PROBABILITY_EDGE: Final = 1e-7
"""Predictions are kept this far from 0 and 1 in log loss, so that one wrong certainty is not infinite."""
_CELLS_AT_ONCE: Final = 4_000_000


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


def auc_per_impression(scores: npt.ArrayLike, labels: npt.ArrayLike, impressions: npt.ArrayLike) -> F64:
    """Return the AUC of each impression, float64 [I]; NaN where all its labels are alike.

    The Mann-Whitney form: the share of (clicked, not clicked) pairs in the right order, ties counting one half.
    """
    s, y, g = _flat(scores, labels, impressions)
    total = _groups(g)
    order = np.lexsort((s, g))
    s, y, g = s[order], y[order], g[order]
    place = np.arange(len(s)) - np.searchsorted(g, np.arange(total))[g] + 1.0
    tie = np.cumsum(np.r_[True, (s[1:] != s[:-1]) | (g[1:] != g[:-1])][: len(s)]) - 1
    rank = (np.bincount(tie, place) / np.maximum(np.bincount(tie), 1))[tie]
    positive = _sums(g, y, total)
    negative = _sums(g, 1.0 - y, total)
    wins = _sums(g, rank * y, total) - positive * (positive + 1) / 2
    return _ratio(wins, positive * negative)


def reciprocal_rank_per_impression(scores: npt.ArrayLike, labels: npt.ArrayLike, impressions: npt.ArrayLike) -> F64:
    """Return Σ y/rank ÷ Σ y of each impression (MIND's MRR), float64 [I]; NaN where nothing was clicked.

    Among equal scores the clicked items come last: a constant score earns nothing by luck of the order.
    """
    y, g, rank, total = _ranked(scores, labels, impressions)
    return _ratio(_sums(g, y / rank, total), _sums(g, y, total))


def ndcg_per_impression(scores: npt.ArrayLike, labels: npt.ArrayLike, impressions: npt.ArrayLike, k: int) -> F64:
    """Return nDCG@k with binary gains of each impression, float64 [I]; NaN where nothing was clicked.

    DCG = Σ y/log2(rank + 1) over ranks ≤ k (Järvelin and Kekäläinen 2002). Among equal scores the clicked come last.
    """
    y, g, rank, total = _ranked(scores, labels, impressions)
    gain = np.where(rank <= k, y / np.log2(rank + 1), 0.0)
    positive = _sums(g, y, total).astype(np.int64)
    ideal = np.r_[0.0, np.cumsum(1 / np.log2(np.arange(1, k + 1) + 1.0))]
    return _ratio(_sums(g, gain, total), ideal[np.minimum(positive, k)])


def log_loss(predictions: npt.ArrayLike, labels: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Return the mean binary cross-entropy in nats, weighted if weights are given; NaN for no predictions."""
    p = np.clip(np.asarray(predictions, np.float64), PROBABILITY_EDGE, 1 - PROBABILITY_EDGE)
    y = np.asarray(labels, np.float64)
    w = None if weights is None else np.asarray(weights, np.float64)
    return float(np.average(-(y * np.log(p) + (1 - y) * np.log1p(-p)), weights=w)) if p.size else float("nan")


def expected_calibration_error(
    predictions: npt.ArrayLike, labels: npt.ArrayLike, bins: int = 15, weights: npt.ArrayLike | None = None
) -> float:
    """Return Σ_bins share · |mean label − mean prediction|, over bins of equal counts; NaN for no predictions.

    Equal counts (Nguyen and O'Connor 2015), not equal widths: click-through rates crowd near 0, where bins of
    equal width would put all of them in one. Equal predictions share a bin. Weights, if given, weigh the means.
    """
    p, y = np.asarray(predictions, np.float64), np.asarray(labels, np.float64)
    if not p.size:
        return float("nan")
    order = np.argsort(p, kind="stable")
    p, y = p[order], y[order]
    first_of_equals = np.searchsorted(p, p)
    place = first_of_equals * bins // len(p)
    w = np.ones_like(p) if weights is None else np.asarray(weights, np.float64)[order]
    gap = np.abs(np.bincount(place, w * y) - np.bincount(place, w * p))
    return float(gap.sum() / w.sum())


def coverage(shown: npt.ArrayLike, catalogue_size: int) -> float:
    """Return the share of the catalogue that appears among the shown rows [n]; 0 for an empty catalogue."""
    return len(np.unique(np.asarray(shown))) / catalogue_size if catalogue_size else 0.0


def gini(exposures: npt.ArrayLike) -> float:
    """Return the Gini coefficient of how often each item was shown [items]: 0 all alike, towards 1 one item only.

    G = Σ_i (2i − n − 1)·x_i ÷ (n·Σ x) with x ascending. 0 where nothing was shown.
    """
    x = np.sort(np.asarray(exposures, np.float64))
    n, total = len(x), x.sum()
    if not n or total <= 0:
        return 0.0
    return float(((2 * np.arange(1, n + 1) - n - 1) * x).sum() / (n * total))


def bootstrap_mean(
    values: npt.ArrayLike, users: npt.ArrayLike, *, resamples: int = 2_000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Return the mean of values [I] with a percentile bootstrap interval, resampling whole users [I].

    Impressions of one user are alike, so they are drawn together (cluster bootstrap, Davison and Hinkley 1997,
    section 3.8). NaN values are left out. For two models on the same impressions, pass the differences of their
    values: that is the paired test.
    """
    v, u = np.asarray(values, np.float64), np.asarray(users)
    if v.shape != u.shape:
        raise ValueError(f"{v.shape} values for {u.shape} users; give one user for each value")
    kept = ~np.isnan(v)
    v, u = v[kept], u[kept]
    if not len(v):
        return Interval(float("nan"), float("nan"), float("nan"))
    _, cluster = np.unique(u, return_inverse=True)
    sums, counts = np.bincount(cluster, v), np.bincount(cluster).astype(np.float64)
    clusters = len(sums)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _CELLS_AT_ONCE // clusters)
    for start in range(0, resamples, step):
        drawn = generator.integers(0, clusters, (min(step, resamples - start), clusters))
        means[start : start + step] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    edge = (1 - confidence) / 2
    low, high = np.quantile(means, [edge, 1 - edge])
    return Interval(float(v.mean()), float(low), float(high))


def _flat(scores: npt.ArrayLike, labels: npt.ArrayLike, impressions: npt.ArrayLike) -> tuple[F64, F64, I64]:
    s = np.asarray(scores, np.float64)
    y = np.asarray(labels, np.float64)
    g = np.asarray(impressions, np.int64)
    if not s.shape == y.shape == g.shape or s.ndim != 1:
        raise ValueError(f"scores {s.shape}, labels {y.shape} and impressions {g.shape} must be flat and of one length")
    if np.isnan(s).any():
        raise ValueError("a score is not a number; a ranking cannot be measured")
    return s, y, g


def _groups(g: I64) -> int:
    return int(g.max(initial=-1)) + 1


def _ranked(scores: npt.ArrayLike, labels: npt.ArrayLike, impressions: npt.ArrayLike) -> tuple[F64, I64, F64, int]:
    """Return labels, impressions and ranks from 1, sorted by impression and falling score, and the number I."""
    s, y, g = _flat(scores, labels, impressions)
    total = _groups(g)
    order = np.lexsort((y, -s, g))
    y, g = y[order], g[order]
    rank: F64 = np.arange(len(y), dtype=np.float64) - np.searchsorted(g, np.arange(total))[g] + 1
    return y, g, rank, total


def _sums(g: I64, values: F64, total: int) -> F64:
    """Return the sum of values [n] of each impression, float64 [total]."""
    return np.bincount(g, values, total).astype(np.float64, copy=False)


def _ratio(above: F64, below: F64) -> F64:
    found = np.full(len(above), np.nan)
    np.divide(above, below, out=found, where=below > 0)
    return found

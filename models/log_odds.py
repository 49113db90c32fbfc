"""From raw state to log-odds: what a model version says of items, for slates, shadow scores and the gate alike.

Axes: S slates, C items of a slate (padded), R recent items, as in models/features.py.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from models.catalogue import SpaceVectors
from models.counter_events import CLICKS, IMPRESSIONS
from models.ctr import CtrScorer
from models.errors import ModelError
from models.features import FeatureConfig, RawSlates, encode
from models.ranking import F32, I32, LONG_TERM, Bools, RankingConfig, clip_ctr

PART_ITEMS: Final = 4_096
"""Items that are encoded and scored at once."""
SHOWN_NOW: Final = 0
"""Half-life of the counters that tells what is being shown now: the shortest."""
LEAST_EXPOSURE: Final = 0.1
"""Impressions that every item has besides: where next to nothing was shown lately, all count alike."""
UNPROVEN_ODDS: Final = 0.3
"""Odds of an item of which the model is not believed, in those of the hand-set score: others did not show it."""
_LEAST: Final = float(np.finfo(np.float64).tiny)
HALF_LIFE: Final = 1
"""Half-life of the counters that the hand-set score reads: RecommenderConfig's own default."""


def learned_log_odds(
    scorer: CtrScorer,
    features: FeatureConfig,
    vectors: SpaceVectors,
    raw: RawSlates,
    item_rows: I32,
    recent_rows: I32,
    attention: F32 | None = None,
    item_vectors: F32 | None = None,
    x: F32 | None = None,
) -> F32:
    """Return the calibrated log-odds of a CTR model at the reference position, float32 [S, C]; 0 where not valid.

    ``item_rows`` int32 [S, C] and ``recent_rows`` int32 [S, R]: rows of the items in ``vectors``, -1 for none.
    ``attention`` float32 [S, C, R] is filled with what the model looked at. ``item_vectors`` float32 [S, C, D]: of the
    items, and ``x`` float32 [S, C, F]: the columns of ``raw``, where the caller has them. Raises ModelError where a
    score is not finite.
    """
    log_odds = np.empty(raw.valid.shape, np.float32)
    # In parts whose numbers stay in the processor's cache: a quarter faster than a large batch at once.
    step = max(1, PART_ITEMS // max(1, raw.valid.shape[1]))
    for start in range(0, len(log_odds), step):
        at = slice(start, start + step)
        part = raw if step >= len(log_odds) else raw.take(at)
        items = item_vectors[at] if item_vectors is not None else vectors.of(item_rows[at])[0]
        recents, known = vectors.of(recent_rows[at])
        known &= part.recent_codes != 0
        columns = x[at] if x is not None else encode(part, features)
        logits, weights = scorer.logits(columns, items, recents, known, part.recent_age_seconds, part.recent_codes)
        if attention is not None:
            attention[at] = weights
        log_odds[at] = scorer.log_odds(logits)
    _clear(log_odds, raw.valid)
    finite = np.count_nonzero(np.isfinite(log_odds))
    if finite < log_odds.size:
        raise ModelError(
            f"the CTR model gave {log_odds.size - finite} scores that are not finite: no slate was made "
            "of them; roll back to the previous version"
        )
    return log_odds


def trusted_log_odds(log_odds: F32, raw: RawSlates, ranking: RankingConfig, priors: FeatureConfig | None = None) -> F32:
    """Return what candidates are ordered by: a model's log-odds as far as it is believed, float32 [S, C].

    A model that learned the order of what was shown extrapolates to what was not. With n impressions at the shortest
    half-life, n' = n + 0.1, and m the mean of n over the slate, weighted by n itself (what an impression shows):
    w = n' / (n' + κ·m), odds = w · learned odds + (1 − w) · 0.3 · hand-set odds. Exposure is the gate between two
    experts (Jacobs et al. 1991, Adaptive mixtures of local experts); doubt counts against an item (Jeunen and Goethals
    2021, Pessimistic reward models for off-policy learning in recommendation). Dividing by m makes w the same at any
    traffic. ``priors``: of the model, so that both experts speak of one level of CTR. The very same array where κ is 0;
    0 where not valid.
    """
    if not ranking.half_trust_exposure or not log_odds.size:
        return log_odds
    # In float64, so that neither padding nor the order of the items moves a score by as much as is told apart.
    shown = raw.counters[:, :, SHOWN_NOW, IMPRESSIONS].astype(np.float64)
    np.expm1(shown, out=shown)
    _clear(shown, raw.valid)
    total = np.add.reduce(shown, axis=1, keepdims=True)
    usual = np.add.reduce(shown * shown, axis=1, keepdims=True) / np.where(total > 0, total, 1.0)
    half = ranking.half_trust_exposure * usual
    exposure = shown + LEAST_EXPOSURE
    believed = exposure / (exposure + half)
    doubt = np.log(np.maximum(UNPROVEN_ODDS * (1 - believed), _LEAST))
    mixed = np.logaddexp(log_odds + np.log(believed), hand_set_log_odds(raw, ranking, priors) + doubt)
    trusted: F32 = mixed.astype(np.float32)
    _clear(trusted, raw.valid)
    return trusted


def hand_set_log_odds(raw: RawSlates, ranking: RankingConfig, priors: FeatureConfig | None = None) -> F32:
    """Return the hand-set score of the bootstrap as log-odds, float32 [S, C]; 0 where not valid.

    The order is that of models.ranking.score from the same raw state (popularity: the logarithm of decayed clicks
    against the most clicked item of the slate). The level is that of the slate's mean smoothed CTR m:
    log-odds = logit(m) + score − mean score. So its sigmoid is an estimate of a CTR, and a first candidate can be
    compared with it in AUC and in log loss.
    """
    priors = priors or FeatureConfig()
    counts = raw.counters[:, :, HALF_LIFE, : CLICKS + 1].transpose(2, 0, 1).astype(np.float32, order="C")
    np.expm1(counts, out=counts)
    clicks = counts[CLICKS]
    shown = np.maximum(counts[IMPRESSIONS], clicks)
    strength, prior = np.float32(priors.prior_strength), np.float32(priors.prior_ctr[HALF_LIFE])
    ctr = clip_ctr(np.asarray((clicks + strength * prior) / (shown + strength), np.float32))
    popularity = np.log1p(clicks)
    _clear(popularity, raw.valid)
    popularity /= np.maximum(np.maximum.reduce(popularity, axis=1, keepdims=True, initial=0), np.float32(1e-9))
    score: npt.NDArray[np.float32] = raw.sims.astype(np.float32) @ ranking.taste_weights()[: LONG_TERM + 1]
    score += np.float32(ranking.ctr_weight) * _logit(ctr)
    score += np.float32(ranking.popularity_weight) * popularity
    score -= np.float32(ranking.shown_penalty) * raw.shown_counts
    if np.count_nonzero(np.isfinite(score)) < score.size:
        np.nan_to_num(score, copy=False, nan=0.0, posinf=1e4, neginf=-1e4)
    _clear(score, raw.valid)
    _clear(ctr, raw.valid)
    items = np.maximum(np.add.reduce(raw.valid, axis=1, keepdims=True), 1).astype(np.float32)
    expected: F32 = np.add.reduce(ctr, axis=1, keepdims=True)
    level = expected / items
    score -= np.add.reduce(score, axis=1, keepdims=True) / items
    score += _logit(clip_ctr(level))
    _clear(score, raw.valid)
    return score


def _clear(values: F32 | npt.NDArray[np.float64], valid: Bools) -> None:
    """Set ``values`` [S, C] to 0 where not valid. Most often all are."""
    # Counting takes a fifth of the time of np.where, which would copy all values besides.
    if np.count_nonzero(valid) < valid.size:
        values[~valid] = 0


def probability(log_odds: F32) -> F32:
    """Return the probability that log-odds stand for, their sigmoid, same shape."""
    bounded = np.minimum(np.maximum(log_odds, np.float32(-80)), np.float32(80))
    return np.asarray(1 / (1 + np.exp(-bounded)), np.float32)


def _logit(p: F32) -> F32:
    return np.asarray(np.log(p / (1 - p)), np.float32)

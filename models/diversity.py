"""From scores to a slate that is not all alike: less of what is popular anyway, less of the same, few of a category.

Axes as in models/ranking.py. Each strength is off at 0, and then nothing here is called.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from models.columns import at_columns
from models.ranking import F32, I32, SCORE_STEPS, UNWANTED_PENALTY, Bools, top_k

LEAST_COMPARED: Final = 100
"""Candidates that maximal marginal relevance chooses from at least, the best by score; twice the slate if more."""
_OVER_LIMIT: Final = 4.0
"""More than any two values of maximal marginal relevance differ: what is over its category's maximum comes last."""


class DiversityConfig(BaseModel):
    """How much a slate gives up for what it would not show otherwise; each is off at 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    popularity_debias: float = Field(
        0.0,
        ge=0,
        le=10,
        description="Taken from the score for each unit of ln(1 + decayed clicks): 1 takes from the odds what is in "
        "proportion to popularity. 0: off.",
    )
    sameness: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Weight of likeness to what stands above in the slate, against the score (maximal marginal "
        "relevance): 0 is off, 1 looks at likeness alone.",
    )
    max_per_category: int = Field(
        0,
        ge=0,
        description="Most items of one category (an item's first) in a slate, as long as there are candidates of "
        "others to fill it. 0: off.",
    )

    @property
    def reorders(self) -> bool:
        """Whether the slate is chosen item by item."""
        return self.sameness > 0 or self.max_per_category > 0


def debiased(scores: F32, clicks: F32, config: DiversityConfig) -> F32:
    """Return scores [B, C] less what popularity alone gives; ``clicks`` float32 [B, C], decayed.

    score − τ·ln(1 + clicks): logit adjustment after training (Menon et al. 2021, section 4.1), with an item's share
    of clicks for the prior of its class; constants of a slate drop out.
    """
    popularity = np.log1p(np.maximum(clicks, 0))
    return np.asarray(scores - np.float32(config.popularity_debias) * popularity, np.float32)


def diverse(
    scores: F32,
    rows: I32,
    valid: Bools,
    vectors: F32,
    categories: I32,
    ks: npt.NDArray[np.int64],
    config: DiversityConfig,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the columns of each request's slate, best first, int64 [B, K], and how many count [B]; as ``top_k``.

    Greedy: the next item is the one with the greatest (1 − λ)·relevance − λ·max cosine to those chosen (Carbonell and
    Goldstein 1998, equation 1, with λ for their 1 − λ), relevance being the score scaled to 0 … 1 over the compared
    candidates. ``vectors`` float32 [B, C, D] of unit norm or zero; ``categories`` int32 [B, C], 0 = none: never over
    a maximum. ``ks`` int64 [B].
    """
    batch, width = rows.shape
    k = int(min(np.maximum.reduce(ks, initial=0), width))
    order, counts = top_k(scores, rows, valid, width)
    compared = np.minimum(counts, width if config.max_per_category else np.maximum(LEAST_COMPARED, 2 * ks))
    reach = int(np.maximum.reduce(compared, initial=0))
    order = order[:, :reach]
    counts = np.minimum(counts, ks)
    if not k or not reach:
        return order[:, :k], np.minimum(counts, k)
    there = np.arange(reach) < compared[:, None]
    # Of all requests in one row: what is looked up costs what its calls cost, and one index is found faster than two.
    in_row = order + (np.arange(batch) * width)[:, None]
    ordered = scores.take(in_row)
    penalised = ordered < -UNWANTED_PENALTY / 2
    # In steps, as scores are compared: the last bits of a product decide nothing, the better score does.
    # Without a dimension, but an array: each product would make one of a scalar.
    strength = np.array(config.sameness * SCORE_STEPS, np.float32)
    worth = np.float32(SCORE_STEPS) * ((1 - np.float32(config.sameness)) * _relevance(ordered, there & ~penalised))
    if np.count_nonzero(penalised):
        worth -= penalised * (np.float32(SCORE_STEPS) * UNWANTED_PENALTY)
    if np.count_nonzero(there) < there.size:
        worth[~there] = -np.inf
    worth = np.ascontiguousarray(worth)
    near = vectors.reshape(-1, vectors.shape[2]).take(in_row, axis=0) if strength else vectors
    kinds = categories.take(in_row)
    surplus: F32 | None = None  # what is taken off the worth of items whose category is full
    taken: list[dict[int, int]] = [{} for _ in range(batch)]
    begins = np.arange(batch) * reach
    flat_worth, flat_near, flat_kinds = worth.ravel(), near.reshape(-1, vectors.shape[2]), kinds.ravel()
    # The greatest cosine to what was chosen, times its strength.
    likeness = np.zeros((batch, reach, 1), np.float32)
    spare, value = np.empty_like(likeness), worth.copy()
    chosen_last = np.empty((batch, vectors.shape[2], 1), np.float32)
    # Views, made once: what they show changes with each place.
    likeness_flat, chosen_flat = likeness[:, :, 0], chosen_last[:, :, 0]
    chosen = np.zeros((min(k, reach), batch), np.int64)
    last = len(chosen) - 1
    for place, best in enumerate(chosen):
        np.rint(value, out=value).argmax(axis=1, out=best)
        if place == last:
            break
        at = best + begins
        flat_worth[at] = -np.inf
        if strength:
            flat_near.take(at, axis=0, out=chosen_flat, mode="clip")
            now = np.matmul(near, chosen_last, out=spare if place else likeness)
            now *= strength
            if place:
                np.maximum(likeness, now, out=likeness)
        np.subtract(worth, likeness_flat, out=value)
        if config.max_per_category:
            for b, kind in enumerate(flat_kinds.take(at).tolist()):
                times = taken[b][kind] = taken[b].get(kind, 0) + 1
                # What has no category is never too many.
                if kind > 0 and times == config.max_per_category:
                    surplus = np.zeros(worth.shape, np.float32) if surplus is None else surplus
                    surplus[b, kinds[b] == kind] = SCORE_STEPS * _OVER_LIMIT
            if surplus is not None:
                value -= surplus
    return at_columns(order, chosen.T), np.minimum(counts, last + 1)


def _relevance(scores: F32, usual: Bools) -> F32:
    """Return scores scaled to 0 … 1 over the usual ones of each request, float32 [B, C]; 0 for others, or all alike."""
    low = np.minimum.reduce(scores, axis=1, keepdims=True, where=usual, initial=np.inf)
    high = np.maximum.reduce(scores, axis=1, keepdims=True, where=usual, initial=-np.inf)
    usual = usual & (high > low)
    relevance = np.zeros(scores.shape, np.float32)
    np.subtract(scores, low, out=relevance, where=usual)
    np.divide(relevance, high - low, out=relevance, where=usual)
    return relevance

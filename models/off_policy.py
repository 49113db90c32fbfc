"""What another policy would have earned, from the log of a policy that drew at random: exploration slots, for one.

Legend of shapes: n = logged choices, each one item in one slot. Propensities are probabilities of the logged item:
``logged`` under the policy that made the log, ``target`` under the policy that is judged. Only drawn slots have a
propensity; a deterministic slot says nothing about what another choice would have earned.

Every estimate is refused (NoSupportError) where the log cannot answer: a number from ten effective choices looks like
any other number, and is luck.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from models.errors import NoSupportError

F64 = npt.NDArray[np.float64]


class SupportConfig(BaseModel):
    """When a log is too thin for an estimate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    least_effective: float = Field(
        100.0, gt=0, description="Effective sample size below which an estimate is refused, in logged choices."
    )
    least_share: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Share of the judged policy's choices that the log must be able to hold: below it, refused.",
    )


@dataclass(frozen=True, slots=True)
class Estimate:
    """The value of a policy, the bounds of its confidence interval, and what it rests on."""

    value: float
    low: float
    high: float
    choices: int
    """Logged choices that were used."""
    effective: float
    """Effective sample size, in choices: (Σ w)² / Σ w² (Kong 1992)."""
    mean_weight: float
    """Of w = target / logged. Its expectation is 1 where the log supports the policy; less, where it does not."""


def self_normalised(
    rewards: npt.ArrayLike,
    logged: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    clusters: npt.ArrayLike | None = None,
    confidence: float = 0.95,
    support: SupportConfig | None = None,
) -> Estimate:
    """Return the self-normalised inverse propensity estimate (Swaminathan and Joachims 2015, equation 9).

    V = Σ w·r / Σ w with w = target / logged; all [n]. The interval is that of the linearised ratio, its residuals
    summed by ``clusters`` [n] (users; default: each choice alone). Rewards within 0 and 1 have it on the log-odds
    scale, where a rate near 0 keeps its upper side; without any reward in the log it is the exact one for no success
    in ``effective`` trials (Clopper and Pearson 1934). Raises NoSupportError.
    """
    r, w = _weighted(rewards, logged, target)
    effective, mean_weight = _supported(w, support or SupportConfig())
    value = float((w * r).sum() / w.sum())
    scatter = _clustered_norm(w * (r - value), clusters) / float(w.sum())
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    if r.min() < 0 or r.max() > 1:
        low, high = value - z * scatter, value + z * scatter
    elif value <= 0:
        low, high = 0.0, 1 - float(((1 - confidence) / 2) ** (1 / effective))
    elif value >= 1:
        low, high = float(((1 - confidence) / 2) ** (1 / effective)), 1.0
    else:
        centre, reach = float(np.log(value / (1 - value))), z * scatter / (value * (1 - value))
        low, high = _sigmoid(centre - reach), _sigmoid(centre + reach)
    return Estimate(value, low, high, len(r), effective, mean_weight)


def doubly_robust(
    rewards: npt.ArrayLike,
    logged: npt.ArrayLike,
    target: npt.ArrayLike,
    predicted_logged: npt.ArrayLike,
    predicted_target: npt.ArrayLike,
    *,
    clusters: npt.ArrayLike | None = None,
    confidence: float = 0.95,
    support: SupportConfig | None = None,
) -> Estimate:
    """Return the doubly robust estimate (Dudík, Langford and Li 2011, equation 4).

    V = mean of q̂(target) + w·(r − q̂(logged)), all [n]: ``predicted_logged`` is a model's expected reward of the
    logged item, ``predicted_target`` its mean over the judged policy's choices. Right where the propensities are
    right, or the model is. The model must not have learned from the choice that it predicts (fit it on another part
    of the log). The interval is normal, clustered as in ``self_normalised``. Raises NoSupportError.
    """
    r, w = _weighted(rewards, logged, target)
    effective, mean_weight = _supported(w, support or SupportConfig())
    q_logged, q_target = np.asarray(predicted_logged, np.float64), np.asarray(predicted_target, np.float64)
    if not r.shape == q_logged.shape == q_target.shape:
        raise ValueError(f"{r.shape} rewards, predictions of {q_logged.shape} and {q_target.shape}; give one each")
    if not (np.isfinite(q_logged).all() and np.isfinite(q_target).all()):
        raise ValueError("a prediction is not a number; nothing was estimated")
    parts = q_target + w * (r - q_logged)
    value = float(parts.mean())
    reach = NormalDist().inv_cdf(0.5 + confidence / 2) * _clustered_norm(parts - value, clusters) / len(parts)
    return Estimate(value, value - reach, value + reach, len(r), effective, mean_weight)


def _weighted(rewards: npt.ArrayLike, logged: npt.ArrayLike, target: npt.ArrayLike) -> tuple[F64, F64]:
    """Return rewards and weights [n]."""
    r = np.asarray(rewards, np.float64)
    p = np.asarray(logged, np.float64)
    q = np.asarray(target, np.float64)
    if not r.shape == p.shape == q.shape or r.ndim != 1:
        raise ValueError(f"rewards {r.shape} and propensities {p.shape}, {q.shape} must be flat and of one length")
    if not np.isfinite(r).all():
        raise ValueError("a reward is not a number; nothing was estimated")
    if not (np.isfinite(q).all() and (q >= 0).all() and (q <= 1).all()):
        raise ValueError("a target propensity is not a probability; nothing was estimated")
    drawn = np.isfinite(p) & (p > 0) & (p <= 1)
    if not drawn.all():
        raise NoSupportError(
            f"{int((~drawn).sum())} of {len(p)} logged choices have no propensity within 0 and 1; nothing was "
            "estimated. Leave out slots that were not drawn"
        )
    return r, q / p


def _supported(w: F64, config: SupportConfig) -> tuple[float, float]:
    """Return the effective sample size and the mean weight. Raises NoSupportError where they are too small."""
    if not len(w) or not w.any():
        raise NoSupportError("no logged choice is one that the policy would make; nothing was estimated")
    effective, mean = float(w.sum() ** 2 / (w**2).sum()), float(w.mean())
    if effective < config.least_effective:
        raise NoSupportError(
            f"{len(w)} logged choices count as {effective:.1f} for this policy, fewer than {config.least_effective:g}; "
            "nothing was estimated. Log more, or judge a policy nearer to the one that was logged"
        )
    # Two standard errors: only a share that is missing beyond doubt refuses.
    if mean + 2 * float(w.std()) / len(w) ** 0.5 < config.least_share:
        raise NoSupportError(
            f"the log can hold {mean:.0%} of what this policy would choose, less than {config.least_share:.0%}; "
            "nothing was estimated. The rest was never drawn: widen the pool that is drawn from"
        )
    return effective, mean


def _clustered_norm(residuals: F64, clusters: npt.ArrayLike | None) -> float:
    """Return the standard error of Σ residuals [n], those of one cluster summed first, corrected for few clusters."""
    if clusters is not None:
        labels = np.asarray(clusters)
        if labels.shape != residuals.shape:
            raise ValueError(f"{labels.shape} clusters for {residuals.shape} choices; give one for each")
        _, place = np.unique(labels, return_inverse=True)
        residuals = np.bincount(place, residuals).astype(np.float64, copy=False)
    n = len(residuals)
    if n < 2:
        raise NoSupportError("all logged choices are of one user; nothing was estimated. Log more users")
    return float(np.sqrt((residuals**2).sum() * n / (n - 1)))


def _sigmoid(log_odds: float) -> float:
    return float(1 / (1 + np.exp(-log_odds)))

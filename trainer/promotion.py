"""The gate: is a candidate promoted, is the live bundle rolled back, may a window be learned from at all.

Pure: scores, labels, users and a seed in; a decision with its figures out. Impressed items come flat, [n], with the
number of their impression 0 … I − 1, [n]; users are one for each impression, [I].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from models.errors import TrainingError
from models.evaluation import F64, PROBABILITY_EDGE, Interval, auc_per_impression, bootstrap_mean

Outcome = Literal["promote", "refuse", "roll-back", "keep"]
LEAST_HISTORY: Final = 3
"""Windows whose positive rates are known before a rate can be called out of its history."""


class GateConfig(BaseModel):
    """When a candidate takes the live bundle's place, and when it gives it back."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    margin_auc: float = Field(
        0.002, ge=0, le=0.5, description="A candidate must not be worse than the live bundle by more AUC than this."
    )
    equal_promotion_rate: float = Field(
        0.05,
        gt=0,
        lt=0.5,
        description="How often a candidate that is exactly as good as the live bundle is promoted, at most. Half of it "
        "is for looking better in log loss by chance, half for looking better in AUC.",
    )
    roll_back_rate: float = Field(
        0.01,
        gt=0,
        lt=0.5,
        description="How often a live bundle that is exactly as good as the previous one is rolled back, at most, for "
        "each slice that is looked at. Half of it is for AUC, half for log loss.",
    )
    min_impressions: int = Field(
        1_000, ge=2, description="Labelled impressions that a slice needs before it is judged; until then it grows."
    )
    min_users: int = Field(
        100, ge=2, description="Users that a slice needs: the interval rests on users, not on impressions."
    )
    cool_down_minutes: float = Field(
        30.0, ge=0, description="After a promotion or a rollback, no other promotion for this long."
    )
    resamples: int = Field(2_000, ge=100, le=100_000, description="Draws of users behind each interval.")
    positive_rate_factor: float = Field(
        3.0,
        gt=1,
        description="Labels whose positive rate is this many times above or below the median of the last rounds look "
        "wrong, and are not learned from. A lasting change is accepted when half of the rounds kept show it.",
    )
    positive_rate_rounds: int = Field(12, ge=LEAST_HISTORY, description="Rounds whose positive rates are kept.")
    max_auc_fall: float = Field(
        0.02,
        ge=0,
        description="A trained model whose AUC on its own held-back slice is lower than that of the bundle it started "
        "from by more than this is not announced.",
    )
    shadow_tolerance: float = Field(
        0.05, gt=0, description="Greatest difference in log-odds between a logged shadow score and the recomputed one."
    )
    shadow_share: float = Field(
        0.99, gt=0, le=1, description="Share of the impressions with shadow scores that must be within the tolerance."
    )
    min_shadow_impressions: int = Field(
        50, ge=0, description="Impressions with shadow scores of the candidate that a promotion needs; 0: none."
    )


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided, why, and the figures that it rests on."""

    outcome: Outcome
    reason: str
    """A short slug, stable enough to be a metric label."""
    sentence: str
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def promote(self) -> bool:
        """Whether the candidate becomes the live bundle."""
        return self.outcome == "promote"

    def record(self) -> dict[str, Any]:
        """Return the decision as plain data, figures rounded to what they mean."""
        figures = {name: round(float(value), 6) for name, value in self.figures.items()}
        return {"outcome": self.outcome, "reason": self.reason, "sentence": self.sentence, "figures": figures}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same impressions: differences are first minus second."""

    impressions: int
    users: int
    positive_rate: float
    auc_first: float
    auc_second: float
    auc: Interval
    log_loss_first: float
    log_loss_second: float
    log_loss: Interval

    def figures(self, first: str, second: str, prefix: str = "") -> dict[str, float]:
        """Return the figures by name, ready for a manifest; those that do not exist (NaN) are left out."""
        found = {
            "impressions": float(self.impressions),
            "users": float(self.users),
            "positive_rate": self.positive_rate,
            f"auc_{first}": self.auc_first,
            f"auc_{second}": self.auc_second,
            "auc_difference": self.auc.mean,
            "auc_difference_low": self.auc.low,
            "auc_difference_high": self.auc.high,
            f"log_loss_{first}": self.log_loss_first,
            f"log_loss_{second}": self.log_loss_second,
            "log_loss_difference": self.log_loss.mean,
            "log_loss_difference_low": self.log_loss.low,
            "log_loss_difference_high": self.log_loss.high,
        }
        return {prefix + name: float(value) for name, value in found.items() if np.isfinite(value)}


def compare(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    labels: npt.ArrayLike,
    impressions: npt.ArrayLike,
    users: npt.ArrayLike,
    *,
    rate: float,
    resamples: int,
    seed: int,
) -> Comparison:
    """Compare two models' log-odds [n] on the same impressions, paired and clustered by user.

    Each bound of an interval is passed by chance with probability ``rate`` / 2. Percentile bootstrap over users
    (Davison and Hinkley 1997, sections 3.8 and 5.3.1), widened by √(U / (U − 1)) and from the normal to Student's
    quantile (Cornish and Fisher 1938, first term): with few users the plain form is too narrow.
    """
    y, g, u = np.asarray(labels, np.float64), np.asarray(impressions, np.int64), np.asarray(users)
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    auc_a, auc_b = auc_per_impression(a, y, g), auc_per_impression(b, y, g)
    loss_a, loss_b = _log_loss_per_impression(a, y, g), _log_loss_per_impression(b, y, g)
    return Comparison(
        impressions=len(u),
        users=len(np.unique(u)),
        positive_rate=float(y.mean()) if len(y) else float("nan"),
        auc_first=_mean(auc_a),
        auc_second=_mean(auc_b),
        auc=_interval(auc_a - auc_b, u, rate, resamples, seed),
        log_loss_first=_mean(loss_a),
        log_loss_second=_mean(loss_b),
        log_loss=_interval(loss_a - loss_b, u, rate, resamples, seed),
    )


def judge(
    candidate: npt.ArrayLike,
    live: npt.ArrayLike,
    labels: npt.ArrayLike,
    impressions: npt.ArrayLike,
    users: npt.ArrayLike,
    config: GateConfig,
    seed: int,
) -> Decision:
    """Decide on a candidate by log-odds [n] of it and of the live bundle on a slice that neither has learned from.

    Promoted: its AUC is not worse by more than the margin (lower bound above −margin), and it is better in log loss
    or in AUC (the bound beyond zero). A slice must be judged once only: a second look has another rate of mistakes.
    """
    y, a, b = np.asarray(labels), np.asarray(candidate), np.asarray(live)
    if not (y.any() and (y == 0).any()):
        return Decision("refuse", "labels-of-one-kind", "all labels of the slice are alike: nothing can be compared")
    for name, scores in (("candidate", a), ("live", b)):
        if not np.isfinite(scores).all():
            return Decision("refuse", "scores-not-finite", f"{name} scores of the slice are not finite numbers")
    found = compare(
        a, b, y, impressions, users, rate=config.equal_promotion_rate, resamples=config.resamples, seed=seed
    )
    figures = found.figures("candidate", "live")
    auc, loss = found.auc, found.log_loss
    said = (
        f"AUC {found.auc_first:.4f} against {found.auc_second:.4f} ({auc.low:+.4f} to {auc.high:+.4f}), "
        f"log loss {found.log_loss_first:.4f} against {found.log_loss_second:.4f} "
        f"({loss.low:+.4f} to {loss.high:+.4f}), {found.impressions:,} impressions of {found.users:,} users"
    )
    if not auc.low > -config.margin_auc:
        reason = "auc-worse" if auc.high < 0 else "auc-may-be-worse"
        return Decision("refuse", reason, f"may be worse by more than {config.margin_auc} AUC: {said}", figures)
    better = [name for name, is_better in (("auc", auc.low > 0), ("log-loss", loss.high < 0)) if is_better]
    if not better:
        return Decision("refuse", "not-better", f"not shown to be better in AUC or log loss: {said}", figures)
    return Decision("promote", f"better-{'-and-'.join(better)}", f"better in {' and '.join(better)}: {said}", figures)


def should_roll_back(
    live: npt.ArrayLike,
    previous: npt.ArrayLike,
    labels: npt.ArrayLike,
    impressions: npt.ArrayLike,
    users: npt.ArrayLike,
    config: GateConfig,
    seed: int,
) -> Decision:
    """Decide whether the live bundle fell behind the previous one, by both log-odds [n] on the same impressions.

    Rolled back: its AUC is lower with the whole interval, or its log loss is higher with the whole interval and its
    AUC is not shown to be higher. Never by an absolute figure: every night would trip it. Live scores that are not
    finite are rolled back at once.
    """
    y, a, b = np.asarray(labels), np.asarray(live), np.asarray(previous)
    if not np.isfinite(b).all():
        return Decision("keep", "scores-not-finite", "the previous bundle's scores are not finite; the live one stays")
    if not np.isfinite(a).all():
        return Decision("roll-back", "scores-not-finite", "the live bundle's scores are not finite numbers")
    if not (y.any() and (y == 0).any()):
        return Decision("keep", "labels-of-one-kind", "all labels of the slice are alike: nothing can be compared")
    found = compare(a, b, y, impressions, users, rate=config.roll_back_rate, resamples=config.resamples, seed=seed)
    figures = found.figures("live", "previous")
    said = (
        f"AUC {found.auc.low:+.4f} to {found.auc.high:+.4f}, log loss {found.log_loss.low:+.4f} to "
        f"{found.log_loss.high:+.4f} against previous, {found.impressions:,} impressions of {found.users:,} users"
    )
    if found.auc.high < 0:
        return Decision("roll-back", "auc-behind", f"the live bundle's AUC fell behind: {said}", figures)
    if found.log_loss.low > 0 and not found.auc.low > 0:
        return Decision("roll-back", "log-loss-behind", f"the live bundle's log loss fell behind: {said}", figures)
    return Decision("keep", "not-behind", f"not shown to be behind: {said}", figures)


def check_labels(labels: npt.ArrayLike, history: Sequence[float], config: GateConfig) -> float:
    """Return the positive rate of labels [n]; raises TrainingError where they look wrong.

    ``history``: rates of earlier rounds, oldest first, those that were refused included.
    """
    y = np.asarray(labels, np.float64)
    rate = float(y.mean()) if len(y) else 0.0
    if not 0 < rate < 1:
        raise TrainingError(
            "labels-of-one-kind", f"all {len(y):,} labels are alike; is every click's item or request_id named?"
        )
    kept = [h for h in history[-config.positive_rate_rounds :] if h > 0]
    if len(kept) >= LEAST_HISTORY:
        usual = float(np.median(kept))
        if not usual / config.positive_rate_factor <= rate <= usual * config.positive_rate_factor:
            raise TrainingError(
                "positive-rate-off",
                f"{rate:.4f} of the new labels are positive, the last {len(kept)} rounds had {usual:.4f}; "
                "nothing was learned from them, the bundles in use stay; look at what sends impressions and actions",
            )
    return rate


def check_trained(losses: Sequence[float], auc: float, auc_before: float, config: GateConfig) -> None:
    """Raise TrainingError where a training's losses are not finite or its held-back AUC fell; NaN AUCs are unknown."""
    if not np.isfinite(np.asarray(losses, np.float64)).all():
        raise TrainingError("loss-not-finite", f"losses {list(losses)} are not finite; the trained model is dropped")
    if auc < auc_before - config.max_auc_fall:
        raise TrainingError(
            "metric-falls",
            f"AUC on the held-back slice is {auc:.4f}, before training it was {auc_before:.4f}; "
            "the trained model is dropped, the bundles in use stay",
        )


def check_shadow(
    logged: Sequence[npt.NDArray[Any]], recomputed: Sequence[npt.NDArray[Any]], config: GateConfig
) -> Decision:
    """Decide whether a candidate is healthy in shadow.

    ``logged``: log-odds that workers wrote, one array for each impression; ``recomputed``: the trainer's own for the
    same ones. Unhealthy: too few, not finite, or apart.
    """
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(logged, recomputed, strict=True)]
    if len(pairs) < config.min_shadow_impressions:
        return Decision(
            "refuse",
            "shadow-too-few",
            f"workers scored {len(pairs)} labelled impressions of the slice in shadow, "
            f"{config.min_shadow_impressions} are needed",
            {"shadow_impressions": float(len(pairs))},
        )
    if not pairs:
        return Decision("promote", "shadow-not-asked", "no shadow scores are asked for")
    if not all(np.isfinite(a).all() for a, _ in pairs):
        return Decision("refuse", "shadow-not-finite", "workers logged shadow scores that are not finite numbers")
    worst = np.array([np.abs(a - b).max(initial=0.0) if a.shape == b.shape else np.inf for a, b in pairs])
    share = float((worst <= config.shadow_tolerance).mean())
    figures = {"shadow_impressions": float(len(pairs)), "shadow_share_equal": share}
    if share < config.shadow_share:
        return Decision(
            "refuse",
            "shadow-differs",
            f"{1 - share:.1%} of {len(pairs)} impressions were scored in shadow otherwise than here, by up to "
            f"{worst.max():.3f} in log-odds: serving and training disagree",
            figures,
        )
    return Decision("promote", "shadow-healthy", f"{len(pairs)} shadow scores are as recomputed", figures)


def _log_loss_per_impression(log_odds: F64, labels: F64, impressions: npt.NDArray[np.int64]) -> F64:
    """Return the mean cross-entropy of each impression's items in nats, float64 [I]; clipped as `log_loss` does."""
    edge = np.log((1 - PROBABILITY_EDGE) / PROBABILITY_EDGE)
    z = np.clip(log_odds, -edge, edge)
    loss = np.logaddexp(0.0, z) - labels * z
    total = int(impressions.max(initial=-1)) + 1
    return np.asarray(np.bincount(impressions, loss, total) / np.maximum(np.bincount(impressions, minlength=total), 1))


def _interval(values: F64, users: npt.NDArray[Any], rate: float, resamples: int, seed: int) -> Interval:
    found = bootstrap_mean(values, users, resamples=resamples, confidence=1 - rate, seed=seed)
    clusters = len(np.unique(users[~np.isnan(values)]))
    if clusters < 2:
        return Interval(found.mean, -np.inf, np.inf)
    wider = np.sqrt(clusters / (clusters - 1)) * (
        1 + (NormalDist().inv_cdf(1 - rate / 2) ** 2 + 1) / (4 * (clusters - 1))
    )
    return Interval(
        found.mean, found.mean + wider * (found.low - found.mean), found.mean + wider * (found.high - found.mean)
    )


def _mean(values: F64) -> float:
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else float("nan")

"""The CTR model as it serves: NumPy only, batched over slates, from the tensors of a bundle.

For an item p, the live features x of its impression and the items r that the user acted on lately:

    logit = wᵀσ(A·u + B·p + D·x + C) + s·cos(u, p) + b           (+ the term of its position, in training only)
    u = Σ_r a_r·g(kind_r)·r,   a = softmax over the known recents of
        q(p)·k(r)/√d + bias(kind_r) − decay·log(1 + age_r / 1 min),  with one more slot, "nothing", whose value is 0

Target attention: the idea of Zhou et al. 2018 (Deep Interest Network), section 4.3, with the scaled dot product of
Vaswani et al. 2017, equation 1. cos(u, p) = u·p / √(|u|² + SMALL_NORM²) for a unit p: it fades where the user gave
little evidence, and is 0 where there is none. models/ctr_module.py is the same in torch, by the same tensor names.

Axes: S slates, C items of a slate (padded), F features, R recent items, D dimensions of the space, A of the
attention, H of a hidden layer, P positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from models.columns import at_columns
from models.errors import ModelError

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

KINDS: Final = 64
"""Kinds of action: the code of a user row without its pending bit, which is action number and label."""
KIND_MASK: Final = KINDS - 1
SMALL_NORM: Final = 0.05
"""Length of u from which the similarity counts for about what its angle says."""
AGE_UNIT_SECONDS: Final = 60.0
UNKNOWN_SCORE: Final = -1e30
"""Attention score of a place without a known item: its weight is 0."""
CONSTANT_STD: Final = 1e9
"""Stored deviation of a feature that did not vary in training: its untrained weights count for nothing."""
LONGEST_LOG_ODDS: Final = 15.0
"""Calibrated log-odds are kept within ± this, 3·10⁻⁷: nothing that a window can show is surer."""


class CtrConfig(BaseModel):
    """Shape of a CTR model; it is stored in its bundle and rebuilds it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    dim: int = Field(64, ge=1, le=4_096, description="Dimensions D of the embedding space.")
    features: int = Field(ge=0, le=10_000, description="Number of features F of an impressed item.")
    hidden: tuple[int, ...] = Field((64,), min_length=1, max_length=4, description="Width of each hidden layer.")
    attention_dim: int = Field(64, ge=1, le=1_024, description="Dimensions of queries and keys.")
    positions: int = Field(
        32, ge=0, le=1_000, description="Positions with a term of their own; 0: position is left out."
    )
    activation: Literal["sigmoid", "silu", "relu"] = Field("sigmoid", description="σ of the hidden layers.")


def tensor_shapes(config: CtrConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of a model."""
    first = config.hidden[0]
    shapes: dict[str, tuple[int, ...]] = {
        "feature_mean": (config.features,),
        "feature_std": (config.features,),
        "head.user": (config.dim, first),
        "head.item": (config.dim, first),
        "head.features": (config.features, first),
        "head.bias": (first,),
        "head.out": (config.hidden[-1],),
        "head.scale": (1,),
        "head.base": (1,),
        "attention.query": (config.dim, config.attention_dim),
        "attention.key": (config.dim, config.attention_dim),
        "attention.kind": (KINDS,),
        "attention.gain": (KINDS,),
        "attention.decay": (1,),
        "attention.nothing": (1,),
        "position": (config.positions + 1,),
        "calibration": (2,),
    }
    for at, (wide, narrow) in enumerate(zip(config.hidden, config.hidden[1:], strict=False), start=1):
        shapes[f"head.layer{at}.weight"] = (wide, narrow)
        shapes[f"head.layer{at}.bias"] = (narrow,)
    return shapes


def check_tensors(config: CtrConfig, tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, F32]:
    """Return the tensors of a model as float32.

    Raises ModelError where one is missing, too many, of another shape or not finite.
    """
    shapes = tensor_shapes(config)
    if set(tensors) != set(shapes):
        missing, unknown = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
        raise ModelError(
            f"a CTR model lacks the tensors {missing} and has the unknown ones {unknown}; it was not loaded: "
            "take a bundle of this program's version"
        )
    checked: dict[str, F32] = {}
    for name, shape in shapes.items():
        tensor = np.ascontiguousarray(tensors[name], np.float32)
        if tensor.shape != shape:
            raise ModelError(
                f"tensor {name} has the shape {tensor.shape}, its configuration says {shape}; the model was not loaded"
            )
        if not np.isfinite(tensor).all():
            raise ModelError(f"tensor {name} holds values that are not finite; the model was not loaded")
        checked[name] = tensor
    if (checked["feature_std"] <= 0).any():
        raise ModelError("feature_std holds a value that is not above 0; the model was not loaded")
    return checked


class CtrScorer:
    """A CTR model that is ready to score. Immutable: threads may share one."""

    def __init__(self, config: CtrConfig, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take the tensors named in ``tensor_shapes``. Raises ModelError as ``check_tensors`` does."""
        self.config = config
        self.tensors: Mapping[str, F32] = check_tensors(config, tensors)
        t = self.tensors
        query, key = t["attention.query"].astype(np.float64), t["attention.key"].astype(np.float64)
        # q(p)·k(r)/√d as one bilinear form, applied to the few recents rather than to the many candidates.
        self._keys = np.asarray(key @ query.T / np.sqrt(config.attention_dim), np.float32)
        # (x − mean)/std folded into the first layer.
        weights = t["head.features"].astype(np.float64) / t["feature_std"].astype(np.float64)[:, None]
        self._features = np.asarray(weights, np.float32)
        self._bias = np.asarray(t["head.bias"] - t["feature_mean"].astype(np.float64) @ weights, np.float32)
        self._layers = [(t[f"head.layer{at}.weight"], t[f"head.layer{at}.bias"]) for at in range(1, len(config.hidden))]
        self._decay, self._nothing = t["attention.decay"][0], t["attention.nothing"][0]
        self._scale, self._base = t["head.scale"][0], t["head.base"][0]

    def logits(
        self,
        x_SCF: F32,
        items_SCD: F32,
        recents_SRD: F32,
        recent_known_SR: Bools,
        recent_age_SR: F32,
        recent_codes_SR: npt.NDArray[np.uint8],
    ) -> tuple[F32, F32]:
        """Return the raw logits of slates, float32 [S, C], without a term of position, and what was looked at.

        That is the weights a_r of the recents, float32 [S, C, R]; their sum is 1 less the weight of "nothing", 0 where
        not known. ``x_SCF``: as models.features.encode gives it. ``items_SCD``: unit vectors, zero for an item without
        one. ``recent_known_SR``: the place holds an item with a vector. ``recent_age_SR``: seconds before the
        impression, at least 0, any value where not known. Padded items get any finite value. R is at least 1.
        """
        slates, width, dim = items_SCD.shape
        kinds = recent_codes_SR & np.uint8(KIND_MASK)
        values: F32 = recents_SRD * (self.tensors["attention.gain"].take(kinds) * recent_known_SR)[:, :, None]
        places = values.shape[1]
        both = np.concatenate([(recents_SRD.reshape(-1, dim) @ self._keys).reshape(values.shape), values], axis=1)
        products = items_SCD @ both.transpose(0, 2, 1)
        attention = self._attention(products[:, :, :places], kinds, recent_known_SR, recent_age_SR)
        along = np.einsum("scr,scr->sc", attention, products[:, :, places:])
        # |u|² = aᵀ(V·Vᵀ)a: u itself, of D numbers for each candidate, is never made.
        gram = values @ values.transpose(0, 2, 1)
        square = np.einsum("scr,scr->sc", attention @ gram, attention)
        hidden: F32 = attention @ (values @ self.tensors["head.user"])
        flat = hidden.reshape(slates * width, hidden.shape[2])
        flat += items_SCD.reshape(-1, dim) @ self.tensors["head.item"]
        flat += x_SCF.reshape(slates * width, x_SCF.shape[2]) @ self._features
        flat += self._bias
        for weight, bias in self._layers:
            flat = self._activate(flat) @ weight
            flat += bias
        out = (self._activate(flat) @ self.tensors["head.out"]).reshape(slates, width)
        cosine = along / np.sqrt(np.maximum(square, np.float32(0)) + np.float32(SMALL_NORM**2))
        return np.asarray(out + self._scale * cosine + self._base, np.float32), attention

    def log_odds(self, logits: F32) -> F32:
        """Return the calibrated log-odds a·z + b of raw logits, any shape; the CTR is its sigmoid.

        Platt 1999 (Probabilistic outputs for support vector machines), equation 1. a and b were fitted on logits
        without a term of position: the CTR is that of an average position of its window.
        """
        a, b = self.tensors["calibration"]
        odds = np.maximum(a * logits + b, np.float32(-LONGEST_LOG_ODDS))
        return np.asarray(np.minimum(odds, np.float32(LONGEST_LOG_ODDS)), np.float32)

    def _attention(self, scores: F32, kinds: npt.NDArray[np.uint8], known: Bools, age: F32) -> F32:
        """Return the weights of the recents, float32 [S, C, R]; their sum is 1 less the weight of "nothing"."""
        # What is not finite compares as false: any age may stand where nothing is known.
        age = np.where(age < np.inf, np.fmax(age, np.float32(0)), np.float32(0))
        old = np.log1p(age / np.float32(AGE_UNIT_SECONDS))
        bias = self.tensors["attention.kind"].take(kinds) - self._decay * old
        scores = scores + np.where(known, bias, np.float32(UNKNOWN_SCORE))[:, None, :]
        # By its place: NumPy finds that in less than half the time of the maximum of so short rows.
        rows = scores.reshape(-1, scores.shape[2])
        highest = np.maximum(at_columns(rows, rows.argmax(axis=1)[:, None]), self._nothing).reshape(scores.shape[:2])
        scores -= highest[:, :, None]
        np.exp(scores, out=scores)
        total = np.add.reduce(scores, axis=2)
        total += np.exp(self._nothing - highest)
        scores /= total[:, :, None]
        return scores

    def _activate(self, z: F32) -> F32:
        """Return σ(z) of [n, H]; ``z`` is used up."""
        if self.config.activation == "relu":
            return np.maximum(z, np.float32(0), out=z)
        # Beyond ±80 the sigmoid is 0 or 1 to float32; exp there would overflow with a warning.
        e = np.clip(z, -80.0, 80.0, out=z if self.config.activation == "sigmoid" else None)
        np.negative(e, out=e)
        np.exp(e, out=e)
        e += np.float32(1)
        if self.config.activation == "sigmoid":
            return np.reciprocal(e, out=e)
        return np.divide(z, e, out=e)


def fit_calibration(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    offsets: npt.ArrayLike | None = None,
) -> F32:
    """Return a and b of Platt scaling a·z + b, float32 [2], fitted to logits [n] and labels [n] between 0 and 1.

    Newton's method on the cross-entropy with Platt's smoothed targets (Platt 1999, section 2.2; Lin, Lin and Weng
    2007, algorithm 1). a stays above 0: calibration never turns the order around. (1, 0) where there are no
    examples, a shift only where there is but one kind of label or the logits do not vary. ``offsets`` [n] are what the
    sampling of negatives added to the log-odds; they are no part of what is calibrated.
    """
    z, y = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    w = np.ones_like(z) if weights is None else np.asarray(weights, np.float64)
    o = np.zeros_like(z) if offsets is None else np.asarray(offsets, np.float64)
    if not z.size or w.sum() <= 0:
        return np.array([1.0, 0.0], np.float32)
    positive, negative = float((w * y).sum()), float((w * (1 - y)).sum())
    target = y * (positive + 1) / (positive + 2) + (1 - y) / (negative + 2)
    shift_only = min(positive, negative) < 1 or float(z.std()) < 1e-6
    a, b = _newton(z, target, w, o, shift_only)
    if not shift_only and a <= 0.01:
        a, b = _newton(z, target, w, o, True)
    return np.array([a, b], np.float32)


def _newton(z: F64, target: F64, w: F64, offsets: F64, shift_only: bool) -> tuple[float, float]:
    def cost(a: float, b: float) -> float:
        f = a * z + b + offsets
        return float((w * (np.logaddexp(0.0, f) - target * f)).sum())

    a, b = 1.0, 0.0
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(a * z + b + offsets, -500, 500)))
        error, curve = w * (p - target), w * p * (1 - p)
        gradient = np.array([(error * z).sum(), error.sum()])
        hessian = np.array([[(curve * z * z).sum(), (curve * z).sum()], [(curve * z).sum(), curve.sum()]])
        if shift_only:
            step = np.array([0.0, gradient[1] / (hessian[1, 1] + 1e-12)])
        else:
            step = np.linalg.solve(hessian + 1e-9 * np.eye(2) * (1 + np.trace(hessian)), gradient)
        here, length = cost(a, b), 1.0
        while cost(a - length * step[0], b - length * step[1]) > here and length > 1e-10:
            length /= 2
        a, b = a - length * float(step[0]), b - length * float(step[1])
        if np.abs(length * step).max() < 1e-9:
            break
    return a, b

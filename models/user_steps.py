"""Gradient steps on user vectors with the item vectors fixed, users side by side.

Axes: R rows (users), T the two vectors (short-term, long-term), D dimensions, K items.
Formulas: docs/user-row.md. Everything is float32; rounding to fp16 is the caller's, once per event.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

_ONE: Final = np.float32(1)
_STEEP: Final = np.float32(60)
_NEVER: Final = np.float32(-np.inf)


@dataclass(frozen=True, slots=True)
class StepRates:
    """What all steps share: rates [T], logit scale, shrink 1 − ηλ [T], longest vector."""

    rates_T: F32
    keep_T: F32
    logit_scale: np.float32
    max_norm: np.float32


def sigmoid(x: F32) -> F32:
    """Return 1 / (1 + e^−x); below −60 the result is held: e^−x must not overflow."""
    return _ONE / (_ONE + np.exp(np.minimum(-x, _STEEP)))


def norms(h_RTD: F32) -> F32:
    """Return the lengths [R, T] of vectors [R, T, D]."""
    length_RT: F32 = np.sqrt(np.einsum("rtd,rtd->rt", h_RTD, h_RTD))
    return length_RT


def bound(h_RTD: F32, max_norm: np.float32) -> F32:
    """Return the vectors, those longer than ``max_norm`` shortened to it."""
    length_RT = norms(h_RTD)
    scale_RT = max_norm / np.maximum(length_RT, max_norm)
    bounded_RTD: F32 = np.asarray(h_RTD * scale_RT[..., None], np.float32)
    return bounded_RTD


def logistic_step(h_RTD: F32, v_RD: F32, weight_R: F32, label_R: F32, bias_R: F32, rates: StepRates) -> F32:
    """Return h ← (1 − ηλ)·h + η·w·(y − σ(s·h·v + b))·v, bounded; each vector on its own logit."""
    logit_RT = rates.logit_scale * np.einsum("rtd,rd->rt", h_RTD, v_RD) + bias_R[:, None]
    gain_RT = rates.rates_T * (weight_R[:, None] * (label_R[:, None] - sigmoid(logit_RT)))
    stepped_RTD = rates.keep_T[:, None] * h_RTD + gain_RT[..., None] * v_RD[:, None, :]
    return bound(stepped_RTD, rates.max_norm)


def softmax_step(
    h_RTD: F32,
    items_RKD: F32,
    known_RK: npt.NDArray[np.bool_],
    clicked_R: npt.NDArray[np.intp],
    weight_R: F32,
    rates: StepRates,
) -> F32:
    """Return h ← (1 − ηλ)·h + η·w·(v_clicked − Σ_j p_j·v_j), p = softmax_j(s·h·v_j) over the known items; bounded."""
    logit_RTK = rates.logit_scale * np.einsum("rtd,rkd->rtk", h_RTD, items_RKD)
    logit_RTK = np.where(known_RK[:, None, :], logit_RTK, _NEVER)
    share_RTK = np.exp(logit_RTK - np.maximum.reduce(logit_RTK, axis=-1, keepdims=True))
    share_RTK /= np.add.reduce(share_RTK, axis=-1, keepdims=True)
    clicked_RD = items_RKD[np.arange(len(items_RKD)), clicked_R]
    mean_RTD = np.einsum("rtk,rkd->rtd", share_RTK, items_RKD)
    gain_RT = rates.rates_T * weight_R[:, None]
    stepped_RTD = rates.keep_T[:, None] * h_RTD + gain_RT[..., None] * (clicked_RD[:, None, :] - mean_RTD)
    return bound(stepped_RTD, rates.max_norm)


def unclicked_step(
    h_RTD: F32,
    items_RKD: F32,
    known_RK: npt.NDArray[np.bool_],
    bias_R: F32,
    weight: np.float32,
    max_share: np.float32,
    rates: StepRates,
) -> F32:
    """Return h − η·w·mean_j(σ(s·h·v_j + b)·v_j) over the known items, the step at most ``max_share`` of h's length.

    No shrink here: a thousand ignored slates must not wear a vector down.
    """
    logit_RTK = rates.logit_scale * np.einsum("rtd,rkd->rtk", h_RTD, items_RKD) + bias_R[:, None, None]
    expected_RTK = sigmoid(logit_RTK) * known_RK[:, None, :]
    expected_RTK /= np.maximum(np.add.reduce(known_RK, axis=1), 1).astype(np.float32)[:, None, None]
    step_RTD = (rates.rates_T * weight)[:, None] * np.einsum("rtk,rkd->rtd", expected_RTK, items_RKD)
    length_RT = norms(step_RTD)
    limit_RT = max_share * norms(h_RTD)
    scale_RT = np.minimum(_ONE, limit_RT / np.maximum(length_RT, np.float32(1e-30)))
    return bound(h_RTD - scale_RT[..., None] * step_RTD, rates.max_norm)

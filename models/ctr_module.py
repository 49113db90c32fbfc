"""The CTR model of models/ctr.py in torch, for training: same tensors by the same names, and the loss.

Axes as in models/ctr.py. ``CtrModule.tensors`` is what a bundle keeps and what CtrScorer takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from models.ctr import (
    AGE_UNIT_SECONDS,
    F32,
    KIND_MASK,
    SMALL_NORM,
    UNKNOWN_SCORE,
    CtrConfig,
    check_tensors,
    tensor_shapes,
)
from models.user_row import NEGATIVE

FIXED = ("feature_mean", "feature_std", "calibration")
"""Tensors that are measured or fitted, not trained by gradients."""
FIRST_SHARPNESS = 5.0
"""Attention of a new model: softmax of this times the cosine of candidate and recent item."""
FIRST_SCALE = 4.0
"""s of a new model: what a cosine of 1 adds to the logit."""
FIRST_DECAY = 0.1
_POSITIONS_WITHOUT_TERM = 2
"""Position 0 (not known) and 1: what the terms of the others are relative to."""


class CtrModule(nn.Module):
    """The trainable CTR model."""

    def __init__(self, config: CtrConfig, tensors: Mapping[str, npt.NDArray[Any]], dropout: float = 0.0) -> None:
        """Start from tensors as in models.ctr.tensor_shapes. Raises ModelError where they do not fit."""
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(dropout)
        for name, value in check_tensors(config, tensors).items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            tensor = torch.from_numpy(value.copy())
            if name in FIXED:
                owner.register_buffer(leaf, tensor)
            else:
                owner.register_parameter(leaf, nn.Parameter(tensor))

    def tensors(self) -> dict[str, F32]:
        """Return the tensors for CtrScorer and a bundle, copies in float32."""
        return {name: value.detach().float().cpu().numpy().copy() for name, value in self.state_dict().items()}

    def forward(
        self,
        x_SCF: Tensor,
        items_SCD: Tensor,
        recents_SRD: Tensor,
        recent_known_SR: Tensor,
        recent_age_SR: Tensor,
        recent_codes_SR: Tensor,
        positions_SC: Tensor | None = None,
    ) -> Tensor:
        """Return raw logits [S, C], as CtrScorer.logits does; with ``positions_SC`` (int64) their terms are added."""
        user = self._user(items_SCD, recents_SRD, recent_known_SR, recent_age_SR, recent_codes_SR)
        head = self.get_submodule("head")
        x = (x_SCF - self.get_buffer("feature_mean")) / self.get_buffer("feature_std")
        hidden = user @ head.get_parameter("user") + items_SCD @ head.get_parameter("item")
        hidden = hidden + x @ head.get_parameter("features") + head.get_parameter("bias")
        hidden = self.dropout(self._activate(hidden))
        for at in range(1, len(self.config.hidden)):
            layer = head.get_submodule(f"layer{at}")
            hidden = hidden @ layer.get_parameter("weight") + layer.get_parameter("bias")
            hidden = self.dropout(self._activate(hidden))
        cosine = (user * items_SCD).sum(-1) / torch.sqrt((user * user).sum(-1) + SMALL_NORM**2)
        logits: Tensor = hidden @ head.get_parameter("out")
        logits = logits + head.get_parameter("scale") * cosine + head.get_parameter("base")
        return logits if positions_SC is None else logits + self.position_terms(positions_SC)

    def _user(self, items: Tensor, recents: Tensor, known: Tensor, age: Tensor, codes: Tensor) -> Tensor:
        """Return u of each candidate, [S, C, D]."""
        attention = self.get_submodule("attention")
        kinds = (codes & KIND_MASK).long()
        values = recents * (attention.get_parameter("gain")[kinds] * known)[:, :, None]
        queries, keys = items @ attention.get_parameter("query"), recents @ attention.get_parameter("key")
        scores = queries @ keys.transpose(1, 2) / self.config.attention_dim**0.5
        old = torch.log1p(torch.nan_to_num(age, posinf=0.0).clamp(min=0) / AGE_UNIT_SECONDS)
        bias = attention.get_parameter("kind")[kinds] - attention.get_parameter("decay") * old
        scores = scores + torch.where(known, bias, torch.full_like(bias, UNKNOWN_SCORE))[:, None, :]
        nothing = attention.get_parameter("nothing").to(scores.dtype).expand(*scores.shape[:2], 1)
        weights = torch.softmax(torch.cat([scores, nothing], dim=2), dim=2)[:, :, :-1]
        return weights.to(values.dtype) @ values

    def position_terms(self, positions: Tensor) -> Tensor:
        """Return what positions (int64, 1-based, 0 = not known) add to the logit in training, same shape."""
        table = self.get_parameter("position")
        at = positions.clamp(max=self.config.positions)
        return torch.where(at >= _POSITIONS_WITHOUT_TERM, table[at], 0.0)

    def _activate(self, z: Tensor) -> Tensor:
        if self.config.activation == "relu":
            return torch.relu(z)
        return torch.sigmoid(z) if self.config.activation == "sigmoid" else nn.functional.silu(z)


def first_tensors(config: CtrConfig, mean: F32, std: F32, click_rate: float, seed: int) -> dict[str, F32]:
    """Return the tensors of a new model.

    It ranks by its cosine with what the user acted on, and its base is the log-odds of ``click_rate``. ``mean`` and
    ``std`` [F] are those of the features, ``std`` being CONSTANT_STD where a feature did not vary.
    """
    random = np.random.default_rng(seed)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(config).items()}

    def spread(name: str, inputs: int) -> None:
        tensors[name] = (random.standard_normal(tensors[name].shape) / max(inputs, 1) ** 0.5).astype(np.float32)

    spread("head.user", config.dim)
    spread("head.item", config.dim)
    spread("head.features", config.features)
    for at in range(1, len(config.hidden)):
        spread(f"head.layer{at}.weight", config.hidden[at - 1])
    tensors["head.out"] = (random.standard_normal(config.hidden[-1]) * 0.1 / config.hidden[-1] ** 0.5).astype(
        np.float32
    )
    tensors["feature_mean"], tensors["feature_std"] = mean.astype(np.float32), std.astype(np.float32)
    tensors["head.scale"][:] = FIRST_SCALE
    rate = min(max(click_rate, 1e-4), 1 - 1e-4)
    tensors["head.base"][:] = np.log(rate / (1 - rate)) - 0.5 * tensors["head.out"].sum() * (
        config.activation == "sigmoid"
    )
    # Orthonormal columns shared by queries and keys: the first attention is that of the cosine.
    width = min(config.dim, config.attention_dim)
    basis = np.linalg.qr(random.standard_normal((config.dim, width)))[0]
    sharpness = (FIRST_SHARPNESS * config.attention_dim**0.5) ** 0.5
    for name in ("attention.query", "attention.key"):
        tensors[name][:, :width] = basis * sharpness
    tensors["attention.decay"][:] = FIRST_DECAY
    tensors["attention.gain"][:] = 1.0
    tensors["attention.gain"][np.flatnonzero(np.arange(len(tensors["attention.gain"])) & NEGATIVE)] = -0.5
    tensors["calibration"][:] = (1.0, 0.0)
    return tensors


@dataclass(slots=True)
class LossSums:
    """Sums of the two losses over some slates, and what to divide each by."""

    listwise: Tensor
    clicked_slates: Tensor
    cross_entropy: Tensor
    weight: Tensor

    def mean(self, listwise_weight: float, cross_entropy_weight: float) -> Tensor:
        """Return the weighted sum of the two means."""
        listwise = self.listwise / self.clicked_slates.clamp(min=1)
        cross_entropy = self.cross_entropy / self.weight.clamp(min=1e-9)
        return listwise_weight * listwise + cross_entropy_weight * cross_entropy


def loss_sums(logits: Tensor, labels: Tensor, weights: Tensor, offsets: Tensor | None = None) -> LossSums:
    """Return the losses of logits, all [S, C].

    ``labels``: 0 to 1. ``weights``: how many impressed items each stands for; 0 where padded. ``offsets``: added to
    the logit in the cross-entropy only: the log-odds that the sampling of negatives added (King and Zeng 2001,
    equation 7), 0 for shown items.

    Listwise: −Σ_i t_i·log softmax(z)_i over slates with a click, t the labels scaled to sum 1 (ListNet's top-one
    cross-entropy, Cao et al. 2007, section 4.2); an item of weight w counts as w items in the sum of the softmax.
    """
    logits = logits.float()
    present = weights > 0
    gains = torch.where(present, labels * weights, torch.zeros_like(weights))
    total = gains.sum(1)
    clicked = total > 0
    counted = torch.where(present, logits + torch.log(weights.clamp(min=1e-30)), torch.full_like(logits, -1e30))
    normal = torch.logsumexp(counted, dim=1)
    share = gains / total.clamp(min=1e-30)[:, None]
    listwise = torch.where(clicked, (share * (normal[:, None] - torch.where(present, logits, 0.0))).sum(1), 0.0)
    shifted = logits if offsets is None else logits + offsets
    entropy = binary_cross_entropy_with_logits(torch.where(present, shifted, 0.0), labels, reduction="none")
    return LossSums(listwise.sum(), clicked.sum().float(), (entropy * weights).sum(), weights.sum())

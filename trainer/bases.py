"""Base encodings of the window's items for the steps of a training: a fixed table, or layers that are trained.

Each text of a group of steps passes the trained layers once. The head's steps see its encoding as a constant and leave
their gradients on it; then one backward pass brings these into the layers (gradient caching, Gao et al. 2021, "Scaling
deep contrastive learning batch size under memory limited setup", section 3). Texts beyond GRAPH_TOKENS are run again
for that pass rather than kept, so that memory does not grow with the group.
Axes: U items of the window, u items of a batch, t texts of a group, B dimensions of a base encoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from models.errors import TrainingError
from trainer.encodings import SplitEncoder
from trainer.memory import halved, is_out_of_memory, smaller

I64 = npt.NDArray[np.int64]

GRAPH_TOKENS: Final = 16_384
"""Tokens times trained layers of a group whose activations are kept; some 0.9 GB at a width of 384."""


class BaseSource(Protocol):
    """Where the steps of a training get base encodings from."""

    def begin(self, rows: I64) -> None:
        """Make ready what a group of steps needs: items at ``rows``, distinct."""

    def of(self, rows: I64) -> Tensor:
        """Return the base encodings of items of the group, float32 [u, B]; zero for an item without a text."""

    def take_gradient(self, scale: float) -> None:
        """Take up what a step of the head left, divided by ``scale``."""

    def drop_gradient(self) -> None:
        """Forget what an unfinished step of the head left."""

    def end(self) -> None:
        """End the group: one step of what is trained."""

    def evaluate(self, rows: I64) -> Tensor:
        """Return the base encodings of items as they are now, float32 [u, B], without a group."""

    def state(self) -> Any:
        """Return a copy of what is trained."""

    def restore(self, state: Any) -> None:
        """Take back a copy."""


class FrozenBase:
    """A table of base encodings that nothing changes."""

    def __init__(self, table: npt.NDArray[np.float16], device: torch.device) -> None:
        """Take fp16 [U, B], zero for an item without a text."""
        self._table = torch.from_numpy(table.astype(np.float32)).to(device)

    def begin(self, rows: I64) -> None:
        """Do nothing: the table is there."""

    def of(self, rows: I64) -> Tensor:
        """Return rows of the table."""
        return self._table[torch.from_numpy(rows).to(self._table.device)]

    def take_gradient(self, scale: float) -> None:
        """Do nothing: there is no gradient."""

    def drop_gradient(self) -> None:
        """Do nothing: there is no gradient."""

    def end(self) -> None:
        """Do nothing: nothing is trained."""

    def evaluate(self, rows: I64) -> Tensor:
        """Return rows of the table."""
        return self.of(rows)

    def state(self) -> Any:
        """Return None: nothing is trained."""

    def restore(self, state: Any) -> None:
        """Do nothing: nothing was trained."""


class TrainedBase:
    """Encodings through the upper layers of an encoder, which are trained."""

    def __init__(
        self,
        split: SplitEncoder,
        texts: I64,
        device: torch.device,
        optimiser: torch.optim.Optimizer,
        schedule: LRScheduler,
        clip_norm: float,
        scaler: torch.amp.GradScaler,
    ) -> None:
        """``texts`` [U]: place of each item's text among those that ``split`` was loaded with, -1 for none."""
        self._split, self._texts, self._device = split, texts, device
        self._optimiser, self._schedule, self._clip_norm, self._scaler = optimiser, schedule, clip_norm, scaler
        self._passes: list[tuple[I64, Tensor | None]] = []
        self._used: I64 = np.zeros(0, np.int64)
        self._leaf: Tensor = torch.zeros(0, split.dim)
        self._gradient: Tensor = torch.zeros(0, split.dim)
        self._steps = 0
        self._size = split.batch_texts

    def begin(self, rows: I64) -> None:
        """Encode each text of the group once."""
        texts = self._texts[rows]
        self._used = np.unique(texts[texts >= 0])
        tokens = self._split.tokens(self._used)
        order = np.argsort(tokens, kind="stable")
        self._passes, kept, leaf = [], 0, torch.zeros(len(order), self._split.dim, device=self._device)

        def run(places: I64) -> None:
            nonlocal kept
            cost = int(tokens[places].max()) * len(places) * self._split.top_layers
            keep = kept + cost <= GRAPH_TOKENS
            with torch.set_grad_enabled(keep):
                encoded = self._forward(places)
            leaf[torch.from_numpy(places).to(self._device)] = encoded.detach()
            kept += cost if keep else 0
            self._passes.append((places, encoded if keep else None))

        self._size = halved(run, order, self._size)
        self._leaf = leaf.requires_grad_()
        self._gradient = torch.zeros_like(leaf)
        self._steps = 0

    def of(self, rows: I64) -> Tensor:
        """Return encodings of the group, which carry a gradient."""
        return self._by_item(rows, self._used, self._leaf)

    def take_gradient(self, scale: float) -> None:
        """Take up the gradient of a finished step; one that overflowed in half precision counts for nothing."""
        if self._leaf.grad is not None:
            gradient = self._leaf.grad / scale
            if bool(torch.isfinite(gradient).all()):
                self._gradient += gradient
                self._steps += 1
        self._leaf.grad = None

    def drop_gradient(self) -> None:
        """Forget the gradient of an unfinished step."""
        self._leaf.grad = None

    def end(self) -> None:
        """Bring the group's gradient into the layers, and take a step.

        Raises TrainingError("loss-not-finite") where the gradient is not finite.
        """
        if self._steps:
            self._backward(self._gradient / self._steps)
            self._scaler.unscale_(self._optimiser)
            norm = torch.nn.utils.clip_grad_norm_(self._split.parameters, self._clip_norm)
            if not self._scaler.is_enabled() and not bool(torch.isfinite(norm)):
                raise TrainingError("loss-not-finite", "the encoder's gradient is not finite; nothing was published")
            self._scaler.step(self._optimiser)
            self._scaler.update()
            self._schedule.step()
        self._optimiser.zero_grad(set_to_none=True)
        self._passes = []

    def evaluate(self, rows: I64) -> Tensor:
        """Return encodings through the layers as they are now, without dropout."""
        texts = self._texts[rows]
        used = np.unique(texts[texts >= 0])
        was_training = self._split.module.training
        self._split.module.eval()
        with torch.no_grad():
            encoded = self._split.encode(used)
        self._split.module.train(was_training)
        return self._by_item(rows, used, encoded)

    def state(self) -> Any:
        """Return a copy of the trained layers."""
        return deepcopy(self._split.module.state_dict())

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back a copy of the trained layers."""
        self._split.module.load_state_dict(state)

    def _by_item(self, rows: I64, used: I64, encoded: Tensor) -> Tensor:
        texts = self._texts[rows]
        if not len(used):
            return torch.zeros(len(rows), self._split.dim, device=self._device)
        places = torch.from_numpy(np.where(texts >= 0, np.searchsorted(used, texts), 0)).to(self._device)
        has = torch.from_numpy(texts >= 0).to(self._device)
        # embedding, not indexing: its backward adds in a fixed order.
        return torch.nn.functional.embedding(places, encoded) * has[:, None]

    def _forward(self, places: I64) -> Tensor:
        """Run one pass with a dropout that is the same when it is run again."""
        if not self._split.module.training:
            return self._split.forward(self._used[places])
        devices = [self._device] if self._device.type == "cuda" else []
        seed = int(torch.initial_seed() % 2**31) + int(places[0]) + 1_000_003 * len(self._used)
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            return self._split.forward(self._used[places])

    def _backward(self, gradient: Tensor) -> None:
        try:
            for places, encoded in self._passes:
                self._backward_pass(places, self._forward(places) if encoded is None else encoded, gradient)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._again(gradient, error)

    def _again(self, gradient: Tensor, error: BaseException) -> None:
        """Run every pass again, in smaller ones: a half backward pass cannot be taken back otherwise."""
        self._size = smaller(min(self._size, max(len(places) for places, _ in self._passes)), error)
        order = np.concatenate([places for places, _ in self._passes])
        self._passes = [(order[i : i + self._size], None) for i in range(0, len(order), self._size)]
        self._optimiser.zero_grad(set_to_none=True)
        self._backward(gradient)

    def _backward_pass(self, places: I64, encoded: Tensor, gradient: Tensor) -> None:
        part = gradient[torch.from_numpy(places).to(self._device)]
        encoded.backward(self._scaler.scale(part))  # type: ignore[no-untyped-call]


def warm_up_and_decay(optimiser: torch.optim.Optimizer, steps: int, warm_up_share: float) -> LRScheduler:
    """Return a schedule: rates rise from 0 over the first share of ``steps``, then fall to 0 in a line."""
    warm_up = max(1, round(steps * warm_up_share))

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        return max(0.0, (steps - step) / max(1, steps - warm_up))

    return torch.optim.lr_scheduler.LambdaLR(optimiser, factor)

"""The training loop: steps, halving, early stopping. What it trains and on what is trainer/finetune.py's matter.

Axes: U items of the window, u items of a batch, B dimensions of a base encoding, D of the space, r items with a
residual, S slates, C items of a slate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, normalize

from models.bootstrap import EMBEDDING_WEIGHT
from models.ctr_module import CtrModule, LossSums, loss_sums
from models.errors import TrainingError
from models.evaluation import auc_per_impression
from trainer.bases import BaseSource, warm_up_and_decay
from trainer.batches import I64, Batch, Slates, cut, in_order, shuffled
from trainer.encodings import autocast
from trainer.memory import is_out_of_memory, smaller
from trainer.training_config import TrainingConfig

F32 = npt.NDArray[np.float32]
Progress = Callable[[str, int, int | None], None]
"""Takes what is being done, how much of it is done and how much there is. It may raise to end the training."""

EVALUATED_AT_ONCE: Final = 256


class ItemSide(nn.Module):
    """From base encodings to item vectors, as models.bootstrap.Space makes them: what is trained of the space."""

    def __init__(
        self, projection: F32, residuals: F32, share: F32, places: I64, own: F32 | None, config: TrainingConfig
    ) -> None:
        """Take the projection [B, D], and residuals [r, D] with the share n/(n + k) [r] of each that counts.

        ``places`` [U]: which residual an item has, r for none. ``own`` [U, D]: unit vectors that items bring.
        """
        super().__init__()
        self.projection = nn.Parameter(torch.from_numpy(projection.copy()), requires_grad=config.projection)
        self.residual = nn.Parameter(torch.from_numpy(residuals.copy()), requires_grad=config.residuals)
        self.register_buffer("share", torch.from_numpy(share.copy()))
        self._places = torch.from_numpy(places)
        self._own = None if own is None else torch.from_numpy(own)

    def residuals(self) -> Tensor:
        """Return the residuals as they are added, shrunk, [r, D]."""
        return self.residual * self.get_buffer("share")[:, None]

    def forward(self, base: Tensor, rows: I64) -> Tensor:
        """Return the vectors [u, D] of items at ``rows`` by their base encodings [u, B]; zero for one without any."""
        at = torch.from_numpy(rows)
        device = self.projection.device
        vectors = base @ self.projection
        if len(self.residual):
            table = torch.cat([self.residuals(), torch.zeros_like(self.residual[:1])])
            has_text = base.detach().any(dim=1)[:, None]
            vectors = vectors + embedding(self._places[at].to(device), table) * has_text
        vectors = normalize(vectors, dim=1)
        if self._own is not None:
            own = self._own[at].to(device)
            has_own = own.any(dim=1)[:, None]
            vectors = torch.where(has_own, normalize(vectors + EMBEDDING_WEIGHT * own, dim=1), vectors)
        return vectors


@dataclass(slots=True)
class Measures:
    """What a slice says of the weights as they are."""

    loss: float
    auc: float

    def better_than(self, other: Measures, by: str) -> bool:
        """Tell whether this one is better; where the AUC cannot be told the loss decides."""
        if by == "auc" and np.isfinite(self.auc) and np.isfinite(other.auc):
            return self.auc > other.auc + 1e-6
        return self.loss < other.loss - 1e-6


@dataclass(slots=True)
class Course:
    """How a training went."""

    start: Measures
    best: Measures
    best_epoch: int = 0
    epochs: list[dict[str, float]] = field(default_factory=list)
    """One entry an epoch: train_loss, held_back_loss, held_back_auc."""


class Fitter:
    """Trains a CTR model and its item side on prepared slates."""

    def __init__(
        self,
        module: CtrModule,
        items: ItemSide,
        base: BaseSource,
        slates: Slates,
        config: TrainingConfig,
        device: torch.device,
        precision: str,
        scaler: torch.amp.GradScaler,
    ) -> None:
        self._module, self._items, self._base, self._slates = module, items, base, slates
        self._config, self._device, self._precision = config, device, precision
        self._scaler = scaler
        self._size = config.batch_impressions
        self._optimiser = torch.optim.AdamW(self._groups(), lr=config.learning_rate)
        self._trained = [p for group in self._optimiser.param_groups for p in group["params"]]

    @property
    def batch_impressions(self) -> int:
        """Return how many impressions pass at once; less than the setting after memory ended."""
        return self._size

    def fit(self, train: I64, held_back: I64, on_progress: Progress) -> Course:
        """Train until the epochs are over or the held-back slice gets no better; the best weights are restored.

        The weights of the start count as an epoch: a training that only makes things worse changes nothing. With
        ``stop_on`` "end" the held-back slice decides that alone: the rate has fallen to nothing by then, so that the
        last weights are the best guess, where the highest of many noisy measures is often luck.
        Raises TrainingError ("loss-not-finite", "out-of-memory"), and whatever ``on_progress`` raises.
        """
        config = self._config
        random = np.random.default_rng(config.seed)
        steps = steps_of_epoch(len(train), config)
        schedule = warm_up_and_decay(self._optimiser, steps * config.epochs, config.warm_up_share)
        start = self.measure(held_back)
        course = Course(start, start)
        kept = self._state()
        for epoch in range(1, config.epochs + 1):
            step_name = f"epoch {epoch} of at most {config.epochs}"
            losses, done = [], 0
            batches = shuffled(self._slates, train, config.batch_impressions, random)
            for group in _groups_of_steps(batches, config):
                self._base.begin(self._slates.item_rows(np.concatenate([b for step in group for b in step])))
                for step in group:
                    losses.append(self._step(step))
                    schedule.step()
                    done += 1
                    on_progress(step_name, done, steps)
                self._base.end()
            now = self.measure(held_back)
            course.epochs.append(
                {"train_loss": float(np.mean(losses)), "held_back_loss": now.loss, "held_back_auc": now.auc}
            )
            if config.stop_on == "end":
                better = epoch == config.epochs and (now.better_than(start, "loss") or now.better_than(start, "auc"))
            else:
                better = now.better_than(course.best, config.stop_on)
            if better:
                course.best, course.best_epoch, kept = now, epoch, self._state()
            elif config.stop_on != "end" and epoch - course.best_epoch >= config.patience:
                break
        self._restore(kept)
        return course

    def measure(self, impressions: I64) -> Measures:
        """Return loss (as trained, with positions) and mean AUC (as served, without) of impressions."""
        self._module.eval()
        sums: list[LossSums] = []
        scores: list[F32] = []
        rows = self._slates.item_rows(impressions)
        with torch.no_grad():
            vectors = self._items(self._base.evaluate(rows), rows)
            for part in in_order(impressions, EVALUATED_AT_ONCE):
                batch = cut(self._slates, part, rows)
                served, trained = self._logits(batch, vectors)
                sums.append(loss_sums(trained, *self._targets(batch)))
                scores.append(served.float().cpu().numpy()[batch.valid])
        self._module.train()
        total = LossSums(
            *(
                torch.stack([getattr(s, n) for s in sums]).sum()
                for n in ("listwise", "clicked_slates", "cross_entropy", "weight")
            )
        )
        loss = float(total.mean(self._config.listwise_weight, self._config.cross_entropy_weight))
        if not np.isfinite(loss):
            raise TrainingError("loss-not-finite", f"the loss of the held-back slice is {loss}; nothing was published")
        labels = self._slates.labels[self._slates.flat(impressions)] > 0
        aucs = auc_per_impression(np.concatenate(scores), labels, self._slates.groups(impressions))
        told = aucs[np.isfinite(aucs)]
        return Measures(loss, float(told.mean()) if len(told) else float("nan"))

    def _step(self, batches: Sequence[I64]) -> float:
        """Take one step on the gradients of some batches; return the loss. Halved until memory is enough."""
        self._module.train()
        while True:
            try:
                return self._try_step(batches)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._size = smaller(min(self._size, max(map(len, batches))), error)
                self._optimiser.zero_grad(set_to_none=True)
                self._base.drop_gradient()

    def _try_step(self, batches: Sequence[I64]) -> float:
        clicked, weight = self._normal(np.concatenate(batches))
        config, loss = self._config, 0.0
        for batch in batches:
            for piece in in_order(batch, self._size):
                part = cut(self._slates, piece)
                vectors = self._items(self._base.of(part.rows), part.rows)
                sums = loss_sums(self._logits(part, vectors)[1], *self._targets(part))
                piece_loss = config.listwise_weight * sums.listwise / clicked
                piece_loss = piece_loss + config.cross_entropy_weight * sums.cross_entropy / weight
                loss += float(piece_loss.detach())
                if not np.isfinite(loss):
                    raise TrainingError("loss-not-finite", f"the loss of a step is {loss}; nothing was published")
                self._scaler.scale(piece_loss).backward()  # type: ignore[no-untyped-call]
        self._scaler.unscale_(self._optimiser)
        norm = torch.nn.utils.clip_grad_norm_(self._trained, config.clip_norm)
        if not self._scaler.is_enabled() and not bool(torch.isfinite(norm)):
            raise TrainingError("loss-not-finite", "a gradient is not finite; nothing was published")
        self._base.take_gradient(float(self._scaler.get_scale()))
        self._scaler.step(self._optimiser)
        self._scaler.update()
        self._optimiser.zero_grad(set_to_none=True)
        return loss

    def _logits(self, batch: Batch, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [S, C] as served and with the terms of positions, from the vectors [u, D] of ``batch.rows``."""

        def there(values: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(values).to(self._device)

        with autocast(self._device, self._precision):
            served = self._module(
                there(batch.x),
                embedding(there(batch.items), vectors),
                embedding(there(batch.recents), vectors),
                there(batch.recent_known & self._has_vector(batch, vectors)),
                there(batch.recent_age),
                there(batch.recent_codes),
            )
        return served, served + self._module.position_terms(there(batch.positions))

    def _has_vector(self, batch: Batch, vectors: Tensor) -> npt.NDArray[np.bool_]:
        has: npt.NDArray[np.bool_] = vectors.detach().any(dim=1).cpu().numpy()
        return has[batch.recents] if len(has) else np.zeros(batch.recents.shape, np.bool_)

    def _targets(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return labels, weights and offsets [S, C]."""
        return (
            torch.from_numpy(batch.labels).to(self._device),
            torch.from_numpy(batch.weights).to(self._device),
            torch.from_numpy(batch.offsets).to(self._device),
        )

    def _normal(self, impressions: I64) -> tuple[float, float]:
        """Return the number of clicked impressions and the weight of the items, each at least a little."""
        flat = self._slates.flat(impressions)
        gains = (self._slates.labels[flat] * self._slates.weights[flat]) > 0
        clicked = np.unique(self._slates.groups(impressions)[gains]).size
        return float(max(clicked, 1)), float(max(self._slates.weights[flat].sum(), 1e-9))

    def _groups(self) -> list[dict[str, Any]]:
        """Return the parameters with their rates; only matrices are decayed."""
        config = self._config
        matrices = [p for p in self._module.parameters() if p.ndim > 1]
        others = [p for p in self._module.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "lr": config.learning_rate, "weight_decay": config.weight_decay},
            {"params": others, "lr": config.learning_rate, "weight_decay": 0.0},
        ]
        if config.projection:
            # Not decayed: the projection starts from a good one, and its length is divided out.
            rate = config.projection_learning_rate
            groups.append({"params": [self._items.projection], "lr": rate, "weight_decay": 0.0})
        if config.residuals and len(self._items.residual):
            rate = config.residual_learning_rate
            groups.append({"params": [self._items.residual], "lr": rate, "weight_decay": config.weight_decay})
        return groups

    def _state(self) -> tuple[Any, Any, Any]:
        return deepcopy(self._module.state_dict()), deepcopy(self._items.state_dict()), self._base.state()

    def _restore(self, kept: tuple[Any, Any, Any]) -> None:
        self._module.load_state_dict(kept[0])
        self._items.load_state_dict(kept[1])
        self._base.restore(kept[2])


def steps_of_epoch(impressions: int, config: TrainingConfig) -> int:
    """Return the steps of the head in one pass over the training slice."""
    batches = -(-impressions // config.batch_impressions)
    return -(-batches // config.accumulate)


def _groups_of_steps(batches: list[I64], config: TrainingConfig) -> list[list[list[I64]]]:
    steps = [batches[i : i + config.accumulate] for i in range(0, len(batches), config.accumulate)]
    return [steps[i : i + config.encoder_interval] for i in range(0, len(steps), config.encoder_interval)]

"""Learning from what users did one after the other, where a log holds actions and no impressions.

Each next item of a history is told apart from items that other users of the same batch acted on, by the same model
that is served: a softmax over the item and drawn ones (sampled softmax with negatives of the batch, Hidasi et al.
2016, "Session-based Recommendations with Recurrent Neural Networks", section 3.2). It teaches the item side (projection
and, if it is to be trained, the encoder), the attention and the similarity; of the live features nothing is known, so
that their weights stay as they are. Its logits are for ordering only: ``trainer.finetune.train`` on real impressions
comes after it and calibrates.

    start = learn_histories(histories, texts, StartingPoint(space, encoder, scorer=first), TrainingConfig())
    trained = train(TrainingSet(records, labels, texts), start, TrainingConfig())

Axes: N targets of a batch, K candidates of each (the target first), R recent items, D dimensions of the space,
u items of a batch, U items of all histories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding

from models.bootstrap import Space
from models.ctr import CtrScorer
from models.ctr_module import CtrModule
from models.encoder_delta import EncoderDelta
from models.errors import TrainingError
from models.events import ACTIONS
from models.user_row import POSITIVE, RECENT
from trainer.bases import BaseSource, FrozenBase, TrainedBase, warm_up_and_decay
from trainer.encodings import OutputCache, SplitEncoder, base_encodings, current_encoder
from trainer.finetune import StartingPoint, choose_device, choose_precision, silent
from trainer.fit import ItemSide, Progress
from trainer.training_config import TrainingConfig

I64 = npt.NDArray[np.int64]

CLICK: Final = (ACTIONS.index("click") + 1) | POSITIVE
AGE_SECONDS: Final = 86_400.0
"""Age of every recent item: histories tell an order, not times."""
HIDDEN: Final = -1e9
"""Logit of a candidate that the user of the target acted on: it is no negative."""
LOSSES_AT_ONCE: Final = 50


class HistoryConfig(BaseModel):
    """How histories are learned from; rates, encoder and seed are those of the TrainingConfig."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(1_000, ge=1, le=1_000_000, description="Steps, each with a batch of drawn users.")
    users: int = Field(32, ge=2, le=4_096, description="Users of a batch.")
    window: int = Field(24, ge=2, le=512, description="Items in a row of each user, drawn anew each time.")
    targets: int = Field(8, ge=1, le=512, description="Items of a window that are to be foreseen.")
    negatives: int = Field(128, ge=1, le=65_536, description="Items of the batch that each target is told apart from.")


@dataclass(slots=True)
class _Batch:
    """Targets with what came before each and what it is told apart from; places point into ``rows``."""

    rows: I64
    """Items of the batch [u], rows of all items, rising."""
    recents: I64
    """[N, R], newest first, -1 = free."""
    candidates: I64
    """[N, K]."""
    own: npt.NDArray[np.bool_]
    """[N, K]: the user of the target acted on it; never so for the target itself."""


def learn_histories(
    histories: Mapping[str, Sequence[int]],
    texts: Mapping[int, str],
    start: StartingPoint,
    config: TrainingConfig | None = None,
    history: HistoryConfig | None = None,
    *,
    new_space_id: str = "space-history",
    cache_folder: Path | None = None,
    on_progress: Progress = silent,
) -> tuple[StartingPoint, list[float]]:
    """Return a starting point that has learned from histories, and the mean loss of every LOSSES_AT_ONCE steps.

    ``histories``: items' 64-bit hashes of each user, oldest first; items without a text are left out. ``start`` needs
    a scorer (a first one: models.ctr_module.first_tensors). Residuals of its space are not kept. Same input and seed
    give the same weights on a CPU. Raises TrainingError "no-scorer", "window-too-small" (fewer than two users with two
    items), "loss-not-finite".
    """
    config, history = config or TrainingConfig(), history or HistoryConfig()
    if start.scorer is None:
        raise TrainingError(
            "no-scorer", "a starting point without a scorer has nothing to learn with: give a first one"
        )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        learner = _Learner(histories, texts, start, start.scorer, config, history, cache_folder, on_progress)
        losses = learner.run()
        return learner.result(new_space_id), losses


class _Learner:
    """One pass of learning from histories."""

    def __init__(
        self,
        histories: Mapping[str, Sequence[int]],
        texts: Mapping[int, str],
        start: StartingPoint,
        scorer: CtrScorer,
        config: TrainingConfig,
        history: HistoryConfig,
        cache_folder: Path | None,
        on_progress: Progress,
    ) -> None:
        self._start, self._config, self._history, self._show = start, config, history, on_progress
        known = {item for item, text in texts.items() if text}
        kept = [[item for item in items if item in known] for _, items in sorted(histories.items())]
        kept = [items for items in kept if len(items) >= 2]
        if len(kept) < 2:
            raise TrainingError(
                "window-too-small", f"{len(kept)} users with two items or more, at least 2 are needed: wait"
            )
        self._items = np.unique(np.concatenate([np.array(items, np.uint64) for items in kept]))
        self._users = [np.searchsorted(self._items, np.array(items, np.uint64)).astype(np.int64) for items in kept]
        weights = np.array([min(len(items), history.window) for items in kept], np.float64)
        self._weights = weights / weights.sum()
        self._random = np.random.default_rng(config.seed)
        self._device = choose_device(config)
        self._module = CtrModule(scorer.config, scorer.tensors, dropout=config.dropout).to(self._device)
        none, places = np.zeros((0, start.space.dim), np.float32), np.zeros(len(self._items), np.int64)
        self._side = ItemSide(start.space.projection, none, none[:, 0], places, None, config).to(self._device)
        self._layers: SplitEncoder | None = None
        self._base = self._base_source(
            [texts[int(item)] for item in self._items], OutputCache(cache_folder, config.cache_bytes)
        )
        matrices = [p for p in self._module.parameters() if p.ndim > 1]
        others = [p for p in self._module.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "lr": config.learning_rate, "weight_decay": config.weight_decay},
            {"params": others, "lr": config.learning_rate, "weight_decay": 0.0},
            {"params": [self._side.projection], "lr": config.projection_learning_rate, "weight_decay": 0.0},
        ]
        self._optimiser = torch.optim.AdamW(groups)
        self._trained = [p for group in self._optimiser.param_groups for p in group["params"]]
        self._schedule = warm_up_and_decay(self._optimiser, history.steps, config.warm_up_share)

    def run(self) -> list[float]:
        """Take all steps; return the mean losses."""
        self._module.train()
        losses: list[float] = []
        for step in range(self._history.steps):
            losses.append(self._step(self._draw()))
            self._show("histories", step + 1, self._history.steps)
        return [float(np.mean(losses[i : i + LOSSES_AT_ONCE])) for i in range(0, len(losses), LOSSES_AT_ONCE)]

    def result(self, new_space_id: str) -> StartingPoint:
        """Return what was learned, as a starting point."""
        start = self._start
        delta: EncoderDelta | None = start.delta if self._layers is None else self._layers.delta()
        encoder_id = start.space.encoder_id if delta is None else delta.encoder_id
        projection = self._side.projection.detach().cpu().numpy().copy()
        space = Space(new_space_id, encoder_id, projection)
        scorer = CtrScorer(self._module.config, self._module.tensors())
        return StartingPoint(space, start.encoder, delta, scorer, start.features)

    def _base_source(self, texts: list[str], cache: OutputCache) -> BaseSource:
        config, distinct = self._config, list(dict.fromkeys(texts))
        place_of = {text: place for place, text in enumerate(distinct)}
        text_of_item = np.array([place_of[text] for text in texts], np.int64)
        if config.encoder == "frozen":
            encoder = current_encoder(self._start.encoder, self._start.delta)
            encoded = base_encodings(encoder, distinct, cache, lambda done, all_: self._show("encoding", done, all_))
            return FrozenBase(encoded[text_of_item], self._device)
        precision = choose_precision(config, self._device)
        self._layers = SplitEncoder(self._start.encoder, self._start.delta, config, self._device, precision)
        self._layers.load(distinct, cache, lambda done, all_: self._show("frozen layers", done, all_))
        optimiser = torch.optim.AdamW(
            self._layers.parameters, lr=config.encoder_learning_rate, weight_decay=config.weight_decay
        )
        schedule = warm_up_and_decay(optimiser, self._history.steps, config.warm_up_share)
        scaler = torch.amp.GradScaler(self._device.type, enabled=False)
        return TrainedBase(self._layers, text_of_item, self._device, optimiser, schedule, config.clip_norm, scaler)

    def _draw(self) -> _Batch:
        """Return a batch: windows of drawn users, targets in them, and negatives of the batch."""
        history, random = self._history, self._random
        users = random.choice(
            len(self._users), min(history.users, len(self._users)), replace=False, p=self._weights
        ).tolist()
        windows = []
        for user in users:
            first = int(random.integers(0, max(1, len(self._users[user]) - history.window + 1)))
            windows.append(self._users[user][first : first + history.window])
        rows = np.unique(np.concatenate(windows))
        local = [np.searchsorted(rows, window) for window in windows]
        acted = np.zeros((len(local), len(rows)), np.bool_)
        recents, targets, owners = [], [], []
        for owner, window in enumerate(local):
            acted[owner, window] = True
            places = np.arange(1, len(window))
            if len(places) > history.targets:
                places = np.sort(random.choice(places, history.targets, replace=False))
            for place in places.tolist():
                before = window[max(0, place - RECENT) : place][::-1]
                recents.append(np.pad(before, (0, RECENT - len(before)), constant_values=-1))
                targets.append(window[place])
                owners.append(owner)
        drawn = random.choice(len(rows), min(history.negatives, len(rows)), replace=False)
        candidates = np.concatenate([np.array(targets)[:, None], np.tile(drawn, (len(targets), 1))], axis=1)
        own = acted[owners][:, drawn]
        return _Batch(rows, np.array(recents), candidates, np.pad(own, ((0, 0), (1, 0)), constant_values=False))

    def _step(self, batch: _Batch) -> float:
        self._base.begin(batch.rows)
        logits = self._logits(batch)
        loss = cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=self._device))
        value = float(loss.detach())
        if not np.isfinite(value):
            raise TrainingError("loss-not-finite", f"the loss of a step on histories is {value}; nothing was kept")
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._trained, self._config.clip_norm)
        self._base.take_gradient(1.0)
        self._optimiser.step()
        self._schedule.step()
        self._base.end()
        return value

    def _logits(self, batch: _Batch) -> Tensor:
        """Return the logits [N, K], those of the user's own items hidden."""
        vectors = self._side(self._base.of(batch.rows), batch.rows)
        known = torch.from_numpy(batch.recents >= 0).to(self._device)
        recents = embedding(torch.from_numpy(np.maximum(batch.recents, 0)).to(self._device), vectors)
        items = embedding(torch.from_numpy(batch.candidates).to(self._device), vectors)
        # The mean of each feature: it adds nothing, and its weights learn nothing.
        mean = self._module.get_buffer("feature_mean").expand(*batch.candidates.shape, -1)
        age = torch.full(known.shape, AGE_SECONDS, device=self._device)
        codes = torch.full(known.shape, CLICK, dtype=torch.uint8, device=self._device)
        logits: Tensor = self._module(mean, items, recents, known, age, codes)
        return logits.masked_fill(torch.from_numpy(batch.own).to(self._device), HIDDEN)

"""Learning the space from histories with few encodings: some live items a step, and clicks on them from all users.

A step of trainer/history.py encodes two texts for each click that it learns from. Here a step draws items, encodes only
these with a gradient, and takes clicks on them from all users; what the users did before is looked up in a table of
earlier encodings, which the steps bring up to date. Two towers meet: an item's vector as the space makes it, and the
user's, a softmax over the recent items that does not look at the candidate, so that one product scores every pair:

    p = normalise(E·P),  u = normalise(Q·Σ_r a_r·p_r),  a = softmax_r(q·p_r + recency_r),  logit = s·u·p

The loss is a softmax over the live items, each as often as it was clicked in the step (negatives of the batch, Hidasi
et al. 2016, section 3.2): what is learned is what a user likes beyond what all like. All candidates are
live: were some looked up, their age alone would tell them from the target. Gradients reach the encoder through
candidates, and through those recent items that are live (the table is the memory of Wu et al. 2018, "Unsupervised
Feature Learning via Non-Parametric Instance Discrimination", section 3.1).

Projection and encoder are what is kept. The user's tower goes: ``trainer.history.learn_histories`` with the encoder
frozen teaches the attention of the model that is served, in the new space.

Axes: U items of all histories, L live items, N clicks of a step, R recent items, B dimensions of a base encoding, D of
the space, n clicks of all histories.
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
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, normalize

from models.bootstrap import Space
from models.encoder_delta import EncoderDelta
from models.errors import TrainingError
from models.user_row import RECENT
from trainer.bases import BaseSource, FrozenBase, TrainedBase, warm_up_and_decay
from trainer.encodings import OutputCache, SplitEncoder, base_encodings, current_encoder
from trainer.finetune import StartingPoint, choose_device, choose_precision, silent
from trainer.fit import Progress
from trainer.history import HIDDEN, LOSSES_AT_ONCE
from trainer.training_config import TrainingConfig

I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

EVALUATED_AT_ONCE: Final = 4_096
FIRST_SHARPNESS: Final = 10.0
"""s of a new tower: a softmax over some hundred items."""
SHARPNESS: Final = (1.0, 30.0)


class TowerConfig(BaseModel):
    """How the space is learned; rates, encoder and seed are those of the TrainingConfig."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(240, ge=1, le=1_000_000, description="Steps, each with drawn items.")
    items: int = Field(512, ge=2, le=65_536, description="Items of a step that are encoded, and told apart.")
    clicks: int = Field(2_048, ge=1, le=1_000_000, description="Most clicks of a step.")
    clicks_of_item: int = Field(
        32, ge=1, le=65_536, description="Most clicks on one item in a step; an item is drawn by the root of these."
    )
    least_clicks: int = Field(2, ge=1, description="Items with fewer clicks are not drawn.")
    encoder_share: float = Field(
        1.0, gt=0, le=1, description="How far from its first to its last weights the encoder goes in the end."
    )


@dataclass(slots=True)
class _Clicks:
    """Clicks of all histories that have one before them, sorted by item."""

    items: I64
    """All clicks [n], user after user, oldest first, as rows of items."""
    first: I64
    """[n]: place of the first click of the same user."""
    users: I64
    """[n]."""
    places: I64
    """Places of clicks to foresee, those on one item together."""
    ends: I64
    """[U + 1]: where in ``places`` those of each item begin."""

    def recents(self, places: I64) -> tuple[I64, Bools]:
        """Return the items before each click [N, R], newest first, and which of them there are."""
        before = places[:, None] - 1 - np.arange(RECENT)[None, :]
        known = before >= self.first[places][:, None]
        return np.where(known, self.items[np.maximum(before, 0)], 0), known

    def own(self, places: I64, live: I64, all_items: int) -> Bools:
        """Tell which live items the user of each click acted on, but for the click's own, [N, L]."""
        at = np.full(all_items, -1, np.int64)
        at[live] = np.arange(len(live))
        column = at[self.items]
        users, rows = np.unique(self.users[places], return_inverse=True)
        chosen = np.flatnonzero((column >= 0) & np.isin(self.users, users))
        acted = np.zeros((len(users), len(live)), np.bool_)
        acted[np.searchsorted(users, self.users[chosen]), column[chosen]] = True
        own: Bools = acted[rows]
        own[np.arange(len(places)), column[places]] = False
        return own


class _UserTower(nn.Module):
    """From recent items to the user's vector."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.recency = nn.Parameter(torch.zeros(RECENT))
        self.query = nn.Parameter(torch.zeros(dim))
        self.turn = nn.Parameter(torch.eye(dim))
        self.sharpness = nn.Parameter(torch.tensor(FIRST_SHARPNESS))

    def forward(self, recents: Tensor, known: Tensor) -> Tensor:
        """Return unit vectors [N, D] from items [N, R, D], of which there is at least one."""
        scores = (recents @ self.query + self.recency).masked_fill(~known, HIDDEN)
        mean = (torch.softmax(scores, dim=1)[:, :, None] * recents).sum(dim=1)
        return normalize(mean @ self.turn, dim=1)

    def scale(self) -> Tensor:
        """Return s."""
        return self.sharpness.clamp(*SHARPNESS)


def learn_towers(
    histories: Mapping[str, Sequence[int]],
    texts: Mapping[int, str],
    start: StartingPoint,
    config: TrainingConfig | None = None,
    towers: TowerConfig | None = None,
    *,
    new_space_id: str = "space-towers",
    cache_folder: Path | None = None,
    on_progress: Progress = silent,
) -> tuple[StartingPoint, list[float]]:
    """Return a starting point whose space has learned from histories, and the mean loss of every LOSSES_AT_ONCE steps.

    ``histories``: items' 64-bit hashes of each user, oldest first; items without a text are left out. The scorer of
    ``start`` stays as it is; residuals of its space are not kept. Same input and seed give the same weights on a CPU.
    Raises TrainingError "window-too-small" (fewer than two items that are clicked often enough), "loss-not-finite".
    """
    config, towers = config or TrainingConfig(), towers or TowerConfig()
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        learner = _Learner(histories, texts, start, config, towers, cache_folder, on_progress)
        losses = learner.run()
        return learner.result(new_space_id), losses


class _Learner:
    """One pass of learning the space."""

    def __init__(
        self,
        histories: Mapping[str, Sequence[int]],
        texts: Mapping[int, str],
        start: StartingPoint,
        config: TrainingConfig,
        towers: TowerConfig,
        cache_folder: Path | None,
        on_progress: Progress,
    ) -> None:
        self._start, self._config, self._towers, self._show = start, config, towers, on_progress
        known = {item for item, text in texts.items() if text}
        kept = [[item for item in items if item in known] for _, items in sorted(histories.items())]
        self._items = np.unique(np.array([item for items in kept for item in items], np.uint64))
        self._clicks = _clicks(
            [np.searchsorted(self._items, np.array(items, np.uint64)) for items in kept], self._items
        )
        counts = np.diff(self._clicks.ends)
        self._drawn = np.flatnonzero(counts >= towers.least_clicks)
        if len(self._drawn) < 2:
            raise TrainingError(
                "window-too-small",
                f"{len(self._drawn)} items with {towers.least_clicks} clicks or more, at least 2 are needed: wait",
            )
        weights = np.sqrt(np.minimum(counts[self._drawn], towers.clicks_of_item))
        self._weights = weights / weights.sum()
        self._random = np.random.default_rng(config.seed)
        self._device = choose_device(config)
        self._projection = nn.Parameter(torch.from_numpy(start.space.projection.copy()).to(self._device))
        self._user = _UserTower(start.space.dim).to(self._device)
        self._layers: SplitEncoder | None = None
        self._base = self._base_source(
            [texts[int(item)] for item in self._items], OutputCache(cache_folder, config.cache_bytes)
        )
        rows = np.arange(len(self._items))
        parts = [self._base.evaluate(rows[i : i + EVALUATED_AT_ONCE]) for i in range(0, len(rows), EVALUATED_AT_ONCE)]
        self._table = torch.cat(parts)
        groups = [
            {"params": [self._projection], "lr": config.projection_learning_rate},
            {"params": list(self._user.parameters()), "lr": config.learning_rate},
        ]
        self._optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
        self._trained = [p for group in self._optimiser.param_groups for p in group["params"]]
        self._schedule = warm_up_and_decay(self._optimiser, towers.steps, config.warm_up_share)
        self._first = [p.detach().clone() for p in self._of_encoder()]

    def run(self) -> list[float]:
        """Take all steps; return the mean losses."""
        losses: list[float] = []
        for step in range(self._towers.steps):
            losses.append(self._step())
            self._show("towers", step + 1, self._towers.steps)
        self._draw_back()
        return [float(np.mean(losses[i : i + LOSSES_AT_ONCE])) for i in range(0, len(losses), LOSSES_AT_ONCE)]

    def result(self, new_space_id: str) -> StartingPoint:
        """Return what was learned, as a starting point."""
        start = self._start
        delta: EncoderDelta | None = start.delta if self._layers is None else self._layers.delta()
        encoder_id = start.space.encoder_id if delta is None else delta.encoder_id
        space = Space(new_space_id, encoder_id, self._projection.detach().cpu().numpy().copy())
        return StartingPoint(space, start.encoder, delta, start.scorer, start.features)

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
        schedule = warm_up_and_decay(optimiser, self._towers.steps, config.warm_up_share)
        scaler = torch.amp.GradScaler(self._device.type, enabled=False)
        return TrainedBase(self._layers, text_of_item, self._device, optimiser, schedule, config.clip_norm, scaler)

    def _of_encoder(self) -> list[nn.Parameter]:
        return [] if self._layers is None else self._layers.parameters

    def _draw_back(self) -> None:
        """Take the encoder part of the way back: between both weights lie those that serve new items best.

        Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", equation 1.
        """
        with torch.no_grad():
            for first, last in zip(self._first, self._of_encoder(), strict=True):
                last.lerp_(first, 1.0 - self._towers.encoder_share)

    def _draw(self) -> tuple[I64, I64]:
        """Return the live items of a step, rising, and places of clicks on them."""
        towers, clicks, random = self._towers, self._clicks, self._random
        count = min(towers.items, len(self._drawn))
        live = np.sort(random.choice(self._drawn, count, replace=False, p=self._weights))
        chosen = []
        for item in live.tolist():
            places = clicks.places[clicks.ends[item] : clicks.ends[item + 1]]
            most = towers.clicks_of_item
            chosen.append(places if len(places) <= most else random.choice(places, most, replace=False))
        places = np.concatenate(chosen)
        if len(places) > towers.clicks:
            places = random.choice(places, towers.clicks, replace=False)
        return live, places

    def _step(self) -> float:
        live, places = self._draw()
        self._base.begin(live)
        logits, targets = self._logits(live, places)
        loss = cross_entropy(logits, targets)
        value = float(loss.detach())
        if not np.isfinite(value):
            raise TrainingError("loss-not-finite", f"the loss of a step of the towers is {value}; nothing was kept")
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._trained, self._config.clip_norm)
        self._base.take_gradient(1.0)
        self._optimiser.step()
        self._schedule.step()
        self._base.end()
        return value

    def _logits(self, live: I64, places: I64) -> tuple[Tensor, Tensor]:
        """Return the logits [N, L], the users' other items hidden, and which live item each click is on, [N]."""

        def there(values: npt.NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(values).to(self._device)

        encoded = self._base.of(live)
        self._table[there(live)] = encoded.detach()
        recents, known = self._clicks.recents(places)
        rows = np.union1d(recents, live)
        base = self._table[there(rows)].index_copy(0, there(np.searchsorted(rows, live)), encoded)
        vectors = normalize(base @ self._projection, dim=1)
        users = self._user(embedding(there(np.searchsorted(rows, recents)), vectors), there(known))
        candidates = embedding(there(np.searchsorted(rows, live)), vectors)
        logits = self._user.scale() * (users @ candidates.T)
        logits = logits.masked_fill(there(self._clicks.own(places, live, len(self._items))), HIDDEN)
        targets = np.searchsorted(live, self._clicks.items[places])
        often = np.bincount(targets, minlength=len(live))
        # Each item stands for as many negatives as it has clicks here: otherwise popularity would be learned.
        times = np.where(often > 0, np.log(np.maximum(often, 1)), HIDDEN).astype(np.float32)
        return logits + there(times), there(targets)


def _clicks(histories: Sequence[npt.NDArray[np.intp]], all_items: npt.NDArray[np.uint64]) -> _Clicks:
    lengths = np.array([len(items) for items in histories], np.int64)
    items = np.concatenate([*histories, np.zeros(0, np.int64)]).astype(np.int64)
    users = np.repeat(np.arange(len(histories)), lengths)
    first = np.repeat(np.cumsum(lengths) - lengths, lengths)
    places = np.flatnonzero(np.arange(len(items)) > first)
    places = places[np.argsort(items[places], kind="stable")]
    ends = np.searchsorted(items[places], np.arange(len(all_items) + 1))
    return _Clicks(items, first, users, places, ends)

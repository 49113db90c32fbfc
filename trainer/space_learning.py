"""A space that fits how people read on: learned from what users did one after the other, before any impression is.

Three passes over the same histories, each of items' 64-bit hashes, oldest first: ``trainer.history`` (projection and
attention; the encoder frozen), ``trainer.towers`` (projection, and the encoder's top layers where that is asked for),
``trainer.history`` again, so that attention and projection fit what the towers left. What comes of it is where a
training on impressions starts: a space under its own id, and a scorer that orders by taste and knows nothing of the
live features yet (``with_features``). A replay, the trainer and benchmarks/quality.py use this one recipe.

    if enough_histories(histories, texts, config):
        start = learn_space(histories, texts, StartingPoint(space, encoder), config).start
        start = with_features(start, TrainingSet(records, labels, texts), seed=0)
        trained = train(TrainingSet(records, labels, texts), start, TrainingConfig(projection=False, residuals=False))
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from models.ctr import CONSTANT_STD, CtrScorer
from models.ctr_module import first_tensors
from models.errors import TrainingError
from models.features import FeatureConfig, columns
from trainer.batches import TrainingSet, feature_moments, fit_priors, prepare, time_order
from trainer.encodings import OutputCache
from trainer.finetune import SMALLEST_STD, StartingPoint, encode_items, silent
from trainer.fit import Progress
from trainer.history import HistoryConfig, learn_histories
from trainer.towers import TowerConfig, learn_towers
from trainer.training_config import TrainingConfig

FIRST_SCALE: Final = 10.0
"""s of the first scorer: a softmax over 64 items needs sharper logits than a slate."""
FIRST_RATE: Final = 0.1
"""Click rate that the first scorer's base speaks of; what comes after it calibrates."""
PREFIX: Final = "space-histories-"
"""Of the id of a space that was learned here, until a training on impressions moves it."""
LEG_SEEDS: Final = 1_000
"""Between the seeds of both passes of trainer.history: each draws batches of its own."""


class SpaceConfig(BaseModel):
    """How a space is learned from histories, and from how many; seed, device and encoder hold for all passes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    least_items: int = Field(
        2_000, ge=2, description="Items with a text that were acted on twice or more; with fewer nothing is learned."
    )
    history_items: int = Field(100, ge=2, le=10_000, description="Latest items of each history that are learned from.")
    warm: HistoryConfig = Field(
        default_factory=lambda: HistoryConfig(steps=800, negatives=64), description="First pass: space and attention."
    )
    towers: TowerConfig = Field(
        default_factory=lambda: TowerConfig(steps=100), description="Second pass: the space, and the encoder."
    )
    again: HistoryConfig = Field(
        default_factory=lambda: HistoryConfig(steps=300, negatives=64), description="Third pass: as the first."
    )
    history_rates: TrainingConfig = Field(
        default_factory=lambda: TrainingConfig(learning_rate=1e-3, projection_learning_rate=1e-3),
        description="Rates of the first and the third pass; the encoder is frozen in them.",
    )
    tower_rates: TrainingConfig = Field(
        default_factory=lambda: TrainingConfig(
            learning_rate=1e-3,
            projection_learning_rate=1e-4,
            encoder="frozen",
            encoder_learning_rate=3e-4,
            top_layers=2,
            precision="bfloat16",
        ),
        description="Rates of the second pass, and what of the encoder it trains.",
    )

    def settled(self, **changes: object) -> SpaceConfig:
        """Return the same with other values in the rates of all passes: seed, device, cache_bytes."""
        rates = {name: getattr(self, name).model_copy(update=changes) for name in ("history_rates", "tower_rates")}
        return self.model_copy(update=rates)

    def with_encoder(self, encoder: str) -> SpaceConfig:
        """Return the same with the second pass training so much of the encoder: frozen, top or lora."""
        return self.model_copy(update={"tower_rates": self.tower_rates.model_copy(update={"encoder": encoder})})


@dataclass(slots=True)
class LearnedSpace:
    """What was learned from histories."""

    start: StartingPoint
    """With a scorer whose features count for nothing."""
    warm: StartingPoint
    """As it was after the first pass: another encoder can go on from it."""
    losses: dict[str, list[float]] = field(default_factory=dict)
    """Of each pass (``warm``, ``towers``, ``again``), the mean of every trainer.history.LOSSES_AT_ONCE steps."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each pass."""


def enough_histories(
    histories: Mapping[str, Sequence[int]], texts: Mapping[int, str], config: SpaceConfig | None = None
) -> bool:
    """Tell whether there is enough to learn a space from: ``config.least_items`` items acted on twice or more."""
    config = config or SpaceConfig()
    return repeated_items(learnable(histories, texts, config.history_items).values()) >= config.least_items


def learnable(
    histories: Mapping[str, Sequence[int]], texts: Mapping[int, str], history_items: int
) -> dict[str, list[int]]:
    """Return the latest items of each history that have a text; histories with fewer than two of them are left out."""
    kept = {user: [item for item in items if texts.get(item)][-history_items:] for user, items in histories.items()}
    return {user: items for user, items in kept.items() if len(items) >= 2}


def repeated_items(histories: Iterable[Sequence[int]]) -> int:
    """Return how many items were acted on twice or more."""
    counts = Counter(item for items in histories for item in items)
    return sum(count >= 2 for count in counts.values())


def learn_space(
    histories: Mapping[str, Sequence[int]],
    texts: Mapping[int, str],
    start: StartingPoint,
    config: SpaceConfig | None = None,
    *,
    warm: StartingPoint | None = None,
    cache_folder: Path | None = None,
    on_progress: Progress = silent,
) -> LearnedSpace:
    """Return a starting point whose space has learned from histories.

    ``start``: where it has a scorer, that one is gone on from, the weights of its live features as they are.
    ``warm``: what an earlier call with the same histories and start had after its first pass, which is left out then.
    The new space's id tells what it was learned from. Same input and seed give the same weights on a CPU.
    Raises TrainingError: "window-too-small" where ``enough_histories`` says no, "loss-not-finite".
    """
    config = config or SpaceConfig()
    kept = learnable(histories, texts, config.history_items)
    found = repeated_items(kept.values())
    if found < config.least_items:
        raise TrainingError(
            "window-too-small",
            f"{found:,} items with a text were acted on twice or more, {config.least_items:,} are needed to learn a "
            "space from histories: wait, or lower least_items",
        )
    used = {item: texts[item] for items in kept.values() for item in items}
    seed = config.history_rates.seed
    name = space_id(histories, texts, start, config)
    if start.scorer is None:
        start = replace(start, scorer=first_scorer(start.space.dim, seed), features=FeatureConfig())
    rates = config.history_rates.model_copy(update={"encoder": "frozen"})
    other = rates.model_copy(update={"seed": seed + LEG_SEEDS})
    learned = LearnedSpace(start if warm is None else warm, start if warm is None else warm)

    def history(part: str, pass_: HistoryConfig, by: TrainingConfig) -> None:
        began = time.perf_counter()
        learned.start, learned.losses[part] = learn_histories(
            kept, used, learned.start, by, pass_, new_space_id=name, cache_folder=cache_folder, on_progress=on_progress
        )
        learned.seconds[part] = time.perf_counter() - began

    if warm is None:
        history("warm", config.warm, rates)
        learned.warm = learned.start
    began = time.perf_counter()
    learned.start, learned.losses["towers"] = learn_towers(
        kept,
        used,
        learned.start,
        config.tower_rates,
        config.towers,
        new_space_id=name,
        cache_folder=cache_folder,
        on_progress=on_progress,
    )
    if learned.start.delta is not None and cache_folder is not None:
        # Through the trained layers alone, from outputs that are kept: the next pass would run all of them.
        cache, delta = OutputCache(cache_folder, config.tower_rates.cache_bytes), learned.start.delta
        encode_items(start.encoder, used, cache, lambda done, of: on_progress("encoding", done, of), delta)
    learned.seconds["towers"] = time.perf_counter() - began
    history("again", config.again, other)
    return learned


def first_scorer(dim: int, seed: int, training: TrainingConfig | None = None) -> CtrScorer:
    """Return an untrained scorer for items [dim] of a space: it orders by cosine, and takes no notice of features.

    ``training``: whose shape it has; None: the usual one, without positions.
    """
    features = len(columns(FeatureConfig()))
    shape = (training or TrainingConfig(positions=0)).ctr_config(features, dim)
    mean, std = np.zeros(features, np.float32), np.full(features, CONSTANT_STD, np.float32)
    tensors = first_tensors(shape, mean, std, FIRST_RATE, seed)
    tensors["head.scale"][:] = FIRST_SCALE
    return CtrScorer(shape, tensors)


def with_features(start: StartingPoint, impressions: TrainingSet) -> StartingPoint:
    """Return a starting point whose scorer takes notice of the live features that ``impressions`` show.

    Their deviations and priors are those of the impressions, their weights zero: it scores as it did. Raises
    TrainingError as ``time_order`` does, and "no-scorer".
    """
    if start.scorer is None:
        raise TrainingError("no-scorer", "a starting point without a scorer takes no features: learn a space first")
    features = fit_priors(impressions.records)
    slates = prepare(time_order(impressions), features)
    mean, std = feature_moments(slates, np.arange(len(slates)))
    std = np.where(std > 1e-4 * np.maximum(1.0, np.abs(mean)), np.maximum(std, SMALLEST_STD), CONSTANT_STD)
    tensors = {
        **start.scorer.tensors,
        "feature_mean": mean.astype(np.float32),
        "feature_std": std.astype(np.float32),
        "head.features": np.zeros_like(start.scorer.tensors["head.features"]),
    }
    return replace(start, scorer=CtrScorer(start.scorer.config, tensors), features=features)


def space_id(
    histories: Mapping[str, Sequence[int]], texts: Mapping[int, str], start: StartingPoint, config: SpaceConfig
) -> str:
    """Return the id of the space that ``learn_space`` makes of these: it tells all that it was learned from."""
    digest = hashlib.blake2b(digest_size=6)
    for part in (start.space.space_id, start.space.encoder_id, config.model_dump_json()):
        digest.update(part.encode() + b"\0")
    if start.scorer is not None:
        for name, tensor in sorted(start.scorer.tensors.items()):
            digest.update(name.encode() + b"\0" + tensor.tobytes())
    used = set[int]()
    for user, items in sorted(learnable(histories, texts, config.history_items).items()):
        digest.update(user.encode() + b"\0" + np.array(items, np.uint64).tobytes())
        used.update(items)
    for item in sorted(used):
        digest.update(item.to_bytes(8, "little") + texts[item].encode() + b"\0")
    return f"{PREFIX}{digest.hexdigest()}"

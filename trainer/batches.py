"""Labelled impressions as flat arrays, and the padded batches that are cut from them.

Axes: I impressions, n impressed items of all of them, U items of the window, F features, R recent items; of a batch
S slates and C items of its longest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from models.counter_events import CLICKS, EXPECTED, HALF_LIVES, IMPRESSIONS
from models.errors import TrainingError
from models.examples import FeaturesRecord, raw_slates
from models.features import FeatureConfig, RawSlates, encode

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
OnProgress = Callable[[int, int], None]

_RECORDS_AT_ONCE: Final = 256
_STATE: Final = (
    "counters",
    "age_seconds",
    "first_seen_seconds",
    "sims",
    "shown_counts",
    "shown_age_seconds",
    "acted_age_seconds",
)
_BY_ITEM: Final = (*_STATE, "items", "positions")
_BY_IMPRESSION: Final = ("recent_items", "recent_age_seconds", "recent_codes", "user_counts", "time_ms")
LEAST_IMPRESSIONS: Final = 10


@dataclass(slots=True)
class TrainingSet:
    """Labelled impressions of a window, in any order; they are taken by event time, the latest for calibration."""

    records: Sequence[FeaturesRecord]
    """[I]. What is lagged or replayed is already left out."""
    labels: Sequence[F32]
    """[I] of [K]: 1 for an item with a positive action, else 0 (models.examples.label_values); between: a part."""
    texts: Mapping[int, str]
    """Text by hash64 of the item id (models.encoder.item_text), of items shown and recent ones; without: no vector."""
    weights: Sequence[F32] | None = None
    """[I] of [K]: how many impressed items each stands for; None: each for itself."""
    embeddings: Mapping[int, Sequence[float]] = field(default_factory=dict)
    """Vectors that items bring themselves, by hash."""


@dataclass(slots=True)
class Slates:
    """Prepared impressions. ``starts`` [I + 1] says where each one's items lie in the flat arrays [n]."""

    starts: I64
    state: dict[str, npt.NDArray[Any]]
    """The fields of RawSlates that each impressed item has, flat [n, …]: a batch is encoded when it is cut."""
    user_counts: npt.NDArray[np.uint32]
    features: FeatureConfig
    items: npt.NDArray[np.int32]
    """Row of each impressed item in ``hashes`` [n]."""
    labels: F32
    weights: F32
    offsets: F32
    """[n]. What drawing negatives added to the log-odds (King and Zeng 2001, equation 7); 0 for shown items."""
    positions: npt.NDArray[np.int32]
    recents: npt.NDArray[np.int32]
    """Rows in ``hashes`` [I, R], -1 = free."""
    recent_age: F32
    recent_codes: npt.NDArray[np.uint8]
    users: npt.NDArray[np.int32]
    times_ms: I64
    hashes: npt.NDArray[np.uint64]
    """Items of the window [U], rising."""

    def __len__(self) -> int:
        """Return I."""
        return len(self.starts) - 1

    def flat(self, impressions: I64) -> I64:
        """Return the places of impressions' items in the flat arrays, in their order."""
        sizes = self.starts[impressions + 1] - self.starts[impressions]
        ends = np.cumsum(sizes)
        flat: I64 = np.arange(int(sizes.sum())) - np.repeat(ends - sizes - self.starts[impressions], sizes)
        return flat

    def groups(self, impressions: I64) -> I64:
        """Return for each place of ``flat`` which of the impressions it is of, 0 …."""
        return np.repeat(np.arange(len(impressions)), self.starts[impressions + 1] - self.starts[impressions])

    def item_rows(self, impressions: I64) -> I64:
        """Return the rows of all items that impressions need, rising."""
        recents = self.recents[impressions]
        return np.unique(np.concatenate([self.items[self.flat(impressions)], recents[recents >= 0]])).astype(np.int64)


@dataclass(slots=True)
class Batch:
    """Padded slates; rows point into ``rows``, the items that the batch needs, each once."""

    impressions: I64
    rows: I64
    valid: npt.NDArray[np.bool_]
    x: F32
    items: I64
    """Places in ``rows`` [S, C], 0 where padded."""
    recents: I64
    """Places in ``rows`` [S, R], 0 where free: see ``recent_known``."""
    recent_known: npt.NDArray[np.bool_]
    recent_age: F32
    recent_codes: npt.NDArray[np.uint8]
    labels: F32
    weights: F32
    offsets: F32
    positions: I64


def cut(slates: Slates, impressions: I64, rows: I64 | None = None) -> Batch:
    """Return impressions as one padded batch. ``rows``: items to point into, rising; else just those needed."""
    rows = slates.item_rows(impressions) if rows is None else rows
    starts = slates.starts[impressions]
    sizes = slates.starts[impressions + 1] - starts
    places = np.arange(int(sizes.max(initial=0)))
    valid = places < sizes[:, None]
    at = np.where(valid, starts[:, None] + places, 0)
    recents = slates.recents[impressions]
    known = recents >= 0
    raw = RawSlates.empty(*valid.shape)
    raw.valid[:] = valid
    for name, values in slates.state.items():
        getattr(raw, name)[valid] = values[at[valid]]
    raw.user_counts[:] = slates.user_counts[impressions]
    raw.time_ms[:] = slates.times_ms[impressions]

    def padded(values: npt.NDArray[Any]) -> Any:
        return np.where(valid, values[at], np.zeros((), values.dtype))

    return Batch(
        impressions=impressions,
        rows=rows,
        valid=valid,
        x=encode(raw, slates.features),
        items=np.where(valid, np.searchsorted(rows, slates.items[at]), 0),
        recents=np.where(known, np.searchsorted(rows, recents), 0),
        recent_known=known,
        recent_age=slates.recent_age[impressions],
        recent_codes=slates.recent_codes[impressions],
        labels=padded(slates.labels),
        weights=padded(slates.weights),
        offsets=padded(slates.offsets),
        positions=padded(slates.positions).astype(np.int64),
    )


def feature_moments(slates: Slates, impressions: I64) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return mean and standard deviation of each column over the items of impressions, float64 [F] each."""
    count, total, squares = 0, np.zeros(0), np.zeros(0)
    for part in in_order(impressions, _RECORDS_AT_ONCE):
        batch = cut(slates, part)
        x = batch.x[batch.valid].astype(np.float64)
        count += len(x)
        total, squares = (x.sum(0), (x * x).sum(0)) if not len(total) else (total + x.sum(0), squares + (x * x).sum(0))
    mean = total / max(count, 1)
    return mean, np.sqrt(np.maximum(squares / max(count, 1) - mean**2, 0.0))


def shuffled(slates: Slates, impressions: I64, size: int, random: np.random.Generator) -> list[I64]:
    """Return the impressions of one pass, in batches of ``size`` in a drawn order.

    Impressions of like length share a batch, so that little of it is padding: sorted within stretches of 16 batches.
    """
    order = random.permutation(impressions)
    sizes = slates.starts[order + 1] - slates.starts[order]
    stretch = np.arange(len(order)) // (16 * size)
    order = order[np.lexsort((sizes, stretch))]
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return [batches[i] for i in random.permutation(len(batches))]


def in_order(impressions: I64, size: int) -> Iterator[I64]:
    """Yield impressions in their order, ``size`` at once."""
    for start in range(0, len(impressions), size):
        yield impressions[start : start + size]


def split(impressions: int, held_back_share: float, calibration_share: float) -> tuple[I64, I64, I64]:
    """Return the places of the training, held-back and calibration slices of impressions in time order.

    Raises TrainingError("window-too-small") for fewer than LEAST_IMPRESSIONS.
    """
    if impressions < LEAST_IMPRESSIONS:
        raise TrainingError(
            "window-too-small",
            f"{impressions} labelled impressions, at least {LEAST_IMPRESSIONS} are needed; nothing was trained: wait",
        )
    calibration = max(1, round(impressions * calibration_share))
    held_back = max(1, round(impressions * held_back_share))
    first = impressions - held_back - calibration
    places = np.arange(impressions)
    return places[:first], places[first : first + held_back], places[first + held_back :]


def time_order(training_set: TrainingSet) -> TrainingSet:
    """Return the same impressions by event time; ties keep their order. Raises TrainingError where lengths differ."""
    records, labels, weights = training_set.records, training_set.labels, training_set.weights
    if len(labels) != len(records) or (weights is not None and len(weights) != len(records)):
        raise TrainingError("labels", f"{len(records)} impressions and {len(labels)} labels; nothing was trained")
    for record, values in zip(records, labels, strict=True):
        if len(values) != len(record):
            raise TrainingError(
                "labels", f"impression {record.impression_id}: {len(record)} items, {len(values)} labels"
            )
    order = np.argsort([r.time_ms for r in records], kind="stable").tolist()
    return TrainingSet(
        [records[i] for i in order],
        [labels[i] for i in order],
        training_set.texts,
        None if weights is None else [weights[i] for i in order],
        training_set.embeddings,
    )


def fit_priors(records: Sequence[FeaturesRecord]) -> FeatureConfig:
    """Return the feature encoding with the mean rates of each half-life that the impressed items' counters show."""
    clicks, shown, expected = np.zeros(HALF_LIVES), np.zeros(HALF_LIVES), np.zeros(HALF_LIVES)
    # Some at once: one slate of hundreds of items would pad all of a window to its length.
    for _, raw in padded_slates(records):
        counts = np.expm1(raw.counters[raw.valid].astype(np.float64))
        clicks += counts[:, :, CLICKS].sum(0)
        shown += counts[:, :, IMPRESSIONS].sum(0)
        expected += counts[:, :, EXPECTED].sum(0)
    default = FeatureConfig()
    strength = default.prior_strength
    # Where little was counted the default stands.
    rates = (clicks + strength * np.array(default.prior_ctr)) / (shown + strength)
    first, second, third, fourth = np.clip(rates, 1e-4, 0.5).tolist()[:HALF_LIVES]
    weight = default.coec_strength
    ratios = np.clip((clicks + weight * np.array(default.prior_coec)) / (expected + weight), 1e-3, 1e3).tolist()
    return FeatureConfig(
        prior_ctr=(first, second, third, fourth), prior_coec=(ratios[0], ratios[1], ratios[2], ratios[3])
    )


def prepare(
    ordered: TrainingSet, features: FeatureConfig, on_progress: OnProgress = lambda done, total: None
) -> Slates:
    """Return impressions in time order as flat arrays; their batches are encoded with ``features``."""
    records = ordered.records
    parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in (*_BY_ITEM, *_BY_IMPRESSION)}
    for at, raw in padded_slates(records):
        for name in _BY_ITEM:
            parts[name].append(getattr(raw, name)[raw.valid])
        for name in _BY_IMPRESSION:
            parts[name].append(getattr(raw, name))
        on_progress(at.stop, len(records))
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    sizes = np.fromiter(map(len, records), np.int64, len(records))
    recents = joined["recent_items"]
    hashes = np.unique(np.concatenate([joined["items"], recents[recents != 0]]))
    labels = np.concatenate(ordered.labels).astype(np.float32)
    weights = np.ones_like(labels) if ordered.weights is None else np.concatenate(ordered.weights).astype(np.float32)
    offsets = np.array([sampling_offset(record) for record in records], np.float32)
    return Slates(
        starts=np.r_[0, np.cumsum(sizes)],
        state={name: joined[name] for name in _STATE},
        user_counts=joined["user_counts"],
        features=features,
        items=np.searchsorted(hashes, joined["items"]).astype(np.int32),
        labels=labels,
        weights=weights,
        offsets=np.repeat(offsets, sizes),
        positions=joined["positions"].astype(np.int32),
        recents=np.where(recents != 0, np.searchsorted(hashes, recents), -1).astype(np.int32),
        recent_age=joined["recent_age_seconds"],
        recent_codes=joined["recent_codes"],
        users=np.unique([r.user_id for r in records], return_inverse=True)[1].astype(np.int32),
        times_ms=joined["time_ms"],
        hashes=hashes,
    )


def sampling_offset(record: FeaturesRecord) -> float:
    """Return what drawing negatives at a rate added to the log-odds of an impression's items; 0 for shown ones.

    −log(rate): with a share ``rate`` of the negatives kept, the odds among the kept are 1 / rate of the true ones
    (King and Zeng 2001, equation 7).
    """
    return 0.0 if record.negative_rate is None else -float(np.log(record.negative_rate))


def padded_slates(records: Sequence[FeaturesRecord]) -> Iterator[tuple[slice, RawSlates]]:
    """Yield records as padded slates, some at once, with the places that they have among ``records``."""
    for start in range(0, len(records), _RECORDS_AT_ONCE):
        at = slice(start, min(start + _RECORDS_AT_ONCE, len(records)))
        yield at, raw_slates(records[at])

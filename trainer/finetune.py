"""One training: labelled impressions and a starting point in, the tensors of a bundle and their measures out.

The window is cut by event time: what is trained on, then a held-back slice that early stopping watches, then the latest
slice, on which the log-odds are calibrated. The same window, start and settings give the same weights on a CPU, bit
for bit, where the number of torch's threads is the same.

    trained = train(TrainingSet(records, labels, texts), StartingPoint(space, encoder), TrainingConfig())
    table = ItemTable(trained.space, encode_items(encoder, texts, cache))      # trainer/scoring.py
    log_odds = score(trained.scorer, trained.features, table, records)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from models.bootstrap import Space
from models.bundle import ItemEncodings
from models.ctr import CONSTANT_STD, CtrConfig, CtrScorer, fit_calibration
from models.ctr_module import CtrModule, first_tensors
from models.encoder import TextEncoder
from models.encoder_delta import EncoderDelta
from models.errors import TrainingError
from models.evaluation import auc_per_impression, expected_calibration_error, log_loss
from models.features import SPACE_COLUMNS, FeatureConfig, columns, require_spec, spec_id
from models.hashing import hash64
from trainer.bases import BaseSource, FrozenBase, TrainedBase, warm_up_and_decay
from trainer.batches import I64, Slates, TrainingSet, feature_moments, fit_priors, prepare, split, time_order
from trainer.encodings import OutputCache, SplitEncoder, base_encodings, current_encoder
from trainer.fit import Course, Fitter, ItemSide, Progress, steps_of_epoch
from trainer.scoring import ItemTable, encode_items, own_vectors, score
from trainer.training_config import TrainingConfig

__all__ = [
    "ItemTable",
    "OutputCache",
    "StartingPoint",
    "Trained",
    "TrainingConfig",
    "TrainingSet",
    "encode_items",
    "score",
    "train",
]

F32 = npt.NDArray[np.float32]
SMALLEST_STD: Final = 0.05
"""Least deviation that a feature is divided by; most columns are logarithms and shares of about 1."""
_CARRY_RIDGE: Final = 1.0
"""Pulls the carrying map towards "nothing changes" as strongly as one item's vector pulls it."""


def silent(step: str, done: int, total: int | None) -> None:
    """Show nothing."""


@dataclass(slots=True)
class StartingPoint:
    """What a training starts from: the bootstrap space, or the parts of a parent bundle."""

    space: Space
    """Its ``encoder_id`` is that of ``encoder`` with ``delta``."""
    encoder: TextEncoder
    """The base encoder, as the settings name it; a training leaves it as it is."""
    delta: EncoderDelta | None = None
    """What the parent's fine-tuning changed of it."""
    scorer: CtrScorer | None = None
    features: FeatureConfig | None = None
    """Of ``scorer``; without one the priors are fitted on the window."""


@dataclass(slots=True)
class Trained:
    """What a training made."""

    scorer: CtrScorer
    """With ``config`` and ``tensors`` for a bundle; calibrated."""
    features: FeatureConfig
    space: Space
    """The start's, under its id, where nothing of it was trained; else a new one, under ``new_space_id``."""
    delta: EncoderDelta | None
    """Of the encoder, over its base; None where the encoder is the base one."""
    encodings: ItemEncodings | None
    """Base encodings of the window's items under an encoder that was trained now; None where it was not."""
    carry: F32 | None
    """[D, D]: a vector of the start's space times this is about one of the new space; None in an unchanged space."""
    metrics: dict[str, float]
    course: Course
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time by part of the work."""


def train(
    training_set: TrainingSet,
    start: StartingPoint,
    config: TrainingConfig | None = None,
    *,
    new_space_id: str = "space-new",
    cache_folder: Path | None = None,
    on_progress: Progress = silent,
) -> Trained:
    """Train a CTR model on labelled impressions.

    ``cache_folder``: where outputs of frozen encoder layers are kept for the next round; None: nowhere.
    ``on_progress``: called with step, done and total; what it raises ends the training.
    Raises TrainingError: "window-too-small", "labels" (do not fit the impressions, or are of one kind only),
    "loss-not-finite", "out-of-memory", "encoder-layout"; EncoderError and BundleError ("feature-spec").
    """
    with _deterministic(config or TrainingConfig()) as settings:
        return _Training(training_set, start, settings, new_space_id, cache_folder, on_progress).run()


def without_similarities(tensors: Mapping[str, F32], features: FeatureConfig) -> dict[str, F32]:
    """Return tensors of a model that takes no notice of similarities to the user's vectors.

    Records hold those of the space that was served. In a space that is trained they would be others, of vectors that
    no record has: a model that learned from the old ones would be served the new ones.
    """
    std = tensors["feature_std"].copy()
    std[np.isin(columns(features), SPACE_COLUMNS)] = CONSTANT_STD
    return {**tensors, "feature_std": std}


class _Training:
    """The parts of one training, in their order."""

    def __init__(
        self,
        training_set: TrainingSet,
        start: StartingPoint,
        config: TrainingConfig,
        new_space_id: str,
        cache_folder: Path | None,
        on_progress: Progress,
    ) -> None:
        self._set, self._start, self._config = time_order(training_set), start, config
        self._new_space_id, self._show = new_space_id, on_progress
        self._cache = OutputCache(cache_folder, config.cache_bytes)
        self._device = choose_device(config)
        self._precision = choose_precision(config, self._device)
        self._seconds: dict[str, float] = {}
        self._parts = split(len(self._set.records), config.held_back_share, config.calibration_share)

    def run(self) -> Trained:
        """Train, calibrate, measure."""
        learned_on = [self._set.records[i] for i in self._parts[0]]
        features = self._start.features if self._start.scorer is not None else None
        features = features or fit_priors(learned_on)
        require_spec(spec_id(features), FeatureConfig())
        with self._timed("features"):
            slates = prepare(self._set, features, partial(self._show, "features"))
        self._check_labels(slates)
        ctr, first = self._first_scorer(slates, features)
        if self._config.changes_space:
            first = without_similarities(first, features)
        module = CtrModule(ctr, first, dropout=self._config.dropout).to(self._device)
        items, residual_rows = self._item_side(slates)
        texts, text_of_item = _texts(slates, self._set.texts)
        base, scaler, split_encoder = self._base(texts, text_of_item)
        with self._timed("encoding"):
            before = self._encodings(slates, base, texts, text_of_item)
        fitter = Fitter(module, items, base, slates, self._config, self._device, self._precision, scaler)
        with self._timed("training"):
            course = fitter.fit(self._parts[0], self._parts[1], self._show)
        with self._timed("training"):
            encodings = self._encodings(slates, base, texts, text_of_item)
        if not course.best_epoch:
            # Nothing was better than the start: its encoder stays, under its id.
            split_encoder = None
        space, delta = self._space(items, slates, residual_rows, split_encoder, course)
        tensors = module.tensors()
        with self._timed("scoring"):
            scorer, metrics = self._calibrate(module.config, tensors, features, space, encodings, slates)
        metrics |= _course_metrics(course)
        metrics |= {"impressions": float(len(slates)), "examples": float(len(slates.labels))}
        changed = space is not self._start.space
        return Trained(
            scorer=scorer,
            features=features,
            space=space,
            delta=delta,
            encodings=encodings if split_encoder is not None else None,
            carry=self._carry(space, before, encodings) if changed else None,
            metrics=metrics,
            course=course,
            seconds=self._seconds,
        )

    def _check_labels(self, slates: Slates) -> None:
        labels = slates.labels[slates.flat(self._parts[0])]
        if not np.isfinite(slates.labels).all() or slates.labels.min() < 0 or slates.labels.max() > 1:
            raise TrainingError("labels", "a label is not between 0 and 1; nothing was trained")
        if not (labels > 0).any() or not (labels <= 0).any():
            raise TrainingError("labels", "all labels of the training slice are alike; nothing was trained: wait")

    def _first_scorer(self, slates: Slates, features: FeatureConfig) -> tuple[CtrConfig, Mapping[str, F32]]:
        if self._start.scorer is not None:
            return self._start.scorer.config, self._start.scorer.tensors
        flat = slates.flat(self._parts[0])
        mean, std = feature_moments(slates, self._parts[0])
        # What did not vary here says nothing; what hardly varied would be enormous where it varies later.
        std = np.where(std > 1e-4 * np.maximum(1.0, np.abs(mean)), np.maximum(std, SMALLEST_STD), CONSTANT_STD)
        weights = slates.weights[flat]
        rate = float((slates.labels[flat] * weights).sum() / weights.sum())
        odds = np.log(max(rate, 1e-6) / max(1 - rate, 1e-6)) - float(slates.offsets[flat].mean())
        config = self._config.ctr_config(len(columns(features)), self._start.space.dim)
        click_rate = float(1 / (1 + np.exp(-odds)))
        first = first_tensors(
            config, np.asarray(mean, np.float32), np.asarray(std, np.float32), click_rate, self._config.seed
        )
        return config, first

    def _item_side(self, slates: Slates) -> tuple[ItemSide, I64]:
        """Return the trainable space, and the rows of the items that have a residual."""
        space, k = self._start.space, self._config.residual_strength
        shown = np.bincount(slates.items[slates.flat(self._parts[0])], minlength=len(slates.hashes))
        has_text = np.array([bool(self._set.texts.get(int(h))) for h in slates.hashes], np.bool_)
        rows = np.flatnonzero((shown > 0) & has_text)
        if not self._config.residuals:
            rows = np.flatnonzero(np.isin(slates.hashes, space.residual_items))
            shown = np.full(len(slates.hashes), np.inf)
        share = np.ones(len(rows)) if not self._config.residuals else shown[rows] / (shown[rows] + k)
        first = np.zeros((len(rows), space.dim), np.float32)
        at = np.searchsorted(space.residual_items, slates.hashes[rows])
        inside = np.minimum(at, max(len(space.residual_items) - 1, 0))
        if len(space.residual_items):
            known = space.residual_items[inside] == slates.hashes[rows]
            first[known] = space.residuals[inside[known]] / share[known, None]
        places = np.full(len(slates.hashes), len(rows), np.int64)
        places[rows] = np.arange(len(rows))
        embeddings = self._set.embeddings
        own = own_vectors(space, slates.hashes, embeddings) if embeddings else None
        side = ItemSide(space.projection, first, share.astype(np.float32), places, own, self._config)
        return side.to(self._device), rows.astype(np.int64)

    def _base(
        self, texts: list[str], text_of_item: I64
    ) -> tuple[BaseSource, torch.amp.GradScaler, SplitEncoder | None]:
        """Return where base encodings come from, the head's gradient scaler, and the encoder if it is trained."""
        half = self._precision == "float16"
        scaler = torch.amp.GradScaler(self._device.type, enabled=half)
        self._check_encoder()
        if self._config.encoder == "frozen":
            with self._timed("encoding"):
                encoder = current_encoder(self._start.encoder, self._start.delta)
                encoded = base_encodings(encoder, texts, self._cache, partial(self._show, "encoding"))
            return FrozenBase(_by_item(encoded, text_of_item), self._device), scaler, None
        with self._timed("encoding"):
            layers = SplitEncoder(self._start.encoder, self._start.delta, self._config, self._device, self._precision)
            layers.load(texts, self._cache, partial(self._show, "frozen layers"))
        steps = -(-steps_of_epoch(len(self._parts[0]), self._config) // self._config.encoder_interval)
        optimiser = torch.optim.AdamW(
            layers.parameters, lr=self._config.encoder_learning_rate, weight_decay=self._config.weight_decay
        )
        schedule = warm_up_and_decay(optimiser, steps * self._config.epochs, self._config.warm_up_share)
        own_scaler = torch.amp.GradScaler(self._device.type, enabled=half)
        clip = self._config.clip_norm
        return TrainedBase(layers, text_of_item, self._device, optimiser, schedule, clip, own_scaler), scaler, layers

    def _check_encoder(self) -> None:
        encoder_id = self._start.encoder.encoder_id if self._start.delta is None else self._start.delta.encoder_id
        if encoder_id != self._start.space.encoder_id:
            raise TrainingError(
                "encoder",
                f"the space is of {self._start.space.encoder_id!r}, the encoder is {encoder_id!r}; nothing was trained",
            )

    def _encodings(self, slates: Slates, base: BaseSource, texts: list[str], text_of_item: I64) -> ItemEncodings:
        """Return the window's base encodings as workers will hold them, fp16."""
        rows = np.flatnonzero(text_of_item >= 0)
        parts = [base.evaluate(rows[i : i + 4_096]).cpu().numpy() for i in range(0, len(rows), 4_096)]
        dim = self._start.space.base_dim
        encoded = np.concatenate(parts) if parts else np.zeros((0, dim), np.float32)
        contents = np.array([hash64(texts[t]) for t in text_of_item[rows]], np.uint64)
        return ItemEncodings(slates.hashes[rows], contents, encoded.astype(np.float16))

    def _space(
        self, items: ItemSide, slates: Slates, residual_rows: I64, layers: SplitEncoder | None, course: Course
    ) -> tuple[Space, EncoderDelta | None]:
        start, config = self._start, self._config
        delta = start.delta if layers is None else layers.delta()
        if not course.best_epoch or (layers is None and not config.projection and not config.residuals):
            return start.space, delta
        encoder_id = start.space.encoder_id if delta is None or layers is None else delta.encoder_id
        residual_items, residuals = start.space.residual_items, start.space.residuals
        if config.residuals:
            residual_items = slates.hashes[residual_rows]
            residuals = items.residuals().detach().cpu().numpy()
        projection = items.projection.detach().cpu().numpy().copy()
        space = Space(self._new_space_id, encoder_id, projection, residual_items, residuals)
        return (start.space if space.same_as(start.space) else space), delta

    def _calibrate(
        self,
        ctr: CtrConfig,
        tensors: dict[str, F32],
        features: FeatureConfig,
        space: Space,
        encodings: ItemEncodings,
        slates: Slates,
    ) -> tuple[CtrScorer, dict[str, float]]:
        """Fit the calibration on the latest slice, by the code that serves, and measure both later slices."""
        _, held_back, calibration = self._parts
        table = ItemTable(space, encodings, self._set.embeddings)
        later = [self._set.records[i] for i in np.concatenate([held_back, calibration])]
        plain = CtrScorer(ctr, tensors | {"calibration": np.array([1.0, 0.0], np.float32)})
        self._show("scoring", 0, 1)
        logits = score(plain, features, table, later)
        self._show("scoring", 1, 1)
        flat = np.concatenate(logits[len(held_back) :])
        at = slates.flat(calibration)
        fitted = fit_calibration(flat, slates.labels[at], slates.weights[at], slates.offsets[at])
        scorer = CtrScorer(ctr, tensors | {"calibration": fitted})
        metrics: dict[str, float] = {"calibration_a": float(fitted[0]), "calibration_b": float(fitted[1])}
        for name, part, own in (
            ("held_back", held_back, logits[: len(held_back)]),
            ("calibration", calibration, logits[len(held_back) :]),
        ):
            at = slates.flat(part)
            odds = scorer.log_odds(np.concatenate(own)) + slates.offsets[at]
            measured = measures(odds, slates.labels[at], slates.groups(part), slates.weights[at])
            metrics |= {f"{measure}_{name}": value for measure, value in measured.items()}
        return scorer, metrics

    def _carry(self, space: Space, before: ItemEncodings, after: ItemEncodings) -> F32:
        """Return the map by which long-term vectors go over to the new space: least squares over the items."""
        old = self._start.space.item_vectors(before.base, before.items)
        return carrying_map(old, space.item_vectors(after.base, after.items))

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - began


def measures(log_odds: npt.ArrayLike, labels: F32, impressions: I64, weights: F32) -> dict[str, float]:
    """Return AUC (mean over impressions that have both kinds), log loss and calibration error of impressed items."""
    odds = np.asarray(log_odds, np.float64)
    p = 1 / (1 + np.exp(-odds))
    aucs = auc_per_impression(odds, labels > 0, impressions)
    told = aucs[np.isfinite(aucs)]
    return {
        "auc": float(told.mean()) if len(told) else float("nan"),
        "log_loss": log_loss(p, labels, weights),
        "ece": expected_calibration_error(p, labels, weights=weights),
    }


def carrying_map(old: F32, new: F32) -> F32:
    """Return M, float32 [D, D], that minimises |old·M − new|² + ridge·|M − 1|² over rows [n, D] of unit vectors."""
    a, b = old.astype(np.float64), new.astype(np.float64)
    eye = np.eye(a.shape[1]) * _CARRY_RIDGE
    return np.asarray(np.linalg.solve(a.T @ a + eye, a.T @ b + eye), np.float32)


def choose_device(config: TrainingConfig) -> torch.device:
    """Return where to train. Raises TrainingError("device") where cuda is asked for and not there."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TrainingError("device", "training.device is cuda and torch finds no GPU: set it to auto or cpu")
    return torch.device("cuda")


def choose_precision(config: TrainingConfig, device: torch.device) -> str:
    """Return the precision of matrix products."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cpu":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


@contextmanager
def _deterministic(config: TrainingConfig) -> Iterator[TrainingConfig]:
    """Draw from the seed and add in a fixed order, and leave torch's state as it was."""
    was, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        torch.use_deterministic_algorithms(choose_device(config).type == "cpu", warn_only=True)
        try:
            yield config
        finally:
            torch.use_deterministic_algorithms(was, warn_only=warned)


def _texts(slates: Slates, texts: Mapping[int, str]) -> tuple[list[str], I64]:
    """Return the distinct texts of the window's items, and the place of each item's among them, -1 for none."""
    places: dict[str, int] = {}
    of_item = np.full(len(slates.hashes), -1, np.int64)
    for row, item in enumerate(slates.hashes.tolist()):
        text = texts.get(item)
        if text:
            of_item[row] = places.setdefault(text, len(places))
    return list(places), of_item


def _by_item(encoded: npt.NDArray[np.float16], text_of_item: I64) -> npt.NDArray[np.float16]:
    table = np.zeros((len(text_of_item), encoded.shape[1]), np.float16)
    has = text_of_item >= 0
    table[has] = encoded[text_of_item[has]]
    return table


def _course_metrics(course: Course) -> dict[str, float]:
    last = course.epochs[-1] if course.epochs else {}
    return {
        "start_loss_held_back": course.start.loss,
        "start_auc_held_back": course.start.auc,
        "loss_held_back": course.best.loss,
        "train_loss": float(last.get("train_loss", float("nan"))),
        "epochs": float(len(course.epochs)),
        "best_epoch": float(course.best_epoch),
    }

"""Several trainings from the same weights, and the mean of what they made: less chance in it, and no dearer to serve.

Trainings that start from one learned model and differ in order, dropout and draws end in one valley of the loss, so
that the mean of their weights scores as the mean of their scores would (Wortsman et al. 2022, "Model soups: averaging
weights of multiple fine-tuned models improves accuracy without increasing inference time", section 2). From drawn
first weights they do not: it needs a start that has a scorer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from models.ctr import CtrScorer, fit_calibration
from models.errors import TrainingError
from trainer.batches import TrainingSet, sampling_offset, split, time_order
from trainer.finetune import StartingPoint, Trained, silent, train
from trainer.fit import Progress
from trainer.scoring import ItemTable, score
from trainer.training_config import TrainingConfig

F32 = npt.NDArray[np.float32]


def train_soup(
    sets: Sequence[TrainingSet],
    start: StartingPoint,
    config: TrainingConfig,
    table: ItemTable,
    *,
    cache_folder: Path | None = None,
    on_progress: Progress = silent,
) -> Trained:
    """Return the mean of one training on each of ``sets``, with rising seeds, calibrated on the latest of the first.

    ``table``: the items in the space of ``start``, which stays. Measures are means over the trainings, but for the
    calibration. Raises TrainingError as ``train`` does, and "no-scorer", "space" where ``config`` changes the space.
    """
    if start.scorer is None or start.features is None:
        raise TrainingError("no-scorer", "the mean of trainings from drawn weights is no model: give a learned start")
    if config.changes_space:
        raise TrainingError("space", "trainings that change the space have no mean: train the head alone")
    made = [
        train(
            one,
            start,
            config.model_copy(update={"seed": config.seed + number}),
            cache_folder=cache_folder,
            on_progress=on_progress,
        )
        for number, one in enumerate(sets)
    ]
    tensors: dict[str, F32] = {
        name: np.asarray(np.mean([one.scorer.tensors[name] for one in made], axis=0, dtype=np.float64), np.float32)
        for name in start.scorer.tensors
    }
    plain = CtrScorer(start.scorer.config, tensors | {"calibration": np.array([1.0, 0.0], np.float32)})
    ordered = time_order(sets[0])
    later = split(len(ordered.records), config.held_back_share, config.calibration_share)[2].tolist()
    records, labels = [ordered.records[i] for i in later], [ordered.labels[i] for i in later]
    flat = np.concatenate(score(plain, start.features, table, records))
    offsets = np.repeat([sampling_offset(record) for record in records], [len(record) for record in records])
    weights = None if ordered.weights is None else np.concatenate([ordered.weights[i] for i in later])
    fitted = fit_calibration(flat, np.concatenate(labels), weights, offsets)
    scorer = CtrScorer(plain.config, tensors | {"calibration": fitted})
    metrics = {name: float(np.mean([one.metrics[name] for one in made])) for name in made[0].metrics}
    metrics |= {"calibration_a": float(fitted[0]), "calibration_b": float(fitted[1])}
    seconds = {part: sum(one.seconds.get(part, 0.0) for one in made) for part in made[0].seconds}
    return replace(made[0], scorer=scorer, metrics=metrics, seconds=seconds)

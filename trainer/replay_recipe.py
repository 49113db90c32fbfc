"""By which settings a replay trains the head: those that won on the logs of docs/quality.md."""

from __future__ import annotations

from typing import Any, Final

from trainer.training_config import TrainingConfig

_GENTLE: Final[dict[str, Any]] = {
    "epochs": 6,
    "patience": 2,
    "batch_impressions": 256,
    "learning_rate": 1e-3,
    "dropout": 0.3,
    "held_back_share": 0.08,
    "calibration_share": 0.04,
}

HEADS_AVERAGED: Final = 4
"""Trainings whose mean is taken where they all go on from what was learned from histories (trainer/soup.py)."""


def head_recipe(from_histories: bool = False, thinned: bool = False) -> TrainingConfig:
    """Return how a head is trained on a log, item vectors as they are.

    ``from_histories``: it goes on from what was learned from histories (trainer/space_learning.py). What it knows
    already is soon spoiled, so that it takes fewer and smaller steps, with more dropout. ``thinned``: each click is
    compared several times an epoch, and is soon known by heart: the same.
    """
    recipe = TrainingConfig(
        epochs=16,
        # The held-back slice of a log is some hundred impressions: the epoch that it likes best is chosen by chance.
        stop_on="end",
        held_back_share=0.03,
        calibration_share=0.05,
        batch_impressions=256,
        learning_rate=3e-3,
        cross_entropy_weight=0.0,
        positions=0,
        projection=False,
        residuals=False,
        device="cpu",
    )
    return recipe.model_copy(update=_GENTLE) if from_histories or thinned else recipe

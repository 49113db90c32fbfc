"""By which settings a replay trains the head: those that won on the logs of docs/quality.md."""

from __future__ import annotations

from trainer.training_config import TrainingConfig


def head_recipe() -> TrainingConfig:
    """Return how a head is trained on a log, item vectors as they are."""
    return TrainingConfig(
        epochs=12,
        patience=5,
        stop_on="auc",
        held_back_share=0.05,
        calibration_share=0.05,
        batch_impressions=128,
        learning_rate=2e-3,
        cross_entropy_weight=0.0,
        positions=0,
        projection=False,
        residuals=False,
        device="cpu",
    )

"""By which settings a replay trains the head: those that won on the logs of docs/quality.md."""

from __future__ import annotations

from trainer.training_config import TrainingConfig


def head_recipe() -> TrainingConfig:
    """Return how a head is trained on a log, item vectors as they are."""
    return TrainingConfig(
        epochs=8,
        batch_impressions=128,
        learning_rate=2e-3,
        cross_entropy_weight=0.0,
        hidden=(128, 32),
        activation="silu",
        positions=0,
        projection=False,
        residuals=False,
        device="cpu",
    )

"""How one round trains: cheap to import, so that the trainer's settings can hold it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from models.ctr import CtrConfig


class TrainingConfig(BaseModel):
    """Settings of one training; a bundle keeps the ones that it was trained with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(4, ge=1, le=1_000, description="Most passes over the training slice.")
    batch_impressions: int = Field(64, ge=1, le=65_536, description="Impressions of a batch; halved where memory ends.")
    accumulate: int = Field(1, ge=1, le=1_024, description="Batches whose gradients make one step.")
    learning_rate: float = Field(2e-3, gt=0, le=1, description="Highest rate of head and attention.")
    projection_learning_rate: float = Field(5e-4, gt=0, le=1, description="Highest rate of the projection.")
    residual_learning_rate: float = Field(5e-3, gt=0, le=1, description="Highest rate of the items' residuals.")
    encoder_learning_rate: float = Field(5e-5, gt=0, le=1, description="Highest rate of encoder layers or LoRA.")
    warm_up_share: float = Field(0.1, ge=0, le=0.9, description="Share of the steps in which the rates rise from 0.")
    clip_norm: float = Field(1.0, gt=0, description="Longest gradient of a step, over all that is trained.")
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW's, on matrices; never on biases and scales.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Of the hidden layers of the head, in training.")
    listwise_weight: float = Field(1.0, ge=0, description="Weight of the listwise softmax loss.")
    cross_entropy_weight: float = Field(1.0, ge=0, description="Weight of the binary cross-entropy.")

    hidden: tuple[int, ...] = Field((128, 32), min_length=1, max_length=4, description="Hidden layers of a new model.")
    activation: Literal["sigmoid", "silu", "relu"] = Field("silu", description="σ of a new model.")
    attention_dim: int = Field(64, ge=1, le=1_024, description="Attention dimensions of a new model.")
    positions: int = Field(32, ge=0, le=1_000, description="Positions with a term, of a new model; 0: none.")

    encoder: Literal["frozen", "top", "lora"] = Field(
        "frozen", description="What of the text encoder is trained: nothing, its top layers, or LoRA in them."
    )
    top_layers: int = Field(1, ge=1, le=48, description="Layers, from the top, that are trained or hold LoRA.")
    lora_rank: int = Field(8, ge=1, le=256, description="Rank of LoRA on attention query and value.")
    lora_alpha: float = Field(16.0, gt=0, description="LoRA's scale is this over the rank.")
    encoder_dropout: float = Field(0.0, ge=0, lt=1, description="Of the trained encoder layers, in training.")
    encoder_interval: int = Field(
        1, ge=1, le=1_024, description="Steps of the head for one step of the encoder: its texts are encoded once."
    )
    encoder_batch_texts: int = Field(64, ge=1, le=4_096, description="Texts of one pass through the encoder.")

    projection: bool = Field(
        True,
        description="Whether the projection is trained; with it the space changes, and a model of a changed space "
        "takes no notice of similarities to the user's vectors, which records hold in the old one.",
    )
    residuals: bool = Field(True, description="Whether items with history get a residual; with it the space changes.")
    residual_strength: float = Field(20.0, gt=0, description="k of the shrinkage n/(n + k), n impressions of an item.")

    held_back_share: float = Field(
        0.1, gt=0, lt=0.5, description="Share of the window, after what is trained on, that early stopping watches."
    )
    calibration_share: float = Field(0.1, gt=0, lt=0.5, description="Latest share of the window; calibration only.")
    patience: int = Field(2, ge=1, description="Epochs without a better held-back slice before it stops.")
    stop_on: Literal["loss", "auc", "end"] = Field(
        "loss",
        description="Which measure of the held-back slice picks the epoch. end: none does, all epochs are run and the "
        "last weights taken, unless both measures are worse than at the start; for slices too small to tell epochs "
        "apart.",
    )

    seed: int = Field(0, ge=0, description="Of initial weights, order and dropout: on a CPU the same weights again.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of matrix products. auto: float32 on a CPU, bfloat16 (else float16) on cuda."
    )
    cache_bytes: int = Field(
        4 << 30, ge=0, description="Most bytes on disk of frozen layers' outputs; oldest go first."
    )

    @property
    def changes_space(self) -> bool:
        """Whether items get other vectors by the training."""
        return self.projection or self.residuals or self.encoder != "frozen"

    def ctr_config(self, features: int, dim: int) -> CtrConfig:
        """Return the shape of a new model."""
        return CtrConfig(
            dim=dim,
            features=features,
            hidden=self.hidden,
            attention_dim=self.attention_dim,
            positions=self.positions,
            activation=self.activation,
        )

"""Settings of the trainer: section ``[trainer]`` of the settings file, variables ``MILLSTREAM_TRAINER__…``.

How Kafka is reached, the names of the topics, the encoder and the registry are the worker's settings; the command line
reads them and hands them over (trainer/connection.py).
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from models.errors import SettingsError
from trainer.promotion import GateConfig
from trainer.training_config import TrainingConfig

SECTION: Final = "trainer"
VARIABLE_PREFIX: Final = "MILLSTREAM_TRAINER__"
CONFIG_FILE_VARIABLE: Final = "MILLSTREAM_CONFIG"
DEFAULT_CONFIG_FILE: Final = "millstream.toml"


class TrainerConfig(BaseSettings):
    """Everything that the trainer is told, from the environment over the TOML file over the defaults."""

    model_config = SettingsConfigDict(
        env_prefix=VARIABLE_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, validate_default=True
    )

    data_folder: Path = Field(
        Path(".millstream/trainer"),
        description="Lock, state, spool, cached encodings, bundles being made, TensorBoard logs. For one trainer.",
    )
    round_minutes: float = Field(
        30.0, gt=0, description="A round starts this long after the start of the one before, or earlier: see below."
    )
    round_examples: int = Field(
        100_000, ge=1, description="A round starts early when so many impressions were labelled since the last one."
    )
    poll_seconds: float = Field(5.0, gt=0, le=600, description="How often it looks how much is new.")
    window_hours: float = Field(72.0, gt=0, description="Broker time of the impressions that a round learns from.")
    spool_days: float = Field(
        14.0, gt=0, description="How long spooled records are kept; as long, any bundle's window can be rebuilt."
    )
    max_impressions: int = Field(
        1_000_000, ge=1, description="Most impressions of a window that are learned from: the newest ones."
    )
    min_impressions: int = Field(500, ge=1, description="A window with fewer labelled impressions is not learned from.")
    min_clicks: int = Field(50, ge=1, description="A window with fewer positive labels is not learned from.")
    sampled_negatives: int = Field(
        0,
        ge=0,
        description="For logs with actions only: items drawn from the catalogue for each positive action, as an "
        "impression of its own. 0: such actions are not learned from. Never used where the window has impressions.",
    )
    histories: Literal["off", "frozen", "top", "lora"] = Field(
        "off",
        description="Whether a round first learns the space from actions on items that were not shown (histories), "
        "and what of the text encoder that trains: nothing, its top layers, or LoRA. It takes minutes.",
    )
    histories_hours: float = Field(336.0, gt=0, description="Broker time of the actions that a space is learned from.")
    histories_every_hours: float = Field(
        168.0, gt=0, description="How long a learned space stands; where there was too little, a 24th of it."
    )
    histories_least_items: int = Field(
        2_000, ge=2, description="Items with a text acted on twice or more, below which no space is learned."
    )
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="How a round trains.")
    gate: GateConfig = Field(default_factory=GateConfig, description="When a candidate is promoted or rolled back.")
    prepare_timeout_seconds: float = Field(
        300.0, gt=0, description="How long a promotion waits for the live workers to have prepared the candidate."
    )
    seed: int = Field(0, ge=0, description="Of the gate's resampling and of drawn negatives.")
    tensorboard: bool = Field(True, description="Whether TensorBoard logs are written, below data_folder.")
    host: str = Field("127.0.0.1", description="Where /metrics listens.")
    port: int = Field(9466, ge=0, le=65_535, description="Port of /metrics; 0 takes a free one.")
    threads: int = Field(1, ge=1, le=256, description="Threads of NumPy and torch in this process.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe line written.")
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="auto: console on a terminal, else JSON."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # init values come from the TOML file (see `load`), so the environment goes first.
        return env_settings, init_settings


def load(config_file: Path | None = None) -> TrainerConfig:
    """Read the trainer's settings from the environment and the section of the TOML file.

    The file is found as the worker finds it: the one given, else $MILLSTREAM_CONFIG, else ./millstream.toml. Raises
    SettingsError, naming every value that is unknown or impossible.
    """
    named = config_file or (Path(v) if (v := os.environ.get(CONFIG_FILE_VARIABLE)) else None)
    path = named or Path(DEFAULT_CONFIG_FILE)
    values: dict[str, Any] = {}
    if path.is_file():
        try:
            values = tomllib.loads(path.read_text("utf-8")).get(SECTION, {})
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsError(f"{path} is not TOML: {error}") from None
    elif named is not None:
        raise SettingsError(f"the settings file {named} does not exist")
    unknown = [
        name
        for name in os.environ
        if name.startswith(VARIABLE_PREFIX)
        and name.removeprefix(VARIABLE_PREFIX).split("__")[0].lower() not in TrainerConfig.model_fields
    ]
    if unknown:
        raise SettingsError(f"unknown environment variables: {', '.join(sorted(unknown))}")
    try:
        return TrainerConfig(**values)
    except ValidationError as error:
        lines = [
            f"  {SECTION}.{'.'.join(str(p) for p in e['loc'])}: {e['msg']} (got {e.get('input')!r})"
            for e in error.errors()
        ]
        raise SettingsError("settings that cannot be used:\n" + "\n".join(lines)) from None

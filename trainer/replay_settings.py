"""How a log is replayed: cheap to import, so that the command line can hold it."""

from __future__ import annotations

import re
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.counters import CountersConfig
from models.errors import ReplayError
from models.joiner import JoinerConfig
from models.surfaces import RecommenderConfig
from models.user_events import UserStateConfig

Mode = Literal["frozen", "live", "retrained"]
MODES: Final[tuple[Mode, ...]] = ("frozen", "live", "retrained")


_UNITS_SECONDS: Final = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3_600, "d": 86_400}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")


def duration_seconds(text: str, name: str) -> float:
    """Return what a text like ``0s``, ``5m``, ``1.5h`` or ``1d`` says, seconds.

    ``name``: of the option, for the ReplayError that any other text raises.
    """
    found = _DURATION.fullmatch(text.strip().lower())
    if found is None or found[2] not in _UNITS_SECONDS:
        raise ReplayError(f"{name}: {text!r} is no length of time; write it as 0s, 90s, 5m, 1h or 1d")
    return float(found[1]) * _UNITS_SECONDS[found[2]]


class ReplayConfig(BaseModel):
    """How a log is replayed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    delays_seconds: tuple[float, ...] = Field(
        (0.0,), min_length=1, description="Feedback delays: how much later than it happened an event arrives."
    )
    modes: tuple[Mode, ...] = Field(MODES, min_length=1, description="What is compared.")
    retrain_every_seconds: float = Field(
        86_400.0,
        ge=0,
        description="How often the model of the mode retrained is trained again; 0: never, no such mode.",
    )
    unclicked_weight: float = Field(
        1.0, ge=1, le=1_000, description="Impressions that an unclicked item of the scored part stands for."
    )
    warm_up_share: float = Field(
        0.08,
        ge=0,
        le=0.9,
        description="First share of the impressions before the scored part not trained on: counters were empty.",
    )
    score_share: float = Field(
        0.3, gt=0, lt=1, description="Latest share of the impressions that is scored where the log is one part."
    )
    histories: Literal["off", "frozen", "top"] = Field(
        "frozen",
        description="Where items have texts and enough was acted on: whether the space is learned from histories, with "
        "the text encoder as it is or with its top layers trained.",
    )
    slates: int = Field(2_000, ge=0, description="Scored impressions with a click at which a slate is made; 0: none.")
    k: int = Field(10, ge=1, le=200, description="Items of such a slate.")
    seed: int = Field(0, ge=0, description="Of weights, draws and intervals.")
    tick_seconds: float | None = Field(
        None,
        ge=0.001,
        le=86_400,
        description="An impression sees strictly earlier ticks of this length. None: an hour or a minute where "
        "all times of the scored part are whole hours or minutes, else a millisecond.",
    )
    user_state: UserStateConfig = Field(default_factory=lambda: UserStateConfig(), description="Of the rows.")
    counters: CountersConfig = Field(default_factory=lambda: CountersConfig(), description="Of the item counters.")
    joiner: JoinerConfig = Field(default_factory=lambda: JoinerConfig(), description="Where the log has no outcomes.")
    recommender: RecommenderConfig = Field(
        default_factory=lambda: RecommenderConfig(), description="How the slates are made; the default surface."
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if any(delay < 0 for delay in self.delays_seconds):
            raise ValueError("a feedback delay is not negative")
        return self

    @property
    def wanted(self) -> tuple[Mode, ...]:
        """Return the modes in their order; without retraining two of them are one."""
        return tuple(
            mode for mode in MODES if mode in self.modes and (mode != "retrained" or self.retrain_every_seconds > 0)
        )

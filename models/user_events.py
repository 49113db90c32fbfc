"""What changes a user row: the settings of the update, and events hashed and ready for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Final, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from models.events import ACTIONS, Action, Event, Impression
from models.hashing import hash64, short_hash
from models.user_row import ACTION_MASK, NEGATIVE, POSITIVE
from models.user_steps import F32

Bools = npt.NDArray[np.bool_]

IMPRESSION: Final = 0
ACTION: Final = 1
REQUEST: Final = 2
NO_SURFACE: Final = 255
"""Surface number of an event without a surface, or of one that the settings do not name."""


class UserStateConfig(BaseModel):
    """How a user row is updated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: float = Field(0.1, gt=0, le=1, description="Step length η of the short-term vector, no unit.")
    long_term_learning_rate: float = Field(0.03, gt=0, le=1, description="Step length η of the long-term vector.")
    weight_decay: float = Field(
        0.01, ge=0, lt=1, description="Shrink λ: each step first multiplies the vector by 1 − ηλ."
    )
    short_term_half_life_seconds: float = Field(
        6 * 3_600.0, gt=0, description="Event time in which the short-term vector loses half of its length, seconds."
    )
    long_term_half_life_seconds: float = Field(
        30 * 86_400.0, gt=0, description="Event time in which the long-term vector loses half of its length, seconds."
    )
    max_norm: float = Field(1.0, gt=0, le=100, description="Longest that either vector may be.")
    logit_scale: float = Field(10.0, gt=0, le=100, description="Factor s between a dot product and a logit.")
    default_base_rate: float = Field(
        0.05, gt=0, lt=1, description="Share of shown items that are clicked, where base_rates does not name a surface."
    )
    base_rates: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(
        default_factory=dict, description="Share of shown items that are clicked, by surface, between 0 and 1."
    )
    click_strength: float = Field(1.0, ge=0, le=100, description="Weight w of the step for a click (y = 1).")
    like_strength: float = Field(1.0, ge=0, le=100, description="Weight of a like (y = 1).")
    share_strength: float = Field(1.5, ge=0, le=100, description="Weight of a share (y = 1).")
    purchase_strength: float = Field(2.5, ge=0, le=100, description="Weight of a purchase (y = 1).")
    rating_strength: float = Field(1.0, ge=0, le=100, description="Weight of a rating that is good or bad.")
    dwell_strength: float = Field(0.5, ge=0, le=100, description="Weight of a dwell time that is long or short.")
    dislike_strength: float = Field(3.0, ge=0, le=100, description="Weight of a dislike (y = 0).")
    hide_strength: float = Field(3.0, ge=0, le=100, description="Weight of a hide (y = 0).")
    good_rating: float = Field(4.0, description="A rating of at least this many stars has y = 1.")
    bad_rating: float = Field(2.0, description="A rating of at most this many stars has y = 0; between: no step.")
    long_dwell_seconds: float = Field(30.0, ge=0, description="A dwell time of at least this has y = 1.")
    short_dwell_seconds: float = Field(
        0.0, ge=0, description="A dwell time below this has y = 0; 0: none has. Between the two: no step."
    )
    attribution_window_seconds: int = Field(
        1_800,
        ge=1,
        le=30 * 86_400,
        description="How long after an impression an action may belong to it, seconds, where "
        "attribution_windows_seconds does not name a surface.",
    )
    attribution_windows_seconds: dict[str, Annotated[int, Field(ge=1, le=30 * 86_400)]] = Field(
        default_factory=dict, description="The same by surface, seconds."
    )
    unclicked_weight: float = Field(
        0.1, ge=0, le=1, description="Weight of the step against an impression that nobody clicked, mean of its items."
    )
    unclicked_max_share: float = Field(
        0.01, ge=0, le=0.5, description="Longest such step, as a share of the vector's length."
    )
    unclicked_cap: int = Field(
        32,
        ge=0,
        le=255,
        description="Such steps in a row, since the last positive action, that move the vector at all.",
    )

    def __hash__(self) -> int:
        """Return a hash by which what is made of the settings can be kept; the dictionaries among them have none."""
        return hash((self.default_base_rate, self.attribution_window_seconds))


def surface_names(default: str, served: Iterable[str], config: UserStateConfig) -> list[str]:
    """Return the names of surfaces by number: the default one first, then ``served``, then those of ``config``.

    Rows keep the numbers: names that only the base rates or the attribution windows have come last.
    """
    names = [default, *sorted({*served} - {default})]
    for table in (config.base_rates, config.attribution_windows_seconds):
        names += sorted({*table} - {*names})
    return names


def attribution_windows(config: UserStateConfig, surfaces: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return the attribution window by surface number, seconds, int64 [256]."""
    table = np.full(256, config.attribution_window_seconds, np.int64)
    for number, name in enumerate(surfaces[:NO_SURFACE]):
        table[number] = config.attribution_windows_seconds.get(name, config.attribution_window_seconds)
    return table


class VectorSource(Protocol):
    """Item vectors of one embedding space, found by hash; the catalogue is one."""

    @property
    def dim(self) -> int:
        """Return D."""

    def by_hash(self, hashes: npt.NDArray[np.uint64]) -> tuple[F32, Bools]:
        """Return vectors [n, D] and which of them are known [n]; the vector of an unknown one is any finite value."""

    def by_short_hash(self, hashes: npt.NDArray[np.uint32]) -> tuple[F32, Bools]:
        """Return the same for 32-bit hashes; one that two items share, and 0, are unknown."""


class Outcome(IntEnum):
    """What an event did to its row."""

    APPLIED = 0
    REPLAYED = 1
    """Not above the guard: nothing changed. Its outputs are sent again."""
    DUPLICATE = 2
    """A client's retry, known by its event id: the guard moved on, nothing else."""


@dataclass(slots=True)
class UserEvent:
    """One decoded event, hashed, ready for the row."""

    user: int
    """Place of the user's row in the rows given to ``apply``."""
    kind: int
    """IMPRESSION, ACTION or REQUEST."""
    offset: int
    time_ms: int
    event_hash: int
    request_hash: int
    """Short hash of the request id; 0: none."""
    surface: int
    """Number of the surface, NO_SURFACE where it is not known."""
    items: npt.NDArray[np.uint64]
    """64-bit hashes: of an impression all that were shown, each once; of an action the one item."""
    action: int = 0
    """Action code as in the ring of recent items: number plus 1, with POSITIVE or NEGATIVE."""
    strength: float = 0.0
    label: float = 0.0


_CODES: Final[dict[str, int]] = {name: number for number, name in enumerate(ACTIONS, start=1)}


def action_code(action: str, value: float | None, config: UserStateConfig) -> int:
    """Return the code of an action: number in ACTIONS plus 1, with POSITIVE (y = 1), NEGATIVE (y = 0) or neither."""
    code = _CODES[action]
    if action in ("hide", "dislike"):
        return code | NEGATIVE
    if action == "rating":
        good, bad = config.good_rating, config.bad_rating
        return code if value is None else code | (POSITIVE if value >= good else NEGATIVE if value <= bad else 0)
    if action == "dwell":
        if value is None:
            return code
        long, short = config.long_dwell_seconds, config.short_dwell_seconds
        return code | (POSITIVE if value >= long else NEGATIVE if 0 <= value < short else 0)
    return code | POSITIVE


def strengths(config: UserStateConfig) -> F32:
    """Return the step weight of each action code, float32 [64]; 0 for a code without a label."""
    table = np.zeros(64, np.float32)
    for number, name in enumerate(ACTIONS, 1):
        table[number | POSITIVE] = table[number | NEGATIVE] = getattr(config, f"{name}_strength")
    return table


def user_event(
    event: Event, user: int, offset: int, time_ms: int, config: UserStateConfig, surfaces: Sequence[str]
) -> UserEvent:
    """Return ``event`` hashed for the row at ``user``; ``time_ms`` is the event time to use, ``offset`` its place.

    An event without a surface is on the first of ``surfaces``, the default one; one on a surface not among them is on
    none.
    """
    request = short_hash(hash64(event.request_id)) if event.request_id else 0
    surface = NO_SURFACE
    if event.surface is None:
        surface = 0 if surfaces else NO_SURFACE
    elif event.surface in surfaces:
        surface = min(surfaces.index(event.surface), NO_SURFACE)
    code, kind = 0, REQUEST
    hashes: list[int] = []
    if isinstance(event, Impression):
        kind = IMPRESSION
        hashes = list(dict.fromkeys([hash64(item.item_id) for item in event.items]))
    elif isinstance(event, Action):
        kind = ACTION
        hashes = [hash64(event.item_id)]
        code = action_code(event.action, event.value, config)
    strength = 0.0
    if code & (POSITIVE | NEGATIVE):
        strength = getattr(config, f"{ACTIONS[(code & ACTION_MASK) - 1]}_strength")
    label = 1.0 if code & POSITIVE else 0.0
    items = np.array(hashes, np.uint64)
    return UserEvent(
        user, kind, offset, time_ms, hash64(event.event_id), request, surface, items, code, strength, label
    )

"""The one feature encoding, for serving and for training: raw state of slates in, columns of numbers out.

Axes: S slates (one impression, or one request's candidates), C items of a slate (padded), R recent items, F columns.
Inside, planes are [F, S, C], so that each column is one stretch of memory.

What is compared within a slate is rounded to multiples of 1 / GRID first. Sums of such numbers are exact, so that
neither the order of the items, nor padding, nor what else is in the batch can change the last bit of a column:
training sees exactly what serving saw. No column tells how long a slate is, or where an item stood in it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, field_validator

from models.counter_events import ACTIONS, CLICKS, EXPECTED, HALF_LIVES, IMPRESSIONS, KINDS
from models.errors import BundleError
from models.user_row import RECENT

F32 = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

VERSION: Final = 2
GRID: Final = 4096.0
"""Values are compared within a slate in steps of 1 / GRID."""
MAX_LOG_COUNT: Final = 16.0
"""Largest log1p of a count that is told apart: nine million."""
DAY_MS: Final = 86_400_000
MAX_COMPARED: Final = 16.0
"""What is compared within a slate lies within ± this."""
_VALUE_BITS: Final = 18
"""Bits of a compared value in steps of 1 / GRID, its sign included."""

HALF_LIFE_NAMES: Final = ("first", "second", "third", "fourth")
RELATIVE_KINDS: Final = ("rank", "gap")
COMPARED: Final[tuple[str, ...]] = (
    *(f"impressions_{name}" for name in HALF_LIFE_NAMES),
    *(f"clicks_{name}" for name in HALF_LIFE_NAMES),
    *(f"ctr_{name}" for name in HALF_LIFE_NAMES),
    *(f"quick_ctr_{name}" for name in HALF_LIFE_NAMES),
    *(f"coec_{name}" for name in HALF_LIFE_NAMES),
    *(f"quick_coec_{name}" for name in HALF_LIFE_NAMES),
    "sim_short",
    "sim_long",
    "age",
    "first_seen",
    "shown_count",
)
"""Columns that are also given as rank within the slate and as gap to its highest. ctr: clicks by impressions; coec:
clicks over expected clicks; quick: with a weaker prior, so that few events tell more."""
COLUMNS: Final[tuple[str, ...]] = (
    *COMPARED,
    *(f"actions_{name}" for name in HALF_LIFE_NAMES),
    "age_given",
    "first_seen_given",
    "shown_recency",
    "shown_just_now",
    "shown_ever",
    "acted_recency",
    "acted_before",
    "user_impressions",
    "user_clicks",
    "user_actions",
    "user_ctr",
    "hour_sin",
    "hour_cos",
    "weekday_sin",
    "weekday_cos",
    *(f"{name}_{kind}" for kind in RELATIVE_KINDS for name in COMPARED),
)
"""Names of the columns of version 2, in their order."""

SPACE_COLUMNS: Final[tuple[str, ...]] = tuple(name for name in COLUMNS if name.startswith(("sim_short", "sim_long")))
"""Columns made of vectors: in another space they are other numbers, which no record of this one tells."""

_AT: Final = {name: place for place, name in enumerate(COLUMNS)}
_PLANES: Final = len(COMPARED)
_SIMS: Final = slice(_AT["sim_short"], _AT["sim_long"] + 1)
_RATES: Final = {
    name: slice(_AT[f"{name}_first"], _AT[f"{name}_fourth"] + 1) for name in ("ctr", "quick_ctr", "coec", "quick_coec")
}
_SOME_ONLY: Final = (("age", "age_given"), ("first_seen", "first_seen_given"))
"""Compared columns that some items lack, and the columns that tell which have them."""

Prior = Annotated[float, Field(gt=0, lt=1)]
Ratio = Annotated[float, Field(gt=0, le=1e6)]


class FeatureConfig(BaseModel):
    """What the encoding freezes in a bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[2] = Field(2, description="Version of the encoding: which columns, and how each is made.")
    prior_ctr: tuple[Prior, Prior, Prior, Prior] = Field(
        (0.05, 0.05, 0.05, 0.05), description="Mean m of the Beta prior of an item's CTR, for each half-life."
    )
    prior_strength: float = Field(
        20.0, gt=0, le=1e6, description="Impressions s that the prior of a CTR weighs as much as."
    )
    quick_prior_strength: float = Field(
        5.0, gt=0, le=1e6, description="The same of the quick columns, whose prior is weaker."
    )
    prior_coec: tuple[Ratio, Ratio, Ratio, Ratio] = Field(
        (1.0, 1.0, 1.0, 1.0), description="Mean clicks over expected clicks of all items, for each half-life."
    )
    coec_strength: float = Field(
        2.0,
        gt=0,
        le=1e6,
        description="Expected clicks that the prior of clicks over expected clicks weighs as much as.",
    )
    quick_coec_strength: float = Field(0.5, gt=0, le=1e6, description="The same of the quick columns.")
    columns: tuple[str, ...] = Field(COLUMNS, description="Names of the columns, in their order.")

    @field_validator("columns")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if names != COLUMNS:
            unlike = sorted(set(names) ^ set(COLUMNS))[:5] or "their order"
            raise ValueError(f"columns that this program does not make so: {unlike}")
        return names


@dataclass(slots=True)
class RawSlates:
    """Raw state of slates, as it was when they were shown or asked for. Values where not ``valid`` mean nothing."""

    valid: Bools
    """bool [S, C]."""
    items: npt.NDArray[np.uint64]
    """64-bit hashes [S, C]."""
    counters: npt.NDArray[np.float16]
    """log1p of decayed counts [S, C, half-lives, kinds], as models.counters orders them."""
    age_seconds: F32
    """Time since publication [S, C], NaN = not given."""
    first_seen_seconds: F32
    """Time since anybody was first shown the item [S, C], NaN = never."""
    sims: npt.NDArray[np.float16]
    """Products of the item's unit vector with the scaled short- and long-term taste [S, C, 2], 0 = none."""
    shown_counts: npt.NDArray[np.uint8]
    """Times shown lately to this user [S, C]."""
    shown_age_seconds: F32
    """Time since it was last shown [S, C], NaN = never."""
    acted_age_seconds: F32
    """Time since this user last acted on it, among the recent items [S, C], NaN = not among them."""
    positions: npt.NDArray[np.uint16]
    """1-based [S, C], 0 = not known. Not among the columns: it is the model's own nullable term."""
    recent_items: npt.NDArray[np.uint64]
    """Hashes [S, R], newest first, 0 = free."""
    recent_age_seconds: F32
    """[S, R]."""
    recent_codes: npt.NDArray[np.uint8]
    """Action codes as models.user_row has them [S, R], 0 = free."""
    user_counts: npt.NDArray[np.uint32]
    """Impressions, clicks and actions of the user before [S, 3]."""
    time_ms: npt.NDArray[np.int64]
    """Epoch milliseconds [S]."""

    @classmethod
    def empty(cls, slates: int, items: int) -> RawSlates:
        """Return slates without any item, to be filled in."""
        shape = (slates, items)
        return cls(
            valid=np.zeros(shape, np.bool_),
            items=np.zeros(shape, np.uint64),
            counters=np.zeros((*shape, HALF_LIVES, KINDS), np.float16),
            age_seconds=np.full(shape, np.nan, np.float32),
            first_seen_seconds=np.full(shape, np.nan, np.float32),
            sims=np.zeros((*shape, 2), np.float16),
            shown_counts=np.zeros(shape, np.uint8),
            shown_age_seconds=np.full(shape, np.nan, np.float32),
            acted_age_seconds=np.full(shape, np.nan, np.float32),
            positions=np.zeros(shape, np.uint16),
            recent_items=np.zeros((slates, RECENT), np.uint64),
            recent_age_seconds=np.zeros((slates, RECENT), np.float32),
            recent_codes=np.zeros((slates, RECENT), np.uint8),
            user_counts=np.zeros((slates, 3), np.uint32),
            time_ms=np.zeros(slates, np.int64),
        )

    def take(self, at: npt.NDArray[np.integer] | slice) -> RawSlates:
        """Return the slates at ``at``."""
        return RawSlates(*(getattr(self, name)[at] for name in self.__slots__))


def columns(config: FeatureConfig) -> tuple[str, ...]:
    """Return the names of the columns that ``encode`` makes under ``config``."""
    return config.columns


def spec_id(config: FeatureConfig) -> str:
    """Return the id of an encoding: a hash of its version, its columns and the shape of its priors.

    A bundle names it. The values of the priors are data, not code: they stand in the bundle and change no id.
    """
    told = {
        "version": config.version,
        "columns": columns(config),
        "priors": len(config.prior_ctr),
        "coec": len(config.prior_coec),
    }
    digest = hashlib.blake2b(json.dumps(told, separators=(",", ":")).encode(), digest_size=6).hexdigest()
    return f"features-{config.version}-{digest}"


def require_spec(named: str, config: FeatureConfig) -> None:
    """Return if this program makes the encoding ``named`` by a bundle.

    Raises BundleError("feature-spec") otherwise: its scores would be of columns that the model never saw.
    """
    own = spec_id(config)
    if named != own:
        raise BundleError(
            "feature-spec",
            f"the bundle was trained on the feature encoding {named!r}, this program makes {own!r}; the model in use "
            "was kept: run the program version that wrote the bundle, or train a new one with this",
        )


def encode(raw: RawSlates, config: FeatureConfig) -> F32:
    """Return the columns, float32 [S, C, F]: finite, zero where not valid, not standardised (the model does it).

    Smoothed CTR: log of (clicks + s·m) / (impressions + s) over m, the posterior mean of a Beta-Binomial with mean m
    and strength s against that mean (Gelman et al., Bayesian Data Analysis, 3rd ed. 2013, section 2.4). Clicks without
    their impressions count as impressions too. Clicks over expected clicks (Zhang and Jones 2007, Comparing click logs
    and editorial labels for training query rewriting, section 4.3): the same with the items' shares of their slates in
    place of impressions, over the mean ratio. User CTR: log of (clicks + 1) / (impressions + 2).
    Rank: share of the slate's other items that are below, ties sharing the lowest. Gap: what is lacking to the highest
    of the slate, at most 0.
    """
    slates, items = raw.valid.shape
    planes: F32 = np.zeros((len(COLUMNS), slates, items), np.float32)
    if slates and items:
        _counts(planes, raw, config)
        _item_facts(planes, raw)
        _user_facts(planes, raw)
        _relative(planes, raw.valid)
        planes *= raw.valid
    return np.ascontiguousarray(planes.transpose(1, 2, 0))


def _counts(planes: F32, raw: RawSlates, config: FeatureConfig) -> None:
    logs = np.ascontiguousarray(raw.counters.transpose(3, 2, 0, 1), np.float32)
    # fmax takes the other one of two where one is NaN; np.nan_to_num takes many times as long for a single slate.
    logs = np.minimum(np.fmax(logs, np.float32(0), out=logs), np.float32(MAX_LOG_COUNT), out=logs)
    planes[_AT["impressions_first"] : _AT["impressions_first"] + HALF_LIVES] = logs[IMPRESSIONS]
    planes[_AT["clicks_first"] : _AT["clicks_first"] + HALF_LIVES] = logs[CLICKS]
    planes[_AT["actions_first"] : _AT["actions_first"] + HALF_LIVES] = logs[ACTIONS]
    impressions, clicks, expected = np.exp(logs[[IMPRESSIONS, CLICKS, EXPECTED]]) - np.float32(1)
    impressions = np.maximum(impressions, clicks)
    rates = (
        ("ctr", config.prior_ctr, impressions, config.prior_strength),
        ("quick_ctr", config.prior_ctr, impressions, config.quick_prior_strength),
        ("coec", config.prior_coec, expected, config.coec_strength),
        ("quick_coec", config.prior_coec, expected, config.quick_coec_strength),
    )
    for name, prior, chances, strength in rates:
        usual = clicks / np.array(prior, np.float32)[:, None, None]
        planes[_RATES[name]] = np.log((usual + np.float32(strength)) / (chances + np.float32(strength)))


def _item_facts(planes: F32, raw: RawSlates) -> None:
    """Fill what is known of each item."""
    sims = np.ascontiguousarray(raw.sims.transpose(2, 0, 1), np.float32)
    np.copyto(sims, 0.0, where=np.isnan(sims))
    planes[_SIMS] = np.clip(sims, -1.0, 1.0)
    for name, seconds, unit in (
        ("age", raw.age_seconds, np.float32(3600)),
        ("first_seen", raw.first_seen_seconds, np.float32(60)),
    ):
        given = np.isfinite(seconds)
        planes[_AT[name]] = np.log1p(np.where(given, np.maximum(seconds, 0), 0) / unit)
        planes[_AT[f"{name}_given"]] = given
    planes[_AT["shown_count"]] = np.log1p(raw.shown_counts.astype(np.float32))
    ever = np.isfinite(raw.shown_age_seconds)
    seconds = np.where(ever, np.maximum(raw.shown_age_seconds, 0), 0)
    planes[_AT["shown_recency"]] = np.where(ever, 1 / (1 + seconds / np.float32(3600)), 0)
    planes[_AT["shown_just_now"]] = np.where(ever, 1 / (1 + seconds / np.float32(120)), 0)
    planes[_AT["shown_ever"]] = ever
    acted = np.isfinite(raw.acted_age_seconds)
    hours = np.where(acted, np.maximum(raw.acted_age_seconds, 0), 0) / np.float32(3600)
    planes[_AT["acted_recency"]] = np.where(acted, 1 / (1 + hours), 0)
    planes[_AT["acted_before"]] = acted


def _user_facts(planes: F32, raw: RawSlates) -> None:
    """Fill what is the same for all items of a slate: the user's counts, and the time in UTC."""
    counts = raw.user_counts.astype(np.float64)
    first = _AT["user_impressions"]
    planes[first : first + 3] = np.log1p(counts).T[:, :, None]
    planes[_AT["user_ctr"]] = np.log((counts[:, 1] + 1) / (np.maximum(counts[:, 0], counts[:, 1]) + 2))[:, None]
    # 1970-01-01 was a Thursday: the week is counted from the Monday before.
    for name, phase in (("hour", raw.time_ms / DAY_MS), ("weekday", (raw.time_ms / DAY_MS + 3) / 7)):
        angle = 2 * np.pi * (phase % 1.0)
        planes[_AT[f"{name}_sin"]] = np.sin(angle)[:, None]
        planes[_AT[f"{name}_cos"]] = np.cos(angle)[:, None]


def _relative(planes: F32, valid: Bools) -> None:
    """Fill rank and gap within the slate of the compared planes; of what some items lack among those that have it."""
    np.clip(planes[:_PLANES], -MAX_COMPARED, MAX_COMPARED, out=planes[:_PLANES])
    compared = np.broadcast_to(valid, planes[:_PLANES].shape).copy()
    for name, given in _SOME_ONLY:
        compared[_AT[name]] &= planes[_AT[given]] > 0
    n = np.count_nonzero(compared, axis=2)[:, :, None]
    first = _AT[f"{COMPARED[0]}_{RELATIVE_KINDS[0]}"]
    ranks, gaps = (planes[first + i * _PLANES : first + (i + 1) * _PLANES] for i in range(2))
    # Whole numbers below 2^24: float32 holds them exactly.
    steps = planes[:_PLANES] * np.float32(GRID)
    np.rint(steps, out=steps)
    ranks[:] = _below(steps.astype(np.int32), compared)
    ranks /= np.maximum(n - 1, 1).astype(np.float32)
    ranks *= compared
    highest = np.where(compared, steps, np.float32(-MAX_COMPARED * GRID)).max(axis=2, keepdims=True)
    np.subtract(steps, highest, out=gaps)
    gaps *= np.float32(1 / GRID)
    gaps *= compared


def _below(steps: npt.NDArray[np.int32], compared: Bools) -> npt.NDArray[Any]:
    """Return for each compared value how many compared ones of its slate are below it, int [P, S, C]."""
    width = steps.shape[2]
    # Value and place in one number: sorting those is several times as fast as an argsort, the narrow ones most so.
    bits = width.bit_length()
    whole: type[np.signedinteger[Any]] = np.int32 if _VALUE_BITS + bits < 31 else np.int64
    keys = steps.astype(whole) << whole(bits)
    keys[~compared] = np.iinfo(whole).max >> bits << bits
    keys |= np.arange(width, dtype=whole)
    keys.sort(axis=2)
    places = keys & whole((1 << bits) - 1)
    keys >>= whole(bits)
    starts = np.zeros(keys.shape, whole)
    np.multiply(keys[..., 1:] != keys[..., :-1], np.arange(1, width, dtype=whole), out=starts[..., 1:])
    np.maximum.accumulate(starts, axis=2, out=starts)
    below = np.empty_like(starts)
    slates = np.arange(steps.shape[0] * steps.shape[1]).reshape(*steps.shape[:2], 1)
    below.reshape(-1)[slates * width + places] = starts
    return below

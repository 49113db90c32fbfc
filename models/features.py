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
from functools import lru_cache
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


def _stretch(first: str, last: str) -> slice:
    """Return the places of columns that stand side by side and are filled at once."""
    return slice(_AT[first], _AT[last] + 1)


_SHOWN_AND_CLICKED: Final = _stretch("impressions_first", "clicks_fourth")
_ACTIONS: Final = _stretch("actions_first", "actions_fourth")
_RATES: Final = _stretch("ctr_first", "quick_coec_fourth")
_SIMS: Final = _stretch("sim_short", "sim_long")
_AGES: Final = _stretch("age", "first_seen")
"""Compared columns that some items lack."""
_AGES_GIVEN: Final = _stretch("age_given", "first_seen_given")
_SHOWN_RECENCIES: Final = _stretch("shown_recency", "shown_just_now")
_USER_FACTS: Final = _stretch("user_impressions", "weekday_cos")
_RELATIVE: Final = _stretch(f"{COMPARED[0]}_rank", f"{COMPARED[-1]}_gap")
_TIME_UNITS: Final[F32] = np.array([3600, 60, 3600, 120, 3600], np.float32)[:, None, None]
"""Seconds in which the age, the time since it was first seen, twice since shown and since acted on are told."""
_SPACE_PLACES: Final = [_AT[name] for name in SPACE_COLUMNS]
_NOT_COMPARED: Final = -MAX_COMPARED * GRID - 1
"""Below whatever is compared."""

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
        age, first_seen, shown, acted = np.full((4, *shape), np.nan, np.float32)
        return cls(
            valid=np.zeros(shape, np.bool_),
            items=np.zeros(shape, np.uint64),
            counters=np.zeros((*shape, HALF_LIVES, KINDS), np.float16),
            age_seconds=age,
            first_seen_seconds=first_seen,
            sims=np.zeros((*shape, 2), np.float16),
            shown_counts=np.zeros(shape, np.uint8),
            shown_age_seconds=shown,
            acted_age_seconds=acted,
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
    planes: F32 = np.empty((len(COLUMNS), slates, items), np.float32)
    if slates and items:
        _counts(planes, raw, config)
        _item_facts(planes, raw)
        _user_facts(planes, raw)
        _relative(planes, raw.valid)
        if np.count_nonzero(raw.valid) < raw.valid.size:
            planes *= raw.valid
    return np.ascontiguousarray(planes.transpose(1, 2, 0))


def encode_sims(x: F32, raw: RawSlates) -> F32:
    """Return the columns of slates that differ from those of ``x`` in ``sims`` alone: what another space says of them.

    The same as ``encode(raw, config)``, under the config of ``x``.
    """
    if not x.size:
        return x
    planes: F32 = np.empty((1 + len(RELATIVE_KINDS), 2, *raw.valid.shape), np.float32)
    own, ranks, gaps = planes
    _fill_sims(own, raw)
    compared = np.empty(own.shape, np.bool_)
    compared[:] = raw.valid
    _compare(own, compared, ranks, gaps)
    planes *= raw.valid
    anew = x.copy()
    anew[:, :, _SPACE_PLACES] = planes.reshape(-1, *raw.valid.shape).transpose(1, 2, 0)
    return anew


def _counts(planes: F32, raw: RawSlates, config: FeatureConfig) -> None:
    logs = np.ascontiguousarray(raw.counters.transpose(3, 2, 0, 1), np.float32)
    # fmax takes the other one of two where one is NaN; np.nan_to_num takes many times as long for a single slate.
    logs = np.minimum(np.fmax(logs, np.float32(0), out=logs), np.float32(MAX_LOG_COUNT), out=logs)
    planes[_SHOWN_AND_CLICKED].reshape(2, *logs.shape[1:])[:] = logs[IMPRESSIONS : CLICKS + 1]
    planes[_ACTIONS] = logs[ACTIONS]
    counts = np.exp(logs, out=logs)
    counts -= np.float32(1)
    np.maximum(counts[IMPRESSIONS], counts[CLICKS], out=counts[IMPRESSIONS])
    # All rates at once: [what clicks are held against, strength of its prior, half-lives, S, C].
    chances = counts[IMPRESSIONS :: EXPECTED - IMPRESSIONS][:, None]
    priors, strengths = _priors(config)
    rates = planes[_RATES].reshape(2, 2, *counts.shape[1:])
    np.add(counts[CLICKS] / priors, strengths, out=rates)
    rates /= chances + strengths
    np.log(rates, out=rates)


@lru_cache(maxsize=16)
def _priors(config: FeatureConfig) -> tuple[F32, F32]:
    """Return the means of the priors [2, 1, half-lives, 1, 1] and their strengths [2, 2, 1, 1, 1]."""
    means = np.array((config.prior_ctr, config.prior_coec), np.float32)
    strengths = np.array(
        (
            (config.prior_strength, config.quick_prior_strength),
            (config.coec_strength, config.quick_coec_strength),
        ),
        np.float32,
    )
    # The next call gets the same arrays.
    means.setflags(write=False)
    strengths.setflags(write=False)
    return means[:, None, :, None, None], strengths[:, :, None, None, None]


def _item_facts(planes: F32, raw: RawSlates) -> None:
    """Fill what is known of each item."""
    _fill_sims(planes[_SIMS], raw)
    # All times at once, each in a unit of its own; how lately an item was shown is told in two.
    times = np.empty((len(_TIME_UNITS), *raw.valid.shape), np.float32)
    times[0], times[1], times[2:4], times[4] = (
        raw.age_seconds,
        raw.first_seen_seconds,
        raw.shown_age_seconds,
        raw.acted_age_seconds,
    )
    given = np.isfinite(times)
    times = np.where(given, np.maximum(times, np.float32(0), out=times), np.float32(0))
    times /= _TIME_UNITS
    np.log1p(times[:2], out=planes[_AGES])
    planes[_AGES_GIVEN] = given[:2]
    times += np.float32(1)
    recencies = np.reciprocal(times, out=times)
    recencies *= given
    planes[_SHOWN_RECENCIES], planes[_AT["acted_recency"]] = recencies[2:4], recencies[4]
    planes[_AT["shown_ever"]], planes[_AT["acted_before"]] = given[2], given[4]
    shown = planes[_AT["shown_count"]]
    shown[:] = raw.shown_counts
    np.log1p(shown, out=shown)


def _fill_sims(sims: F32, raw: RawSlates) -> None:
    """Fill the similarities, [2, S, C]."""
    sims[:] = raw.sims.transpose(2, 0, 1)
    unknown = np.isnan(sims)
    if np.count_nonzero(unknown):
        sims[unknown] = 0.0
    np.clip(sims, -1.0, 1.0, out=sims)


def _user_facts(planes: F32, raw: RawSlates) -> None:
    """Fill what is the same for all items of a slate: the user's counts, and the time in UTC."""
    facts = np.empty((_USER_FACTS.stop - _USER_FACTS.start, len(raw.time_ms)))
    counts = raw.user_counts.T.astype(np.float64)
    np.log1p(counts, out=facts[:3])
    facts[3] = np.log((counts[1] + 1) / (np.maximum(counts[0], counts[1]) + 2))
    days = raw.time_ms / DAY_MS
    angles = np.empty((2, len(days)))
    # 1970-01-01 was a Thursday: the week is counted from the Monday before.
    angles[0], angles[1] = days, (days + 3) / 7
    angles %= 1.0
    angles *= 2 * np.pi
    np.sin(angles, out=facts[4::2])
    np.cos(angles, out=facts[5::2])
    planes[_USER_FACTS] = facts[:, :, None]


def _relative(planes: F32, valid: Bools) -> None:
    """Fill rank and gap within the slate of the compared planes; of what some items lack among those that have it."""
    own = planes[:_PLANES]
    compared = np.empty(own.shape, np.bool_)
    compared[:] = valid
    compared[_AGES] &= planes[_AGES_GIVEN] > 0
    ranks, gaps = planes[_RELATIVE].reshape(len(RELATIVE_KINDS), *own.shape)
    _compare(own, compared, ranks, gaps)


def _compare(own: F32, compared: Bools, ranks: F32, gaps: F32) -> None:
    """Bring values [P, S, C] within bounds; fill rank and gap of each among those of its slate that are compared."""
    np.clip(own, -MAX_COMPARED, MAX_COMPARED, out=own)
    n = np.add.reduce(compared, axis=2, keepdims=True, dtype=np.int32)
    # Whole numbers below 2^24: float32 holds them exactly.
    steps = own * np.float32(GRID)
    np.rint(steps, out=steps)
    highest = _below(np.where(compared, steps, np.float32(_NOT_COMPARED)), n, out=ranks)
    ranks /= np.maximum(n - 1, 1).astype(np.float32)
    np.subtract(steps, highest, out=gaps)
    gaps *= np.float32(1 / GRID)
    gaps *= compared


def _below(steps: F32, n: npt.NDArray[np.int32], out: F32) -> F32:
    """Put into ``out`` [P, S, C] how many of the ``n`` [P, S, 1] compared steps of its slate are below each; else 0.

    Returns the highest steps, [P, S, 1].
    """
    width = steps.shape[2]
    # Value and place in one number: sorting those is several times as fast as an argsort, the narrow ones most so.
    bits = width.bit_length()
    whole: type[np.signedinteger[Any]] = np.int32 if _VALUE_BITS + bits < 31 else np.int64
    low = whole((1 << bits) - 1)
    keys = steps.astype(whole)
    keys <<= whole(bits)
    columns = np.arange(width, dtype=whole)
    keys |= columns
    keys.sort(axis=2)
    places = keys & low
    keys >>= whole(bits)
    # What is not compared comes first, and the lowest compared one after it.
    others = (width - n).astype(whole)
    starts = np.empty(keys.shape, whole)
    starts[..., :1] = others
    np.multiply(keys[..., 1:] != keys[..., :-1], columns[1:], out=starts[..., 1:])
    np.maximum.accumulate(starts, axis=2, out=starts)
    # Back into the order of places by a sort as well, half the time of writing to each its place.
    places <<= whole(bits)
    places |= starts
    places.sort(axis=2)
    places &= low
    np.subtract(places, others, out=out)
    return keys[..., -1:].astype(np.float32)

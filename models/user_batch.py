"""A batch of events as columns, cut into rounds, and the vectors of the rows that a round works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.user_events import (
    ACTION,
    NO_SURFACE,
    Bools,
    UserEvent,
    UserStateConfig,
    VectorSource,
    attribution_windows,
    strengths,
)
from models.user_row import DIM, SHOWN, Rows
from models.user_steps import F32, StepRates, norms

Ints = npt.NDArray[np.intp]
Carry = tuple[int, F32]
"""Hash of the space that vectors are carried over from, and M [D, D]: v in that space is about v @ M in this one."""


@dataclass(frozen=True, slots=True)
class Context:
    """What stays the same over a batch."""

    config: UserStateConfig
    vectors: VectorSource
    epoch: np.uint64
    space: np.uint64
    generation: int
    rates: StepRates
    strengths: F32
    biases: F32
    """Base-rate logit by surface number, [256]."""
    windows_seconds: npt.NDArray[np.int64]
    """Attribution window by surface number, [256]."""
    half_lives_T: npt.NDArray[np.float64]
    carry: Carry | None

    @classmethod
    def of(
        cls,
        config: UserStateConfig,
        vectors: VectorSource,
        epoch: int,
        space_id: int,
        generation: int,
        surfaces: Sequence[str],
        carry: Carry | None = None,
    ) -> Context:
        """Return the context of one batch; arguments as of models.user_state.apply."""
        return cls(
            config,
            vectors,
            np.uint64(epoch),
            np.uint64(space_id),
            generation,
            _rates(config),
            strengths(config),
            _biases(config, surfaces),
            attribution_windows(config, surfaces),
            half_lives(config),
            carry,
        )


def _rates(config: UserStateConfig) -> StepRates:
    rates_T = np.array([config.learning_rate, config.long_term_learning_rate], np.float32)
    keep_T = np.float32(1) - rates_T * np.float32(config.weight_decay)
    return StepRates(rates_T, keep_T, np.float32(config.logit_scale), np.float32(config.max_norm))


def half_lives(config: UserStateConfig) -> npt.NDArray[np.float64]:
    """Return the half-lives [T] in seconds, short-term and long-term."""
    return np.array([config.short_term_half_life_seconds, config.long_term_half_life_seconds])


def _biases(config: UserStateConfig, surfaces: Sequence[str]) -> F32:
    table = np.full(256, config.default_base_rate)
    for number, name in enumerate(surfaces[:NO_SURFACE]):
        table[number] = config.base_rates.get(name, config.default_base_rate)
    biases: F32 = np.asarray(np.log(table) - np.log1p(-table), np.float32)
    return biases


@dataclass(slots=True)
class Columns:
    """Events as columns [N], in the order in which rounds use them."""

    kind: npt.NDArray[np.int8]
    offset: npt.NDArray[np.int64]
    time_ms: npt.NDArray[np.int64]
    event_hash: npt.NDArray[np.uint64]
    request: npt.NDArray[np.uint32]
    surface: npt.NDArray[np.uint8]
    action: npt.NDArray[np.uint8]
    strength: F32
    label: F32
    n_items: npt.NDArray[np.uint8]
    item: npt.NDArray[np.uint64]
    items_NS: npt.NDArray[np.uint32]
    """Short hashes of the first SHOWN items, 0 where there are fewer."""
    vector_ND: F32
    """Vector of an action's item, zero where there is none."""
    known: Bools

    @classmethod
    def of(cls, events: Sequence[UserEvent], vectors: VectorSource) -> Columns:
        """Return the columns of events; looks up the vectors of all actions at once."""
        n = len(events)
        sizes = np.fromiter((len(e.items) for e in events), np.intp, n)
        flat = np.concatenate([e.items for e in events]) if n else np.zeros(0, np.uint64)
        starts = np.cumsum(sizes) - sizes
        item = np.zeros(n, np.uint64)
        item[sizes > 0] = flat[starts[sizes > 0]]
        shorts = (flat & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        shorts[shorts == 0] = 1
        place_S = np.arange(SHOWN)
        held_NS = place_S < sizes[:, None]
        items_NS = np.zeros((n, SHOWN), np.uint32)
        items_NS[held_NS] = shorts[(starts[:, None] + place_S)[held_NS]]
        kind = np.fromiter((e.kind for e in events), np.int8, n)
        vector_ND = np.zeros((n, DIM), np.float32)
        known = np.zeros(n, np.bool_)
        acted = np.flatnonzero((kind == ACTION) & (sizes > 0))
        if len(acted):
            found, known[acted] = vectors.by_hash(item[acted])
            vector_ND[acted] = np.where(known[acted, None], found, 0)
        return cls(
            kind,
            np.fromiter((e.offset for e in events), np.int64, n),
            np.fromiter((e.time_ms for e in events), np.int64, n),
            np.fromiter((e.event_hash for e in events), np.uint64, n),
            np.fromiter((e.request_hash for e in events), np.uint32, n),
            np.fromiter((e.surface for e in events), np.uint8, n),
            np.fromiter((e.action for e in events), np.uint8, n),
            np.fromiter((e.strength for e in events), np.float32, n),
            np.fromiter((e.label for e in events), np.float32, n),
            np.minimum(sizes, 255).astype(np.uint8),
            item,
            items_NS,
            vector_ND,
            known,
        )

    def take(self, at: Ints | slice) -> Columns:
        """Return the events at ``at``, as columns."""
        return Columns(*(getattr(self, name)[at] for name in self.__slots__))


class RowVectors:
    """The vectors of the rows of one round, float32 while the event works on them."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._h_RTD = np.empty((len(rows), 2, DIM), np.float32)
        self._loaded = np.zeros(len(rows), np.bool_)
        self._stepped = np.zeros(len(rows), np.bool_)

    def get(self, at: Ints) -> F32:
        """Return the vectors of the rows ``at``, as they stand in this event."""
        new = at[~self._loaded[at]]
        if len(new):
            self._h_RTD[new] = read_vectors(self._rows[new])
            self._loaded[new] = True
        return self._h_RTD[at]

    def set(self, at: Ints, h_RTD: F32) -> None:
        """Replace the vectors of the rows ``at``."""
        self._h_RTD[at] = h_RTD
        self._loaded[at] = self._stepped[at] = True

    def store(self) -> None:
        """Write back what moved: the one point at which values are rounded to fp16."""
        at = np.flatnonzero(self._stepped)
        if len(at):
            h_RTD = self._h_RTD[at]
            length_RT = norms(h_RTD)
            unit_RTD = h_RTD / np.where(length_RT > 0, length_RT, 1)[..., None]
            self._rows["vectors"][at] = unit_RTD.astype(np.float16)
            self._rows["norms"][at] = length_RT


def read_vectors(rows: Rows) -> F32:
    """Return the vectors of rows as they are stored, [R, T, D]."""
    vectors: F32 = rows["vectors"].astype(np.float32) * rows["norms"][..., None]
    return vectors


def rounds(users: Ints) -> tuple[Ints, Ints, list[int]]:
    """Return the users, busiest first, the order of events by round and user, and the bounds of the rounds.

    Busiest first makes the users of each round a prefix, so that a round works on a view.
    """
    touched, inverse, counts = np.unique(users, return_inverse=True, return_counts=True)
    busiest = np.argsort(-counts, kind="stable")
    place = np.empty(len(touched), np.intp)
    place[busiest] = np.arange(len(touched))
    by_user = np.argsort(inverse, kind="stable")
    rank = np.empty(len(users), np.intp)
    rank[by_user] = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = np.lexsort((place[inverse], rank))
    bounds = np.concatenate([[0], np.cumsum(np.bincount(rank))])
    return touched[busiest], order, bounds.tolist()

"""A batch of events as columns, cut into rounds, and the vectors of the rows that a round works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from models.user_events import (
    ACTION,
    IMPRESSION,
    NO_SURFACE,
    Bools,
    UserEvent,
    UserStateConfig,
    VectorSource,
    attribution_windows,
    strengths,
)
from models.user_row import DIM, ROW, SHOWN, Rows
from models.user_steps import F32, StepRates, norms

Ints = npt.NDArray[np.intp]
Carry = tuple[int, F32]
"""Hash of the space that vectors are carried over from, and M [D, D]: v in that space is about v @ M in this one."""


class Context(NamedTuple):
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
        tables = _tables(config, tuple(surfaces))
        return cls(config, vectors, np.uint64(epoch), np.uint64(space_id), generation, *tables, carry)


@lru_cache(maxsize=8)
def _tables(
    config: UserStateConfig, surfaces: tuple[str, ...]
) -> tuple[StepRates, F32, F32, npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return what a context reads of the settings, made once: rates, strengths, biases, windows, half-lives."""
    windows_seconds = attribution_windows(config, surfaces)
    return _rates(config), strengths(config), _biases(config, surfaces), windows_seconds, half_lives(config)


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
    time_s: npt.NDArray[np.int64]
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
    """Vector of an action's item; where it is not known, any finite one."""
    known: Bools

    @classmethod
    def of(cls, events: Sequence[UserEvent], vectors: VectorSource) -> Columns:
        """Return the columns of events; looks up the vectors of all actions at once."""
        n = len(events)
        kind = np.array([e.kind for e in events], np.int8)
        time_ms = np.array([e.time_ms for e in events], np.int64)
        acted = [i for i, e in enumerate(events) if e.kind == ACTION]
        if len(acted) == n:
            item = np.concatenate([e.items for e in events])
            vector_ND, known = vectors.by_hash(item)
        else:
            item, vector_ND, known = np.zeros(n, np.uint64), np.zeros((n, DIM), np.float32), np.zeros(n, np.bool_)
            if acted:
                hashes = np.concatenate([events[i].items for i in acted])
                item[acted] = hashes
                vector_ND[acted], known[acted] = vectors.by_hash(hashes)
        n_items, items_NS = np.zeros(n, np.uint8), np.zeros((n, SHOWN), np.uint32)
        shown = [i for i, e in enumerate(events) if e.kind == IMPRESSION]
        if shown:
            slates = [events[i].items for i in shown]
            sizes = np.array([len(items) for items in slates])
            n_items[shown] = np.minimum(sizes, 255)
            held_NS = np.zeros((n, SHOWN), np.bool_)
            held_NS[shown] = np.arange(SHOWN) < sizes[:, None]
            items_NS[held_NS] = short_hashes(np.concatenate([items[:SHOWN] for items in slates]))
        return cls(
            kind,
            np.array([e.offset for e in events], np.int64),
            time_ms,
            time_ms // 1000,
            np.array([e.event_hash for e in events], np.uint64),
            np.array([e.request_hash for e in events], np.uint32),
            np.array([e.surface for e in events], np.uint8),
            np.array([e.action for e in events], np.uint8),
            np.array([e.strength for e in events], np.float32),
            np.array([e.label for e in events], np.float32),
            n_items,
            item,
            items_NS,
            vector_ND,
            known,
        )

    def take(self, at: Ints | slice) -> Columns:
        """Return the events at ``at``, as columns."""
        return Columns(*(getattr(self, name)[at] for name in self.__slots__))


def short_hashes(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """Return the short hash of each 64-bit hash, as models.hashing.short_hash: the low bits, 0 replaced by 1."""
    return np.maximum(hashes.astype(np.uint32), 1)


class RowVectors:
    """The vectors of the rows of one round, float32 while the event works on them."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._h_RTD: F32 | None = None
        self._stepped = np.zeros(len(rows), np.bool_)

    def get(self, at: Ints) -> F32:
        """Return the vectors of the rows ``at``, rising, as they stand in this event; they are not to be written to."""
        h_RTD = self._read()
        # Of all rows no copy is needed; a fancy index costs four times as much as this.
        return h_RTD if len(at) == len(h_RTD) else h_RTD.take(at, axis=0)

    def set(self, at: Ints, h_RTD: F32) -> None:
        """Replace the vectors of the rows ``at``, rising; the array is kept and may be written to."""
        if len(at) == len(self._rows):
            self._h_RTD = h_RTD
            self._stepped[:] = True
        else:
            self._read()[at] = h_RTD
            self._stepped[at] = True

    def store(self) -> None:
        """Write back what moved: the one point at which values are rounded to fp16."""
        at = self._stepped.nonzero()[0]
        if len(at):
            h_RTD = self.get(at)
            length_RT = norms(h_RTD)
            places: Ints | slice = at if len(at) < len(self._rows) else slice(None)
            unit_RTD = h_RTD / (length_RT + (length_RT == 0))[..., None]
            self._rows["vectors"][places] = unit_RTD.astype(np.float16)
            self._rows["norms"][places] = length_RT

    def _read(self) -> F32:
        # Of most events no vector is wanted: they are read when the first one is.
        if self._h_RTD is None:
            self._h_RTD = read_vectors(self._rows)
        return self._h_RTD


def read_vectors(rows: Rows) -> F32:
    """Return the vectors of rows as they are stored, [R, T, D]."""
    vectors: F32 = rows["vectors"].astype(np.float32) * rows["norms"][..., None]
    return vectors


def whole(records: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """Return a view of records as one piece each: NumPy copies a record field by field, at up to ten times the cost."""
    return records.view(_piece(records.itemsize))


@lru_cache
def _piece(size: int) -> np.dtype[np.void]:
    """Return the type of a piece, kept: to read its name costs as much as the view."""
    return np.dtype(f"V{size}")


def rows_at(rows: Rows, at: npt.NDArray[Any]) -> Rows:
    """Return a copy of the rows ``at``."""
    copied: Rows = whole(rows)[at].view(ROW)
    return copied


def put_rows(rows: Rows, at: npt.NDArray[Any], new: Rows) -> None:
    """Replace the rows ``at``, in place."""
    whole(rows)[at] = whole(new)


def rounds(users: Sequence[int]) -> tuple[Ints, Ints, list[int]]:
    """Return the users, busiest first, the order of events by round and user, and the bounds of the rounds.

    Busiest first makes the users of each round a prefix, so that a round works on a view.
    """
    turns: dict[int, list[int]] = {}
    for place, user in enumerate(users):
        turns.setdefault(user, []).append(place)
    touched = sorted(turns)
    if len(touched) < len(users):
        touched.sort(key=lambda user: -len(turns[user]))
    waiting = [turns[user] for user in touched]
    order: list[int] = []
    bounds = [0]
    while waiting:
        turn = len(bounds) - 1
        order += [places[turn] for places in waiting]
        bounds.append(len(order))
        while waiting and len(waiting[-1]) == turn + 1:
            waiting.pop()
    return np.array(touched, np.intp), np.array(order, np.intp), bounds

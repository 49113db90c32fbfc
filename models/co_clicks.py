"""Which items users act on one after another: live, bounded, from the user rows alone.

Whenever a user acts positively on an item that the row does not hold as such yet, each of the last items that the row
does hold is followed by it: the pair (earlier item → later item) gains weight, less the more items lie between. That
an item is learned once for as long as the row remembers it is also the cap of what one user can do to a pair.

A row's ring of recent items tells nearly the same later on (not in which order items were acted on again), so that a
process which takes over users learns from their rows, and no log has to be read.

Bounded: an item keeps at most ``neighbours`` followers, by Space-Saving (Metwally, Agrawal and El Abbadi: Efficient
computation of frequent and top-k elements in data streams, ICDT 2005, section 3): a newcomer takes the place of the
weakest, with its weight as the error that is taken off when read. So a follower that has more than its share of an
item's pairs is among the kept ones, and a newcomer can rise. Weights decay forward (Cormode, Korn and Tirthapura:
Exponentially decayed aggregates on data streams, ICDE 2008): they are kept as they would stand at a landmark.

Pairs are taken in the order given, one of an item after another, and the landmark moves by whole half-lives: cut into
batches in any way, the same steps leave the same bits.

Axes: B requests, R recent items, E steps, P earlier items of a step, M kept followers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from models.columns import at_columns
from models.item_index import ItemIndex
from models.user_batch import rounds
from models.user_events import ACTION, Outcome, UserEvent
from models.user_row import NEGATIVE, POSITIVE, RECENT, Rows, recent

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

SPARE: Final = 1.125
"""Arrays grow to this many times what is needed."""
LABELLED: Final = POSITIVE | NEGATIVE
"""Bits of an action code that say what the action means; the code of an action without stays as it was."""
_LAST: Final = np.iinfo(np.int64).max
_MOST: Final = np.int64(0x7FFFFFFF)
"""Above every row, and no less than the bits of any float32."""
_REACH: Final = 40
"""Half-lives after which the landmark moves; a float32 overflows at 127."""


class CoClicksConfig(BaseModel):
    """How co-click neighbours are learned and read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    neighbours: int = Field(
        32, ge=4, le=256, description="Followers kept of an item, 12 bytes each: 19 MB for 50,000 items."
    )
    last_items: int = Field(
        10, ge=1, le=RECENT - 1, description="Items acted on before, at most, that a step of a user follows."
    )
    fading: float = Field(
        0.85, gt=0, le=1, description="What an item counts of what the next newer one of the same user counts."
    )
    half_life_seconds: float = Field(
        6 * 3_600.0, ge=60, description="Event time in which a pair loses half of its weight, seconds."
    )
    prior: float = Field(
        5.0, gt=0, le=1_000, description="Actions added to those of each item: pairs of rare items count for less."
    )
    popularity_exponent: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Power of a follower's own actions by which its strength is divided; 0.5: cosine, 0: none.",
    )


@dataclass(frozen=True, slots=True)
class Steps:
    """First positive actions of users on items, in the order of the log, and on what each acted before.

    ``items`` int32 [E] and ``earlier`` int32 [E, P], newest first: rows, -1 for none and for what has no row.
    """

    items: I32
    earlier: I32
    times_ms: I64

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.items)


NO_STEPS: Final = Steps(np.zeros(0, np.int32), np.zeros((0, 0), np.int32), np.zeros(0, np.int64))


class CoClicks:
    """The followers of items. Called from one thread.

    ``index``: the numbering of items. An item that it does not hold yet is part of no pair.
    """

    def __init__(self, config: CoClicksConfig, index: ItemIndex) -> None:
        self.config = config
        self._index = index
        self._fading = config.fading ** np.arange(max(config.last_items, RECENT))
        self._followers: I32 = np.zeros((0, config.neighbours), np.int32)
        self._weights: F32 = np.zeros((0, config.neighbours), np.float32)
        self._errors: F32 = np.zeros((0, config.neighbours), np.float32)
        self._actions: F64 = np.zeros(0)
        self._landmark: int | None = None
        """Half-lives since the epoch of the time at which all weights are kept."""

    @property
    def nbytes(self) -> int:
        """Return the bytes of all arrays."""
        return self._followers.nbytes + self._weights.nbytes + self._errors.nbytes + self._actions.nbytes

    def steps_of(self, before: Rows, events: Sequence[UserEvent], outcomes: npt.NDArray[np.int8]) -> Steps:
        """Return the steps among ``events``, applied to the rows ``before`` them, with their Outcome int8 [N].

        Follows the ring of recent items as models.user_state.apply does, event by event.
        """
        done = outcomes.tolist()
        at = [i for i, event in enumerate(events) if event.kind == ACTION and done[i] == Outcome.APPLIED]
        if not at:
            return NO_STEPS
        actions = [events[i] for i in at]
        codes = np.array([event.action for event in actions], np.uint8)
        times_ms = np.array([event.time_ms for event in actions], np.int64)
        is_step = np.zeros(len(at), np.bool_)
        # Each item and what its user acted on before side by side: they are looked up together.
        hashes = np.zeros((len(at), 1 + self.config.last_items), np.uint64)
        items, earlier = hashes[:, 0], hashes[:, 1:]
        items[:] = [event.items[0] for event in actions]
        touched, order, bounds = rounds([event.user for event in actions])
        ring = before["recent"]
        held, held_codes = ring["item"][touched], ring["action"][touched]
        for start, end in pairwise(bounds):
            now = order[start:end]
            own, own_codes, item, code = held[: end - start], held_codes[: end - start], items[now], codes[now]
            same = own == item[:, None]
            liked = (own_codes & POSITIVE) != 0
            is_step[now] = ((code & POSITIVE) != 0) & ~np.logical_or.reduce(same & liked, axis=1)
            earlier[now] = _packed(np.where(liked & ~same, own, 0))[:, : self.config.last_items]
            # Behind the last round nothing is read.
            if end < len(at):
                _move_to_front(own, own_codes, item, code)
        rows = self._rows(hashes[is_step])
        return Steps(rows[:, 0], rows[:, 1:], times_ms[is_step])

    def steps_of_rows(self, rows: Rows, after_ms: int = -1) -> Steps:
        """Return the steps that user rows still tell, those after ``after_ms`` alone, in the order of their times."""
        hashes, codes, times_ms = recent(rows)
        liked = (codes & POSITIVE) != 0
        front = _front(liked)
        times_ms = at_columns(times_ms, front)
        hashes = at_columns(np.where(liked, hashes, 0), front)
        items = self._rows(hashes)
        most = self.config.last_items
        padded = np.concatenate([items[:, 1:], np.full((len(items), most), -1, np.int32)], axis=1)
        # Of the entry at place n, the earlier ones stand at n + 1 and on.
        earlier = np.lib.stride_tricks.sliding_window_view(padded, most, axis=1)
        user, place = np.nonzero((hashes != 0) & (times_ms > after_ms))
        # Of one second the older entry first: it stands behind.
        order = np.lexsort((-place, times_ms[user, place]))
        user, place = user[order], place[order]
        return Steps(items[user, place], earlier[user, place], times_ms[user, place])

    def learn(self, steps: Steps, now_ms: int | None = None) -> None:
        """Learn steps, in their order; one that lies after ``now_ms`` counts as one of that time.

        Without that bound a single event of the next century would leave nothing of this one.
        """
        if not len(steps):
            return
        config, rows, earlier = self.config, steps.items, steps.earlier[:, : self.config.last_items]
        last = np.maximum.reduce(earlier, axis=None, initial=np.maximum.reduce(rows))
        self._grow(int(last) + 1)
        times_ms = steps.times_ms if now_ms is None else np.minimum(steps.times_ms, now_ms)
        half_lives = times_ms / (config.half_life_seconds * 1_000.0)
        whole = np.floor(half_lives)
        self._reach(int(np.maximum.reduce(whole)))
        # The power of the landmark is one of two apart from the rest: moving it rounds nothing.
        fraction, exponents = np.exp2(half_lives - whole), (whole - (self._landmark or 0)).astype(np.int32)
        known = rows >= 0
        if np.count_nonzero(known) < len(known):
            rows, earlier, fraction, exponents = rows[known], earlier[known], fraction[known], exponents[known]
        np.add.at(self._actions, rows, np.ldexp(fraction, exponents))
        fading = self._fading[: earlier.shape[1]]
        weights = np.ldexp((fraction[:, None] * fading).astype(np.float32), exponents[:, None])
        pairs = ((earlier >= 0) & (weights > 0)).reshape(-1).nonzero()[0]
        self._add(earlier.reshape(-1).take(pairs), rows.take(pairs // len(fading)), weights.take(pairs))

    def followers(self, row: int, now_ms: int) -> dict[int, float]:
        """Return the rows that follow one row and their decayed weights at ``now_ms``, errors taken off."""
        if not 0 <= row < len(self._followers):
            return {}
        held = np.flatnonzero(self._weights[row])
        found = (self._weights[row, held] - self._errors[row, held]) * self._decay(now_ms)
        return dict(zip(self._followers[row, held].tolist(), found.tolist(), strict=True))

    def candidates(self, liked: I32, now_ms: int, most: int) -> I32:
        """Return what follows the liked items of each request, strongest first, int32 [B, ≤ most], padded with -1.

        ``liked`` int32 [B, R ≤ RECENT], newest first, -1 for none. Strength: Σ fading^n · w(a → b) / √N(a) / N(b)^α
        over the n-th liked items a, with N the decayed actions on an item and the prior; at α = 0.5 the cosine of
        Sarwar et al. (Item-based collaborative filtering, WWW 2001, section 3.1.1) and Linden, Smith and York
        (Amazon.com recommendations, IEEE Internet Computing 2003), so that what everybody acts on is no one's
        neighbour. A request gets the same alone and in any batch.
        """
        size, config, decay = len(self._followers), self.config, self._decay(now_ms)
        liked = at_columns(liked, _front(liked >= 0))
        known = (liked >= 0) & (liked < size)
        used = np.logical_or.reduce(known, axis=0).nonzero()[0]
        if not len(used) or most <= 0:
            return np.empty((len(liked), 0), np.int32)
        # Those that are known stand at the front, as a rule fewer than a row remembers.
        liked, known = liked[:, : used[-1] + 1], known[:, : used[-1] + 1]
        own = known * self._fading[: liked.shape[1]]
        # What is not known weighs nothing, whatever row is read for it.
        own *= decay / np.sqrt(self._actions.take(liked, mode="clip") * decay + config.prior)
        found = self._followers.take(liked, axis=0, mode="clip")
        actions = self._actions.take(found) * decay + config.prior
        weights = self._weights.take(liked, axis=0, mode="clip")
        weights -= self._errors.take(liked, axis=0, mode="clip")
        strength: F64 = np.multiply(weights, own[:, :, None], dtype=np.float64)
        strength /= np.sqrt(actions) if config.popularity_exponent == 0.5 else actions**config.popularity_exponent
        columns = found.shape[1] * found.shape[2]
        return _strongest(found.reshape(-1, columns), strength.reshape(-1, columns), most)

    def _rows(self, hashes: U64) -> I32:
        return self._index.rows_by_hash(hashes.ravel().tolist(), hashes.size).reshape(hashes.shape)

    def _add(self, items: I32, followers: I32, weights: F32) -> None:
        """Add pairs [n] in their order, each item's one after another, different items side by side."""
        order, bounds = _turns(items)
        items, followers, weights = items[order], followers[order], weights[order]
        begins = items.astype(np.intp) * self.config.neighbours
        # Flat, so that one index leads to a place.
        all_followers, all_weights = self._followers.reshape(-1), self._weights.reshape(-1)
        all_errors = self._errors.reshape(-1)
        for start, end in pairwise(bounds):
            item, follower, weight = items[start:end], followers[start:end], weights[start:end]
            held = self._weights.take(item, axis=0)
            same = self._followers.take(item, axis=0) == follower[:, None]
            same &= held > 0
            known = np.logical_or.reduce(same, axis=1)
            # A free place has no weight: it is the weakest.
            at = begins[start:end] + np.where(known, same.argmax(axis=1), held.argmin(axis=1))
            before = all_weights.take(at)
            all_errors[at] = np.where(known, all_errors.take(at), before)
            all_weights[at] = before + weight
            all_followers[at] = follower

    def _decay(self, now_ms: int) -> float:
        """Return what a weight at the landmark is at ``now_ms``."""
        exponent = (self._landmark or 0) - now_ms / (self.config.half_life_seconds * 1_000.0)
        return float(np.exp2(min(max(exponent, -1_000.0), 1_000.0)))

    def _reach(self, half_lives: int) -> None:
        """Move the landmark where weights of that time would come near to the largest float."""
        if self._landmark is None:
            self._landmark = half_lives
        if half_lives - self._landmark <= _REACH:
            return
        moved = self._landmark - half_lives
        self._landmark = half_lives
        for held in (self._weights, self._errors, self._actions):
            np.ldexp(held, max(moved, -2_000), out=held)

    def _grow(self, rows: int) -> None:
        missing = rows - len(self._followers)
        if missing <= 0:
            return
        more = max(missing, round(rows * SPARE) - len(self._followers))
        shape = (more, self.config.neighbours)
        self._followers = np.concatenate([self._followers, np.full(shape, -1, np.int32)])
        self._weights = np.concatenate([self._weights, np.zeros(shape, np.float32)])
        self._errors = np.concatenate([self._errors, np.zeros(shape, np.float32)])
        self._actions = np.concatenate([self._actions, np.zeros(more)])


def _turns(items: I32) -> tuple[npt.NDArray[np.intp], list[int]]:
    """Return the order of pairs [n] by their turn, the n-th of each item, and the bounds of the turns."""
    by_item = items.argsort(kind="stable")
    ordered = items.take(by_item)
    again = np.empty(len(items), np.bool_)
    again[:1] = False
    np.equal(ordered[1:], ordered[:-1], out=again[1:])
    if not np.count_nonzero(again):
        return by_item, [0, len(items)]
    place = np.arange(len(items))
    turn = place - np.maximum.accumulate(np.where(again, 0, place))
    bounds = [0, *np.bincount(turn).cumsum().tolist()]
    return by_item[turn.argsort(kind="stable")], bounds


def _strongest(found: I32, strength: F64, most: int) -> I32:
    """Return the rows [B, n] of the greatest sums of strength [B, n], greatest first, int32 [B, ≤ most].

    Plain sorts of packed integers, each request by itself: as fast as NumPy sorts, and the same in any batch.
    """
    # What does not follow stands behind all that does, as one row whose sum is not above 0.
    rows = np.where(strength > 0, found, _MOST)
    keys = (rows << 32) | np.arange(found.size).reshape(found.shape)
    keys.sort(axis=1)
    row = keys >> 32
    own = strength.take(keys & 0xFFFFFFFF)
    sums = own.cumsum(axis=1)
    # Where a row ends, the next one begins.
    edges = np.empty((len(row), row.shape[1] + 1), np.bool_)
    edges[:, 0] = edges[:, -1] = True
    np.not_equal(row[:, 1:], row[:, :-1], out=edges[:, 1:-1])
    begins, ends = edges[:, :-1], edges[:, 1:]
    # Sums never fall before that row, so that what was summed before a row began is the greatest of such so far.
    before = np.where(begins, sums - own, 0.0)
    total = (sums - np.maximum.accumulate(before, axis=1, out=before)).astype(np.float32)
    # The bits of positive floats are in the order of the floats.
    follows = ends & (total > 0)
    keys = np.where(follows, (_MOST - total.view(np.int32)) << 32 | row, _LAST)
    keys.sort(axis=1)
    most = min(most, int(np.maximum.reduce(np.add.reduce(follows, axis=1, dtype=np.intp))))
    # The lower half of the last key is -1.
    return keys[:, :most].astype(np.int32)


def _front(kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """Return the order [n, R] that brings what is kept to the front of each row, else leaving it as it is."""
    return (~kept).argsort(axis=1, kind="stable")


def _packed(items: U64) -> U64:
    """Return items [n, R] without the zeros between them."""
    return at_columns(items, _front(items != 0))


def _move_to_front(held: U64, codes: npt.NDArray[np.uint8], items: U64, actions: npt.NDArray[np.uint8]) -> None:
    """Enter one action into each ring [n, R], in place, as models.user_state does."""
    there = held == items[:, None]
    known = there.any(axis=1)
    where = np.where(known, there.argmax(axis=1), RECENT - 1)
    each, place = np.arange(len(items)), np.arange(RECENT)
    keeps = known & ((actions & LABELLED) == 0)
    newest = np.where(keeps, codes[each, where], actions)
    source = place - (place <= where[:, None])
    source[:, 0] = 0
    held[:] = held[each[:, None], source]
    codes[:] = codes[each[:, None], source]
    held[:, 0], codes[:, 0] = items, newest

"""Decayed counts of one ``events`` partition: a function of its log alone.

Why a function of the log
-------------------------
After a crash the counts are read back from ``item-stats`` and the rest is taken from ``events`` again. That gives the
same counts only if whether an event counts depends on the partition's log and on nothing else: not on what became of
the event in its user's row, not on how the log was cut into batches, not on whether it is read live or again. So every
accepted event is offered here, in the order of offsets, one that failed later too, and the three decisions are made
from the log:

1. **Window.** The watermark is the greatest event time so far in the partition. Windows are tumbling on it; one also
   ends after ``user_window_max_touches`` counts were offered, which bounds all that follows.
2. **Repeated event.** An event whose (user_id, event_id) was seen before in this window or the one before adds
   nothing. (The user's row has a ring of its own; asking it would make the counts depend on the row.)
3. **Cap.** At most ``user_cap`` counted events per user, item, kind and window, held in a count-min sketch with
   conservative update: two rows of 2^20 bytes, 2 MiB a partition. A sketch never lets more through than the cap; it may
   count a user's event as capped that is not: `benchmarks/counters.py` prints how often.

The state behind these decisions at an offset C follows from the log since the first offset of the window before the
one in force at C, together with the watermark there: what was seen before that cannot reach C. A checkpoint keeps
those two numbers (`resume_offset` and `watermark_ms` of `Checkpoint`), and reading on from there rebuilds it exactly.

Each item has its own guard: the offset of the last event that its counts contain. An event not above it adds nothing,
but takes part in 1 to 3. Any published state of an item is therefore right to go on from, however old.

Forward decay
-------------
Counts are kept as they would stand at a landmark time L, w · 2^((t − L) / h) (Cormode, Shkapenyuk, Srivastava, Xu:
Forward Decay, ICDE 2009), so that adds commute, a late event adds its already decayed weight, and partitions are summed
by plain addition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from models.counter_events import (
    ACTIONS,
    EXPECTED,
    HALF_LIVES,
    IMPRESSIONS,
    KINDS,
    TOUCHED,
    WEIGHT_UNIT,
    CountersConfig,
    TouchBatch,
)

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
UInt64 = npt.NDArray[np.uint64]

Scalar = TypeVar("Scalar", bound=np.generic)

CELLS: Final = 1 << 20
WIDTH: Final = HALF_LIVES * KINDS
NEVER_MS: Final = 2**62
"""Time of the first impression of an item that had none."""
MAX_EXPONENT: Final = 1_000.0
"""Greatest power of two that a weight may have: beyond 2^1023 a float overflows."""
_KIND_OFFSETS: Final = np.arange(HALF_LIVES, dtype=np.int64) * KINDS
_UNITS: Final = np.where(np.arange(KINDS) == ACTIONS, 1, WEIGHT_UNIT)
"""By kind, the thousandths of a weight in one of its exact total."""
_SALTS: Final = np.arange(1, KINDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
"""By kind, what a user's touches of an item are told apart by."""
_MIX: Final = tuple(map(np.uint64, (30, 0xBF58476D1CE4E5B9, 27, 0x94D049BB133111EB, 31)))
_FEW_ROWS: Final = 48
"""Rows up to which a set of Python's is faster than NumPy."""
_CELL: Final = np.uint64(CELLS - 1)
_UPPER_HALF: Final = np.uint64(32)


class Landmark:
    """The time at which all counts of a process are kept."""

    def __init__(self, config: CountersConfig) -> None:
        self.half_lives_ms: Float64 = np.array(config.half_lives_seconds, np.float64) * 1000.0
        self.time_ms: int | None = None

    def factors(self, times_ms: Int64) -> Float64:
        """Return what a weight of 1 at each time is at the landmark, [n, 4] float64."""
        exponents = (times_ms - (self.time_ms or 0))[:, None] / self.half_lives_ms
        # Never 0: counts of a partition that lies far behind the others must come back when they are divided again.
        return np.exp2(np.minimum(np.maximum(exponents, -MAX_EXPONENT), MAX_EXPONENT))

    def move(self, time_ms: int) -> Float64:
        """Move the landmark and return what kept values have to be multiplied by, [4] float64."""
        factors = np.exp2(((self.time_ms or 0) - time_ms) / self.half_lives_ms)
        self.time_ms = time_ms
        return factors


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Up to where a partition's counts are published, and from where its decisions can be rebuilt."""

    offset: int = 0
    """Every event below this offset is contained in the published counts."""
    resume_offset: int = 0
    """Read ``events`` again from here: the first offset of the window before the one in force at ``offset``."""
    watermark_ms: int | None = None
    """Watermark once the event at ``resume_offset`` was seen; None where no window was open yet."""


@dataclass(slots=True)
class Added:
    """What one batch changed: touches that were counted, and those that the cap or a repetition kept out."""

    rows: Int32
    kinds: Int64
    scaled: Float64
    """[n, 4]: weights at the landmark."""
    milli: Int64
    """[m], m ≤ n: weights of the first ones as they enter the exact totals; EXPECTED stands behind them."""
    times_ms: Int64
    events: Int64
    """[n]: place in the batch of the event of each."""
    refused: int


@dataclass(frozen=True, slots=True)
class Absolute:
    """State of some items of one partition, arrays side by side: what is published and mirrored."""

    rows: Int32
    values: Float64
    """[n, 4, kinds], decayed to ``ref_ms`` of each item."""
    totals: Int64
    """[n, 3]: impressions, clicks, thousandths of weighted actions."""
    last_offsets: Int64
    ref_ms: Int64
    """Greatest event time contained, epoch milliseconds."""
    first_ms: Int64
    """Least event time of an impression contained; NEVER_MS: none."""


def mix(values: UInt64) -> UInt64:
    """Return the splitmix64 finaliser of each value: stored decisions depend on it, so it never changes."""
    shift_1, factor_1, shift_2, factor_2, shift_3 = _MIX
    values = (values ^ (values >> shift_1)) * factor_1
    values = (values ^ (values >> shift_2)) * factor_2
    return values ^ (values >> shift_3)


class PartitionCounters:
    """Counts of one partition; compact slots, one for each item that the partition's users touched."""

    def __init__(self, config: CountersConfig, landmark: Landmark) -> None:
        self._config = config
        self._landmark = landmark
        self._window_ms = max(1, int(config.user_window_seconds * 1000))
        self.used = 0
        self.rows: Int32 = np.zeros(0, np.int32)
        self.values: Float64 = np.zeros((0, WIDTH))
        self.totals: Int64 = np.zeros((0, TOUCHED), np.int64)
        self.last_offsets: Int64 = np.zeros(0, np.int64)
        self.ref_ms: Int64 = np.zeros(0, np.int64)
        self.first_ms: Int64 = np.zeros(0, np.int64)
        self._dirty = np.zeros(0, np.bool_)
        self._dirty_since: Int64 = np.zeros(0, np.int64)
        self._slot_of_row: Int32 = np.zeros(0, np.int32)
        self.owned = False
        self.start(Checkpoint())

    def start(self, checkpoint: Checkpoint) -> None:
        """Begin to decide from ``checkpoint`` on; counts stay, what was to be published is forgotten.

        The next batch has to begin at ``checkpoint.resume_offset``, or at any offset below it.
        """
        self.next_offset = checkpoint.resume_offset
        self._contained_up_to = checkpoint.offset
        self._seen: set[int] = set()
        self._seen_before: set[int] = set()
        self._cells: tuple[bytearray, bytearray] | None = None
        self._touches = 0
        self._watermark_ms = -1
        self._windows: list[tuple[int, int]] = []
        if checkpoint.watermark_ms is not None:
            self._watermark_ms = checkpoint.watermark_ms
            self._windows.append((checkpoint.resume_offset, checkpoint.watermark_ms))
        self._dirty[:] = False

    def checkpoint(self) -> Checkpoint:
        """Return up to where everything is published, once what is not dirty was sent."""
        dirty = self._dirty[: self.used]
        offset = max(self.next_offset, self._contained_up_to)
        if dirty.any():
            offset = min(offset, int(self._dirty_since[: self.used][dirty].min()))
        if not self._windows:
            return Checkpoint(offset, offset, None)
        first_offset, watermark_ms = self._windows[self._window_before(offset)]
        return Checkpoint(offset, first_offset, watermark_ms)

    def published(self, checkpoint: Checkpoint) -> None:
        """Forget the windows that no checkpoint from ``checkpoint`` on can need."""
        self._contained_up_to = max(self._contained_up_to, checkpoint.offset)
        if self._windows:
            del self._windows[: self._window_before(checkpoint.offset)]

    def _window_before(self, offset: int) -> int:
        """Return the number of the window before the one in force when ``offset`` is read, or of the first held."""
        in_force = 0
        while in_force + 1 < len(self._windows) and self._windows[in_force + 1][0] < offset:
            in_force += 1
        return max(in_force - 1, 0)

    def add(self, batch: TouchBatch, rows: Int32, item_hashes: UInt64) -> Added:
        """Count a batch; ``rows`` and ``item_hashes`` are those of ``batch.item_ids``, a row below 0 is left out.

        Events below ``next_offset`` change nothing at all.
        """
        kinds, weights = np.array(batch.kinds, np.int64), np.array(batch.weights, np.float64)
        event_of = np.arange(len(batch)).repeat(_lengths(batch.ends))
        kept = self._admit(batch, rows, kinds, event_of, item_hashes)
        if not len(kept):
            return Added(rows[:0], kinds[:0], np.zeros((0, HALF_LIVES)), kinds[:0], kinds[:0], kinds[:0], len(kinds))
        offsets = np.array(batch.offsets, np.int64)[event_of[kept]]
        if batch.offsets[0] < self._contained_up_to:
            since = offsets >= self._contained_up_to
            kept, offsets = kept[since], offsets[since]
        slots = self._slots(rows[kept])
        self._mark_dirty(slots, offsets)
        fresh = offsets > self.last_offsets[slots]
        if np.count_nonzero(fresh) < len(fresh):
            kept, slots, offsets = kept[fresh], slots[fresh], offsets[fresh]
        refused = len(kinds) - len(kept)
        own = kinds[kept]
        shown = (own == IMPRESSIONS).nonzero()[0]
        shares = _shares(weights, kinds, event_of)[kept[shown]] if len(shown) else weights[:0]
        rows, kinds, weights, event_of = rows[kept], own, weights[kept], event_of[kept]
        event_times = np.array(batch.times_ms, np.int64)
        times = event_times[event_of]
        milli = np.rint(weights * WEIGHT_UNIT).astype(np.int64) // _UNITS[kinds]
        np.add.at(self.totals.reshape(-1), slots * TOUCHED + kinds, milli)
        # Offsets rise within a batch, and of repeated slots NumPy keeps the last.
        self.last_offsets[slots] = offsets
        np.maximum.at(self.ref_ms, slots, times)
        if len(shown):
            np.minimum.at(self.first_ms, slots[shown], times[shown])
            # What is expected of the impressions stands behind the touches.
            both = np.concatenate([np.arange(len(kept)), shown])
            rows, slots, times, event_of = rows[both], slots[both], times[both], event_of[both]
            kinds = np.concatenate([kinds, np.full(len(shown), EXPECTED)])
            weights = np.concatenate([weights, shares])
        scaled = self._landmark.factors(event_times)[event_of] * weights[:, None]
        add_scaled(self.values, slots, columns_of(kinds), scaled)
        return Added(rows, kinds, scaled, milli, times, event_of, refused)

    def _admit(self, batch: TouchBatch, rows: Int32, kinds: Int64, event_of: Int64, item_hashes: UInt64) -> Int64:
        """Return the touches that neither the cap nor a repetition keeps out, as indices; moves the windows on."""
        event_keys: list[int] = []
        if len(kinds):
            users = mix(np.array(batch.user_hashes, np.uint64))
            event_keys = (users ^ np.array(batch.event_hashes, np.uint64)).tolist()
            keys = mix((users[event_of] ^ item_hashes) + _SALTS[kinds])
            cells_a = (keys & _CELL).tolist()
            cells_b = ((keys >> _UPPER_HALF) & _CELL).tolist()
        known = (rows >= 0).tolist()
        cap = self._config.user_cap
        kept: list[int] = []
        end = 0
        for position, offset in enumerate(batch.offsets):
            start, end = end, batch.ends[position]
            if offset < self.next_offset:
                continue
            self.next_offset = offset + 1
            if start == end:
                continue
            row_a, row_b = self._window(offset, batch.times_ms[position], end - start)
            key = event_keys[position]
            repeated = key in self._seen or key in self._seen_before
            self._seen.add(key)
            if repeated:
                continue
            for i in range(start, end):
                if not known[i]:
                    continue
                cell_a, cell_b = cells_a[i], cells_b[i]
                count_a, count_b = row_a[cell_a], row_b[cell_b]
                least = count_a if count_a < count_b else count_b
                if least >= cap:
                    continue
                if count_a == least:
                    row_a[cell_a] = least + 1
                if count_b == least:
                    row_b[cell_b] = least + 1
                kept.append(i)
        return np.array(kept, np.int64)

    def _window(self, offset: int, time_ms: int, touches: int) -> tuple[bytearray, bytearray]:
        """Move the watermark, open a window where one ended, and return the cap's cells."""
        before = self._watermark_ms
        if time_ms > before:
            self._watermark_ms = time_ms
        if (
            not self._windows
            or self._watermark_ms // self._window_ms != before // self._window_ms
            or self._touches + touches > self._config.user_window_max_touches
        ):
            self._windows.append((offset, self._watermark_ms))
            self._seen_before, self._seen = self._seen, set()
            self._cells = None
            self._touches = 0
        self._touches += touches
        if self._cells is None:
            self._cells = (bytearray(CELLS), bytearray(CELLS))
        return self._cells

    def replace(self, state: Absolute) -> tuple[npt.NDArray[np.bool_], Float64, Int64]:
        """Take over mirrored state where it contains no less than what is held; rows must not repeat.

        Returns (taken [n] bool, change of the scaled values [taken, 4 · kinds], change of the totals [taken, 3]).
        """
        slots = self._slots(state.rows)
        newer = state.last_offsets >= self.last_offsets[slots]
        slots = slots[newer]
        scaled = (
            state.values[newer].reshape(-1, HALF_LIVES, KINDS) * self._landmark.factors(state.ref_ms[newer])[:, :, None]
        )
        flat = scaled.reshape(-1, WIDTH)
        change = flat - self.values[slots]
        totals_change = state.totals[newer] - self.totals[slots]
        self.values[slots] = flat
        self.totals[slots] = state.totals[newer]
        self.last_offsets[slots] = state.last_offsets[newer]
        self.ref_ms[slots] = state.ref_ms[newer]
        self.first_ms[slots] = state.first_ms[newer]
        return newer, change, totals_change

    def contained(self, rows: npt.NDArray[np.integer]) -> Int64:
        """Return the last offset that the counts of item rows [n] contain, -1 where there are none; changes nothing."""
        found = np.full(len(rows), -1, np.int64)
        held = np.flatnonzero((rows >= 0) & (rows < len(self._slot_of_row)))
        slots = self._slot_of_row[rows[held]]
        found[held[slots >= 0]] = self.last_offsets[slots[slots >= 0]]
        return found

    def absolute(self, slots: Int64) -> Absolute:
        """Return the state of the items in ``slots``."""
        values = (
            self.values[slots].reshape(-1, HALF_LIVES, KINDS) / self._landmark.factors(self.ref_ms[slots])[:, :, None]
        )
        return Absolute(
            self.rows[slots],
            values,
            self.totals[slots],
            self.last_offsets[slots],
            self.ref_ms[slots],
            self.first_ms[slots],
        )

    def dirty(self) -> tuple[Int64, Int64, Float64]:
        """Return the slots to publish, the offset since which each waits, and its heat: [n], [n], [n]."""
        slots = np.flatnonzero(self._dirty[: self.used])
        # The shortest half-life tells what moves now; an action is worth several impressions to a reader.
        heat = self.values[slots, 0] + 10.0 * (self.values[slots, 1] + self.values[slots, 2])
        return slots, self._dirty_since[slots], heat

    def clean(self, slots: Int64) -> None:
        """Note that the present state of ``slots`` is on its way to the topic."""
        self._dirty[slots] = False

    def put_back(self, slots: Int64, since: Int64) -> None:
        """Note that ``slots``, which `clean` was told about, were not sent after all."""
        waiting = self._dirty[slots]
        self._dirty_since[slots] = np.where(waiting, np.minimum(self._dirty_since[slots], since), since)
        self._dirty[slots] = True

    def touch_again(self, rows: Int32, contained: Int64) -> None:
        """Have items published again: another process wrote a state of them that contains only up to ``contained``."""
        slots = self._slots(rows)
        behind = contained < self.last_offsets[slots]
        self._mark_dirty(slots[behind], np.maximum(contained[behind] + 1, self._contained_up_to))

    def _mark_dirty(self, slots: Int64, offsets: Int64) -> None:
        new = ~self._dirty[slots]
        # Reversed, so that of a repeated slot the first offset stays.
        self._dirty_since[slots[new][::-1]] = offsets[new][::-1]
        self._dirty[slots] = True

    def _slots(self, rows: Int32) -> Int64:
        """Return the slots of item rows (all 0 or more), giving new ones."""
        if not len(rows):
            return np.zeros(0, np.int64)
        top = int(np.maximum.reduce(rows)) + 1
        if top > len(self._slot_of_row):
            self._slot_of_row = grown(self._slot_of_row, top, -1)
        slots = self._slot_of_row[rows]
        missing = rows[slots < 0]
        if len(missing):
            new_rows = _different(missing)
            used = self.used + len(new_rows)
            if used > len(self.rows):
                self._grow(used)
            self.rows[self.used : used] = new_rows
            self._slot_of_row[new_rows] = np.arange(self.used, used, dtype=np.int32)
            self.used = used
            slots = self._slot_of_row[rows]
        return slots.astype(np.int64)

    def _grow(self, used: int) -> None:
        self.rows = grown(self.rows, used, -1)
        self.values = grown(self.values, used, 0)
        self.totals = grown(self.totals, used, 0)
        self.last_offsets = grown(self.last_offsets, used, -1)
        self.ref_ms = grown(self.ref_ms, used, 0)
        self.first_ms = grown(self.first_ms, used, NEVER_MS)
        self._dirty = grown(self._dirty, used, False)
        self._dirty_since = grown(self._dirty_since, used, 0)


def _different(rows: Int32) -> Int32:
    """Return the different rows, rising."""
    # For the few of a batch of events np.unique takes several times as long.
    return np.unique(rows) if len(rows) > _FEW_ROWS else np.array(sorted(set(rows.tolist())), np.int32)


def _lengths(ends: list[int]) -> Int64:
    bounds = np.array([0, *ends], np.int64)
    return bounds[1:] - bounds[:-1]


def _shares(weights: Float64, kinds: Int64, event_of: Int64) -> Float64:
    """Return each touch's share of what its event shows, 0 for one that is no impression."""
    shown = np.where(kinds == IMPRESSIONS, weights, 0.0)
    slates = np.bincount(event_of, shown)[event_of]
    return shown / np.where(slates > 0, slates, 1.0)


def columns_of(kinds: Int64) -> Int64:
    """Return in which columns of 4 · kinds decayed values touches of these kinds [n] are counted, [n, 4]."""
    return kinds[:, None] + _KIND_OFFSETS


def add_scaled(values: Float64, at: Int64, columns: Int64, scaled: Float64) -> None:
    """Add ``scaled`` [n, 4] to ``values`` [m, 4 · kinds] at rows ``at`` and ``columns`` [n, 4], repeated or not."""
    flat = (at * WIDTH)[:, None] + columns
    np.add.at(values.reshape(-1), flat.reshape(-1), scaled.reshape(-1))


def seconds_since(first_ms: Int64, times_ms: Int64) -> npt.NDArray[np.float32]:
    """Return the seconds from ``first_ms`` to ``times_ms``, at least 0, float32; NaN where it is NEVER_MS."""
    seconds = np.maximum(times_ms - first_ms, 0) / 1000.0
    return np.where(first_ms == NEVER_MS, np.nan, seconds).astype(np.float32)


def grown(array: npt.NDArray[Scalar], at_least: int, fill: float) -> npt.NDArray[Scalar]:
    """Return a copy of ``array`` with room for ``at_least`` rows, at least doubled, the new ones ``fill``."""
    size = max(at_least, 2 * len(array), 1_024)
    bigger = np.full((size, *array.shape[1:]), fill, array.dtype)
    bigger[: len(array)] = array
    return bigger

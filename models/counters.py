"""Decayed item counters: what users did with each item lately, summed over all partitions, read at any time.

``ItemCounters`` is what features and ranking read. It holds one ``PartitionCounters`` for each ``events`` partition:
those that this process owns count events, the others are replaced by what their owners publish. How an event is
counted, and why the counts are a function of the partition's log alone, stands in ``models/partition_counters.py``.

Array legend: rows are ItemIndex rows; the last two axes are half-lives (4, rising) and kinds (IMPRESSIONS, CLICKS,
ACTIONS, EXPECTED); exact totals have the first three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from models.counter_events import (
    ACTIONS,
    CLICKS,
    EXPECTED,
    HALF_LIVES,
    IMPRESSIONS,
    KINDS,
    NO_TOUCHES,
    TOUCHED,
    WEIGHT_UNIT,
    CountersConfig,
    TouchBatch,
    Touches,
    counter_touches,
)
from models.counters_asof import CountersAsOf
from models.errors import FencedError
from models.hashing import hash64
from models.item_index import UNKNOWN, ItemIndex
from models.partition_counters import (
    MAX_EXPONENT,
    NEVER_MS,
    WIDTH,
    Absolute,
    Added,
    Checkpoint,
    Float64,
    Int32,
    Int64,
    Landmark,
    PartitionCounters,
    UInt64,
    add_scaled,
    columns_of,
    grown,
    seconds_since,
)

__all__ = [
    "ACTIONS",
    "CLICKS",
    "EXPECTED",
    "HALF_LIVES",
    "IMPRESSIONS",
    "KINDS",
    "NEVER_MS",
    "NO_TOUCHES",
    "TOUCHED",
    "WEIGHT_UNIT",
    "Absolute",
    "Checkpoint",
    "CountersConfig",
    "ItemCounters",
    "TouchBatch",
    "Touches",
    "counter_touches",
]

Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

RANGE_HALF_LIVES: Final = 256.0
"""The landmark moves when an event is this many of the shortest half-lives after it: 2^256 is far from overflow."""
RECHECK_EVERY: Final = 1_000
"""With no room for unknown items, look after this many refusals whether the catalogue has named some meanwhile."""


class ItemCounters:
    """Counts per item over all partitions. All calls come from one thread.

    ``is_named(row)`` tells whether a catalogue record names the item; at most ``config.max_unknown_items`` others are
    counted, and ``dropped_touches`` counts what that bound kept out. Reading never changes anything.
    """

    def __init__(
        self, index: ItemIndex, config: CountersConfig, is_named: Callable[[int], bool] = lambda row: False
    ) -> None:
        self.config = config
        self.index = index
        self.dropped_touches = 0
        self._is_named = is_named
        self._landmark = Landmark(config)
        self._range_ms = RANGE_HALF_LIVES * float(self._landmark.half_lives_ms[0])
        self._partitions: dict[int, PartitionCounters] = {}
        self._guests: set[int] = set()
        self._refusals = 0
        self._hashes: UInt64 = np.zeros(0, np.uint64)
        self._hashed = 0
        self._sums: Float64 = np.zeros((1, WIDTH))
        self._totals: Int64 = np.zeros((1, TOUCHED), np.int64)
        self._ref_ms: Int64 = np.zeros(1, np.int64)
        self._first_ms: Int64 = np.full(1, NEVER_MS, np.int64)
        self._grand: Float64 = np.zeros(WIDTH)

    # Ownership

    def own(self, partition: int, checkpoint: Checkpoint | None = None) -> None:
        """Begin to count a partition here, from ``checkpoint`` on (default: the beginning of its log).

        Counts that were mirrored stay. The next batches are those from ``checkpoint.resume_offset`` on.
        """
        counters = self._partition(partition)
        counters.start(checkpoint or Checkpoint())
        counters.owned = True

    def release(self, partition: int) -> None:
        """Stop counting a partition; its counts stay until its next owner's replace them."""
        counters = self._partition(partition)
        counters.start(Checkpoint())
        counters.owned = False

    def owned(self) -> list[int]:
        """Return the partitions that are counted here, in order."""
        return sorted(p for p, counters in self._partitions.items() if counters.owned)

    def next_offset(self, partition: int) -> int:
        """Return the offset below which events of a partition change nothing any more."""
        return self._partition(partition).next_offset

    # Writing

    def add(self, partition: int, batch: TouchBatch) -> int:
        """Count a batch of an owned partition and return the number of touches counted.

        The batch holds every accepted event from the last position on, in the order of offsets; those below
        ``next_offset`` change nothing, so a batch may be added again. Call it for events that failed later as well:
        the counts are a function of the log, and recovery, which reads the log alone, counts them too.
        Raises FencedError, counting nothing, for a partition that is not owned.
        """
        self._check_owned(partition)
        if not len(batch):
            return 0
        self._keep_in_range(max(batch.times_ms))
        return len(self._count(partition, batch, self._rows(batch.item_ids)).milli)

    def add_as_of(self, partition: int, batch: TouchBatch, arrivals_ms: Int64) -> CountersAsOf:
        """Count a batch as ``add`` does and return a reader of the counts as they stood at each place of it.

        ``arrivals_ms`` [len(batch)], not falling: the time from which reads see each event. The event times of the
        batch may span ``longest_batch_ms``. Raises ValueError where they span more, FencedError as ``add`` does;
        nothing was counted then.
        """
        self._check_owned(partition)
        if len(batch) and max(batch.times_ms) - min(batch.times_ms) > self.longest_batch_ms:
            raise ValueError(f"a batch of more than {self.longest_batch_ms} ms was not counted: cut it")
        if len(batch):
            self._keep_in_range(max(batch.times_ms))
        rows = self._rows(batch.item_ids)
        items = np.unique(rows[rows >= 0])
        before, first_ms = self._sums[self._safe(items)], self._first_ms[self._safe(items)]
        added = self._count(partition, batch, rows)
        return CountersAsOf(self, self._landmark, items, before, first_ms, added, arrivals_ms)

    @property
    def longest_batch_ms(self) -> int:
        """Return how far apart the event times of a batch of ``add_as_of`` may lie."""
        return int(self._range_ms)

    def _check_owned(self, partition: int) -> None:
        counters = self._partitions.get(partition)
        if counters is None or not counters.owned:
            raise FencedError(f"partition {partition} is not counted here: nothing was changed; take it over first")

    def _count(self, partition: int, batch: TouchBatch, rows: Int32) -> Added:
        """Count a batch whose items have these rows, and return what was counted."""
        added = self._partition(partition).add(batch, rows, self._item_hashes(rows))
        if len(added.rows):
            self._grow(int(np.maximum.reduce(added.rows)) + 1)
            every, columns = added.rows.astype(np.int64), columns_of(added.kinds)
            add_scaled(self._sums, every, columns, added.scaled)
            touched = len(added.milli)
            touches = every[:touched]
            np.add.at(self._totals.reshape(-1), touches * TOUCHED + added.kinds[:touched], added.milli)
            np.maximum.at(self._ref_ms, touches, added.times_ms[:touched])
            # Behind the touches stands what is expected of the impressions among them.
            if len(every) > touched:
                np.minimum.at(self._first_ms, every[touched:], added.times_ms[touched:])
            self._grand += np.bincount(columns.reshape(-1), added.scaled.reshape(-1), WIDTH)
        return added

    def row_for(self, item_id: str) -> int:
        """Return the row of an item, giving it one; UNKNOWN where ``max_unknown_items`` leaves no room."""
        row = self.index.row(item_id)
        if row != UNKNOWN:
            return row
        if len(self._guests) >= self.config.max_unknown_items:
            if self._refusals % RECHECK_EVERY == 0:
                self._guests = {guest for guest in self._guests if not self._is_named(guest)}
            self._refusals += 1
            if len(self._guests) >= self.config.max_unknown_items:
                self.dropped_touches += 1
                return UNKNOWN
        row = self.index.add(item_id)
        self._guests.add(row)
        return row

    def replace(self, partition: int, state: Absolute) -> None:
        """Take over what the owner of a partition published, where it contains no less than what is held.

        Rows must not repeat within ``state``. Nothing is done for a partition that is owned here.
        """
        counters = self._partition(partition)
        if counters.owned or not len(state.rows):
            return
        self._keep_in_range(int(state.ref_ms.max()))
        taken, change, totals_change = counters.replace(state)
        if not taken.any():
            return
        rows = state.rows[taken]
        self._grow(int(rows.max()) + 1)
        self._sums[rows] += change
        self._totals[rows] += totals_change
        self._ref_ms[rows] = np.maximum(self._ref_ms[rows], state.ref_ms[taken])
        self._first_ms[rows] = np.minimum(self._first_ms[rows], state.first_ms[taken])
        self._grand += change.sum(axis=0)

    # Publication

    def dirty(self, partition: int) -> tuple[Int64, Int64, Float64]:
        """Return what is to be published of a partition: slots, offsets since which they wait, heat; each [n]."""
        return self._partition(partition).dirty()

    def take_dirty(self, partition: int, slots: Int64) -> Absolute:
        """Return the state of ``slots``, to be sent now; `put_back` what was not sent after all."""
        counters = self._partition(partition)
        counters.clean(slots)
        return counters.absolute(slots)

    def put_back(self, partition: int, slots: Int64, since: Int64) -> None:
        """Have taken slots published after all, with the offsets since which they wait."""
        self._partition(partition).put_back(slots, since)

    def checkpoint(self, partition: int) -> Checkpoint:
        """Return up to where a partition is published once all that `take_dirty` returned is; changes nothing."""
        return self._partition(partition).checkpoint()

    def published(self, partition: int, checkpoint: Checkpoint) -> None:
        """Forget what only an earlier checkpoint needs; call it when ``checkpoint`` was acknowledged."""
        self._partition(partition).published(checkpoint)

    def touch_again(self, partition: int, rows: Int32, contained: Int64) -> None:
        """Have items of an owned partition published again where somebody wrote a state that contains less."""
        counters = self._partition(partition)
        if counters.owned and len(rows):
            counters.touch_again(rows, contained)

    # Reading

    def read(self, rows: npt.NDArray[np.integer], now_ms: int) -> Float32:
        """Return the decayed counts at ``now_ms``, float32 [..., 4, kinds] for rows of any shape.

        Zeros for UNKNOWN and for items without counts. An event that lies after ``now_ms`` counts whole, never more.
        """
        safe = self._safe(rows)
        return self._values(safe, now_ms, 0, WIDTH).reshape(*safe.shape, HALF_LIVES, KINDS)

    def decayed(self, rows: npt.NDArray[np.integer], now_ms: int, half_life_index: int, kind: int) -> Float32:
        """Return the decayed counts of one kind at one half-life, float32 of the shape of ``rows``."""
        column = half_life_index * KINDS + kind
        return self._values(self._safe(rows), now_ms, column, column + 1)[..., 0]

    def read_at(self, rows: npt.NDArray[np.integer], times_ms: Int64) -> Float32:
        """Return the decayed counts of rows [S, …] as ``read`` does, each slate at its own time int64 [S]."""
        safe = self._safe(rows)
        out = self._values(safe, times_ms.reshape(-1, *[1] * (safe.ndim - 1)), 0, WIDTH)
        return out.reshape(*safe.shape, HALF_LIVES, KINDS)

    def last_offsets(self, partition: int, rows: npt.NDArray[np.integer]) -> Int64:
        """Return the last offset of a partition that the counts of rows [n] contain, int64 [n]; -1: none."""
        return self._partition(partition).contained(rows)

    def first_seen_seconds(self, rows: npt.NDArray[np.integer], times_ms: Int64) -> Float32:
        """Return for rows [S, …] the time since the first impression of each, at its slate's time int64 [S].

        float32 [S, …] seconds, NaN for an item without impressions; 0 where the first one lies after the time.
        """
        first_ms = self._first_ms.take(self._safe(rows))
        return seconds_since(first_ms, times_ms.reshape(-1, *[1] * (first_ms.ndim - 1)))

    def totals(self, rows: npt.NDArray[np.integer]) -> Float64:
        """Return the undecayed totals, float64 [..., 3]: impressions and clicks exact, weighted actions to 0.001."""
        totals = self._totals[self._safe(rows)].astype(np.float64)
        totals[..., ACTIONS] /= WEIGHT_UNIT
        return totals

    def smoothed_ctr(self, rows: npt.NDArray[np.integer], now_ms: int, half_life_index: int) -> Float32:
        """Return (clicks + s·m) / (impressions + s), float32 [...], in (0, 1).

        s is ``prior_strength`` and m the mean CTR of all items, itself smoothed by ``prior_ctr``. Clicks without
        their impressions (a log that has none) count as impressions too.
        """
        safe = self._safe(rows)
        column = half_life_index * KINDS
        strength = self.config.prior_strength
        mean = self._mean_ctr(column, now_ms)
        values = self._values(safe, now_ms, column, column + KINDS)
        clicks = values[..., CLICKS]
        impressions = np.maximum(values[..., IMPRESSIONS], clicks)
        ctr = (clicks + np.float32(strength * mean)) / (impressions + np.float32(strength))
        return np.minimum(np.maximum(ctr, np.float32(1e-7)), np.float32(1 - 1e-6))

    def grand_total(self, kind: int, half_life_index: int, now_ms: int) -> float:
        """Return the decayed count of a kind over all items at ``now_ms``."""
        return float(self._grand[half_life_index * KINDS + kind] * self._decay(now_ms)[half_life_index])

    def top(self, n: int, now_ms: int, half_life_index: int, kind: int, mask: Bool | None = None) -> Int32:
        """Return the rows of the ``n`` items with the greatest decayed count, greatest first, int32 [≤ n].

        Ties by row. Only items counted at all and, with ``mask`` (bool [rows], shorter means False), allowed by it.
        Costs a pass over all rows: callers keep the result.
        """
        column = self._sums[:-1, half_life_index * KINDS + kind]
        found = np.flatnonzero(column > 0)
        if mask is not None:
            found = found[: np.searchsorted(found, len(mask))]
            found = found[mask[found]]
        values = column[found]
        ahead = np.flatnonzero(self._ref_ms[found] > now_ms)
        if len(ahead):
            late = self._landmark.factors(np.append(self._ref_ms[found[ahead]], now_ms))[:, half_life_index]
            values[ahead] *= late[-1] / late[:-1]
        if len(found) > n > 0:
            best = np.flatnonzero(values >= np.partition(values, len(found) - n)[len(found) - n])
            found, values = found[best], values[best]
        return found[np.argsort(-values, kind="stable")][: max(n, 0)].astype(np.int32)

    # Inner parts

    def _partition(self, partition: int) -> PartitionCounters:
        counters = self._partitions.get(partition)
        if counters is None:
            counters = self._partitions[partition] = PartitionCounters(self.config, self._landmark)
        return counters

    def _decay(self, times_ms: int | Int64) -> Float64:
        """Return what a value at the landmark is at each time, float64 [..., 4]."""
        elapsed_ms = (self._landmark.time_ms or 0) - np.asarray(times_ms)[..., None]
        exponents = elapsed_ms / self._landmark.half_lives_ms
        return np.exp2(np.minimum(np.maximum(exponents, -MAX_EXPONENT), MAX_EXPONENT))

    def _mean_ctr(self, column: int, now_ms: int) -> float:
        decay = float(self._decay(now_ms)[column // KINDS])
        clicks = float(self._grand[column + CLICKS]) * decay
        impressions = max(float(self._grand[column + IMPRESSIONS]) * decay, clicks)
        strength = self.config.prior_strength
        return (clicks + strength * self.config.prior_ctr) / (impressions + strength)

    def _values(self, safe: npt.NDArray[np.intp], times_ms: int | Int64, begin: int, end: int) -> Float32:
        """Return columns begin … end - 1 of the decayed counts, float32 [..., end - begin].

        ``begin`` is a multiple of ``end - begin``, which divides WIDTH. ``times_ms``: one time, or as many as broadcast
        to the shape of ``safe``.
        """
        width = end - begin
        decay = self._decay(times_ms).repeat(KINDS, axis=-1)[..., begin:end]
        # Read as rows of that width, at a third of the cost of an index.
        place = safe if width == WIDTH else safe * (WIDTH // width) + begin // width
        sums = self._sums.reshape(-1, width).take(place, axis=0)
        out = np.empty(sums.shape, np.float32)
        ahead = self._ref_ms.take(safe) > times_ms
        if not np.count_nonzero(ahead):
            return np.multiply(sums, decay, out=out, casting="same_kind")
        # What overflows lies far after its time and is put right below.
        with np.errstate(over="ignore"):
            np.multiply(sums, decay, out=out, casting="same_kind")
        factors = self._landmark.factors(self._ref_ms[safe[ahead]])
        out[ahead] = sums[ahead] / factors.repeat(KINDS, axis=1)[:, begin:end]
        return out

    def _safe(self, rows: npt.NDArray[np.integer]) -> npt.NDArray[np.intp]:
        """Return ``rows`` with what has no counts replaced by the last row, which is always zero."""
        # Without a sign, a negative row is greater than any other: one comparison for both ends.
        unsigned = np.minimum(rows.astype(np.intp).view(np.uintp), len(self._sums) - 1)
        return unsigned.view(np.intp)

    def _rows(self, item_ids: Sequence[str]) -> Int32:
        rows = self.index.rows(item_ids)
        for position in (rows == UNKNOWN).nonzero()[0].tolist():
            rows[position] = self.row_for(item_ids[position])
        return rows

    def _item_hashes(self, rows: Int32) -> UInt64:
        """Return the 64-bit hashes of item rows, any for UNKNOWN: rows differ between processes, hashes do not."""
        known = len(self.index)
        if known > self._hashed:
            if known > len(self._hashes):
                self._hashes = grown(self._hashes, known, 0)
            item_id = self.index.item_id
            self._hashes[self._hashed : known] = [hash64(item_id(row)) for row in range(self._hashed, known)]
            self._hashed = known
        if not len(rows) or not known:
            return np.zeros(len(rows), np.uint64)
        return self._hashes.take(rows, mode="clip")

    def _grow(self, rows: int) -> None:
        if rows < len(self._sums):
            return
        self._sums = grown(self._sums, rows + 1, 0)
        self._totals = grown(self._totals, rows + 1, 0)
        self._ref_ms = grown(self._ref_ms, rows + 1, 0)
        self._first_ms = grown(self._first_ms, rows + 1, NEVER_MS)

    def _keep_in_range(self, time_ms: int) -> None:
        """Move the landmark where an event is far after it, and sum anew, which also ends any drift."""
        if self._landmark.time_ms is None:
            self._landmark.time_ms = time_ms
            return
        if time_ms - self._landmark.time_ms <= self._range_ms:
            return
        factors = np.repeat(self._landmark.move(time_ms), KINDS)
        self._sums[:] = 0.0
        for counters in self._partitions.values():
            counters.values *= factors
            # A partition has one slot for each row, so that plain indexing adds every one.
            self._sums[counters.rows[: counters.used]] += counters.values[: counters.used]
        self._grand = self._sums.sum(axis=0)

"""The batched update of user rows, and what is read from them.

``apply`` runs in rounds: the n-th event of each user, users side by side. A row is a function of its log alone:
time comes from the events, never from a clock. Values are rounded to fp16 at one point, after each event of a
user whose vectors moved (``RowVectors.store``); decay alone moves only the float32 norms and rounds nothing.
Axes as in models/user_steps.py, and S = SHOWN, K = PENDING_ITEMS, N = events, E = impressions that are stepped against.
docs/user-row.md tells the rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal, overload

import numpy as np
import numpy.typing as npt

from models.columns import at_columns
from models.errors import RowError
from models.events import ACTIONS
from models.user_batch import (
    Carry,
    Columns,
    Context,
    Ints,
    RowVectors,
    half_lives,
    put_rows,
    read_vectors,
    rounds,
    rows_at,
    short_hashes,
    whole,
)
from models.user_events import (
    ACTION,
    IMPRESSION,
    NO_SURFACE,
    REQUEST,
    Bools,
    Outcome,
    UserEvent,
    UserStateConfig,
    VectorSource,
    action_code,
    user_event,
)
from models.user_row import (
    ACTION_MASK,
    CLICKED_ELSEWHERE,
    DIM,
    FLAG_MARKER,
    NEGATIVE,
    PENDING,
    PENDING_ENTRY,
    PENDING_ITEMS,
    POSITIVE,
    RECENT,
    ROW,
    ROW_BYTES,
    SHOWN,
    STEP_PENDING,
    VERSION,
    Rows,
    decode_rows,
    empty_rows,
    encode_rows,
    forget,
    guard_of,
    is_idle,
    is_marker,
    markers,
    recent,
    shown,
)
from models.user_space import enter_space, vectors_anew
from models.user_steps import F32, logistic_step, softmax_step, unclicked_step

__all__ = [
    "ACTION",
    "IMPRESSION",
    "REQUEST",
    "ROW",
    "ROW_BYTES",
    "Outcome",
    "Rows",
    "UserEvent",
    "UserReader",
    "UserStateConfig",
    "VectorSource",
    "action_code",
    "apply",
    "decode_rows",
    "empty_rows",
    "encode_rows",
    "forget",
    "guard_of",
    "is_idle",
    "is_marker",
    "markers",
    "recent",
    "shown",
    "user_event",
    "user_vectors",
]

Times = int | npt.NDArray[np.int64]
_APPLIED: Final = int(Outcome.APPLIED)
"""NumPy takes 10 µs to compare with a member of an enumeration."""
_CLICK: Final = ACTIONS.index("click") + 1
_NO_SLOT: Final = PENDING_ITEMS
"""Place of the acted-on item where the impression does not hold it: one after the held ones."""
_STEP_PENDING: Final = np.uint8(STEP_PENDING)
"""The bit in the type of action codes."""
_CLICKED_BITS: Final = np.array([1 << place for place in range(PENDING_ITEMS)] + [CLICKED_ELSEWHERE], np.uint16)
"""Bit of ``clicked`` by place."""
_RING: Final = np.arange(RECENT)
"""The places of recent items."""
_FREE: Final = whole(np.zeros(1, PENDING_ENTRY))[0]
"""A free place of pending impressions, as one piece."""


@overload
def apply(
    rows: Rows,
    events: Sequence[UserEvent],
    vectors: VectorSource,
    config: UserStateConfig,
    *,
    epoch: int,
    space_id: int,
    generation: int,
    surfaces: Sequence[str] = (),
    carry: Carry | None = None,
    keep_before: Literal[False] = False,
) -> tuple[Rows, npt.NDArray[np.int8]]: ...


@overload
def apply(
    rows: Rows,
    events: Sequence[UserEvent],
    vectors: VectorSource,
    config: UserStateConfig,
    *,
    epoch: int,
    space_id: int,
    generation: int,
    surfaces: Sequence[str] = (),
    carry: Carry | None = None,
    keep_before: Literal[True],
) -> tuple[Rows, npt.NDArray[np.int8], Rows, Ints]: ...


def apply(
    rows: Rows,
    events: Sequence[UserEvent],
    vectors: VectorSource,
    config: UserStateConfig,
    *,
    epoch: int,
    space_id: int,
    generation: int,
    surfaces: Sequence[str] = (),
    carry: Carry | None = None,
    keep_before: bool = False,
) -> tuple[Rows, npt.NDArray[np.int8]] | tuple[Rows, npt.NDArray[np.int8], Rows, Ints]:
    """Return the rows after ``events``, in their order, and what each event did (Outcome), int8 [N].

    ``rows`` is not changed; ``UserEvent.user`` points into it. ``epoch`` is the hash of the events topic's id,
    ``space_id`` (not 0) that of the id of the space that ``vectors`` are in, ``generation`` its bundle's.
    ``surfaces``: names by surface number, as given to ``user_event``; base rates and windows are found by them.
    ``carry``: a row of that space keeps its long-term vector, mapped, where it would be made anew.
    With ``keep_before`` also: for each impression among ``events`` its row as it stood before it, [n], and which
    event that is, intp [n], rising. What the event did is in the outcomes: the row before a REPLAYED one already holds
    it. Raises RowError where the vectors do not have the row's dimension.
    """
    if vectors.dim != DIM:
        raise RowError(
            f"item vectors have {vectors.dim} dimensions, a user row {DIM}; rows were kept: project to {DIM}"
        )
    outcomes = np.zeros(len(events), np.int8)
    impressions = [i for i, event in enumerate(events) if event.kind == IMPRESSION] if keep_before else []
    before, before_index = empty_rows(len(impressions)), np.array(impressions, np.intp)
    if not events:
        out = rows_at(rows, np.arange(len(rows)))
        return (out, outcomes, before, before_index) if keep_before else (out, outcomes)
    context = Context.of(config, vectors, epoch, space_id, generation, surfaces, carry)
    touched, order, bounds = rounds([event.user for event in events])
    work = rows_at(rows, touched)
    columns = Columns.of([events[i] for i in order.tolist()], vectors)
    for start, end in pairwise(bounds):
        turn = columns if len(bounds) == 2 else columns.take(slice(start, end))
        if impressions:
            shown_now = (turn.kind == IMPRESSION).nonzero()[0]
            put_rows(before, before_index.searchsorted(order[start:end][shown_now]), rows_at(work, shown_now))
        outcomes[order[start:end]] = _round(work[: end - start], turn, context)
    # One round of all users has them in their order.
    out = work
    if len(bounds) > 2 or len(touched) < len(rows):
        out = rows_at(rows, np.arange(len(rows)))
        put_rows(out, touched, work)
    return (out, outcomes, before, before_index) if keep_before else (out, outcomes)


def _round(rows: Rows, events: Columns, context: Context) -> npt.NDArray[np.int8]:
    """Apply one event to each row, in place; return the outcomes."""
    outcomes = np.zeros(len(rows), np.int8)
    replayed = (rows["epoch"] == context.epoch) & (rows["offset"] > events.offset)
    repeated = rows["event_ids"] == events.event_hash[:, None]
    # To count is the cheapest test of a few.
    any_replayed = np.count_nonzero(replayed)
    above: Bools | slice = ~replayed if any_replayed else slice(None)
    rows["version"][above] = VERSION
    rows["epoch"][above] = context.epoch
    rows["offset"][above] = events.offset[above] + 1
    if np.count_nonzero(rows["flags"]):
        rows["flags"][above] &= np.uint8(~FLAG_MARKER & 0xFF)
    if not any_replayed and not np.count_nonzero(repeated):
        _apply_events(rows, events, context)
        return outcomes
    outcomes[repeated.any(axis=1)] = Outcome.DUPLICATE
    outcomes[replayed] = Outcome.REPLAYED
    fresh = (outcomes == _APPLIED).nonzero()[0]
    if len(fresh):
        some = rows_at(rows, fresh)
        _apply_events(some, events.take(fresh), context)
        put_rows(rows, fresh, some)
    return outcomes


def _apply_events(rows: Rows, events: Columns, context: Context) -> None:
    """Apply one new event to each row, in place."""
    now_ms = np.maximum(rows["last_time_ms"], events.time_ms)
    vectors = RowVectors(rows)
    frozen = enter_space(rows, now_ms, vectors, context)
    _take_pending_steps(rows, frozen, vectors, context)
    _close_impressions(rows, now_ms, frozen, vectors, context)
    acted = (events.kind == ACTION).nonzero()[0]
    if len(acted) == len(rows):
        _act(rows, acted, events, frozen, vectors, context)
    else:
        if len(acted):
            some = rows_at(rows, acted)
            _act(some, acted, events.take(acted), frozen[acted], vectors, context)
            put_rows(rows, acted, some)
        impressed = (events.kind == IMPRESSION).nonzero()[0]
        if len(impressed) == len(rows):
            _impress(rows, events)
        elif len(impressed):
            some = rows_at(rows, impressed)
            _impress(some, events.take(impressed))
            put_rows(rows, impressed, some)
        rows["requests"] += events.kind == REQUEST
    vectors.store()
    ids = rows["event_ids"]
    ids[:, 1:] = ids[:, :-1].copy()
    ids[:, 0] = events.event_hash
    rows["last_time_ms"] = now_ms


def _take_pending_steps(rows: Rows, frozen: Bools, vectors: RowVectors, context: Context) -> None:
    """Take the steps of items that have a vector now, oldest first: logistic, at the default base rate."""
    bits = rows["recent"]["action"] & _STEP_PENDING
    if not np.count_nonzero(bits):
        return
    waiting = bits != 0
    some = np.flatnonzero(waiting.any(axis=1) & ~frozen)
    if not len(some):
        return
    # Most often none has a vector yet: one look-up tells, instead of one for each place of the ring.
    _, known = context.vectors.by_hash(rows["recent"]["item"][some][waiting[some]])
    if not known.any():
        return
    for entry in range(RECENT - 1, -1, -1):
        at = some[waiting[some, entry]]
        if not len(at):
            continue
        ring = rows["recent"][:, entry]
        found, known = context.vectors.by_hash(ring["item"][at])
        at, found_RD = at[known], found[known]
        if not len(at):
            continue
        codes = ring["action"][at] & ~_STEP_PENDING
        label = (codes & POSITIVE > 0).astype(np.float32)
        bias = np.full(len(at), context.biases[NO_SURFACE])
        h_RTD = logistic_step(vectors.get(at), found_RD, context.strengths[codes], label, bias, context.rates)
        vectors.set(at, h_RTD)
        ring["action"][at] = codes


def _close_impressions(
    rows: Rows, now_ms: npt.NDArray[np.int64], frozen: Bools, vectors: RowVectors, context: Context
) -> None:
    """Remove the impressions whose window is over, in order of closing, with a weak step against the unclicked."""
    ring = rows["pending"]
    age_s = (now_ms // 1000)[:, None] - ring["time_s"]
    over = ring["n"].astype(np.bool_) & (age_s > context.windows_seconds.take(ring["surface"]))
    if not np.count_nonzero(over):
        return
    if np.count_nonzero(frozen):
        over &= ~frozen[:, None]
    some = np.logical_or.reduce(over, axis=1).nonzero()[0]
    if not len(some):
        return
    entries = whole(ring)
    held, over = entries[some], over[some]
    _step_against(rows, some, over, vectors, context)
    held[over] = _FREE
    entries[some] = at_columns(held, over.argsort(axis=1, kind="stable"))


def _step_against(rows: Rows, at: Ints, over: Bools, vectors: RowVectors, context: Context) -> None:
    """Step against the unclicked impressions of each row ``at``, unless enough were since the last positive action.

    ``over`` [R, PENDING]: which of the row's impressions close.
    """
    ring = rows["pending"]
    unclicked = over & (ring["clicked"][at] == 0)
    before = rows["unclicked"][at]
    rows["unclicked"][at] = np.minimum(before + np.add.reduce(unclicked, axis=1), 255)
    if context.config.unclicked_weight <= 0:
        return
    # A vector of zero stays one: what is true of it before the first step is true of it before each.
    unclicked &= np.logical_or.reduce(vectors.get(at), axis=(1, 2))[:, None]
    if not np.count_nonzero(unclicked):
        return
    # Oldest log order last in the ring: reversed, a stable sort by time breaks ties in favour of the older one.
    times_s = np.where(over, ring["time_s"][at].astype(np.int64), 2**32)
    closing = (PENDING - 1) - times_s[:, ::-1].argsort(axis=1, kind="stable")
    steps = at_columns(unclicked, closing)
    steps &= before[:, None] + steps.cumsum(axis=1) <= context.config.unclicked_cap
    stepping, turns = steps.nonzero()
    if not len(stepping):
        return
    row, slot = at[stepping], closing[stepping, turns]
    surface = ring["surface"][row, slot]
    number = steps.cumsum().reshape(steps.shape) - 1
    items_EKD, known_EK = _held_items(ring["items"][row, slot], context)
    steps[steps] = known_EK.any(axis=1)
    for turn in range(PENDING):
        some = steps[:, turn].nonzero()[0]
        if not len(some):
            continue
        which = number[some, turn]
        stepped_RTD = unclicked_step(
            vectors.get(at[some]),
            items_EKD[which],
            known_EK[which],
            context.biases[surface[which]],
            np.float32(context.config.unclicked_weight),
            np.float32(context.config.unclicked_max_share),
            context.rates,
        )
        vectors.set(at[some], stepped_RTD)


def _held_items(held: npt.NDArray[np.uint32], context: Context, room: int = 0) -> tuple[F32, Bools]:
    """Return the vectors [R, K, D] of the items that impressions hold, zero where unknown, and which are known.

    ``held``: their short hashes [R, PENDING_ITEMS]; ``room``: places left free behind them.
    """
    hashes = np.zeros((len(held), PENDING_ITEMS + room), np.uint32)
    hashes[:, :PENDING_ITEMS] = held
    found, known = context.vectors.by_short_hash(hashes.reshape(-1))
    known_RK = known.reshape(hashes.shape) & (hashes != 0)
    items_RKD = found.reshape(*hashes.shape, DIM) * known_RK[..., None]
    return items_RKD, known_RK


def _act(rows: Rows, at: Ints, events: Columns, frozen: Bools, vectors: RowVectors, context: Context) -> None:
    """Apply one action to each row: match its impression, step, enter the item into the ring, count.

    ``at``: the places of the rows among those of ``vectors``.
    """
    found, slot, place = _match(rows, events, context)
    positive = (events.action & POSITIVE).astype(np.bool_)
    clicked = (found & positive).nonzero()[0]
    if len(clicked):
        bits = _CLICKED_BITS.take(place.take(clicked))
        rows["pending"]["clicked"][clicked, slot.take(clicked)] |= bits
    rows["unclicked"][positive] = 0

    labelled = events.strength > 0
    steps = labelled & events.known & ~frozen
    alone = steps.copy()
    by_slate = clicked[steps.take(clicked)]
    if len(by_slate):
        held = rows["pending"]["items"][by_slate, slot.take(by_slate)]
        items_RKD, known_RK = _held_items(held, context, room=1)
        each, chosen = np.arange(len(by_slate)), place.take(by_slate)
        items_RKD[each, chosen] = events.vector_ND.take(by_slate, axis=0)
        known_RK[each, chosen] = True
        # One known item alone has p = 1 and would teach nothing.
        enough = np.add.reduce(known_RK, axis=1) > 1
        if np.count_nonzero(enough) < len(enough):
            by_slate, chosen = by_slate[enough], chosen[enough]
            items_RKD, known_RK = items_RKD[enough], known_RK[enough]
        alone[by_slate] = False
        acting = at.take(by_slate)
        weight = events.strength.take(by_slate)
        vectors.set(acting, softmax_step(vectors.get(acting), items_RKD, known_RK, chosen, weight, context.rates))
    single = alone.nonzero()[0]
    if len(single):
        acting = at.take(single)
        h_RTD = logistic_step(
            vectors.get(acting),
            events.vector_ND.take(single, axis=0),
            events.strength.take(single),
            events.label.take(single),
            context.biases.take(events.surface.take(single)),
            context.rates,
        )
        vectors.set(acting, h_RTD)
    _remember(rows, events, labelled & ~steps)
    rows["actions"] += 1
    rows["clicks"] += (events.action & ACTION_MASK) == _CLICK


def _match(rows: Rows, events: Columns, context: Context) -> tuple[Bools, Ints, Ints]:
    """Find the open impression of each action: that of its request, else the newest that holds the item.

    Returns whether there is one [R], its slot [R] and the item's place in it [R] (_NO_SLOT: not held).
    """
    ring = rows["pending"]
    age_s = events.time_s[:, None] - ring["time_s"]
    open_ = ring["n"].astype(np.bool_) & (age_s <= context.windows_seconds.take(ring["surface"]))
    if not np.count_nonzero(open_):
        none = np.zeros(len(rows), np.intp)
        return none != 0, none, none + _NO_SLOT
    holds = np.empty((len(rows), PENDING, PENDING_ITEMS + 1), np.bool_)
    np.equal(ring["items"], short_hashes(events.item)[:, None, None], out=holds[:, :, :_NO_SLOT])
    # The first true one is looked for: this one where the item is in none.
    holds[:, :, _NO_SLOT] = True
    place = holds.argmax(axis=2)
    by_request = open_ & (ring["request"] == events.request[:, None]) & (events.request != 0)[:, None]
    by_item = open_ & (place < _NO_SLOT)
    # The first of the highest: one by request, else one by item.
    rank = np.where(by_request, 2, by_item)
    slot = rank.argmax(axis=1)
    each = np.arange(len(rows))
    return rank[each, slot] > 0, slot, place[each, slot]


def _remember(rows: Rows, events: Columns, pending: Bools) -> None:
    """Move or enter the item of each action to the front of the ring of recent items.

    An action without a label leaves the code of an item that is there already as it is.
    """
    ring = rows["recent"]
    there = ring["item"] == events.item[:, None]
    code = events.action | pending * _STEP_PENDING
    unlabelled = (events.action & (POSITIVE | NEGATIVE)) == 0
    if np.count_nonzero(unlabelled):
        old = (there & unlabelled[:, None]).any(axis=1).nonzero()[0]
        code[old] = ring["action"][old, there[old].argmax(axis=1)]
    # A new item takes the place of the oldest.
    there[:, -1] = True
    # The entry at 0 is written anew.
    source = np.maximum(_RING - (there.argmax(axis=1)[:, None] >= _RING), 0)
    entries = whole(ring)
    entries[:] = at_columns(entries, source)
    ring["item"][:, 0] = events.item
    ring["time_s"][:, 0] = events.time_s
    ring["action"][:, 0] = code


def _impress(rows: Rows, events: Columns) -> None:
    """Apply one impression to each row: open it, and enter its items into the ring of those shown."""
    open_ = rows["pending"]
    # A full ring drops the oldest here, without a step against it: its window was not over.
    entries = whole(open_)
    entries[:, 1:] = entries[:, :-1]
    newest = open_[:, 0]
    newest["request"] = events.request
    newest["time_s"] = events.time_s
    newest["clicked"] = 0
    newest["surface"] = events.surface
    newest["n"] = events.n_items
    newest["items"] = events.items_NS[:, :PENDING_ITEMS]

    ring = rows["shown"]
    old, new = np.ascontiguousarray(ring["item"]), events.items_NS
    # Free places are the same as others, and gone below.
    same = new[:, :, None] == old[:, None, :]
    before = same @ ring["count"].astype(np.intp)[:, :, None]
    merged = np.empty((len(rows), 2 * SHOWN), ring.dtype)
    merged["item"][:, :SHOWN] = new
    merged["time_s"][:, :SHOWN] = newest["time_s"][:, None]
    merged["count"][:, :SHOWN] = np.minimum(before[:, :, 0] + 1, 255)
    merged[:, SHOWN:] = ring
    gone = merged["item"] == 0
    gone[:, SHOWN:] |= same.any(axis=1)
    merged[gone] = np.zeros((), ring.dtype)
    rows["shown"] = at_columns(merged, gone.argsort(axis=1, kind="stable")[:, :SHOWN])
    rows["impressions"] += 1


def user_vectors(
    rows: Rows,
    now_ms: Times,
    config: UserStateConfig | None = None,
    *,
    vectors: VectorSource | None = None,
    space_id: int | None = None,
    carry: Carry | None = None,
) -> tuple[F32, F32, Bools]:
    """Return the short-term and the long-term vectors decayed to ``now_ms``, float32 [n, D], and who has any, bool [n].

    ``now_ms``: one time, or one for each row, int64 [n].
    With ``vectors`` and ``space_id``, a row whose vectors are in another space is served with vectors made anew
    from its recent items, or carried over as ``apply`` does it; the row is not rewritten. ``config``: the half-lives;
    default: those of UserStateConfig().
    """
    config = config or UserStateConfig()
    elapsed_seconds = np.maximum(now_ms - rows["vector_time_ms"], 0) / 1000.0
    factor = np.exp2(-elapsed_seconds[:, None] / half_lives(config)).astype(np.float32)
    h_RTD = read_vectors(rows) * factor[..., None]
    if vectors is not None and space_id is not None:
        held = rows["space_id"]
        foreign = ((held != np.uint64(space_id)) & (held != 0)).nonzero()[0]
        if len(foreign):
            until_ms = np.broadcast_to(np.asarray(now_ms, np.int64), len(rows))[foreign]
            context = Context.of(config, vectors, 0, space_id, 0, (), carry)
            h_RTD[foreign], _ = vectors_anew(rows_at(rows, foreign), until_ms, context)
    has = np.logical_or.reduce(h_RTD, axis=(1, 2))
    return np.ascontiguousarray(h_RTD[:, 0]), np.ascontiguousarray(h_RTD[:, 1]), has


@dataclass(frozen=True, slots=True)
class UserReader:
    """What serving reads of user rows, with the settings and the space that it serves in."""

    config: UserStateConfig
    vectors: VectorSource
    space_id: int
    carry: Carry | None = None

    def user_vectors(self, rows: Rows, now_ms: Times) -> tuple[F32, F32, Bools]:
        """Return vectors in this reader's space, see ``user_vectors``."""
        return user_vectors(rows, now_ms, self.config, vectors=self.vectors, space_id=self.space_id, carry=self.carry)

    def shown(self, rows: Rows) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """See models.user_row.shown."""
        return shown(rows)

    def recent(self, rows: Rows) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """See models.user_row.recent."""
        return recent(rows)

"""What becomes of a user row when the embedding space changes: its vectors are made anew, or carried over.

Axes as in models/user_steps.py, and E = RECENT. docs/user-row.md tells the rules.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from models.user_batch import Context, Ints, RowVectors, read_vectors, rows_at
from models.user_events import NO_SURFACE, Bools
from models.user_row import DIM, POSITIVE, RECENT, STEP_PENDING, Rows
from models.user_steps import F32, logistic_step


def enter_space(rows: Rows, now_ms: npt.NDArray[np.int64], vectors: RowVectors, context: Context) -> Bools:
    """Decay the vectors, rebuild those of an older space; return the rows of a newer one, which are left alone."""
    held = rows["space_id"]
    elsewhere: Bools = held != context.space
    frozen, anew_RTD = elsewhere, None
    if np.count_nonzero(elsewhere):
        foreign = elsewhere & (held != 0)
        frozen = foreign & (rows["generation"] > context.generation)
        stale = (foreign & ~frozen).nonzero()[0]
        # Of the undecayed rows: it decays by itself.
        anew_RTD = _made_anew(rows, stale, now_ms, context) if len(stale) else None
    since_ms = rows["vector_time_ms"]
    until_ms = np.maximum(since_ms, now_ms)
    free: Bools | slice = slice(None)
    if np.count_nonzero(frozen):
        free = ~frozen
        until_ms[frozen] = since_ms[frozen]
    elapsed_seconds = (until_ms - since_ms) * (since_ms > 0) / 1000.0
    rows["norms"] *= np.exp2(-elapsed_seconds[:, None] / context.half_lives_T).astype(np.float32)
    rows["vector_time_ms"] = until_ms
    rows["space_id"][free] = context.space
    # That of a frozen row is greater.
    rows["generation"] = np.maximum(rows["generation"], context.generation)
    if anew_RTD is not None:
        vectors.set(stale, anew_RTD)
    return frozen


def _made_anew(rows: Rows, at: Ints, now_ms: npt.NDArray[np.int64], context: Context) -> F32:
    """Return the vectors of the rows ``at`` in the space in use, [R, 2, D]; what waits and what counted is set anew."""
    h_RTD, pending = vectors_anew(rows_at(rows, at), now_ms[at], context)
    rows["recent"]["action"][at] = pending
    rows["unclicked"][at] = 0
    return h_RTD


def vectors_anew(rows: Rows, until_ms: npt.NDArray[np.int64], context: Context) -> tuple[F32, npt.NDArray[np.uint8]]:
    """Return the vectors [R, 2, D] of rows of another space, in the one in use, and the bytes of their recent actions.

    Made of the recent items; the long-term ones are carried over where they can be.
    """
    h_RTD, pending = _rebuilt(rows, until_ms, context)
    _carry_over(rows, until_ms, h_RTD, context)
    return h_RTD, pending


def _rebuilt(rows: Rows, until_ms: npt.NDArray[np.int64], context: Context) -> tuple[F32, npt.NDArray[np.uint8]]:
    """Return vectors made anew from the recent items, [R, 2, D], and the action bytes with their pending bits.

    Oldest first: decay to the entry's time, then its logistic step at the default base rate.
    """
    ring = rows["recent"]
    items = np.ascontiguousarray(ring["item"])
    codes = ring["action"] & np.uint8(~STEP_PENDING & 0xFF)
    times_s = ring["time_s"].astype(np.int64)
    found, known = context.vectors.by_hash(items.reshape(-1))
    items_RED = found.reshape(len(rows), RECENT, DIM)
    known_RE = known.reshape(len(rows), RECENT) & (items != 0)
    weights_RE = context.strengths[codes]
    steps_RE = known_RE & (weights_RE > 0)
    labels_RE = ((codes & POSITIVE) != 0).astype(np.float32)
    biases_R = np.full(len(rows), context.biases[NO_SURFACE])
    # Up to when the vectors stand after each entry, and before it: after the one that is next in the ring.
    after_s = np.maximum.accumulate((times_s * steps_RE)[:, ::-1], axis=1)[:, ::-1]
    before_s = np.zeros(after_s.shape, np.int64)
    before_s[:, :-1] = after_s[:, 1:]
    decay_RET1 = _decay(np.where(before_s > 0, np.maximum(times_s - before_s, 0), 0), context)
    h_RTD = np.zeros((len(rows), 2, DIM), np.float32)
    for entry in steps_RE.any(axis=0).nonzero()[0][::-1].tolist():
        due = steps_RE[:, entry].nonzero()[0]
        # A view of all costs a fifth of copies by index.
        at: Ints | slice = due if len(due) < len(rows) else slice(None)
        h_RTD[at] = logistic_step(
            h_RTD[at] * decay_RET1[at, entry],
            items_RED[at, entry],
            weights_RE[at, entry],
            labels_RE[at, entry],
            biases_R[at],
            context.rates,
        )
    last_s = after_s[:, 0]
    h_RTD *= _decay(np.where(last_s > 0, np.maximum(until_ms / 1000.0 - last_s, 0), 0), context)
    pending = (items != 0) & ~known_RE & (weights_RE > 0)
    return h_RTD, codes | np.where(pending, STEP_PENDING, 0).astype(np.uint8)


def _carry_over(rows: Rows, until_ms: npt.NDArray[np.int64], h_RTD: F32, context: Context) -> None:
    """Replace, in place, the long-term vectors made anew of rows in the space that they can be carried over from.

    The map keeps years of taste of which the ring holds 16 items; least squares does not keep lengths, so the vector's
    own is given back.
    """
    if context.carry is None:
        return
    old_space, carry_DD = context.carry
    at = np.flatnonzero(rows["space_id"] == np.uint64(old_space))
    if not len(at):
        return
    long_RD = read_vectors(rows_at(rows, at))[:, 1]
    mapped_RD = long_RD @ carry_DD
    length_R, mapped_length_R = np.linalg.norm(long_RD, axis=1), np.linalg.norm(mapped_RD, axis=1)
    since_ms = rows["vector_time_ms"][at]
    elapsed = np.where(since_ms > 0, np.maximum(until_ms[at] - since_ms, 0), 0) / 1000.0
    scale_R = length_R / np.where(mapped_length_R > 0, mapped_length_R, 1) * _decay(elapsed, context)[:, 1, 0]
    held = mapped_length_R > 0
    h_RTD[at[held], 1] = (mapped_RD * scale_R[:, None])[held]


def _decay(elapsed_seconds: npt.NDArray[Any], context: Context) -> F32:
    factor: F32 = np.exp2(-elapsed_seconds[..., None] / context.half_lives_T).astype(np.float32)[..., None]
    return factor

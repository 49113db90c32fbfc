"""Impressions and actions of one user → labels: what came of each impression, closed by that user's own log.

The user's clock is the newest event time of their log, as in the row. An impression shown at t closes when the clock
passes t + W, W being the attribution window of its surface; until the clock passes t + W_max + grace it is still
corrected by what arrives late, then it is final. Labels are recomputed from what is kept, so they do not depend on the
order in which events arrived, nor on the batches that they came in.

An action belongs to the impressions that it names by request id, else to the newest one, by (time, event hash), that
holds its item; t ≤ t_action ≤ t + W in both cases. Of repeated showings under one request it is the newest one that
holds the item; where none of them does, the action belongs to them and labels nothing. On one item the latest action
counts; at the same millisecond a positive one does.

Nothing here is ever closed by a wall clock: ``due_labels`` only reads.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from models.errors import RowError
from models.examples import BY_TIMER, EARLY, LabelsRecord
from models.hashing import impression_id, short_hash
from models.user_events import (
    ACTION,
    IMPRESSION,
    Outcome,
    UserEvent,
    UserStateConfig,
    attribution_windows,
    strengths,
)
from models.user_row import NEGATIVE, POSITIVE

VERSION: Final = 1
_APPLIED: Final = int(Outcome.APPLIED)
_REPLAYED: Final = int(Outcome.REPLAYED)
_LABELLED: Final = POSITIVE | NEGATIVE
_MATCHED: Final = 0x80
"""Bit of a kept action's code: it belongs to an impression that is kept."""
_ACTION: Final = struct.Struct("<q4sIB")
_IMPRESSION_BYTES: Final = 48
"""What a kept impression needs besides its items, about: five whole numbers and its label."""


class JoinerConfig(BaseModel):
    """What the joiner keeps for each user. The attribution windows stand in the settings of the user row."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    grace_seconds: int = Field(
        600,
        ge=0,
        le=30 * 86_400,
        description="How long after the end of the longest attribution window labels are still corrected, and how late "
        "an impression may come after its action, seconds of event time.",
    )
    max_impressions: int = Field(
        64, ge=1, le=1_000, description="Most impressions kept of one user; beyond it the oldest is closed early."
    )
    max_actions: int = Field(
        128,
        ge=1,
        le=1_000,
        description="Most actions kept of one user that belong to an impression; beyond it the oldest impression that "
        "has any is closed early.",
    )
    max_unmatched_actions: int = Field(
        8, ge=0, le=1_000, description="Most actions kept whose impression has not come; beyond it the oldest goes."
    )
    max_bytes: int = Field(
        16_384, ge=256, le=500_000, description="Most bytes kept of one user, about; beyond it the oldest goes."
    )


@dataclass(frozen=True, slots=True)
class JoinContext:
    """What stays the same over a batch."""

    config: JoinerConfig
    windows_ms: list[int]
    """Attribution window by surface number, [256]."""
    grace_ms: int
    span_ms: int
    """Longest window and the grace: after it an impression is final."""
    strengths: list[float]
    """Step weight by action code, [64]: what makes one positive action stronger than another."""

    @classmethod
    def of(cls, config: JoinerConfig, user_state: UserStateConfig, surfaces: Sequence[str]) -> JoinContext:
        """Return the context; ``surfaces``: names by surface number, as given to ``user_event``."""
        windows_ms = (attribution_windows(user_state, surfaces) * 1_000).tolist()
        grace_ms = config.grace_seconds * 1_000
        return cls(config, windows_ms, grace_ms, max(windows_ms) + grace_ms, strengths(user_state).tolist())


class KeptImpression(msgspec.Struct, array_like=True, gc=False):
    """One impression that is still open, may still be corrected, or whose label may have to be sent again."""

    impression_id: int
    time_ms: int
    closes_ms: int
    request: int
    """Short hash of the request id, 0: none."""
    event_hash: int
    items: bytes
    """u4 short hashes [K]; empty when it is final."""
    revision: int = -1
    """Of the label sent last; -1: not closed yet."""
    flags: int = 0
    clicked: bytes = b""
    refused: bytes = b""
    actions: bytes = b""
    is_final: bool = False
    """Nothing changes its label any more; it is dropped at the start of a later batch."""


class OpenImpressions(msgspec.Struct, array_like=True, gc=False):
    """The joiner's state of one user."""

    version: int
    impressions: list[KeptImpression]
    actions: bytes
    """(time_ms i8, short hash u4, request u4, code u1) of each action that may still matter."""


class Label(NamedTuple):
    """What an impression's label says, as in a LabelsRecord."""

    clicked: bytes
    refused: bytes
    actions: bytes


class _Kept(NamedTuple):
    """An action that may still matter."""

    time_ms: int
    item: bytes
    """Short hash, as impressions keep it."""
    request: int
    code: int


@dataclass(slots=True)
class JoinCounts:
    """What a call of ``join`` did, for the metrics."""

    closed: int = 0
    """Labels of revision 0, those closed early among them."""
    corrected: int = 0
    early: int = 0
    resent: int = 0
    """Labels sent again because of a replayed event."""
    late_actions: int = 0
    """Actions that came after the grace and found no impression."""
    dropped_actions: int = 0
    """Actions without an impression that went for lack of room."""

    def add(self, other: JoinCounts) -> None:
        """Add the counts of another call."""
        self.closed += other.closed
        self.corrected += other.corrected
        self.early += other.early
        self.resent += other.resent
        self.late_actions += other.late_actions
        self.dropped_actions += other.dropped_actions


@dataclass(slots=True)
class Joined:
    """What a user's events made of the state."""

    block: bytes
    """The new state, b"" where there is nothing to keep."""
    labels: list[LabelsRecord]
    next_close_ms: int | None
    """When the next of the open impressions closes; None where none is open."""
    counts: JoinCounts


def decode_block(block: bytes) -> OpenImpressions:
    """Return the state in a stored block, an empty one for b"". Raises RowError for nonsense."""
    if not block:
        return OpenImpressions(VERSION, [], b"")
    try:
        state = _DECODER.decode(block)
    except (msgspec.DecodeError, UnicodeDecodeError, OverflowError) as error:
        raise RowError(
            f"a user's open impressions cannot be read ({error}); they were kept as they are: delete the user to start "
            "afresh"
        ) from None
    if (
        state.version != VERSION
        or len(state.actions) % _ACTION.size
        or any(len(i.items) % 4 for i in state.impressions)
    ):
        raise RowError(
            f"a user's open impressions have version {state.version} or do not fit, this program reads {VERSION}; they "
            "were kept as they are: run the program version that wrote them, or delete the user"
        )
    return state


def join(
    block: bytes,
    events: Sequence[UserEvent],
    outcomes: Sequence[int],
    clock_ms: int,
    context: JoinContext,
    *,
    user_id: str,
    epoch: int,
    partition: int,
    as_of: int = 0,
    may_drop: bool = True,
) -> Joined:
    """Apply a user's next events, in the order of their log, to the state in ``block``.

    ``outcomes``: what each did to the row (models.user_state.Outcome). ``clock_ms``: the row's last time before them.
    ``epoch`` and ``partition`` make the impressions' ids; ``as_of`` is the row's offset after them. ``may_drop`` is
    False where the block was made in this same batch: its labels are not acknowledged yet. Raises RowError for a block
    that is nonsense.
    """
    join_ = _Join(decode_block(block), clock_ms, context)
    replayed = _REPLAYED in outcomes
    if may_drop and not replayed:
        # A replay means that labels of the last batch may be lost: until it is over, nothing that was sent is dropped.
        join_.drop_final()
    for event, outcome in zip(events, outcomes, strict=True):
        if outcome == _APPLIED:
            join_.apply(event, epoch, partition)
    join_.close()
    return join_.result(user_id, as_of, replayed)


class _Join:
    """One user's state while a batch works on it."""

    def __init__(self, state: OpenImpressions, clock_ms: int, context: JoinContext) -> None:
        self._context = context
        self._clock_ms = clock_ms
        self._live: list[KeptImpression] = []
        self._final: list[KeptImpression] = []
        for impression in state.impressions:
            (self._final if impression.is_final else self._live).append(impression)
        self._actions = list(map(_Kept._make, _ACTION.iter_unpack(state.actions))) if state.actions else []
        self._changed: dict[int, KeptImpression] = {}
        self._dirty = False
        self._counts = JoinCounts()

    def drop_final(self) -> None:
        """Forget the impressions whose last label was acknowledged with an earlier batch."""
        self._final = []

    def apply(self, event: UserEvent, epoch: int, partition: int) -> None:
        """Apply one event; the clock stands where the events before it left it."""
        self._settle()
        if event.kind == IMPRESSION:
            self._show(event, impression_id(epoch, partition, event.offset))
        elif event.kind == ACTION and event.action & _LABELLED:
            self._act(event)
        self._clock_ms = max(self._clock_ms, event.time_ms)

    def close(self) -> None:
        """Make the labels of the impressions whose window is over by the clock, where they are new or may differ."""
        clock_ms, dirty = self._clock_ms, self._dirty
        due = [i for i in self._live if i.closes_ms < clock_ms and (i.revision < 0 or dirty)]
        if due:
            labels = _labels(due, self._live, self._actions, self._context)
            for impression, label in zip(due, labels, strict=True):
                self._set(impression, label)
        self._settle()

    def result(self, user_id: str, as_of: int, replayed: bool) -> Joined:
        """Return the new state and the labels to send; with ``replayed`` those of every closed impression."""
        held = self._final + self._live
        if len(held) > 1:
            held.sort(key=_age)
        sent: list[KeptImpression] = []
        if replayed or self._changed:
            sent = [i for i in held if i.impression_id in self._changed or (replayed and i.revision >= 0)]
            self._counts.resent = len(sent) - len(self._changed)
        block = b""
        if held or self._actions:
            packed = b"".join([_ACTION.pack(*action) for action in self._actions])
            block = _ENCODER.encode(OpenImpressions(VERSION, held, packed))
        return Joined(block, [_record(i, user_id, as_of) for i in sent], _next_close_ms(self._live), self._counts)

    def _settle(self) -> None:
        """Make final what is past its grace, and forget the actions whose impression can come no more."""
        over_ms = self._clock_ms - self._context.span_ms
        for impression in [i for i in self._live if i.time_ms < over_ms]:
            self._finish(impression)
        oldest_ms = self._clock_ms - self._context.grace_ms
        if self._actions:
            self._actions = [a for a in self._actions if a.code & _MATCHED or a.time_ms >= oldest_ms]

    def _show(self, event: UserEvent, id_: int) -> None:
        items = [short_hash(item) for item in event.items.tolist()]
        new = KeptImpression(
            id_,
            event.time_ms,
            event.time_ms + self._context.windows_ms[event.surface],
            event.request_hash,
            event.event_hash,
            struct.pack(f"<{len(items)}I", *items),
        )
        if new.time_ms + self._context.span_ms < self._clock_ms:
            self._set(new, Label(b"", b"", b""))
            new.items, new.is_final = b"", True
            self._final.append(new)
            return
        self._live.append(new)
        if any(new.time_ms <= action.time_ms <= new.closes_ms for action in self._actions):
            self._dirty = True
            self._rematch()
        self._make_room()

    def _act(self, event: UserEvent) -> None:
        context = self._context
        item = short_hash(int(event.items[0])).to_bytes(4, "little")
        action = _Kept(event.time_ms, item, event.request_hash, event.action)
        target, is_named = _target(action, self._live)
        is_late = event.time_ms + context.grace_ms < self._clock_ms
        if is_late and (target is None or (action.request and not is_named)):
            # The impression that it names may have been final and gone: a second best would be a wrong label.
            self._counts.late_actions += 1
            return
        if target is not None:
            self._dirty = True
            action = action._replace(code=action.code | _MATCHED)
        self._actions.append(action)
        self._make_room()

    def _make_room(self) -> None:
        """Finish the oldest impressions, and drop the oldest actions without one, until the bounds hold."""
        config = self._context.config
        unmatched = [a for a in self._actions if not a.code & _MATCHED]
        if len(unmatched) > config.max_unmatched_actions:
            for action in sorted(unmatched)[: len(unmatched) - config.max_unmatched_actions]:
                self._actions.remove(action)
                self._counts.dropped_actions += 1
        while len(self._actions) - min(len(unmatched), config.max_unmatched_actions) > config.max_actions:
            owners = [_target(a, self._live)[0] for a in self._actions if a.code & _MATCHED]
            self._finish(min([i for i in owners if i is not None], key=_age))
        while self._live and (len(self._live) > config.max_impressions or self._bytes() > config.max_bytes):
            self._finish(min(self._live, key=_age))

    def _bytes(self) -> int:
        items = sum([len(i.items) for i in self._live])
        return items + _IMPRESSION_BYTES * len(self._live) + _ACTION.size * len(self._actions)

    def _rematch(self) -> None:
        """Tell again which actions have an impression."""
        self._actions = [
            a._replace(code=a.code | _MATCHED if _target(a, self._live)[0] else a.code & ~_MATCHED)
            for a in self._actions
        ]

    def _finish(self, impression: KeptImpression) -> None:
        """Make an impression final, and its actions with it; early where its window is not over."""
        mine = [a for a in self._actions if a.code & _MATCHED and _target(a, self._live)[0] is impression]
        if self._dirty or impression.revision < 0:
            if impression.revision < 0 and impression.closes_ms >= self._clock_ms:
                impression.flags |= EARLY
                self._counts.early += 1
            self._set(impression, _label(impression, mine, self._context))
        self._live = [i for i in self._live if i is not impression]
        if mine:
            self._actions = [a for a in self._actions if a not in mine]
        impression.items, impression.is_final = b"", True
        self._final.append(impression)

    def _set(self, impression: KeptImpression, label: Label) -> None:
        if impression.revision >= 0 and label == (impression.clicked, impression.refused, impression.actions):
            return
        if impression.revision < 0:
            self._counts.closed += 1
        else:
            self._counts.corrected += 1
        impression.revision += 1
        impression.clicked, impression.refused, impression.actions = label
        self._changed[impression.impression_id] = impression


def due_labels(
    block: bytes, clock_ms: int, user_id: str, context: JoinContext, as_of: int = 0
) -> tuple[list[LabelsRecord], int | None]:
    """Return the labels of a silent user's open impressions that close before ``clock_ms``, and when the next closes.

    Reads only: the state stays as the user's own log left it, up to ``as_of``. Raises RowError for a block that is
    nonsense.
    """
    state = decode_block(block)
    live = [i for i in state.impressions if not i.is_final]
    due = [i for i in live if i.revision < 0 and i.closes_ms < clock_ms]
    actions = list(map(_Kept._make, _ACTION.iter_unpack(state.actions))) if due else []
    records = []
    for impression, label in zip(due, _labels(due, live, actions, context), strict=True):
        impression.clicked, impression.refused, impression.actions = label
        impression.revision, impression.flags = 0, BY_TIMER
        records.append(_record(impression, user_id, as_of))
    return records, _next_close_ms(live)


def next_close_ms(block: bytes) -> int | None:
    """Return when the next of the open impressions in a block closes; None where none is open."""
    return _next_close_ms(decode_block(block).impressions)


def is_spent(block: bytes, clock_ms: int, context: JoinContext) -> bool:
    """Tell whether nothing in a block can matter any more at ``clock_ms``, by the partition's watermark."""
    state = decode_block(block)
    over_ms = clock_ms - context.span_ms
    return all(i.is_final or i.time_ms < over_ms for i in state.impressions) and all(
        code & _MATCHED or time_ms + context.grace_ms < clock_ms
        for time_ms, _, _, code in _ACTION.iter_unpack(state.actions)
    )


def _age(impression: KeptImpression) -> tuple[int, int]:
    """Oldest first, in an order that arrival does not change."""
    return impression.time_ms, impression.event_hash


def _next_close_ms(impressions: Sequence[KeptImpression]) -> int | None:
    return min([i.closes_ms for i in impressions if i.revision < 0], default=None)


def _place(items: bytes, item: bytes) -> int:
    """Return the place of a short hash among packed ones, -1 where it is not there."""
    at = items.find(item)
    while at > 0 and at & 3:
        at = items.find(item, at + 1)
    return at >> 2 if at >= 0 else -1


def _target(action: _Kept, live: Sequence[KeptImpression]) -> tuple[KeptImpression | None, bool]:
    """Return the impression that an action belongs to and labels, and whether it names one that is kept."""
    named: KeptImpression | None = None
    holding: KeptImpression | None = None
    is_named = False
    for impression in live:
        if not impression.time_ms <= action.time_ms <= impression.closes_ms:
            continue
        by_name = action.request != 0 and impression.request == action.request
        is_named = is_named or by_name
        if _place(impression.items, action.item) < 0:
            continue
        if by_name and (named is None or _age(named) < _age(impression)):
            named = impression
        if holding is None or _age(holding) < _age(impression):
            holding = impression
    return (named if is_named else holding), is_named


def _labels(
    wanted: Sequence[KeptImpression], live: Sequence[KeptImpression], actions: Sequence[_Kept], context: JoinContext
) -> list[Label]:
    """Return the labels of ``wanted``, a part of ``live``, as a function of what is kept."""
    mine: dict[int, list[_Kept]] = {impression.impression_id: [] for impression in wanted}
    for action in actions:
        target = _target(action, live)[0] if action.code & _MATCHED else None
        if target is not None and target.impression_id in mine:
            mine[target.impression_id].append(action)
    return [_label(impression, mine[impression.impression_id], context) for impression in wanted]


def _label(impression: KeptImpression, actions: Sequence[_Kept], context: JoinContext) -> Label:
    """Return the label that the actions of an impression make."""
    last: dict[int, tuple[int, bool]] = {}
    strongest: dict[int, tuple[float, int]] = {}
    for action in actions:
        place = _place(impression.items, action.item)
        code = action.code & ~_MATCHED
        is_positive = bool(code & POSITIVE)
        last[place] = max(last.get(place, (action.time_ms, is_positive)), (action.time_ms, is_positive))
        if is_positive:
            rank = (context.strengths[code], code)
            strongest[place] = max(strongest.get(place, rank), rank)
    clicked = sorted(place for place, (_, is_positive) in last.items() if is_positive)
    refused = sorted(place for place, (_, is_positive) in last.items() if not is_positive)
    return Label(
        struct.pack(f"<{len(clicked)}H", *clicked),
        struct.pack(f"<{len(refused)}H", *refused),
        bytes(strongest[place][1] for place in clicked),
    )


def _record(impression: KeptImpression, user_id: str, as_of: int) -> LabelsRecord:
    return LabelsRecord(
        impression_id=impression.impression_id,
        user_id=user_id,
        time_ms=impression.time_ms,
        closed_ms=impression.closes_ms,
        revision=impression.revision,
        flags=impression.flags,
        clicked=impression.clicked,
        refused=impression.refused,
        actions=impression.actions,
        as_of=as_of,
    )


_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(OpenImpressions)

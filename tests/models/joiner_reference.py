"""The labels of a log, told from all of it at once: no clock, no batches, nothing ever forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models.hashing import short_hash
from models.user_events import ACTION, IMPRESSION, UserEvent, UserStateConfig, strengths
from models.user_row import NEGATIVE, POSITIVE


@dataclass(frozen=True)
class Outcome:
    """What came of an impression: places of items, and the code of the strongest positive action of each clicked."""

    clicked: tuple[int, ...] = ()
    refused: tuple[int, ...] = ()
    actions: tuple[int, ...] = ()


def owner(action: UserEvent, impressions: Sequence[UserEvent], windows_ms: dict[int, int]) -> UserEvent | None:
    """Return the impression that an action labels."""
    item = short_hash(int(action.items[0]))
    near = [i for i in impressions if 0 <= action.time_ms - i.time_ms <= windows_ms[i.surface]]
    named = [i for i in near if action.request_hash and i.request_hash == action.request_hash]
    holding = [i for i in named or near if item in [short_hash(int(h)) for h in i.items]]
    return max(holding, key=lambda i: (i.time_ms, i.event_hash), default=None)


def outcomes(log: Sequence[UserEvent], config: UserStateConfig, windows_ms: dict[int, int]) -> dict[int, Outcome]:
    """Return what came of each impression of one user's log, by event hash."""
    impressions = [e for e in log if e.kind == IMPRESSION]
    weights = strengths(config)
    found = {}
    for impression in impressions:
        items = [short_hash(int(h)) for h in impression.items]
        mine = [
            e
            for e in log
            if e.kind == ACTION and e.action & (POSITIVE | NEGATIVE) and owner(e, impressions, windows_ms) is impression
        ]
        clicked, refused, strongest = [], [], []
        for place, item in enumerate(items):
            here = [e for e in mine if short_hash(int(e.items[0])) == item]
            if not here:
                continue
            newest_ms = max(e.time_ms for e in here)
            if any(e.action & POSITIVE for e in here if e.time_ms == newest_ms):
                clicked.append(place)
                codes = [e.action for e in here if e.action & POSITIVE]
                strongest.append(max(codes, key=lambda code: (float(weights[code]), code)))
            else:
                refused.append(place)
        found[impression.event_hash] = Outcome(tuple(clicked), tuple(refused), tuple(strongest))
    return found

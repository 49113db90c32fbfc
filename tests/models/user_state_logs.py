"""Small item worlds and random logs for the tests of the user row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from models.hashing import hash64, short_hash
from models.user_events import ACTION, IMPRESSION, REQUEST, UserEvent, UserStateConfig, action_code, strengths
from models.user_row import Rows
from tests.models.user_state_reference import ReferenceRow

START_MS = 1_700_000_000_000
CONFIG = UserStateConfig(short_dwell_seconds=5.0, attribution_window_seconds=600, unclicked_cap=2)


class ItemVectors:
    """Unit vectors of the items "0", "1", …, all leaning to one side as those of a text encoder do."""

    dim = 64

    def __init__(self, items: Sequence[int], seed: int = 0) -> None:
        self.by_full: dict[int, npt.NDArray[np.float32]] = {}
        for item in items:
            v = np.random.default_rng([seed, item]).standard_normal(64) + 0.7
            self.by_full[hash64(str(item))] = (v / np.linalg.norm(v)).astype(np.float32)
        self._by_short = {short_hash(full): v for full, v in self.by_full.items()}

    def by_hash(self, hashes: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        return self._find(self.by_full, hashes.tolist())

    def by_short_hash(self, hashes: npt.NDArray[np.uint32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        return self._find(self._by_short, hashes.tolist())

    def _find(
        self, table: dict[int, npt.NDArray[np.float32]], hashes: list[int]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        # An unknown item's vector may be any finite value: 7 makes a use of it visible.
        unknown = np.full(64, 7, np.float32)
        found = np.array([table.get(h, unknown) for h in hashes], np.float32).reshape(len(hashes), 64)
        return found, np.array([h in table for h in hashes], np.bool_)


def event(
    kind: int,
    items: Sequence[int],
    *,
    offset: int,
    time_ms: int = START_MS,
    user: int = 0,
    action: str = "click",
    value: float | None = None,
    request: int = 0,
    surface: int = 255,
    event_id: int | None = None,
    config: UserStateConfig = CONFIG,
) -> UserEvent:
    """Return a ready event; an event id that is not given is made from the offset."""
    hashes = np.array([hash64(str(i)) for i in items], np.uint64)
    code = action_code(action, value, config) if kind == ACTION else 0
    return UserEvent(
        user,
        kind,
        offset,
        time_ms,
        hash64(f"event {offset if event_id is None else event_id}"),
        request,
        surface,
        hashes,
        code,
        float(strengths(config)[code]),
        1.0 if code & 0x10 else 0.0,
    )


def click(item: int, offset: int, time_ms: int = START_MS, user: int = 0, request: int = 0) -> UserEvent:
    return event(ACTION, [item], offset=offset, time_ms=time_ms, user=user, request=request)


def impression(
    items: Sequence[int], offset: int, time_ms: int = START_MS, user: int = 0, request: int = 0
) -> UserEvent:
    return event(IMPRESSION, items, offset=offset, time_ms=time_ms, user=user, request=request)


ACTIONS_AND_VALUES: list[tuple[str, float | None]] = [
    ("click", None),
    ("click", None),
    ("like", None),
    ("purchase", None),
    ("hide", None),
    ("dislike", None),
    ("rating", 5.0),
    ("rating", 3.0),
    ("rating", 1.0),
    ("dwell", 60.0),
    ("dwell", 20.0),
    ("dwell", 1.0),
]


@st.composite
def logs(draw: st.DrawFn, users: int = 3, most: int = 40, items: int = 30) -> list[UserEvent]:
    """Draw a log: offsets rise with gaps; times wander, also backwards; some event ids come twice."""
    made: list[UserEvent] = []
    offset, time_ms = draw(st.integers(0, 5)), START_MS
    for number in range(draw(st.integers(1, most))):
        offset += draw(st.integers(1, 3))
        time_ms += draw(st.sampled_from([0, 700, 20_000, 90_000, 400_000, 700_000, 90_000_000, -30_000, -500_000]))
        kind = draw(st.sampled_from([IMPRESSION, ACTION, ACTION, REQUEST]))
        one = st.integers(0, items - 1)
        shown = st.lists(one, min_size=1, max_size=25, unique=True)
        action, value = draw(st.sampled_from(ACTIONS_AND_VALUES)) if kind == ACTION else ("click", None)
        made.append(
            event(
                kind,
                draw(shown) if kind == IMPRESSION else [draw(one)] if kind == ACTION else [],
                offset=offset,
                time_ms=time_ms,
                user=draw(st.integers(0, users - 1)),
                action=action,
                value=value,
                request=draw(st.sampled_from([0, 0, 1, 2])),
                surface=draw(st.sampled_from([0, 1, 255])),
                event_id=draw(st.sampled_from([number, number, number, number, number - 1])),
            )
        )
    return made


def moved_to(log: Sequence[UserEvent], users: Sequence[int]) -> list[UserEvent]:
    """Return the log with user ``i`` at the place ``users[i]``."""
    return [replace(e, user=users[e.user]) for e in log]


def same_as_reference(rows: Rows, references: Sequence[ReferenceRow]) -> None:
    """Check every field: whole numbers exactly, vectors to 2e-3 (two roundings to fp16 may differ by one place)."""
    for row, reference in zip(rows, references, strict=True):
        for name in ("epoch", "offset", "last_time_ms", "vector_time_ms", "impressions", "clicks", "actions"):
            assert int(row[name]) == getattr(reference, name), name
        for name in ("requests", "space_id", "generation", "unclicked"):
            assert int(row[name]) == getattr(reference, name), name
        assert [int(i) for i in row["event_ids"] if i] == reference.event_ids
        assert [(int(s["item"]), int(s["time_s"]), int(s["count"])) for s in row["shown"] if s["item"]] == [
            (s.item, s.time_s, s.count) for s in reference.shown
        ]
        assert [(int(r["item"]), int(r["time_s"]), int(r["action"])) for r in row["recent"] if r["item"]] == [
            (r.item, r.time_s, r.code | (0x80 if r.pending else 0)) for r in reference.recent
        ]
        held = [o for o in row["pending"] if o["n"]]
        assert len(held) == len(reference.open)
        for entry, open_ in zip(held, reference.open, strict=True):
            assert int(entry["request"]) == open_.request
            assert (int(entry["time_s"]), int(entry["surface"]), int(entry["n"])) == (
                open_.time_s,
                open_.surface,
                open_.n,
            )
            items = [int(i) for i in entry["items"] if i]
            assert items == open_.items
            bits = sum(1 << place for place, item in enumerate(items) if item in open_.clicked)
            assert int(entry["clicked"]) & 0x7FFF == bits
            assert bool(int(entry["clicked"]) & 0x8000) == bool(open_.clicked - set(items))
        vectors = row["vectors"].astype(np.float32) * row["norms"][:, None]
        np.testing.assert_allclose(vectors, np.array(reference.h), atol=2e-3)

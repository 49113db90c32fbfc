"""What a replay knows of a log before the core sees it: its parts, which impressions count, how much of what is in it.

source = find_parts("ebnerd", [Path("ebnerd-demo")])
survey = survey_log(source.open(), source.open_scored(), 0.3)
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from models.errors import LogFormatError, ReplayError
from models.events import Action, Impression
from models.hashing import hash64
from models.logs import KINDS, LogReader, open_log
from models.logs.log import split_folders

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
OnEvents = Callable[[int], None]

BEHAVIOURS: Final = {"ebnerd": "behaviors.parquet", "mind": "behaviors.tsv", "jsonl": "events.jsonl"}
POSITIVE_ACTIONS: Final = ("click", "like", "share", "purchase")
_PROGRESS_EVERY: Final = 20_000


class Source(Protocol):
    """Where the log of a replay comes from: each process opens it for itself."""

    @property
    def kind(self) -> str:
        """The kind of log, as `import` names it."""

    @property
    def names(self) -> tuple[str, ...]:
        """What the parts are called, without their folders' folders."""

    def open(self) -> LogReader:
        """Return a reader of the whole log."""

    def open_scored(self) -> LogReader | None:
        """Return a reader of the scored part alone; None where the log is not in parts."""


@dataclass(frozen=True, slots=True)
class Parts:
    """A log on disk: ``paths`` of its parts, read as one log, ``scored`` of those whose impressions count."""

    kind: str
    paths: tuple[Path, ...]
    scored: tuple[Path, ...]
    """Empty: the log is one part, and the latest share of its impressions counts."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the last names of the parts, which say nothing of this machine."""
        above = {path.parent for path in self.paths}
        return tuple(path.resolve().name for path in self.paths if path not in above)

    def open(self) -> LogReader:
        """Return a reader of the whole log."""
        return open_log(self.kind, *self.paths)

    def open_scored(self) -> LogReader | None:
        """Return a reader of the scored part alone; None where the log is not in parts."""
        return open_log(self.kind, *self.scored) if self.scored else None


def find_parts(kind: str, paths: Sequence[Path], score: Path | None = None) -> Parts:
    """Return the parts that ``paths`` name: each a part, or the folder above parts.

    ``score``: the part whose impressions count; default: the last path, and where that holds several parts, the one
    that begins last. Raises LogFormatError where there is nothing in the layout of ``kind``.
    """
    if kind not in KINDS:
        raise LogFormatError(f"unknown kind of log {kind!r}; there are {', '.join(KINDS)}")
    if kind not in BEHAVIOURS:
        raise ReplayError(
            f"a log of {kind} has actions and no impressions: nobody knows what was shown and not chosen, so there is "
            "nothing to score; replay a log that has impressions"
        )
    if not paths:
        raise ReplayError("no path is named: name the folder of a log")
    found = list(dict.fromkeys(part for path in paths for part in _parts_of(kind, path)))
    scored = _parts_of(kind, score) if score is not None else _parts_of(kind, paths[-1])
    if score is None and len(scored) > 1:
        scored = [max(scored, key=lambda part: (_first_ms(open_log(kind, part)), part))]
    found += [part for part in scored if part not in found]
    whole = set(scored) == set(found)
    if score is not None and whole:
        raise ReplayError(
            f"--score names {score}, which is all of the log: nothing would be left to learn from; name an earlier "
            "part as a path too"
        )
    return Parts(kind, (*found, *_shared_items(kind, found)), () if whole else tuple(scored))


def _parts_of(kind: str, path: Path) -> list[Path]:
    if not path.exists():
        raise LogFormatError(f"{path} does not exist; name the folder of the log")
    if kind == "jsonl" and path.is_file():
        return [path]
    return split_folders(path, BEHAVIOURS[kind])


def _shared_items(kind: str, parts: Sequence[Path]) -> list[Path]:
    """Return the folders above parts of JSON lines that hold the catalogue of all of them."""
    above = dict.fromkeys(part.parent for part in parts) if kind == "jsonl" else {}
    return [
        f for f in above if f not in parts and any((f / name).is_file() for name in ("items.jsonl", "items.jsonl.gz"))
    ]


def _first_ms(reader: LogReader) -> int:
    return next((e.time_ms for e in reader.events() if isinstance(e.event, Impression)), 0)


@dataclass(slots=True)
class Survey:
    """One pass over a log in event-time order; S scored impressions, in that order, and n items shown in them.

    Counts of what was before are by event time, whatever the delay: a slice holds the same impressions at all delays.
    """

    events: int
    users: int
    items: int
    impressions: int
    start_ms: int
    """Event time of the first scored impression."""
    end_ms: int
    """Event time of the last event."""
    offsets: I64
    """Place of each scored impression among the events, int64 [S], rising."""
    times_ms: I64
    actions_before: I32
    """Actions of its user before each scored impression, int32 [S], histories included."""
    starts: I64
    """Where the items of each begin in ``shown_before``, int64 [S + 1]."""
    shown_before: I32
    """Impressions of each item before it was shown there, int32 [n]; items of an impression each once, in its order."""
    first_shown_ms: dict[str, int]
    clicks: dict[str, int]
    """Positive actions on each item over the whole log."""


def survey_log(
    reader: LogReader, scored: LogReader | None, score_share: float, on_events: OnEvents = lambda events: None
) -> Survey:
    """Read a log once. ``scored`` None: the latest ``score_share`` of its impressions count.

    Raises ReplayError where nothing would count, and LogFormatError as the reader does.
    """
    wanted = None if scored is None else _impression_ids(scored)
    survey = _Surveyor(wanted)
    for place, event in enumerate(reader.events()):
        survey.take(place, event.time_ms, event.event)
        if place % _PROGRESS_EVERY == 0:
            on_events(place)
    made = survey.result(score_share)
    on_events(made.events)
    return made


def acted_on(reader: LogReader, of_history: int) -> set[int]:
    """Return hash64 of the items that users acted on; of a history its last ``of_history`` entries."""
    items: set[str] = set()
    histories: defaultdict[str, deque[str]] = defaultdict(lambda: deque(maxlen=of_history))
    for event in reader.events():
        if isinstance(event.event, Action):
            if event.is_history:
                histories[event.event.user_id].append(event.event.item_id)
            else:
                items.add(event.event.item_id)
    return {hash64(item) for item in items.union(*histories.values())}


def _impression_ids(reader: LogReader) -> set[int]:
    return {hash64(e.event.event_id) for e in reader.events() if isinstance(e.event, Impression)}


class _Surveyor:
    """Counts as it reads."""

    def __init__(self, wanted: set[int] | None) -> None:
        self._wanted = wanted
        self._events = self._impressions = self._end_ms = 0
        self._actions: defaultdict[str, int] = defaultdict(int)
        self._shown: defaultdict[str, int] = defaultdict(int)
        self._clicks: defaultdict[str, int] = defaultdict(int)
        self._first_ms: dict[str, int] = {}
        self._users: set[str] = set()
        self._found: list[tuple[int, int, int]] = []
        self._before: list[list[int]] = []

    def take(self, place: int, time_ms: int, event: object) -> None:
        self._events += 1
        self._end_ms = max(self._end_ms, time_ms)
        if isinstance(event, Action):
            self._users.add(event.user_id)
            self._actions[event.user_id] += 1
            if event.action in POSITIVE_ACTIONS:
                self._clicks[event.item_id] += 1
        elif isinstance(event, Impression):
            self._users.add(event.user_id)
            self._impressions += 1
            items = list(dict.fromkeys(item.item_id for item in event.items))
            if self._wanted is None or hash64(event.event_id) in self._wanted:
                self._found.append((place, time_ms, self._actions[event.user_id]))
                self._before.append([self._shown[item] for item in items])
            for item in items:
                self._shown[item] += 1
                self._first_ms.setdefault(item, time_ms)

    def result(self, score_share: float) -> Survey:
        found, before = self._found, self._before
        if not self._impressions:
            raise ReplayError("the log has no impressions: nothing can be scored; it needs events of type impression")
        if self._wanted is None:
            first = len(found) - max(1, round(len(found) * score_share))
            found, before = found[first:], before[first:]
        if not found:
            raise ReplayError("the scored part has no impressions that the log has: name another part with --score")
        columns = np.array(found, np.int64)
        sizes = [len(counts) for counts in before]
        return Survey(
            events=self._events,
            users=len(self._users),
            items=len(self._first_ms.keys() | self._clicks.keys()),
            impressions=self._impressions,
            start_ms=int(columns[:, 1].min()),
            end_ms=self._end_ms,
            offsets=columns[:, 0],
            times_ms=columns[:, 1],
            actions_before=columns[:, 2].astype(np.int32),
            starts=np.r_[0, np.cumsum(sizes)].astype(np.int64),
            shown_before=np.array([count for counts in before for count in counts], np.int32),
            first_shown_ms=self._first_ms,
            clicks=dict(self._clicks),
        )

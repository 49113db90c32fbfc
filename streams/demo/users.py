"""Simulated users: hidden tastes, position bias, clicks. Pure: time and slates come in, what users do goes out.

The recommender never sees a taste; it sees what is published of what these users looked at and clicked.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

import numpy as np
import numpy.typing as npt

from streams.demo.catalogue import Film, directors_of
from streams.demo.films import DECADES, GENRES

F32 = npt.NDArray[np.float32]

BASE_LOGIT: Final = -3.9
"""Log-odds of a click on an examined film that means nothing to a user: about 2 %."""
LOVED_GENRES: Final = 2
DISLIKED_GENRES: Final = 4
LOVED, LIKED, DISLIKED = 2.4, 1.0, -1.5
LOVED_DECADE: Final = 0.6
LOVED_DIRECTOR: Final = 0.6
QUALITY_SPREAD: Final = 0.6
"""Standard deviation of what makes a film good for everybody: all that a popularity list can learn."""
TIRED: Final = 0.7
"""What is left of the chance of a click for each earlier time that a user examined a film and passed it over."""
SHOWN_LIMIT: Final = 3
"""Both halves leave a film out when a user was shown it this often."""
EVENTS_PER_VIEW: Final = 1.7
"""About how many events one look at a slate causes: its impression, a click or the request for it."""
WAIT_SECONDS: Final = 5.0
"""How long a user waits for a slate before turning away."""


class Half(Enum):
    """Which slates a user gets."""

    OURS = "millstream"
    POPULAR = "popularity"


@dataclass(frozen=True, slots=True)
class Taste:
    """What one user loves; known to the simulation and to whoever watches the demo, not to the recommender."""

    loved: tuple[str, ...]
    liked: str
    decade: int
    director: str

    def __str__(self) -> str:
        genres = " and ".join(self.loved)
        return f"loves {genres}, likes {self.liked}, the {self.decade}s, {self.director}"


def examination(position: int) -> float:
    """Return the chance that a user looks at a position (1-based) of a slate: 1 / log2(1 + position), as in DCG."""
    return float(1.0 / np.log2(1.0 + position))


@dataclass(slots=True)
class World:
    """Films and tastes. ``attraction`` float32 [T, N]: chance of a click on an examined film, for each taste."""

    films: list[Film]
    tastes: list[Taste]
    attraction: F32
    place: dict[str, int]

    @classmethod
    def make(cls, films: Sequence[Film], tastes: int, seed: int) -> World:
        """Draw ``tastes`` tastes and each film's quality."""
        rng = np.random.default_rng([seed, 2])
        quality = rng.normal(0.0, QUALITY_SPREAD, len(films)).astype(np.float32)
        genres = list(GENRES)
        drawn: list[Taste] = []
        logits = np.empty((tastes, len(films)), np.float32)
        for i in range(tastes):
            order = [genres[int(g)] for g in rng.permutation(len(genres))]
            loved = tuple(order[:LOVED_GENRES])
            favourite = directors_of(loved[0])
            taste = Taste(
                loved, order[LOVED_GENRES], int(rng.choice(DECADES)), favourite[int(rng.integers(len(favourite)))]
            )
            weight = dict.fromkeys(loved, LOVED) | {taste.liked: LIKED}
            weight |= dict.fromkeys(order[-DISLIKED_GENRES:], DISLIKED)
            logits[i] = [
                weight.get(film.genre, 0.0)
                + (LOVED_DECADE if film.decade == taste.decade else 0.0)
                + (LOVED_DIRECTOR if film.director == taste.director else 0.0)
                for film in films
            ]
            drawn.append(taste)
        attraction = 1.0 / (1.0 + np.exp(-(BASE_LOGIT + logits + quality)))
        return cls(list(films), drawn, attraction.astype(np.float32), {f.item_id: i for i, f in enumerate(films)})


@dataclass(slots=True)
class Person:
    """One simulated user. ``taste`` is the row of World.attraction; both halves have the same tastes."""

    user_id: str
    half: Half
    taste: int
    clicked: set[str] = field(default_factory=set)
    examined: dict[str, int] = field(default_factory=dict)
    shown: dict[str, int] = field(default_factory=dict)

    def look(self, world: World, slate: Sequence[str], rng: np.random.Generator) -> str | None:
        """Look down a slate and return the first item clicked, None where nothing was; remembers what was seen."""
        for position, item_id in enumerate(slate, 1):
            self.shown[item_id] = self.shown.get(item_id, 0) + 1
            if rng.random() >= examination(position):
                continue
            passed = self.examined.get(item_id, 0)
            self.examined[item_id] = passed + 1
            chance = 0.0 if item_id in self.clicked else world.attraction[self.taste, world.place[item_id]]
            if rng.random() < chance * TIRED**passed:
                # What stands below was on the page as well: it counts as shown, for both halves alike.
                for below in slate[position:]:
                    self.shown[below] = self.shown.get(below, 0) + 1
                self.clicked.add(item_id)
                return item_id
        return None


def people(count: int) -> list[Person]:
    """Return ``count`` users, an even number, in pairs: one of each half with the same taste."""
    made: list[Person] = []
    for taste in range(max(1, count // 2)):
        made.append(Person(f"viewer-{taste + 1:03d}a", Half.OURS, taste))
        made.append(Person(f"viewer-{taste + 1:03d}b", Half.POPULAR, taste))
    return made


class PopularityList:
    """The other half's slates: most clicked first, by both halves' clicks, as of this moment.

    Films with equal clicks stand in an order of their own for the run. A film that the user clicked or was shown
    often is left out, as our slates leave it out: else the comparison would be one of rules.
    """

    def __init__(self, item_ids: Sequence[str], seed: int) -> None:
        rng = np.random.default_rng([seed, 3])
        self._order = {item_ids[int(i)]: place for place, i in enumerate(rng.permutation(len(item_ids)))}
        self._clicks: dict[str, int] = {}
        self._ranked = sorted(self._order, key=self._order.__getitem__)

    def click(self, item_id: str) -> None:
        """Count one click."""
        self._clicks[item_id] = self._clicks.get(item_id, 0) + 1
        clicks, order = self._clicks, self._order
        # Only the clicked film moves, and only up.
        place = self._ranked.index(item_id)
        key = (-clicks[item_id], order[item_id])
        while place and key < (-clicks.get(self._ranked[place - 1], 0), order[self._ranked[place - 1]]):
            self._ranked[place] = self._ranked[place - 1]
            place -= 1
        self._ranked[place] = item_id

    def slate(self, person: Person, k: int) -> list[str]:
        """Return the ``k`` most clicked films that this user may still be shown."""
        chosen: list[str] = []
        for item_id in self._ranked:
            if item_id not in person.clicked and person.shown.get(item_id, 0) < SHOWN_LIMIT:
                chosen.append(item_id)
                if len(chosen) == k:
                    break
        return chosen


@dataclass(frozen=True, slots=True)
class Ask:
    """A user of our half opens the page: a slate is needed."""

    person: Person


@dataclass(frozen=True, slots=True)
class Show:
    """A user looks at a slate."""

    person: Person
    items: list[str]
    slate_id: str | None
    experiment: str | None = None
    """As the slate had it."""


@dataclass(frozen=True, slots=True)
class Click:
    """A user clicks an item of the slate last shown."""

    person: Person
    item_id: str
    slate_id: str | None


Deed = Ask | Show | Click


class _Next(Enum):
    OPEN = 1
    LOOK = 2
    CLICK = 3
    GIVE_UP = 4


@dataclass(slots=True)
class _Mind:
    """What a user is about to do. ``turn`` rises with each plan, so that an overtaken plan is recognised."""

    turn: int = 0
    waiting: bool = False
    slate: tuple[list[str], str | None, str | None] = field(default_factory=lambda: ([], None, None))
    """Items, id and experiment of the slate at hand."""
    click: str | None = None
    after_click: bool = False


class Simulation:
    """All users on one clock, in seconds. ``due`` returns what they do; ``slate`` hands one of them a slate.

    A user of our half asks once when a visit starts, then looks at the slate that each click pushed; the visit ends
    with a slate on which nothing was clicked. One of the other half does the same with the popularity list.
    """

    def __init__(self, world: World, persons: Sequence[Person], *, k: int, events_per_second: float, seed: int) -> None:
        self.world = world
        self.persons: Mapping[str, Person] = {p.user_id: p for p in persons}
        self.popular = PopularityList([f.item_id for f in world.films], seed)
        self.given_up = 0
        """How often a user waited in vain."""
        self._k = k
        self._rng = np.random.default_rng([seed, 4])
        self._pause_seconds = len(persons) * EVENTS_PER_VIEW / events_per_second
        self._minds = {p.user_id: _Mind() for p in persons}
        self._plans: list[tuple[float, int, str, int, _Next]] = []
        self._count = 0

    def start(self, now: float) -> None:
        """Send everybody on their way, spread over one pause."""
        for user_id in self.persons:
            self._plan(user_id, now + float(self._rng.random()) * self._pause_seconds, _Next.OPEN)

    def next_at(self) -> float:
        """Return when the next deed is due; infinity where everybody waits for a slate."""
        return self._plans[0][0] if self._plans else float("inf")

    def due(self, now: float) -> list[Deed]:
        """Return what users do up to ``now``, in order."""
        deeds: list[Deed] = []
        while self._plans and self._plans[0][0] <= now:
            at, _, user_id, turn, what = heapq.heappop(self._plans)
            if turn == self._minds[user_id].turn:
                deeds += self._do(self.persons[user_id], what, at)
        return deeds

    def slate(
        self, user_id: str, items: Sequence[str], slate_id: str, now: float, experiment: str | None = None
    ) -> bool:
        """Hand a user of our half a slate; returns whether they were waiting for one."""
        mind = self._minds.get(user_id)
        known = [i for i in items if i in self.world.place]
        if mind is None or not mind.waiting or not known:
            return False
        mind.waiting = False
        mind.slate = (known, slate_id, experiment)
        self._plan(user_id, now + (self._about(0.5) if mind.after_click else 0.0), _Next.LOOK)
        return True

    def _do(self, person: Person, what: _Next, at: float) -> list[Deed]:
        mind = self._minds[person.user_id]
        if what is _Next.OPEN:
            return self._open(person, mind, at)
        if what is _Next.LOOK:
            items, slate_id, experiment = mind.slate
            if person.half is Half.POPULAR:
                items = self.popular.slate(person, self._k)
            mind.click = person.look(self.world, items, self._rng)
            if mind.click is None:
                self._plan(person.user_id, at + self._about(1.0), _Next.OPEN)
            else:
                self._plan(person.user_id, at + self._about(0.5), _Next.CLICK)
            return [Show(person, items, slate_id, experiment)]
        if what is _Next.CLICK and mind.click is not None:
            self.popular.click(mind.click)
            mind.after_click = True
            self._await_slate(person, mind, at)
            return [Click(person, mind.click, mind.slate[1])]
        mind.waiting = False
        self.given_up += 1
        self._plan(person.user_id, at + self._about(1.0), _Next.OPEN)
        return []

    def _open(self, person: Person, mind: _Mind, at: float) -> list[Deed]:
        mind.after_click = False
        self._await_slate(person, mind, at)
        return [Ask(person)] if person.half is Half.OURS else []

    def _await_slate(self, person: Person, mind: _Mind, at: float) -> None:
        if person.half is Half.OURS:
            mind.waiting = True
            self._plan(person.user_id, at + WAIT_SECONDS, _Next.GIVE_UP)
        else:
            self._plan(person.user_id, at + (self._about(0.5) if mind.after_click else 0.0), _Next.LOOK)

    def _about(self, pauses: float) -> float:
        return float(self._rng.uniform(0.5, 1.5)) * pauses * self._pause_seconds

    def _plan(self, user_id: str, at: float, what: _Next) -> None:
        self._count += 1
        self._minds[user_id].turn += 1
        heapq.heappush(self._plans, (at, self._count, user_id, self._minds[user_id].turn, what))

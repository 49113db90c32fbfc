"""The world of the benchmarks: items that lie around topics, users with a history, and the events they send.

Every draw comes from one seed, so that two runs send the same events.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from models.bootstrap import Space, unit
from models.catalogue import Catalogue
from models.encoder import content_hash
from models.events import Action, Event, ImpressedItem, Impression, Item, Request
from models.hashing import hash64
from models.item_index import ItemIndex
from models.user_row import VERSION, Rows, empty_rows, encode_rows
from models.user_state import UserEvent, UserStateConfig, apply, user_event
from streams import item_vectors

CLUSTERS: Final = 400
SPREAD: Final = 0.7
"""Length of an item's own direction beside that of its topic, for each dimension."""
TEMPLATES: Final = 2_000
"""Different user histories; with more users each stands for several."""
MEAN_SESSIONS: Final = 6.0
SESSION_GAP_MS: Final = 8 * 60_000
SLATE: Final = 15
POPULAR_ITEMS: Final = 500
SURFACE: Final = "default"
SEED: Final = 20_240_601

_WORDS: Final = (
    "after again air already among area army around artist attack author autumn bank beach before bill border bridge "
    "budget camera capital career case centre champion change charge chief child church citizen city claim climate "
    "coach coast company concert council country court crew crisis crowd culture damage dance danger daughter deal "
    "death debate decade decision defence desert design doctor dream drought early east economy editor education "
    "election energy engine europe evening event evidence exhibit expert factory family farmer father festival fight "
    "film final finance fire fish flight flood food football forest former freedom friend future game garden global "
    "gold government grand ground growth guide harbour health heart heavy history holiday home hope hospital hotel "
    "house human hunger ice idea image income island journey judge jury justice kitchen language large late law "
    "leader league letter library light local market master match medicine meeting memory message minister modern "
    "money morning mother mountain museum music nation nature network night north novel ocean office opera parent "
    "park party patient peace people planet player police policy port power president press price prison private "
    "project protest public race radio rain record reform region report rescue research river road rule safety sail "
    "school science season secret senate series service share ship show silver singer snow society soldier south "
    "space spring stage star state storm story street strike student summer sun surgeon survey system teacher team "
    "theatre threat title tour town trade train travel trial union valley victory village violin virus vote voyage "
    "wage war water weather west wind winner winter woman word work world worker writer year young"
)
WORDS: Final = tuple(_WORDS.split())


@dataclass(frozen=True, slots=True)
class Keyed:
    """A record to send."""

    key: bytes
    value: bytes


class World:
    """Items, users and events of one run."""

    def __init__(self, items: int, space: Space, now_ms: int) -> None:
        self.now_ms = now_ms
        self.space = space
        self._random = np.random.default_rng(SEED)
        centres = self._random.standard_normal((CLUSTERS, space.dim))
        self.cluster_of = np.arange(items) % CLUSTERS
        noise = SPREAD * self._random.standard_normal((items, space.dim))
        vectors = unit(np.asarray(centres[self.cluster_of] + noise, np.float32))
        # The projection's columns are orthonormal: what goes in through its transpose comes out again.
        self._base = unit(vectors @ space.projection.T)
        self.items = [
            Item(
                item_id=f"item-{i}",
                title=self.words(9),
                text=self.words(24),
                categories=[f"topic-{self.cluster_of[i]}"],
                published_at=now_ms - i * 60_000,
            )
            for i in range(items)
        ]
        self._sequence = 0

    def words(self, n: int) -> str:
        """Return ``n`` random words."""
        return " ".join(WORDS[i] for i in self._random.integers(0, len(WORDS), n).tolist())

    # -- catalogue -----------------------------------------------------------------------------------------------

    def item_records(self) -> list[Keyed]:
        """Return the catalogue as records of ``items``."""
        return [Keyed(item.item_id.encode(), msgspec.json.encode(item)) for item in self.items]

    def vector_records(self) -> list[tuple[bytes, Keyed]]:
        """Return the base encodings as (key of the item, record of ``item-vectors``): they share a partition."""
        encoder = self.space.encoder_id
        return [
            (
                item.item_id.encode(),
                Keyed(
                    item_vectors.key(encoder, item.item_id), item_vectors.value(content_hash(item), self._base[place])
                ),
            )
            for place, item in enumerate(self.items)
        ]

    def new_items(self, n: int, prefix: str) -> list[Item]:
        """Return ``n`` items with text that no encoder has seen."""
        return [
            Item(item_id=f"{prefix}-{i}", title=self.words(9), text=self.words(24), published_at=self.now_ms)
            for i in range(n)
        ]

    # -- users ---------------------------------------------------------------------------------------------------

    def user_key(self, user: int) -> bytes:
        """Return the key of a user."""
        return f"user-{user}".encode()

    def rows(self, epoch: int) -> list[bytes]:
        """Return the stored row of each template, for an events topic of that epoch of which nothing was read yet."""
        rows = self._templates[0].copy()
        rows["epoch"] = epoch
        rows["offset"] = 0
        return encode_rows(rows)

    def probe_row(self, vector: npt.NDArray[np.float32], epoch: int) -> bytes:
        """Return the row of a user whose taste is ``vector``, float32 [D] of unit norm, and who never did anything."""
        row = empty_rows(1)
        row["version"], row["epoch"], row["space_id"] = VERSION, epoch, hash64(self.space.space_id)
        row["last_time_ms"] = row["vector_time_ms"] = self.now_ms
        row["norms"][0, 0] = 1.0
        row["vectors"][0, 0] = vector
        return encode_rows(row)[0]

    @cached_property
    def _templates(self) -> tuple[Rows, list[list[str]]]:
        """Return rows of TEMPLATES users, and the items that each was shown last."""
        index = ItemIndex()
        catalogue = Catalogue(index, self.space.dim)
        vectors = self.space.vectors(self._base)
        for item, vector in zip(self.items, vectors, strict=True):
            catalogue.set_vector(catalogue.upsert(item), vector)
        sessions = np.minimum(self._random.geometric(1 / MEAN_SESSIONS, TEMPLATES), 40).tolist()
        config = UserStateConfig()
        events: list[UserEvent] = []
        last: list[list[str]] = []
        for user, n in enumerate(sessions):
            shown: list[str] = []
            for session in range(n):
                at_ms = self.now_ms - (n - session) * SESSION_GAP_MS
                shown = self._near(user, SLATE)
                clicked = shown[int(self._random.integers(len(shown)))]
                pair: tuple[Event, Event] = (
                    self._impression(user, shown, at_ms),
                    self._action(user, clicked, at_ms + 30_000),
                )
                for turn, event in enumerate(pair):
                    offset = 2 * session + turn
                    events.append(user_event(event, user, offset, at_ms + turn * 30_000, config, [SURFACE]))
            last.append(shown)
        # One user after the other would give the update one long round each; it takes the n-th of all users at once.
        rows, _ = apply(
            empty_rows(TEMPLATES),
            events,
            catalogue,
            config,
            epoch=1,
            space_id=hash64(self.space.space_id),
            generation=0,
            surfaces=[SURFACE],
        )
        return rows, last

    # -- events --------------------------------------------------------------------------------------------------

    def click(self, user: int, at_ms: int) -> Keyed:
        """Return a click: half of them on an item of the user's last impression."""
        shown = self._templates[1][user % TEMPLATES]
        is_shown = self._random.random() < 0.5
        item = shown[int(self._random.integers(len(shown)))] if is_shown else self._near(user, 1)[0]
        return Keyed(self.user_key(user), msgspec.json.encode(self._action(user, item, at_ms)))

    def impression(self, user: int, at_ms: int) -> Keyed:
        """Return an impression of SLATE items."""
        return Keyed(self.user_key(user), msgspec.json.encode(self._impression(user, self._near(user, SLATE), at_ms)))

    def request(self, user_id: str, at_ms: int) -> Keyed:
        """Return a request for a slate of the default length."""
        name = self._event_id()
        record = Request(event_id=name, event_time=at_ms, user_id=user_id, request_id=f"r{name}", surface=SURFACE)
        return Keyed(user_id.encode(), msgspec.json.encode(record))

    def _action(self, user: int, item_id: str, at_ms: int) -> Action:
        return Action(
            event_id=self._event_id(),
            event_time=at_ms,
            user_id=f"user-{user}",
            item_id=item_id,
            action="click",
            surface=SURFACE,
        )

    def _impression(self, user: int, item_ids: list[str], at_ms: int) -> Impression:
        name = self._event_id()
        items = [ImpressedItem(item_id, position) for position, item_id in enumerate(item_ids, 1)]
        return Impression(
            event_id=name, event_time=at_ms, user_id=f"user-{user}", request_id=f"r{name}", surface=SURFACE, items=items
        )

    def _near(self, user: int, n: int) -> list[str]:
        """Return ``n`` different items: two thirds of the user's topic, the rest popular ones."""
        clusters = min(CLUSTERS, len(self.items))
        cluster = ((user % TEMPLATES) * 7) % clusters
        in_cluster = (len(self.items) - 1 - cluster) // CLUSTERS + 1
        found: dict[int, None] = {}
        while len(found) < n:
            if self._random.random() < 2 / 3 and in_cluster > n:
                found[cluster + CLUSTERS * int(self._random.integers(in_cluster))] = None
            else:
                popular = min(POPULAR_ITEMS, len(self.items))
                found[int(popular * self._random.random() ** 3)] = None
        return [f"item-{i}" for i in found]

    def _event_id(self) -> str:
        self._sequence += 1
        return f"event-{self._sequence:012d}"

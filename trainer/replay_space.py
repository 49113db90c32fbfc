"""The space of a replay, learned from the histories that had arrived when the scored part began, if there are enough.

A history is what a user acted on without having been shown it first, as far as the log knows: what its impressions tell
is learned from them, by trainer/replay_models.py, and not told twice. Delays at which the same histories had arrived
share one space.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from models.bundle import ItemEncodings
from models.events import Action, Impression
from models.hashing import hash64
from models.logs import LogReader
from trainer.encodings import OutputCache
from trainer.finetune import StartingPoint
from trainer.progress import Show
from trainer.replay_log import POSITIVE_ACTIONS
from trainer.replay_models import ItemVectors
from trainer.scoring import encode_items
from trainer.space_files import keep_space, kept_space
from trainer.space_learning import SpaceConfig, enough_histories, learn_space, space_id

CACHE_BYTES: Final = 4 << 30


@dataclass(frozen=True, slots=True)
class Histories:
    """Actions of users on items that they had not been shown, in the order of event time."""

    by_user: dict[str, npt.NDArray[np.uint64]]
    """Items' hashes, oldest first."""
    times_ms: dict[str, npt.NDArray[np.int64]]
    """When each happened."""

    @classmethod
    def read(cls, reader: LogReader, until_ms: int) -> Histories:
        """Return those of a log that happened before a time. Raises LogFormatError as the reader does."""
        shown: defaultdict[str, set[str]] = defaultdict(set)
        items: defaultdict[str, list[int]] = defaultdict(list)
        times_ms: defaultdict[str, list[int]] = defaultdict(list)
        for event in reader.events():
            if event.time_ms >= until_ms:
                break
            one = event.event
            if isinstance(one, Impression):
                shown[one.user_id].update(item.item_id for item in one.items)
            elif isinstance(one, Action) and one.action in POSITIVE_ACTIONS and one.item_id not in shown[one.user_id]:
                items[one.user_id].append(hash64(one.item_id))
                times_ms[one.user_id].append(event.time_ms)
        return cls(
            {user: np.array(own, np.uint64) for user, own in items.items()},
            {user: np.array(own, np.int64) for user, own in times_ms.items()},
        )

    def arrived(self, until_ms: int, delay_ms: int) -> dict[str, list[int]]:
        """Return each user's items that had arrived, a delay after they happened, by a time."""
        found = {user: own[self.times_ms[user] + delay_ms <= until_ms].tolist() for user, own in self.by_user.items()}
        return {user: items for user, items in found.items() if items}


def learned_spaces(
    reader: LogReader,
    start_ms: int,
    items: ItemVectors,
    delays_seconds: Sequence[float],
    config: SpaceConfig,
    show: Show,
) -> dict[float, ItemVectors]:
    """Return for each delay where the items lie: in a space learned from histories, else as they did.

    Raises LogFormatError as the reader does, EncoderError, and TrainingError where a loss is not finite.
    """
    spaces = dict.fromkeys(delays_seconds, items)
    if items.encoder is None or not items.texts:
        return spaces
    histories = Histories.read(reader, start_ms)
    made: dict[int, ItemVectors] = {}
    for delay in sorted(delays_seconds):
        known = histories.arrived(start_ms, round(delay * 1000))
        # Fewer arrive by a longer delay, never others: as many are the same.
        count = sum(map(len, known.values()))
        if count not in made:
            enough = enough_histories(known, items.texts, config)
            made[count] = learned(items, known, config, show) if enough else items
        spaces[delay] = made[count]
    return spaces


def learned(items: ItemVectors, histories: dict[str, list[int]], config: SpaceConfig, show: Show) -> ItemVectors:
    """Return the same items in a space learned from histories, with the scorer that was learned with it."""
    encoder = items.load_encoder()
    start = StartingPoint(items.space, encoder)
    name = space_id(histories, items.texts, start, config)
    found = None if items.cache is None else kept_space(items.cache, name, start)
    if found is None:
        found = learn_space(histories, items.texts, start, config, cache_folder=items.cache, on_progress=show).start
        if items.cache is not None:
            keep_space(items.cache, found)
    encodings: ItemEncodings = items.encodings
    if found.delta is not None:
        cache = OutputCache(items.cache, CACHE_BYTES)
        encodings = encode_items(
            encoder, items.texts, cache, lambda done, total: show("encoding texts again", done, total), found.delta
        )
    return replace(items, space=found.space, encodings=encodings, delta=found.delta, scorer=found.scorer)

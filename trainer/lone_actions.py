"""Actions on items that were not shown: histories, and examples of a log that holds no impressions at all.

Where the window has no impression, each positive action is an example with items drawn from the catalogue; what was
shown is better than what was drawn. See models/sampling.py for the drawing and its correction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import structlog

from models.errors import RecordError
from models.events import EVENT_CODEC, Action, epoch_ms
from models.examples import SAMPLED, label_values
from models.manifest import OffsetRange
from models.sampling import LoneAction, sampled_impressions
from trainer.connection import EventRules
from trainer.dataset import Example, Examples, ItemFacts
from trainer.spool import Spool

log = structlog.get_logger(__name__)


def read_lone_actions(spool: Spool, ranges: Sequence[OffsetRange], rules: EventRules) -> list[LoneAction]:
    """Return the actions among the spooled events of these ranges; a record that a worker would refuse is none.

    Raises TrainingError (``spool-unreadable``).
    """
    found, refused = [], 0
    for r in sorted(ranges, key=lambda r: (r.topic, r.partition, r.start)):
        for record in spool.read(r):
            try:
                event = EVENT_CODEC.decode(record.value)
                if isinstance(event, Action):
                    time_ms = rules.clock.event_time_ms(epoch_ms(event.event_time), record.broker_ms)
                    found.append(
                        LoneAction.of(event, r.partition, record.offset, time_ms, record.broker_ms, rules.user_state)
                    )
            except RecordError:
                refused += 1
    if refused:
        log.warning("events_left_out", records=refused)
    return found


def histories(actions: Sequence[LoneAction], examples: Examples) -> dict[str, list[int]]:
    """Return the items that users liked without having been shown them in these impressions, by user, oldest first.

    What impressions tell is learned from them, and not told twice; drawn ones were never shown.
    """
    shown: defaultdict[str, set[int]] = defaultdict(set)
    for example in examples.impressions:
        if example.features.flags & SAMPLED:
            continue
        shown[example.features.user_id].update(np.frombuffer(example.features.items, "<u8").tolist())
    found: defaultdict[str, list[int]] = defaultdict(list)
    for action in sorted(actions, key=lambda a: (a.time_ms, a.broker_ms, a.partition, a.offset)):
        if action.is_positive and action.item not in shown[action.user_id]:
            found[action.user_id].append(action.item)
    return dict(found)


def sampled_examples(
    actions: Sequence[LoneAction], items: ItemFacts, per_positive: int, seed: int, max_impressions: int
) -> Examples:
    """Return examples in time order, of the newest ``max_impressions`` actions that make one.

    The same actions, items and seed give the same examples.
    """
    catalogue = np.array(sorted(items.texts.keys() | items.embeddings.keys()), np.uint64)
    made = sampled_impressions(actions, catalogue, per_positive, seed)
    kept = made[-max_impressions:]
    found = [Example(f, label_values(labels, len(f)), f.broker_ms) for f, labels in kept]
    return Examples(found, {"above-limit": len(made) - len(kept)} if len(made) > len(kept) else {})

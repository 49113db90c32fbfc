"""Examples of a log that holds actions but no impressions: each positive action with items drawn from the catalogue.

Only where the window has no impression at all; what was shown is better than what was drawn. See models/sampling.py
for the drawing and its correction.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import structlog

from models.errors import RecordError
from models.events import EVENT_CODEC, Action, epoch_ms
from models.examples import label_values
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

"""Labels of a recorded log that does not tell what was clicked: models.joiner over the log in event time.

Labels are the truth that figures are measured against, so they know no feedback delay, and no frozen state either.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

from models.events import Impression
from models.examples import LabelsRecord
from models.joiner import JoinContext, due_labels, join
from models.logs import LogEvent
from models.user_events import Outcome, UserEvent
from models.user_row import EVENT_IDS


class LogLabels:
    """Open impressions of each user, and the labels of those that closed."""

    def __init__(self, context: JoinContext, epoch: int, partition: int) -> None:
        self._context, self._epoch, self._partition = context, epoch, partition
        self._joins = False
        self._blocks: dict[str, bytes] = {}
        self._clocks_ms: dict[str, int] = {}
        self._seen: dict[str, deque[int]] = {}
        self._labels: dict[int, LabelsRecord] = {}

    def take(self, events: Sequence[LogEvent], hashed: Sequence[UserEvent]) -> None:
        """Join the next events of the log, each with its hashed form.

        Nothing is done before the first impression of which the log does not tell the outcome.
        """
        by_user: defaultdict[str, list[UserEvent]] = defaultdict(list)
        for event, user_event in zip(events, hashed, strict=True):
            untold = event.outcome is None and not event.is_history
            self._joins |= untold and isinstance(event.event, Impression)
            if self._joins and untold:
                by_user[event.event.user_id].append(user_event)
        for user, own in by_user.items():
            self._join(user, own)

    def labels(self, clock_ms: int) -> dict[int, LabelsRecord]:
        """Return the last label of each impression that closed before ``clock_ms``, by the impression's id."""
        for user, block in self._blocks.items():
            due, _ = due_labels(block, clock_ms, user, self._context)
            self._labels.update((label.impression_id, label) for label in due)
        return self._labels

    def _join(self, user: str, events: Sequence[UserEvent]) -> None:
        made = join(
            self._blocks.get(user, b""),
            events,
            self._outcomes(user, events),
            self._clocks_ms.get(user, 0),
            self._context,
            user_id=user,
            epoch=self._epoch,
            partition=self._partition,
        )
        self._clocks_ms[user] = max(self._clocks_ms.get(user, 0), *(event.time_ms for event in events))
        self._labels.update((label.impression_id, label) for label in made.labels)
        if made.block:
            self._blocks[user] = made.block
        else:
            self._blocks.pop(user, None)

    def _outcomes(self, user: str, events: Sequence[UserEvent]) -> list[int]:
        """Tell repeated events by the user's last event ids, as the row does."""
        seen = self._seen.setdefault(user, deque(maxlen=EVENT_IDS))
        outcomes: list[int] = []
        for event in events:
            repeated = event.event_hash in seen
            outcomes.append(Outcome.DUPLICATE if repeated else Outcome.APPLIED)
            if not repeated:
                seen.append(event.event_hash)
        return outcomes

"""What the log says of each impression's label, one event at a time, and the comparison with the topic ``labels``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from aiokafka import ConsumerRecord

from models.examples import LabelsRecord, decode_labels
from models.joiner import JoinContext, due_labels, join
from models.user_state import Outcome, UserEvent
from streams.settings import Settings
from tests.integration.conftest import read_topic
from tests.integration.workers import World

UserKey = tuple[int, bytes]
"""(partition, key)."""
Content = tuple[bytes, bytes, bytes]


def content(label: LabelsRecord) -> Content:
    """Return what a label says."""
    return label.clicked, label.refused, label.actions


@dataclass
class Labels:
    """The labels that the log makes, by impression."""

    blocks: dict[UserKey, bytes] = field(default_factory=dict)
    """What stays open of each user."""
    closed: dict[int, Content] = field(default_factory=dict)

    def apply(
        self, key: UserKey, event: UserEvent, outcome: Outcome, clock_ms: int, epoch: int, context: JoinContext
    ) -> None:
        """Apply one event; ``clock_ms`` is the row's last time before it."""
        joined = join(
            self.blocks.get(key, b""),
            [event],
            [outcome],
            clock_ms,
            context,
            user_id=key[1].decode(),
            epoch=epoch,
            partition=key[0],
        )
        self.blocks[key] = joined.block
        self.closed |= {label.impression_id: content(label) for label in joined.labels}

    def copy(self) -> Labels:
        """Return labels to go on with after the events topic was created again."""
        return Labels(dict(self.blocks), dict(self.closed))


def context_of(settings: Settings, surfaces: Sequence[str]) -> JoinContext:
    """Return the joiner's context under ``settings``."""
    return JoinContext.of(settings.joiner, settings.user_state, surfaces)


async def sent_labels(world: World) -> list[LabelsRecord]:
    """Return all labels records, partition by partition in the order of their offsets, each where its user is."""
    found = []
    for record in await read_topic(world.settings, world.names.labels):
        label = decode_labels(record.value)
        assert record.key == label.user_id.encode()
        found.append(label)
    return found


async def places(world: World) -> dict[int, set[int]]:
    """Return the partitions in which labels of each impression lie; one that lies in two would have two last ones."""
    found: dict[int, set[int]] = {}
    records: list[ConsumerRecord] = await read_topic(world.settings, world.names.labels)
    for record in records:
        found.setdefault(decode_labels(record.value).impression_id, set()).add(record.partition)
    return found


async def label_differences(world: World, want: Labels, context: JoinContext) -> list[str]:
    """Return in words which impressions have no label, or a last one that the log does not make.

    An impression that is still open by its user's log may have one from the timer: then it says what is known by now.
    """
    last: dict[int, Content] = {}
    # The one that knows most of the log counts, of equals the last: sorted() keeps the order of equals.
    for label in sorted(await sent_labels(world), key=lambda label: label.as_of):
        last[label.impression_id] = content(label)
    found = [f"impression {i}: no label" for i in want.closed.keys() - last.keys()]
    found += [
        f"impression {i}: the last label is {last[i]}, must be {want.closed[i]}"
        for i in sorted(want.closed.keys() & last.keys())
        if last[i] != want.closed[i]
    ]
    still_open: dict[int, Content] = {}
    for (_, key), block in want.blocks.items():
        records, _ = due_labels(block, 2**62, key.decode(), context)
        still_open |= {label.impression_id: content(label) for label in records}
    found += [
        f"impression {i}: a label {last[i]}, it is open with {still_open.get(i)}"
        for i in sorted(last.keys() - want.closed.keys())
        if last[i] != still_open.get(i)
    ]
    found += [f"impression {i}: labels in the partitions {p}" for i, p in (await places(world)).items() if len(p) > 1]
    return found

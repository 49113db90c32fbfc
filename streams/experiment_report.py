"""Reads features and labels from Kafka and tells what became of each arm: behind `millstream experiments report`."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from models.arm_report import ArmResult, ArmTally
from models.errors import RecordError
from models.examples import decode_features, decode_labels
from streams.settings import Settings
from streams.topic_io import open_topic
from streams.topics import TopicNames


class _SlateHead(msgspec.Struct):
    """What the report wants to know of a slate."""

    recommendation_id: str
    model_version: str
    degraded: bool


_SLATE: Final = msgspec.json.Decoder(_SlateHead)


async def read(settings: Settings, *, slates: bool = False) -> tuple[ArmTally, int]:
    """Return all impressions with an arm that the topics still hold, and how many records could not be read.

    ``slates``: read the slates too, for the versions that ranked them. Raises BrokerUnavailable and LayoutError.
    """
    names, tally, unreadable = TopicNames.of(settings), ArmTally(), 0
    for topic in (names.features, names.labels, *([names.recommendations] if slates else [])):
        if topic == names.recommendations:
            tally.look_at_slates()
        async with open_topic(settings, topic) as tail:
            async for record in tail.read(await tail.begin_offsets(), await tail.end_offsets()):
                if record.value is None:
                    continue
                try:
                    if topic == names.features:
                        tally.add_features(decode_features(record.value))
                    elif topic == names.labels:
                        tally.add_labels(decode_labels(record.value))
                    else:
                        slate = _SLATE.decode(record.value)
                        tally.add_slate(slate.recommendation_id, slate.model_version, degraded=slate.degraded)
                except (RecordError, msgspec.DecodeError):
                    unreadable += 1
    return tally, unreadable


def described(result: ArmResult) -> dict[str, Any]:
    """Return a result as plain values; an error that is infinite, for a single user, is null."""
    told: dict[str, Any] = {
        "experiment": result.experiment,
        "arm": result.arm,
        "users": result.users,
        "impressions": result.impressions,
        "clicked": result.clicked,
        "click_rate": result.rate.mean,
        "click_rate_low": result.rate.low,
        "click_rate_high": result.rate.high,
    }
    if result.difference is not None:
        low, high = result.difference.low, result.difference.high
        known = low > float("-inf")
        told |= {
            "difference": result.difference.mean,
            "difference_low": low if known else None,
            "difference_high": high if known else None,
        }
    if result.ranked_by:
        told["ranked_by"] = dict(result.ranked_by)
    return told

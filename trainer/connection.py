"""What the command line hands to the trainer: how Kafka is reached, and what the topics are called.

The trainer never imports ``streams``; millstream.py makes this from the worker's settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from models.events import ClockPolicy
from models.user_events import UserStateConfig


@dataclass(frozen=True, slots=True)
class Topics:
    """Full names of the topics that the trainer reads or writes."""

    features: str
    labels: str
    items: str
    events: str
    models: str
    model_status: str


@dataclass(frozen=True, slots=True)
class EventRules:
    """How workers read the events topic; needed where events themselves are learned from."""

    clock: ClockPolicy = field(default_factory=ClockPolicy)
    user_state: UserStateConfig = field(default_factory=UserStateConfig)


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach the cluster, and where what is."""

    client_options: Mapping[str, Any]
    """Options that every aiokafka client takes."""
    topics: Topics
    status_interval_seconds: float
    """How often a worker says on ``model-status`` what it serves."""
    events: EventRules = field(default_factory=EventRules)

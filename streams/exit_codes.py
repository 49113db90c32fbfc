"""Exit codes of the worker: each says why, so that an operator and the supervisor can tell them apart."""

from __future__ import annotations

from enum import IntEnum

from models.errors import (
    BrokerUnavailable,
    DeliveryError,
    EncoderError,
    FencedError,
    LayoutError,
    SettingsError,
    TopicRecreatedError,
)


class ExitCode(IntEnum):
    """Why a worker process ended."""

    STOPPED = 0
    """SIGTERM or SIGINT: the batch in work was finished, flushed and committed."""
    UNEXPECTED = 1
    """An error of our own that no other code names; the log has its traceback."""
    SETTINGS = 2
    """A setting is unknown or impossible. Not restarted."""
    LAYOUT = 10
    """The topics are not as they must be. Not restarted."""
    ENCODER = 11
    """The text encoder cannot be loaded. Not restarted."""
    BROKER = 12
    """Kafka could not be reached."""
    DELIVERY = 13
    """A record was not acknowledged; its batch was not committed and is read again."""
    FENCED = 14
    """The process slept past half its session or lost its partitions; it wrote nothing more."""
    STUCK = 15
    """The watchdog saw events read but not committed for too long."""
    TOPIC_RECREATED = 16
    """The events topic was deleted and created again; the next start begins with the new one."""
    POISON = 17
    """An event in the batch broke processing in a way that bisection could not pin down."""
    FAUST = 18
    """Faust crashed; the log has its traceback."""


FINAL = frozenset({ExitCode.STOPPED, ExitCode.SETTINGS, ExitCode.LAYOUT, ExitCode.ENCODER})
"""Codes after which a restart cannot help."""

_BY_ERROR: tuple[tuple[type[BaseException], ExitCode], ...] = (
    (SettingsError, ExitCode.SETTINGS),
    (LayoutError, ExitCode.LAYOUT),
    (EncoderError, ExitCode.ENCODER),
    (BrokerUnavailable, ExitCode.BROKER),
    (DeliveryError, ExitCode.DELIVERY),
    (FencedError, ExitCode.FENCED),
    (TopicRecreatedError, ExitCode.TOPIC_RECREATED),
)


def exit_code(error: BaseException) -> ExitCode:
    """Return the code that an error ends the process with."""
    return next((code for kind, code in _BY_ERROR if isinstance(error, kind)), ExitCode.UNEXPECTED)

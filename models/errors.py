"""The error tree. Every error says what was wrong, what was kept and what to do.

MillstreamError
├── RecordError          a record that is refused (goes to the dead letters)
├── SettingsError        a setting that is unknown or impossible
├── RowError             a user row that cannot be read
├── EncoderError         the text encoder cannot be loaded or failed
├── LogFormatError       a log file that is not in the layout it claims
├── LayoutError          topics that do not have the shape that the worker needs
├── ModelError           tensors that do not fit their configuration
├── BundleError          a bundle or a pointer that is refused; the model in use stays
├── RegistryError        the registry cannot be reached (retriable) or holds something else
├── TrainingError        a round of training that cannot be done, or whose result is refused
├── NoSupportError       a log cannot answer what another policy would have earned
├── ReplayError          a replay that could say nothing: nothing to score, or nothing to learn from
├── BrokerUnavailable    Kafka cannot be reached (retriable)
├── DemoError            the demo could not go on
├── DeliveryError        a record was not acknowledged by the broker (ends the process)
├── FencedError          this process no longer owns what it was about to write (ends the process)
└── TopicRecreatedError  the events topic is not the one that the process started on (ends the process)
"""

from __future__ import annotations


class MillstreamError(Exception):
    """Base of every error that Millstream raises on purpose.

    ``retriable`` says whether the same call may succeed later without a change by the user.
    """

    retriable: bool = False


class RecordError(MillstreamError):
    """A record is refused; ``reason`` is a short slug, stable enough to be a metric label."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class SettingsError(MillstreamError):
    """A setting is unknown, of the wrong type or impossible; the message names it."""


class RowError(MillstreamError):
    """A user row cannot be read: unknown version, or more bytes than a row has."""


class EncoderError(MillstreamError):
    """The text encoder cannot be loaded, its weights are not the expected ones, or it failed."""


class LogFormatError(MillstreamError):
    """A log on disk does not have the layout that was named; the message has file and line."""


class LayoutError(MillstreamError):
    """Topics on the broker differ from what the worker needs; ``differences`` lists all of them."""

    def __init__(self, differences: list[str]) -> None:
        super().__init__("the topics are not as they must be:\n" + "\n".join(f"  - {d}" for d in differences))
        self.differences = differences


class ModelError(MillstreamError):
    """The tensors of a model do not fit its configuration; the model was not loaded."""


class BundleError(MillstreamError):
    """A bundle or a pointer is refused; ``reason`` is a short slug, stable enough to be a metric label."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class RegistryError(MillstreamError):
    """The registry of bundles cannot be read or written; the models in use stay."""

    retriable = True


class TrainingError(MillstreamError):
    """A round of training cannot be done, or its result is refused; nothing was published.

    ``reason`` is a short slug, stable enough to be a metric label.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class NoSupportError(MillstreamError):
    """A log holds too little of what a policy would choose: no estimate is better than one from luck."""


class ReplayError(MillstreamError):
    """A replay could not say anything; nothing was written. The message says what the log lacks and what to name."""


class BrokerUnavailable(MillstreamError):
    """Kafka cannot be reached now."""

    retriable = True


class DeliveryError(MillstreamError):
    """A record was not acknowledged; what it belongs to must not be acknowledged either."""


class FencedError(MillstreamError):
    """This process lost its partitions (or slept too long to know); nothing may be written any more."""


class DemoError(MillstreamError):
    """The demo could not go on; its processes were ended and its topics deleted."""


class TopicRecreatedError(MillstreamError):
    """The ``events`` topic was deleted and created again under the running process."""

"""The topics: their names, the shape that each must have, creating them and comparing them with what is there."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import structlog
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code
from aiokafka.protocol.metadata import MetadataRequest

from models.errors import BrokerUnavailable, LayoutError
from models.events import MAX_RECORD_BYTES
from streams.kafka_clients import bootstrap_servers, new_admin, new_consumer
from streams.settings import Settings

log = structlog.get_logger(__name__)

USER_TABLE = "user_table"
"""Name of the Faust table, from which Faust derives its changelog's name."""
ITEM_PARTITIONS = 6
"""Most partitions of ``items`` and ``item-vectors``: the catalogue is small beside the events."""
FRAMING_BYTES = 64 << 10
"""Headers, key and batch overhead on top of a record of the greatest size."""
DEAD_LETTER_BYTES = 4 << 20
"""A dead letter holds the original bytes and headers that name the error."""
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
SEGMENT_MS = 600_000
SEGMENT_BYTES = 64 << 20
CLASSIC = "classic"
MISSING = "topic"
"""``Difference.what`` of a topic that does not exist."""
PROTOCOLS = "group.coordinator.rebalance.protocols"


@dataclass(frozen=True, slots=True)
class TopicNames:
    """The full name of every topic, and of the user table's changelog."""

    events: str
    items: str
    users: str
    recommendations: str
    features: str
    labels: str
    item_stats: str
    item_vectors: str
    models: str
    model_status: str
    dead_letters: str
    user_table_changelog: str

    @classmethod
    def of(cls, settings: Settings) -> TopicNames:
        """Return ``<prefix>.<name>.v<version>`` for each; the changelog has the name that Faust gives it."""
        names = [f.name for f in dataclasses.fields(cls) if f.name != "user_table_changelog"]
        prefix, version = settings.topics.prefix, settings.topics.version
        full = {name: f"{prefix}.{name.replace('_', '-')}.v{version}" for name in names}
        return cls(**full, user_table_changelog=f"{settings.worker.group}-{USER_TABLE}-changelog")

    def all(self) -> list[str]:
        """Return every name."""
        return [getattr(self, f.name) for f in dataclasses.fields(self)]


@dataclass(frozen=True, slots=True)
class TopicShape:
    """What one topic must be."""

    name: str
    partitions: int
    configs: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Difference:
    """One way in which the cluster is not as it must be."""

    topic: str
    what: str
    wanted: str
    found: str
    fixable: bool
    how: str
    fatal: bool = True
    """False: tuning; the worker says it and starts all the same."""

    def __str__(self) -> str:
        if self.what == MISSING:
            return f"{self.topic}: does not exist; {self.how}"
        verdict = "can be changed" if self.fixable else "can no longer be changed"
        return f"{self.topic}: {self.what} is {self.found}, must be {self.wanted}; {verdict}: {self.how}"


Rule = Literal["equal", "at_least", "at_most"]
_RULES: Mapping[str, Rule] = {
    "retention.ms": "at_least",
    "max.message.bytes": "at_least",
    "min.insync.replicas": "at_least",
    "delete.retention.ms": "at_least",
    "segment.ms": "at_most",
    "segment.bytes": "at_most",
    "min.cleanable.dirty.ratio": "at_most",
    "max.compaction.lag.ms": "at_most",
}
_TUNING = {"segment.ms", "segment.bytes", "min.cleanable.dirty.ratio", "max.compaction.lag.ms"}
_UNLIMITED = {"retention.ms"}
"""Settings where -1 means without a limit."""


def shapes(settings: Settings) -> list[TopicShape]:
    """Return the shape of every topic, in the order of DESIGN's table."""
    names, topics = TopicNames.of(settings), settings.topics
    wide, narrow = topics.partitions, min(topics.partitions, ITEM_PARTITIONS)
    common = {
        "min.insync.replicas": str(topics.min_insync_replicas),
        "unclean.leader.election.enable": "false",
    }
    record = {"max.message.bytes": str(MAX_RECORD_BYTES + FRAMING_BYTES)}

    def kept(hours: float, **more: str) -> dict[str, str]:
        # Retention runs on broker time: a log of 2019 that is replayed now is kept as long as one of today.
        return {
            **common,
            "cleanup.policy": "delete",
            "retention.ms": str(round(hours * HOUR_MS)),
            "message.timestamp.type": "LogAppendTime",
            **more,
        }

    # The active segment is never compacted, so that short segments bound what a recovery or a mirror reads twice.
    compacted = {
        **common,
        "cleanup.policy": "compact",
        "min.cleanable.dirty.ratio": "0.1",
        "segment.ms": str(SEGMENT_MS),
        "segment.bytes": str(SEGMENT_BYTES),
        "delete.retention.ms": str(DAY_MS),
    }
    # A removed profile or row must also be gone from the disk, traffic or not.
    personal = {"max.compaction.lag.ms": str(DAY_MS)}
    changelog = {
        **compacted,
        **personal,
        # A worker with a row store on disk may return after any time in which its events are still there; a
        # tombstone compacted away before that would leave it a forgotten user's row.
        "delete.retention.ms": str(round(topics.events_retention_hours * HOUR_MS) + DAY_MS),
    }
    return [
        TopicShape(names.events, wide, kept(topics.events_retention_hours) | record),
        TopicShape(names.items, narrow, compacted | record),
        TopicShape(names.users, wide, compacted | personal | record),
        TopicShape(names.recommendations, wide, kept(topics.recommendations_retention_hours)),
        TopicShape(names.features, wide, kept(topics.training_retention_hours)),
        TopicShape(names.labels, wide, kept(topics.training_retention_hours)),
        TopicShape(names.item_stats, wide, compacted),
        TopicShape(names.item_vectors, narrow, compacted),
        TopicShape(names.models, 1, compacted),
        TopicShape(names.model_status, 1, compacted),
        TopicShape(
            names.dead_letters,
            wide,
            kept(topics.dead_letters_retention_hours) | {"max.message.bytes": str(DEAD_LETTER_BYTES)},
        ),
        TopicShape(names.user_table_changelog, wide, changelog),
    ]


async def create(settings: Settings) -> list[str]:
    """Create the topics that are missing and return their names; a topic that exists is never altered.

    Raises BrokerUnavailable where the cluster cannot be reached or refuses.
    """
    admin = new_admin(settings)
    try:
        await admin.start()
        existing = set(await admin.list_topics())
        missing = [shape for shape in shapes(settings) if shape.name not in existing]
        if not missing:
            return []
        new = [
            NewTopic(s.name, s.partitions, settings.topics.replication_factor, topic_configs=dict(s.configs))
            for s in missing
        ]
        answer = await admin.create_topics(new)
        refused = [
            f"{name}: {message or for_code(code).__name__}"
            for name, code, message in answer.topic_errors
            if code not in (0, TopicAlreadyExistsError.errno)
        ]
        if refused:
            raise BrokerUnavailable("the cluster refused to create topics: " + "; ".join(refused))
        await _until_known(admin, [s.name for s in missing], settings.kafka.request_timeout_seconds)
        return [s.name for s in missing]
    except (KafkaError, OSError, TimeoutError) as error:
        raise BrokerUnavailable(f"the topics could not be created: {error!r}; run the command again") from error
    finally:
        await admin.close()


async def _until_known(admin: AIOKafkaAdminClient, names: list[str], timeout_seconds: float) -> None:
    """Return when every broker knows the topics and a leader of each partition: creation is told before that."""
    deadline = time.monotonic() + timeout_seconds
    brokers = {int(b["node_id"]) for b in (await admin.describe_cluster())["brokers"]}
    while brokers:
        for broker in sorted(brokers):
            answer = await admin._send_request(MetadataRequest(names), broker)
            topics = answer.to_object()["topics"]
            codes = [t["error_code"] for t in topics] + [p["error_code"] for t in topics for p in t["partitions"]]
            if len(topics) == len(names) and not any(codes):
                brokers.discard(broker)
        if brokers:
            if time.monotonic() > deadline:
                raise BrokerUnavailable(f"the topics were created, but brokers {sorted(brokers)} do not know them yet")
            await asyncio.sleep(0.05)


async def check(settings: Settings) -> list[Difference]:
    """Compare the cluster with the shapes and return every difference; nothing is changed.

    Raises BrokerUnavailable where the cluster cannot be reached.
    """
    admin = new_admin(settings)
    try:
        await admin.start()
        wanted = shapes(settings)
        existing = set(await admin.list_topics())
        found: list[Difference] = []
        present = [shape for shape in wanted if shape.name in existing]
        metadata = {t["topic"]: t for t in await admin.describe_topics([s.name for s in present])} if present else {}
        configs = await _topic_configs(admin, [s.name for s in present])
        for shape in wanted:
            if shape.name not in existing:
                how = "run `millstream topics create`"
                found.append(Difference(shape.name, MISSING, "there", "not there", True, how))
                continue
            topic = metadata[shape.name]
            if topic["error_code"]:
                raise for_code(topic["error_code"])(f"{shape.name}: the brokers do not agree on it yet")
            differences = _compare(settings, shape, topic["partitions"], configs[shape.name])
            if differences:
                is_empty = await _is_empty(settings, shape.name, len(topic["partitions"]))
                found += [_explain(d, is_empty) for d in differences]
        return found + await _classic_protocol(admin)
    except (KafkaError, OSError, TimeoutError) as error:
        raise BrokerUnavailable(f"the topics could not be checked: {error!r}; run the command again") from error
    finally:
        await admin.close()


async def require_layout(settings: Settings) -> None:
    """Return if a worker may start on these topics; differences that are only tuning are logged.

    Raises LayoutError with every fatal difference, BrokerUnavailable where the cluster cannot be reached.
    """
    differences = await check(settings)
    for difference in differences:
        if not difference.fatal:
            log.warning("topic_tuning", difference=str(difference))
    fatal = [str(d) for d in differences if d.fatal]
    if fatal:
        raise LayoutError(fatal)


def _compare(
    settings: Settings, shape: TopicShape, partitions: list[dict[str, Any]], configs: Mapping[str, str]
) -> list[Difference]:
    found: list[Difference] = []
    if len(partitions) != shape.partitions:
        found.append(Difference(shape.name, "partitions", str(shape.partitions), str(len(partitions)), False, ""))
    replicas = min((len(p["replicas"]) for p in partitions), default=0)
    if replicas < settings.topics.replication_factor:
        how = "move its replicas with kafka-reassign-partitions.sh"
        wanted = f"at least {settings.topics.replication_factor}"
        found.append(Difference(shape.name, "replication factor", wanted, str(replicas), True, how))
    for name, value in shape.configs.items():
        actual = configs.get(name)
        if actual is None or fits(name, value, actual):
            continue
        rule = _RULES.get(name, "equal")
        wanted = value if rule == "equal" else f"{rule.replace('_', ' ')} {value}"
        how = (
            f"kafka-configs.sh --bootstrap-server {bootstrap_servers(settings)} --alter"
            f" --entity-type topics --entity-name {shape.name} --add-config {name}={value}"
        )
        found.append(Difference(shape.name, name, wanted, actual, True, how, fatal=name not in _TUNING))
    return found


def fits(config: str, wanted: str, found: str) -> bool:
    """Tell whether a topic's config serves as well as the wanted one: longer retention does, shorter does not."""
    rule = _RULES.get(config, "equal")
    if rule == "equal":
        return set(wanted.split(",")) == set(found.split(","))
    if config in _UNLIMITED and float(found) < 0:
        return True
    return float(found) >= float(wanted) if rule == "at_least" else float(found) <= float(wanted)


def _explain(difference: Difference, is_empty: bool) -> Difference:
    """Say what data that is already there means for a difference."""
    if is_empty:
        if difference.what == "partitions":
            how = "the topic is empty: delete it with kafka-topics.sh --delete and run `millstream topics create`"
            return dataclasses.replace(difference, fixable=True, how=how)
        return difference
    if difference.what == "partitions":
        how = (
            "the topic holds records, and another count would send a key to another partition; "
            f"either set topics.partitions to what is there ({difference.found}), where all topics agree, "
            "or raise topics.version and publish again into the new topics"
        )
        return dataclasses.replace(difference, how=how)
    note = {
        "message.timestamp.type": "records that are already there keep their client's time: "
        "their freshness and age are not to be trusted until retention has removed them",
        "cleanup.policy": "records that the old policy has removed do not come back: publish them again",
        "max.message.bytes": "records that were refused are lost unless their producers kept them",
    }.get(difference.what)
    return dataclasses.replace(difference, how=f"{difference.how} ({note})") if note else difference


async def _is_empty(settings: Settings, topic: str, partitions: int) -> bool:
    consumer = new_consumer(settings)
    try:
        await consumer.start()
        ends = await consumer.end_offsets([TopicPartition(topic, p) for p in range(partitions)])
    finally:
        await consumer.stop()
    return not any(ends.values())


async def _topic_configs(admin: AIOKafkaAdminClient, names: list[str]) -> dict[str, dict[str, str]]:
    if not names:
        return {}
    answers = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name) for name in names])
    return {r["name"]: r["configs"] for answer in answers for r in _resources(answer)}


async def _classic_protocol(admin: AIOKafkaAdminClient) -> list[Difference]:
    """Return a difference where a broker says that it does not speak the classic group protocol."""
    brokers = [str(b["node_id"]) for b in (await admin.describe_cluster())["brokers"]]
    try:
        answers = await admin.describe_configs([ConfigResource(ConfigResourceType.BROKER, b) for b in brokers])
        resources = [r for answer in answers for r in _resources(answer)]
    except KafkaError as error:
        # Managed clusters often forbid it; the group itself will then tell at the first join.
        log.warning("broker_config_unreadable", error=repr(error))
        return []
    found = []
    for resource in resources:
        protocols = resource["configs"].get(PROTOCOLS)
        # Brokers before Kafka 3.7 do not know the setting: they speak the classic protocol only.
        if protocols and CLASSIC not in [p.strip() for p in protocols.split(",")]:
            how = f"add {CLASSIC} to {PROTOCOLS} on every broker: Faust's assignor cannot use KIP-848"
            found.append(Difference(f"broker {resource['name']}", PROTOCOLS, CLASSIC, protocols, True, how))
    return found


def _resources(answer: Any) -> list[dict[str, Any]]:
    """Return name and configs of each resource of a DescribeConfigs answer. Raises KafkaError for a refused one."""
    found = []
    for code, message, _kind, name, entries in answer.resources:
        if code:
            raise for_code(code)(f"the configuration of {name}: {message}")
        found.append({"name": name, "configs": {entry[0]: entry[1] for entry in entries if entry[1] is not None}})
    return found

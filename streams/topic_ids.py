"""Topic ids: what tells a re-created topic from the one that was there before. aiokafka does not read them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from io import BytesIO
from typing import Any
from uuid import UUID

from aiokafka.client import AIOKafkaClient
from aiokafka.errors import IncompatibleBrokerVersion, KafkaError, for_code
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import (
    AbstractType,
    Boolean,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Schema,
    TaggedFields,
)

from models.errors import BrokerUnavailable, LayoutError
from streams.kafka_clients import client_options
from streams.settings import Settings

UNKNOWN_TOPIC = 3
NO_ID = UUID(int=0)


class _Uuid(AbstractType):  # type: ignore[misc]
    @classmethod
    def encode(cls, value: UUID) -> bytes:
        return value.bytes

    @classmethod
    def decode(cls, data: BytesIO) -> UUID:
        return UUID(bytes=data.read(16))


class _MetadataResponse(Response):  # type: ignore[misc]
    """Version 10, the first one with topic ids (KIP-516); field names of Kafka's MetadataResponse.json."""

    API_KEY = 3
    API_VERSION = 10
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            CompactArray(
                ("node_id", Int32),
                ("host", CompactString("utf-8")),
                ("port", Int32),
                ("rack", CompactString("utf-8")),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_id", CompactString("utf-8")),
        ("controller_id", Int32),
        (
            "topics",
            CompactArray(
                ("error_code", Int16),
                ("name", CompactString("utf-8")),
                ("topic_id", _Uuid),
                ("is_internal", Boolean),
                (
                    "partitions",
                    CompactArray(
                        ("error_code", Int16),
                        ("partition_index", Int32),
                        ("leader_id", Int32),
                        ("leader_epoch", Int32),
                        ("replica_nodes", CompactArray(Int32)),
                        ("isr_nodes", CompactArray(Int32)),
                        ("offline_replicas", CompactArray(Int32)),
                        ("tags", TaggedFields),
                    ),
                ),
                ("topic_authorized_operations", Int32),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_authorized_operations", Int32),
        ("tags", TaggedFields),
    )


class _MetadataRequestV10(RequestStruct):  # type: ignore[misc]
    API_KEY = 3
    API_VERSION = 10
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = _MetadataResponse
    SCHEMA = Schema(
        (
            "topics",
            CompactArray(("topic_id", _Uuid), ("name", CompactString("utf-8")), ("tags", TaggedFields)),
        ),
        ("allow_auto_topic_creation", Boolean),
        ("include_cluster_authorized_operations", Boolean),
        ("include_topic_authorized_operations", Boolean),
        ("tags", TaggedFields),
    )


class _TopicIdsRequest(Request[_MetadataRequestV10]):  # type: ignore[misc]
    API_KEY = 3

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)

    def build(self, request_struct_class: type[_MetadataRequestV10]) -> Any:
        return request_struct_class([(NO_ID, name, {}) for name in self._names], False, False, False, {})


async def topic_ids(settings_or_client: Settings | AIOKafkaClient, names: Iterable[str]) -> dict[str, UUID]:
    """Return the id of each named topic, as one broker knows it now; no topic is created by asking.

    A Settings gets a client of its own for this call; a started AIOKafkaClient is used and left open.
    Raises BrokerUnavailable where no broker answers, LayoutError where a topic is missing or has no id.
    """
    wanted = list(names)
    if not isinstance(settings_or_client, Settings):
        return await _ask(settings_or_client, wanted)
    client = AIOKafkaClient(**client_options(settings_or_client))
    try:
        await client.bootstrap()
        return await _ask(client, wanted)
    except (KafkaError, OSError, TimeoutError) as error:
        raise BrokerUnavailable(
            f"the topic ids could not be read: {error!r}; nothing was changed, try again"
        ) from error
    finally:
        await client.close()


def epoch(topic_id: UUID) -> int:
    """Return the unsigned 64-bit epoch of a log: both halves of its topic's id folded; never 0."""
    return (topic_id.int >> 64) ^ (topic_id.int & 0xFFFF_FFFF_FFFF_FFFF) or 1


async def _ask(client: AIOKafkaClient, names: list[str]) -> dict[str, UUID]:
    if not names:
        return {}
    answer = await _send(client, names)
    found: dict[str, UUID] = {}
    wrong: list[str] = []
    for topic in answer.to_object()["topics"]:
        code, name = topic["error_code"], topic["name"]
        if code == UNKNOWN_TOPIC:
            wrong.append(f"{name}: does not exist; create it with `millstream topics create`")
        elif code and topic["topic_id"] == NO_ID:
            raise BrokerUnavailable(f"the broker gives no id for {name}: {for_code(code).__name__}; try again")
        elif topic["topic_id"] == NO_ID:
            wrong.append(f"{name}: has no topic id; the cluster runs with a metadata version before Kafka 2.8")
        else:
            found[name] = topic["topic_id"]
    if wrong:
        raise LayoutError(wrong)
    return found


async def _send(client: AIOKafkaClient, names: list[str]) -> Any:
    """Return the answer of the first broker that gives one: of three, one may be down."""
    brokers = [broker.nodeId for broker in client.cluster.brokers()]
    refused: Exception | None = None
    for broker in random.sample(brokers, len(brokers)):
        try:
            return await client.send(broker, _TopicIdsRequest(names))
        except (NotImplementedError, IncompatibleBrokerVersion) as error:
            raise LayoutError(["the brokers are older than Kafka 2.8: topics have no ids there"]) from error
        except (KafkaError, OSError, TimeoutError) as error:
            refused = error
    raise BrokerUnavailable(f"no broker gives the topic ids: {refused!r}; nothing was changed, try again") from refused

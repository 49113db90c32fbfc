"""aiokafka clients made from the settings, the same way everywhere."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient

from models.errors import BrokerUnavailable
from streams.settings import KafkaSettings, Settings

BOOTSTRAP_FILE = "bootstrap-servers"
"""File in the local broker's folder that holds host:port while it runs."""
MAX_REQUEST_BYTES = 8 << 20
ISOLATION_LEVEL = "read_committed"
"""A record of a transaction that was aborted is none, whoever reads it: the worker, a mirror, a recovery."""


def bootstrap_servers(settings: Settings) -> str:
    """Return host:port of the cluster in force: the configured one, else the local broker's.

    Raises BrokerUnavailable where neither is there, with the two ways out.
    """
    if settings.kafka.bootstrap_servers:
        return settings.kafka.bootstrap_servers
    file = Path(settings.broker.folder) / BOOTSTRAP_FILE
    try:
        return file.read_text("utf-8").strip()
    except FileNotFoundError:
        raise BrokerUnavailable(
            "no Kafka: set MILLSTREAM_KAFKA__BOOTSTRAP_SERVERS to your cluster, "
            "or start one here with `millstream kafka start`"
        ) from None


def client_options(settings: Settings) -> dict[str, Any]:
    """Return the connection options that every aiokafka client takes."""
    kafka = settings.kafka
    options: dict[str, Any] = {
        "bootstrap_servers": bootstrap_servers(settings),
        "security_protocol": kafka.security_protocol,
        "request_timeout_ms": int(kafka.request_timeout_seconds * 1000),
    }
    if kafka.security_protocol.startswith("SASL"):
        options["sasl_mechanism"] = kafka.sasl_mechanism
        options["sasl_plain_username"] = kafka.sasl_username
        options["sasl_plain_password"] = kafka.sasl_password.get_secret_value() if kafka.sasl_password else None
    context = ssl_context(kafka)
    if context is not None:
        options["ssl_context"] = context
    return options


def ssl_context(kafka: KafkaSettings) -> ssl.SSLContext | None:
    """Return the TLS context that the settings ask for, or None for a protocol without TLS."""
    if not kafka.security_protocol.endswith("SSL"):
        return None
    context = ssl.create_default_context(cafile=str(kafka.ssl_cafile) if kafka.ssl_cafile else None)
    context.check_hostname = kafka.ssl_check_hostname
    if kafka.ssl_certfile and kafka.ssl_keyfile:
        context.load_cert_chain(str(kafka.ssl_certfile), str(kafka.ssl_keyfile))
    return context


def new_consumer(settings: Settings, *topics: str, **options: Any) -> AIOKafkaConsumer:
    """Return a consumer that is not started: without a group unless ``group_id`` is given."""
    defaults: dict[str, Any] = {
        "enable_auto_commit": False,
        "auto_offset_reset": "earliest",
        "isolation_level": ISOLATION_LEVEL,
        "max_partition_fetch_bytes": 1 << 20,
        "fetch_max_bytes": 16 << 20,
    }
    return AIOKafkaConsumer(*topics, **client_options(settings), **{**defaults, **options})


def new_producer(settings: Settings, **options: Any) -> AIOKafkaProducer:
    """Return a producer that is not started: idempotent, acks=all, murmur2 partitioner (the default)."""
    defaults: dict[str, Any] = {
        "enable_idempotence": True,
        "acks": "all",
        "max_request_size": MAX_REQUEST_BYTES,
        "max_batch_size": 1 << 20,
    }
    return AIOKafkaProducer(**client_options(settings), **{**defaults, **options})


def new_admin(settings: Settings) -> AIOKafkaAdminClient:
    """Return an admin client that is not started."""
    return AIOKafkaAdminClient(**client_options(settings))

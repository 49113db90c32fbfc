"""The Faust application: one topic, one agent, one table, no web server, started by our own code."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import faust
from faust.types.auth import SASLMechanism

from streams.faust_patches import CommittedOffsets, DirectConsumer, Fail, GatedTableManager, TakeOver
from streams.kafka_clients import bootstrap_servers, ssl_context
from streams.settings import Settings
from streams.topics import TopicNames
from streams.user_table import TABLE_NAME, UserTable

Agent = Callable[[Any], Awaitable[None]]

QUEUE_EVENTS = 2_048
POLL_EVENTS = 500
COMMIT_EVERY_EVENTS = 10_000
"""Commits run on the timer: with the offset guard a repetition costs time, not correctness."""


def build(
    settings: Settings, names: TopicNames, agent: Agent, take_over: TakeOver, committed: CommittedOffsets, fail: Fail
) -> faust.App:
    """Return the app, not started.

    ``take_over`` is called with the owned partitions before their events flow, ``committed`` for where these begin,
    ``fail`` with what ends the process.
    """
    worker = settings.worker
    app: Any = faust.App(
        worker.group,
        broker="kafka://" + bootstrap_servers(settings).replace(",", ";"),
        broker_credentials=_credentials(settings),
        broker_client_id=worker.group,
        broker_commit_interval=worker.commit_interval_seconds,
        broker_commit_every=COMMIT_EVERY_EVENTS,
        broker_session_timeout=worker.session_timeout_seconds,
        broker_rebalance_timeout=worker.rebalance_timeout_seconds,
        broker_heartbeat_interval=worker.heartbeat_interval_seconds,
        broker_request_timeout=max(settings.kafka.request_timeout_seconds, worker.session_timeout_seconds + 5),
        broker_max_poll_records=POLL_EVENTS,
        consumer_auto_offset_reset="earliest",
        store="memory://",
        table_standby_replicas=0,
        table_cleanup_interval=3_600.0,
        topic_partitions=settings.topics.partitions,
        topic_replication_factor=settings.topics.replication_factor,
        topic_disable_leader=True,
        topic_allow_declare=False,
        key_serializer="raw",
        value_serializer="raw",
        processing_guarantee="at_least_once",
        producer_acks=-1,
        stream_buffer_maxsize=QUEUE_EVENTS,
        stream_wait_empty=True,
        web_enabled=False,
        TableManager=GatedTableManager,
        datadir=str(worker.data_folder / "faust"),
    )
    app.take_over = take_over
    app.committed_offsets = committed
    app.fail_worker = fail
    app.events_topic_name = names.events
    app.transport.Consumer = DirectConsumer
    topic = app.topic(
        names.events,
        key_type=bytes,
        value_type=bytes,
        key_serializer="raw",
        value_serializer="raw",
        allow_empty=True,
    )
    app.tables.add(
        UserTable(app, name=TABLE_NAME, key_type=bytes, value_type=bytes, partitions=settings.topics.partitions)
    )
    app.agent(topic, concurrency=1, name="events")(agent)
    return app


def _credentials(settings: Settings) -> Any:
    kafka = settings.kafka
    context = ssl_context(kafka)
    if kafka.security_protocol.startswith("SASL"):
        return faust.SASLCredentials(
            username=kafka.sasl_username,
            password=kafka.sasl_password.get_secret_value() if kafka.sasl_password else None,
            ssl_context=context,
            mechanism=SASLMechanism(kafka.sasl_mechanism),
        )
    return faust.SSLCredentials(context) if context is not None else None

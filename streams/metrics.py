"""Prometheus metrics of the worker; each process has its own registry and port. Listed in docs/metrics.md.

No user or item ids in labels: their number has no bound.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
)

FRESHNESS_BUCKETS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.045, 0.06, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
STAGE_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def package_version() -> str:
    """Return the installed version, or "unknown" when run from a tree that is not installed."""
    try:
        return version("millstream")
    except PackageNotFoundError:
        return "unknown"


class Metrics:
    """All metrics of one worker process, registered in ``registry``."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
            registry.register(collector)
        self.registry = registry
        self.events = Counter(
            "millstream_events", "Events by type and what became of them.", ["type", "outcome"], registry=registry
        )
        self.slates = Counter("millstream_slates", "Slates sent, by kind of trigger.", ["trigger"], registry=registry)
        self.slates_by_experiment = Counter(
            "millstream_slates_by_experiment",
            "Slates sent, by what they say of experiment and arm; randomised ones too.",
            ["experiment"],
            registry=registry,
        )
        self.slates_degraded = Counter(
            "millstream_slates_degraded", "Slates from the fallback, by cause.", ["cause"], registry=registry
        )
        self.slates_suppressed = Counter(
            "millstream_slates_suppressed", "Slates not sent because their trigger was too old.", registry=registry
        )
        self.freshness = Histogram(
            "millstream_freshness_seconds",
            "From the trigger's broker time to the broker's acknowledgement of the slate.",
            buckets=FRESHNESS_BUCKETS,
            registry=registry,
        )
        self.batch_events = Histogram(
            "millstream_batch_events", "Events in a micro-batch.", buckets=BATCH_BUCKETS, registry=registry
        )
        self.stage = Histogram(
            "millstream_stage_seconds",
            "Time of one micro-batch by stage.",
            ["stage"],
            buckets=STAGE_BUCKETS,
            registry=registry,
        )
        for stage in ("decode", "update", "features", "retrieve", "rank", "send"):
            self.stage.labels(stage)
        self.unknown_items = Counter(
            "millstream_unknown_items", "Actions on items that the catalogue does not know.", registry=registry
        )
        self.kafka_errors = Counter("millstream_kafka_errors", "Kafka errors by place.", ["place"], registry=registry)
        self.processing_errors = Counter(
            "millstream_processing_errors", "Errors of our own code, by stage.", ["stage"], registry=registry
        )
        self.foreign_rows = Counter(
            "millstream_foreign_rows", "Rows written again after a write of a former owner.", registry=registry
        )
        self.evicted_rows = Counter(
            "millstream_evicted_rows",
            "Idle rows replaced by a marker, and markers removed.",
            ["what"],
            registry=registry,
        )
        self.encoder_requests = Counter(
            "millstream_encoder_requests",
            "Texts asked of the encoder process, by outcome.",
            ["outcome"],
            registry=registry,
        )
        self.rebalances = Counter("millstream_rebalances", "Group generations joined.", registry=registry)
        self.ready = Gauge("millstream_ready", "1 when events are being processed.", registry=registry)
        self.kept_cpu = Gauge(
            "millstream_kept_cpu", "Processor that the event threads keep to; -1: any.", registry=registry
        )
        self.kept_cpu.set(-1)
        self._add_examples(registry)
        self._build = Info("millstream_build", "Version of the package and of the model served.", registry=registry)
        self._add_state(registry)

    def _add_examples(self, registry: CollectorRegistry) -> None:
        """Add what tells how the examples for the trainer are written."""
        self.features = Counter("millstream_features", "Features records written.", registry=registry)
        self.features_bytes = Counter(
            "millstream_features_bytes", "Bytes of features records written.", registry=registry
        )
        self.features_lagged = Counter(
            "millstream_features_lagged",
            "Features records marked as processed too late to be trained on.",
            registry=registry,
        )

    def _add_state(self, registry: CollectorRegistry) -> None:
        """Add what tells how state stands: offsets, rows, mirrors, index, counters."""
        self.consumer_lag = Gauge(
            "millstream_consumer_lag_events", "Events not yet read, by partition.", ["partition"], registry=registry
        )
        self.commit_age = Gauge(
            "millstream_commit_age_seconds",
            "Time for which the oldest event that was read has not been committed; 0 when all are.",
            registry=registry,
        )
        self.table_rows = Gauge("millstream_table_rows", "User rows held.", registry=registry)
        self.table_bytes = Gauge("millstream_table_bytes", "Bytes of user rows held, without keys.", registry=registry)
        self.recovered = Counter(
            "millstream_recovered_rows", "Changelog records read while taking over partitions.", registry=registry
        )
        self.mirror_lag = Gauge(
            "millstream_mirror_lag_records", "Records behind the end of a mirrored topic.", ["topic"], registry=registry
        )
        self.mirror_staleness = Gauge(
            "millstream_mirror_staleness_seconds", "Time since a mirror was last read.", ["topic"], registry=registry
        )
        self.index_items = Gauge("millstream_index_items", "Items in the vector index.", registry=registry)
        self.catalogue_items = Gauge("millstream_catalogue_items", "Items in the catalogue.", registry=registry)
        self.index_recall = Gauge(
            "millstream_index_recall_ratio", "Share of the exact nearest items that the index found.", registry=registry
        )
        self.dead_letters = Counter(
            "millstream_dead_letters", "Refused records by topic and reason.", ["topic", "reason"], registry=registry
        )
        self.counter_backlog = Gauge(
            "millstream_counter_backlog_items",
            "Items whose counts wait for the publication rate cap.",
            registry=registry,
        )
        self.counter_dropped = Gauge(
            "millstream_counter_dropped_touches",
            "Counts of unknown items left out since the start: counters.max_unknown_items is reached.",
            registry=registry,
        )
        self.context_values = Gauge(
            "millstream_context_dropped_values",
            "Values of context keys given up since the start: recommender.popularity_context_values is reached.",
            registry=registry,
        )
        self.context_items = Gauge(
            "millstream_context_dropped_items",
            "Items of such values given up since the start: recommender.popularity_context_items is reached.",
            registry=registry,
        )
        self.counter_refused = Gauge(
            "millstream_counter_refused_records", "Unreadable item-stats records since the start.", registry=registry
        )

    def set_build(self, *, model_version: str, space_id: str) -> None:
        """State what is running."""
        self._build.info({"version": package_version(), "model_version": model_version, "space_id": space_id})


class EncoderMetrics:
    """All metrics of one encoder process."""

    def __init__(self, encoder_id: str) -> None:
        registry = CollectorRegistry()
        for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
            registry.register(collector)
        self.registry = registry
        self.texts = Counter(
            "millstream_encoder_texts", "Texts encoded, by who waited: item or query.", ["kind"], registry=registry
        )
        self.batch = Histogram(
            "millstream_encoder_batch_seconds", "Time of one batch.", ["kind"], buckets=STAGE_BUCKETS, registry=registry
        )
        self.waiting = Gauge("millstream_encoder_waiting_texts", "Texts that wait for a batch.", registry=registry)
        self.loaded = Gauge("millstream_encoder_loaded", "Encoders that are loaded.", registry=registry)
        self.refused = Counter(
            "millstream_encoder_refused", "Pointers and bundles not followed, by reason.", ["reason"], registry=registry
        )
        self.forgotten = Counter(
            "millstream_encoder_forgotten_encodings",
            "Encodings taken off the topic, of encoders that no role names.",
            registry=registry,
        )
        build = Info("millstream_encoder_build", "Version of the package and the encoder.", registry=registry)
        build.info({"version": package_version(), "encoder": encoder_id})

    def on_batch(self, urgent: bool, texts: int, seconds: float) -> None:
        """Count one batch."""
        kind = "query" if urgent else "item"
        self.texts.labels(kind).inc(texts)
        self.batch.labels(kind).observe(seconds)

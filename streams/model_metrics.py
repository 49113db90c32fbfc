"""Prometheus metrics of the models that a worker serves and prepares. Listed in docs/metrics.md."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from models.serving import ServingModel

SWAP_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)
PREPARE_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1_000)


class ModelMetrics:
    """Metrics of roles, swaps and refusals, in the worker's registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._info = Gauge(
            "millstream_model_info", "1 for the model of each role.", ["role", "version", "space_id"], registry=registry
        )
        self._generation = Gauge(
            "millstream_model_generation", "Generation of the pointer of each role.", ["role"], registry=registry
        )
        self._arms = Gauge(
            "millstream_model_arm_ready",
            "1 where the version that an arm of the experiment names scores for it, 0 where the live one does.",
            ["version"],
            registry=registry,
        )
        self._window_age = Gauge(
            "millstream_model_window_age_seconds",
            "Time since the newest example that the live model learned from; NaN where it learned from none.",
            registry=registry,
        )
        self.refused = Counter(
            "millstream_model_refused", "Pointers and bundles refused, by reason.", ["reason"], registry=registry
        )
        self.unreachable = Counter(
            "millstream_model_unreachable", "Times that the registry could not be reached.", registry=registry
        )
        self.swap_seconds = Histogram(
            "millstream_model_swap_seconds",
            "Time of one swap, in which no batch was in work.",
            buckets=SWAP_BUCKETS,
            registry=registry,
        )
        self.prepare_seconds = Histogram(
            "millstream_model_prepare_seconds",
            "Time of one preparation: fetch, verify, canary, index.",
            buckets=PREPARE_BUCKETS,
            registry=registry,
        )

    def set_roles(self, models: Mapping[str, ServingModel]) -> None:
        """State which model has which role."""
        self._info.clear()
        self._generation.clear()
        for role, model in models.items():
            self._info.labels(role, model.version, model.space_id).set(1)
            self._generation.labels(role).set(model.generation)

    def set_arms(self, named: Collection[str], ready: Collection[str]) -> None:
        """State which versions arms name, and which of them are there."""
        self._arms.clear()
        for version in named:
            self._arms.labels(version).set(version in ready)

    def set_age(self, live: ServingModel, now_ms: int) -> None:
        """State how old the newest example is that the live model learned from."""
        end_ms = live.window_end_ms
        self._window_age.set(float("nan") if end_ms is None else max(0.0, (now_ms - end_ms) / 1000))

"""Prometheus metrics and TensorBoard logs of the trainer. Listed in docs/metrics.md; no user or item ids in labels."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
)

from trainer.promotion import Decision

STEP_BUCKETS: Final = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1_800, 3_600)
MOST_POLICIES: Final = 12
"""Policies with a label of their own; experiments are named by clients, and their number has no bound."""


class TrainerMetrics:
    """All metrics of one trainer process, registered in ``registry``; with a folder, TensorBoard logs as well."""

    def __init__(self, tensorboard_folder: Path | None = None) -> None:
        registry = CollectorRegistry()
        for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
            registry.register(collector)
        self.registry = registry
        self.rounds = Counter("millstream_trainer_rounds", "Rounds by outcome.", ["outcome"], registry=registry)
        self.step_seconds = Histogram(
            "millstream_trainer_step_seconds",
            "Time of each step of a round.",
            ["step"],
            buckets=STEP_BUCKETS,
            registry=registry,
        )
        self.examples = Gauge(
            "millstream_trainer_examples",
            "Of the last window: labelled impressions, impressed items, positive labels.",
            ["kind"],
            registry=registry,
        )
        self.left_out = Gauge(
            "millstream_trainer_left_out_records",
            "Records of the last window that are not learned from, by reason.",
            ["reason"],
            registry=registry,
        )
        self.positive_rate = Gauge(
            "millstream_trainer_positive_rate", "Share of positive labels in the last window.", registry=registry
        )
        self.model = Gauge(
            "millstream_trainer_model",
            "Figures of the model that was trained last: losses, AUC and calibration, by slice.",
            ["figure"],
            registry=registry,
        )
        self.gate = Counter(
            "millstream_trainer_gate_decisions",
            "Decisions by outcome and reason.",
            ["outcome", "reason"],
            registry=registry,
        )
        self.gate_figures = Gauge(
            "millstream_trainer_gate", "Figures of the last decision of the gate.", ["figure"], registry=registry
        )
        self.arm_positive_rate = Gauge(
            "millstream_trainer_arm_positive_rate",
            "Share of positive labels by who made the slate, in the last window.",
            ["policy"],
            registry=registry,
        )
        self.generation = Gauge(
            "millstream_trainer_generation", "Generation of each role on the models topic.", ["role"], registry=registry
        )
        self._newest_learned_ms = 0
        Gauge(
            "millstream_trainer_newest_example_age_seconds",
            "Age of the newest impression that a round learned from; NaN before the first.",
            registry=registry,
        ).set_function(self._newest_age_seconds)
        self._writer: Any = None
        self._tensorboard_folder = tensorboard_folder

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure a step of a round, whether it succeeds or not."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.step_seconds.labels(name).observe(time.perf_counter() - start)

    def learned_to(self, time_ms: int) -> None:
        """Say of which event time the newest impression is that was learned from."""
        self._newest_learned_ms = time_ms

    def decided(self, decision: Decision, at: int) -> None:
        """Count a decision and keep its figures; ``at`` is the number of the round."""
        self.gate.labels(decision.outcome, decision.reason).inc()
        for name, value in decision.figures.items():
            self.gate_figures.labels(name).set(value)
        self.write_scalars("gate", decision.figures, at)

    def arms(self, rates: Mapping[str, float], at: int) -> None:
        """Keep the positive rate by policy: the MOST_POLICIES first ones."""
        self.arm_positive_rate.clear()
        kept = dict(list(rates.items())[:MOST_POLICIES])
        for policy, rate in kept.items():
            self.arm_positive_rate.labels(policy).set(rate)
        self.write_scalars("positive-rate", kept, at)

    def trained(self, figures: Mapping[str, float], at: int) -> None:
        """Keep the figures of a trained model."""
        for name, value in figures.items():
            self.model.labels(name).set(value)
        self.write_scalars("model", figures, at)

    def write_scalars(self, group: str, values: Mapping[str, float], at: int) -> None:
        """Write values to TensorBoard, where it is on."""
        if self._tensorboard_folder is None:
            return
        if self._writer is None:
            # Importing it takes seconds: only where it is wanted, and not before there is something to write.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._tensorboard_folder))
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, at)
        self._writer.flush()

    def close(self) -> None:
        """Close the TensorBoard file."""
        if self._writer is not None:
            self._writer.close()

    def _newest_age_seconds(self) -> float:
        return time.time() - self._newest_learned_ms / 1000 if self._newest_learned_ms else float("nan")

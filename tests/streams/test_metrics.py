"""What a worker measures, and that the documentation names all of it."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.exposition import generate_latest

from streams.metrics import EncoderMetrics, Metrics

DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def _own_metrics(metrics: Metrics | EncoderMetrics) -> list[str]:
    return [f.name for f in metrics.registry.collect() if f.name.startswith("millstream_")]


def test_every_metric_is_listed_in_the_documentation() -> None:
    text = DOCS.read_text("utf-8")
    names = _own_metrics(Metrics()) + _own_metrics(EncoderMetrics("e"))
    assert [name for name in names if name not in text] == []


def test_no_label_names_a_user_or_an_item() -> None:
    labels = {label for value in vars(Metrics()).values() for label in getattr(value, "_labelnames", ())}
    assert not {label for label in labels if "user" in label or "item" in label}


def test_two_workers_in_one_process_do_not_share_counts() -> None:
    first, second = Metrics(), Metrics()
    first.dead_letters.labels("events", "invalid").inc()
    assert b'reason="invalid"' not in generate_latest(second.registry)


def test_freshness_has_a_bucket_at_each_promised_bound() -> None:
    page = generate_latest(Metrics().registry).decode()
    assert 'millstream_freshness_seconds_bucket{le="0.015"}' in page
    assert 'millstream_freshness_seconds_bucket{le="0.06"}' in page


def test_queries_and_items_are_counted_apart() -> None:
    metrics = EncoderMetrics("e")
    metrics.on_batch(True, 2, 0.01)
    metrics.on_batch(False, 8, 0.05)
    page = generate_latest(metrics.registry).decode()
    assert 'millstream_encoder_texts_total{kind="query"} 2.0' in page
    assert 'millstream_encoder_texts_total{kind="item"} 8.0' in page

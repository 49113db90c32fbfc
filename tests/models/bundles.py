"""Small bundles for tests: real contents of few dimensions, every tensor of which can be replaced."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.bundle import BundleContents, Canary, Manifest, Window, save
from models.ctr import CtrConfig, tensor_shapes
from models.examples import FeaturesRecord, encode
from models.features import COLUMNS, FeatureConfig
from models.hashing import hash64
from models.manifest import OffsetRange
from models.signing import PrivateKey

BASE_DIM, DIM = 12, 4
TIME_MS = 1_790_000_000_000


def features_record(items: Sequence[str], recent: Sequence[str] = (), impression_id: int = 1) -> FeaturesRecord:
    """Return the record of an impression of ``items`` by a user who clicked ``recent``."""
    k, r = len(items), len(recent)
    return FeaturesRecord(
        impression_id=impression_id,
        user_id="ann",
        partition=0,
        offset=impression_id,
        time_ms=TIME_MS,
        broker_ms=TIME_MS,
        processed_ms=TIME_MS,
        flags=0,
        surface="home",
        request_id=None,
        experiment=None,
        policy="external",
        session_id=None,
        context=None,
        space_id="space-test",
        items=np.array([hash64(i) for i in items], "<u8").tobytes(),
        positions=np.arange(1, k + 1, dtype="<u2").tobytes(),
        propensities=b"",
        counters=np.log1p(np.arange(k * 16).reshape(k, 4, 4)).astype("<f2").tobytes(),
        age_seconds=np.full(k, 3_600, "<f4").tobytes(),
        first_seen_seconds=np.full(k, 600, "<f4").tobytes(),
        sims=np.full((k, 2), 0.25, "<f2").tobytes(),
        shown_counts=bytes(k),
        shown_age_seconds=np.full(k, np.nan, "<f4").tobytes(),
        acted_age_seconds=np.full(k, np.nan, "<f4").tobytes(),
        recent_items=np.array([hash64(i) for i in recent], "<u8").tobytes(),
        recent_age_seconds=np.full(r, 60, "<f4").tobytes(),
        recent_codes=bytes([1] * r),
        user_counts=(3, 1, 1),
        scores=[],
        model_version="bootstrap-0",
    )


def scorer_parts(
    dim: int = DIM, features: int = len(COLUMNS), seed: int = 0
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return configuration and tensors of a CTR model with seeded weights."""
    config = CtrConfig(dim=dim, features=features, hidden=(8,), attention_dim=4, positions=2)
    random = np.random.default_rng(seed)
    tensors = {name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in tensor_shapes(config).items()}
    tensors["feature_std"] = np.ones(features, np.float32)
    tensors["calibration"] = np.array([1.0, -1.0], np.float32)
    return config.model_dump(mode="json"), tensors


def contents(version: str = "v1", *, seed: int = 0, base_dim: int = BASE_DIM, dim: int = DIM, **given: Any) -> Any:
    """Return the contents of a small bundle; ``given`` replaces fields of BundleContents."""
    random = np.random.default_rng(seed)
    config, tensors = scorer_parts(dim, seed=seed)
    known = np.array([hash64(i) for i in "abc"], np.uint64)
    fields: dict[str, Any] = {
        "name": "default",
        "version": version,
        "created_ms": TIME_MS,
        "space_id": "space-test",
        "encoder_id": "encoder-test",
        "scorer_config": config,
        "scorer_tensors": tensors,
        "features": FeatureConfig(),
        "projection": random.normal(size=(base_dim, dim)).astype(np.float32),
        "canary": Canary(
            records=[encode(features_record(["a", "b", "no text"], ["c"])), encode(features_record(["c"]))],
            items=known,
            base=random.normal(size=(3, base_dim)).astype(np.float16),
        ),
        "window": Window(
            ranges=[OffsetRange("features", 0, 10, 30)],
            from_ms=TIME_MS - 3_600_000,
            to_ms=TIME_MS,
            impressions=20,
            examples=60,
            users=7,
        ),
        "metrics": {"auc": 0.7},
    }
    return BundleContents(**{**fields, **given})


def write(folder: Path, version: str = "v1", private_key: PrivateKey | None = None, **given: Any) -> Manifest:
    """Save a small bundle as ``folder``/``version``."""
    return save(folder / version, contents(version, **given), private_key)

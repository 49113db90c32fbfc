"""Slates of arms in the pipeline: which version they name, and what a broken one costs the others."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt

from models.ctr import CtrScorer
from models.events import Request
from models.features import FeatureConfig
from models.serving import ServingModel
from models.slates import SlateRequest
from streams.pipeline import Prepared
from streams.settings import Settings
from tests.streams.test_examples import NOW_MS, Bench, Recorder

SETTINGS = Settings(
    exploration={"randomised_share": 0.0},
    recommender={"experiment": {"name": "heads", "arms": {"trial": {"share": 0.5, "bundle": "v9"}}}},
)
USERS = [f"user-{n}" for n in range(20)]
TRIED = {user for user in USERS if SETTINGS.recommender.experiment.arm_of(user) == "trial"}


class Broken(Recorder):
    """A scorer that gives no numbers."""

    def logits(
        self, x: npt.NDArray[np.float32], items: npt.NDArray[np.float32], recents: npt.NDArray[np.float32], *_: Any
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        attention = super().logits(x, items, recents)[1]
        return np.full(x.shape[:2], np.nan, np.float32), attention


def trial(bench: Bench, scorer: Recorder) -> ServingModel:
    """Return the version of the arm, in the live space."""
    live = bench.live
    head = cast(CtrScorer, scorer)
    return ServingModel("v9", 9, live.space, head, FeatureConfig(), live.vectors, live.vector_index)


def ask_all(bench: Bench) -> Prepared:
    """Have all users ask in one batch."""
    asked = [Request(event_id=f"r-{u}", event_time=NOW_MS, user_id=u, request_id=f"r-{u}", k=3) for u in USERS]
    return bench.prepare(*[bench.at(request) for request in asked])


def test_a_slate_names_the_version_of_its_arm_and_the_live_space() -> None:
    bench = Bench(SETTINGS)
    bench.pipeline.use(bench.live, [], {"v9": trial(bench, Recorder())})
    slates = [sent.record for sent in ask_all(bench).slates]
    assert 5 < len(TRIED) < 15
    assert {s.user_id for s in slates if s.model_version == "v9"} == TRIED
    assert {s.user_id for s in slates if s.model_version == "v1"} == set(USERS) - TRIED
    assert {s.space_id for s in slates} == {"space"}


def test_a_broken_version_of_an_arm_degrades_the_slates_of_its_arm_alone_and_keeps_the_others_in_one_batch() -> None:
    bench = Bench(SETTINGS)
    bench.pipeline.use(bench.live, [], {"v9": trial(bench, Broken())})
    batches: list[set[str]] = []
    recommend = bench.pipeline._recommender.recommend

    def noting(rows: Any, requests: list[SlateRequest], now_ms: int) -> Any:
        batches.append({request.user_id for request in requests})
        return recommend(rows, requests, now_ms)

    bench.pipeline._recommender.recommend = noting  # type: ignore[assignment,method-assign]
    slates = [sent.record for sent in ask_all(bench).slates]
    assert [s.user_id for s in slates] == USERS
    assert {s.user_id for s in slates if s.degraded} == TRIED
    assert {s.model_version for s in slates} == {"v1"}
    control = set(USERS) - TRIED
    assert [batch for batch in batches if batch & control] == [set(USERS), control]

"""What became of the impressions of each arm of an experiment, from features and labels, with intervals by user."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Final

import numpy as np

from models.evaluation import Interval
from models.examples import FeaturesRecord, LabelsRecord
from models.experiments import CONTROL

LEAST_USERS: Final = 2
DEGRADED: Final = "degraded"
"""In place of a version: the list of popular items, because ranking failed."""
NOT_KNOWN: Final = "not known"
"""In place of a version: the impression names no slate that is still there."""


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm: how much it was seen, and the share of its impressions in which something was clicked."""

    experiment: str
    arm: str
    users: int
    impressions: int
    clicked: int
    rate: Interval
    difference: Interval | None
    """To the control arm of the same experiment; None for that arm, and where there is none."""
    ranked_by: Mapping[str, int] = field(default_factory=dict)
    """Impressions by the model version that made their slate, most first; empty where no slate was looked at."""


class ArmTally:
    """Joins features and labels, each record by itself, in any order, and counts by arm and user; slates come last.

    The first features record of an impression counts; of its labels the one that knows most, of equals the last.
    Impressions that are not labelled yet do not count, nor do those that name no arm.
    """

    def __init__(self) -> None:
        self._shown: dict[int, tuple[str, str, str | None]] = {}
        self._versions: dict[str, str] | None = None
        """Of the slates that impressions name, once slates are looked at; "" while it is not known."""
        self._clicked: dict[int, tuple[int, bool]] = {}

    def add_features(self, record: FeaturesRecord) -> None:
        """Take the arm and the user of one impression."""
        if record.experiment and "/" in record.experiment:
            self._shown.setdefault(record.impression_id, (record.experiment, record.user_id, record.request_id))

    def add_labels(self, record: LabelsRecord) -> None:
        """Take whether one impression was clicked."""
        held = self._clicked.get(record.impression_id)
        if held is None or record.as_of >= held[0]:
            self._clicked[record.impression_id] = record.as_of, bool(record.clicked)

    def look_at_slates(self) -> None:
        """Have the slates that impressions name told by what made them. Call it when all features are there."""
        self._versions = {shown: "" for _, _, shown in self._shown.values() if shown is not None}

    def add_slate(self, recommendation_id: str, model_version: str, *, degraded: bool) -> None:
        """Take what made one slate, if an impression names it and slates are looked at."""
        if self._versions is not None and recommendation_id in self._versions:
            self._versions[recommendation_id] = DEGRADED if degraded else model_version

    def results(self, name: str | None = None, confidence: float = 0.95) -> list[ArmResult]:
        """Return one result for each arm, of the experiment ``name`` or of all, control first.

        rate = Σ clicked / Σ impressions, a ratio of sums over users; its error is that of the linearised ratio with
        users as clusters (Deng, Knoblich and Lu 2018, section 3.1). Arms have different users, so that the error of
        a difference is the root of the sum of squares.
        """
        counts: defaultdict[tuple[str, str], defaultdict[str, list[int]]] = defaultdict(
            lambda: defaultdict(lambda: [0, 0])
        )
        versions: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for impression_id, (label, user_id, slate) in self._shown.items():
            found = self._clicked.get(impression_id)
            experiment, _, arm = label.partition("/")
            if found is not None and name in (None, experiment):
                user = counts[experiment, arm][user_id]
                user[0] += 1
                user[1] += found[1]
                if self._versions is not None:
                    versions[experiment, arm][self._versions.get(slate or "") or NOT_KNOWN] += 1
        z = NormalDist().inv_cdf(0.5 + confidence / 2)
        figures = {key: _rate(users) for key, users in counts.items()}
        results = []
        for key in sorted(counts, key=lambda key: (key[0], key[1] != CONTROL, key[1])):
            rate, error = figures[key]
            against = figures.get((key[0], CONTROL)) if key[1] != CONTROL else None
            difference = None
            if against is not None:
                difference = _interval(rate - against[0], z * math.hypot(error, against[1]))
            shown, clicked = (sum(pair[i] for pair in counts[key].values()) for i in (0, 1))
            bounds = _interval(rate, z * error)
            within = Interval(bounds.mean, max(bounds.low, 0.0), min(bounds.high, 1.0))
            ranked_by = dict(versions[key].most_common())
            results.append(ArmResult(*key, len(counts[key]), shown, clicked, within, difference, ranked_by))
        return results


def _rate(users: dict[str, list[int]]) -> tuple[float, float]:
    """Return clicked ÷ impressions, and its standard error; infinite for a single user."""
    pairs = np.array(list(users.values()), np.float64)
    shown, clicked = pairs[:, 0], pairs[:, 1]
    rate = float(clicked.sum() / shown.sum())
    n = len(pairs)
    if n < LEAST_USERS:
        return rate, math.inf
    residuals = clicked - rate * shown
    return rate, float(np.sqrt((residuals**2).sum() * n / (n - 1)) / shown.sum())


def _interval(value: float, reach: float) -> Interval:
    return Interval(value, value - reach, value + reach)


def lines(results: list[ArmResult]) -> Iterator[str]:
    """Tell the results in a table, one line an arm, and below it what ranked its slates, where that was looked at."""
    yield f"{'experiment/arm':<32} {'users':>8} {'impressions':>12} {'click rate':>11} {'interval':>19}  to control"
    for r in results:
        rate = f"{r.rate.mean:>11.2%} {f'{r.rate.low:.2%} … {r.rate.high:.2%}':>19}"
        told = ""
        if r.difference is not None:
            d = r.difference
            told = f"{d.mean * 100:+.2f} points ({d.low * 100:+.2f} … {d.high * 100:+.2f})"
            told += "" if d.low <= 0 <= d.high else ", not by chance"
        yield f"{f'{r.experiment}/{r.arm}':<32} {r.users:>8} {r.impressions:>12} {rate}  {told}".rstrip()
        if r.ranked_by:
            yield "    ranked by " + ", ".join(
                f"{version} ({n / r.impressions:.1%})" for version, n in r.ranked_by.items()
            )

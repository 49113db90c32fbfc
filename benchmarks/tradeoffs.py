"""``python -m benchmarks.tradeoffs KIND PATH...``: what slates cost that are less popular, less alike, more mixed.

    python -m benchmarks.tradeoffs ebnerd TRAIN VALIDATION [--slates 500] [--feedback-delay 0s] [--plot FILE.png]
    python -m benchmarks.tradeoffs mind TRAIN VALIDATION --unclicked-weight 10 --cache FOLDER

The log is read as ``millstream replay`` reads it, and one model is trained on what was known when the scored part
began. In one more pass the recommender makes slates at sampled impressions with a click, one for each strength of each
knob and each score: the hand-set one, and the model as far as ``half_trust_exposure`` believes it.

Two views. ``slate``: ten items out of everything published or shown before; recall and nDCG ask where in it the
clicked items stand. ``shown``: the items of the impression named as candidates, which the model alone orders. That
view is left out where impressions hold three items or fewer: nothing of them could be left out.

Sameness is tried only where items have vectors, the maximum per category only where they have categories, slots for
new items only where they are dated. Every setting meets the same impressions: ``cost`` is the paired difference of nDCG
to the same score with all of it off.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.tradeoffs_plot import draw
from models.bootstrap import Space
from models.catalogue import NOT_GIVEN_MS, Catalogue
from models.counters import ItemCounters
from models.diversity import DiversityConfig
from models.encoder import EncoderConfig
from models.errors import MillstreamError, ReplayError
from models.evaluation import Interval, bootstrap_mean, coverage, gini
from models.fresh_slots import FreshSlots
from models.hashing import hash64
from models.ranking import RankingConfig
from models.recommender import Recommender, SlateRequest
from models.serving import ServingModel
from models.surfaces import RecommenderConfig, SurfaceConfig
from models.user_state import Rows, UserReader, UserStateConfig
from trainer.finetune import Trained
from trainer.log_examples import LogExamples, Reads
from trainer.progress import Show, progress
from trainer.replay import item_vectors, space_config
from trainer.replay_delay import Delay
from trainer.replay_log import Survey, find_parts, survey_log
from trainer.replay_models import Learner, Schedule
from trainer.replay_recipe import head_recipe
from trainer.replay_settings import ReplayConfig, duration_seconds
from trainer.replay_slates import Popularity, Shelf, sample, whole_catalogue
from trainer.replay_space import learned_spaces

Knob = Literal["popularity_debias", "sameness", "max_per_category", "fresh_slots"]
View = Literal["slate", "shown"]
Score = Literal["hand", "model"]

KNOBS: Final[Mapping[Knob, tuple[float, ...]]] = {
    "popularity_debias": (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0),
    "sameness": (0.1, 0.2, 0.3, 0.5, 0.7),
    "max_per_category": (5, 3, 2, 1),
    "fresh_slots": (1, 2, 3, 5),
}
"""Strengths of each setting, from weak to strong."""
SCORES: Final[tuple[Score, ...]] = ("hand", "model")
FIRST_PLACES: Final = 3
"""Of a re-ordered impression, those that coverage and the like are of: all of its items stand somewhere in it."""
RESAMPLES: Final = 1_000


@dataclass(frozen=True, slots=True)
class Setting:
    """One knob at one strength; with a strength of 0 all are off."""

    knob: Knob
    strength: float

    @property
    def surface(self) -> str:
        """Return the name of the surface that makes its slates."""
        return f"{self.knob} {self.strength:g}" if self.strength else "default"

    def config(self, k: int) -> SurfaceConfig:
        """Return the surface of slates of ``k``; slots for new items are spread over it, to its end."""
        if self.knob == "fresh_slots":
            slots = tuple(round(k * (j + 1) / self.strength) for j in range(round(self.strength)))
            return SurfaceConfig(k=k, fresh_slots=FreshSlots(slots=slots))
        return SurfaceConfig(k=k, diversity=DiversityConfig.model_validate({self.knob: self.strength}))


OFF: Final = Setting("popularity_debias", 0.0)


def grid(has_vectors: bool, has_categories: bool, has_dates: bool) -> list[Setting]:
    """Return what is tried, OFF first; only knobs that have something to go by on this log."""
    possible: dict[Knob, bool] = {
        "popularity_debias": True,
        "sameness": has_vectors,
        "max_per_category": has_categories,
        "fresh_slots": has_dates,
    }
    return [OFF, *(Setting(knob, s) for knob, strengths in KNOBS.items() if possible[knob] for s in strengths)]


def ndcg(slate: Sequence[str], clicked: Sequence[str], k: int) -> float:
    """Return nDCG@k with binary gains of a slate, best first; items that it leaves out gain nothing.

    DCG = Σ 1/log2(place + 1) over clicked items in the first k places (Järvelin and Kekäläinen 2002), by the best
    possible. ``clicked`` must not be empty.
    """
    wanted = set(clicked)
    gained = sum(1 / math.log2(place + 1) for place, item in enumerate(slate[:k], 1) if item in wanted)
    return gained / sum(1 / math.log2(place + 1) for place in range(1, min(k, len(wanted)) + 1))


@dataclass(slots=True)
class Tally:
    """What the slates of one setting, score and view were, in the order of the impressions."""

    ndcg: list[float] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)
    shown: Counter[str] = field(default_factory=Counter)
    alike: list[float] = field(default_factory=list)
    """Mean cosine of the pairs of each slate that has any."""

    def take(self, slate: Sequence[str], clicked: Sequence[str], k: int, places: int) -> None:
        """Count a slate; its first ``places`` for coverage and the like."""
        self.ndcg.append(ndcg(slate, clicked, k))
        self.recall.append(len(set(slate[:k]) & set(clicked)) / len(set(clicked)))
        self.shown.update(slate[:places])


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one setting, score and view; NaN where the log gives none."""

    view: View
    score: Score
    knob: Knob
    strength: float
    ndcg: Interval
    cost: Interval
    """nDCG less that of the same score with all off, on the same impressions."""
    recall: float
    items: int
    """Different items in the counted places."""
    coverage: float
    """Their share of what could be shown."""
    gini: float
    tail_share: float
    novelty: float
    intra_list_diversity: float
    impressions: int


def figures(
    tally: Tally, off: Tally, users: Sequence[str], possible: int, popularity: Popularity, seed: int
) -> dict[str, Any]:
    """Return the figures of a Row. ``possible``: items that could be shown; ``users`` [impressions]."""
    own, base, who = np.array(tally.ndcg), np.array(off.ndcg), np.array(users)
    exposures = np.zeros(max(possible, len(tally.shown)), np.int64)
    exposures[: len(tally.shown)] = list(tally.shown.values())
    places = max(tally.shown.total(), 1)
    return {
        "ndcg": bootstrap_mean(own, who, resamples=RESAMPLES, seed=seed),
        "cost": bootstrap_mean(own - base, who, resamples=RESAMPLES, seed=seed),
        "recall": float(np.mean(tally.recall)) if tally.recall else math.nan,
        "items": len(tally.shown),
        "coverage": coverage(list(tally.shown), possible),
        "gini": gini(exposures),
        "tail_share": sum(n for item, n in tally.shown.items() if popularity.is_tail(item)) / places,
        "novelty": sum(n * popularity.bits(item) for item, n in tally.shown.items()) / places,
        "intra_list_diversity": 1 - float(np.mean(tally.alike)) if tally.alike else math.nan,
        "impressions": len(tally.ndcg),
    }


@dataclass(frozen=True, slots=True)
class Taken:
    """An impression where slates are made: its items, and which of them were clicked."""

    shown: list[str]
    clicked: list[str]


class Tradeoffs:
    """Makes the slates of all settings at sampled impressions of one pass over a log."""

    def __init__(
        self,
        catalogue: Catalogue,
        survey: Survey,
        space: Space,
        user_state: UserStateConfig,
        model: Trained,
        settings: Sequence[Setting],
        taken: Mapping[int, Taken],
        k: int,
        half_trust_exposure: float,
    ) -> None:
        """``taken``: by the place of the impression in the log."""
        self._catalogue, self._space, self._model, self._k = catalogue, space, model, k
        self._shelf = Shelf(catalogue, survey.first_shown_ms)
        self._popularity = Popularity(survey.clicks, survey.first_shown_ms)
        self._users = UserReader(user_state, catalogue, hash64(space.space_id))
        # Slots for new items are for slates that are retrieved.
        ranked = [s for s in settings if s.knob != "fresh_slots"]
        self._settings: dict[View, Sequence[Setting]] = {"slate": settings, "shown": ranked}
        self._taken = taken
        self._config = RecommenderConfig(
            surfaces={s.surface: s.config(k) for s in settings},
            ranking=RankingConfig(half_trust_exposure=half_trust_exposure),
        )
        sizes = [len(one.shown) for one in taken.values()]
        reorders = bool(sizes) and float(np.median(sizes)) > FIRST_PLACES
        self._views: tuple[View, ...] = ("slate", "shown") if reorders else ("slate",)
        self._recommender: Recommender | None = None
        self._tallies = {(v, s, one): Tally() for v in self._views for s in SCORES for one in self._settings[v]}
        self._seen: set[str] = set()
        self._by: list[str] = []

    def take(self, offset: int, time_ms: int, user: str, row: Rows, counters: ItemCounters) -> None:
        """Make the slates of one impression, its user's row [1] and the counters as they are before it."""
        taken = self._taken[offset]
        self._shelf.open_before(time_ms)
        if self._recommender is None:
            self._recommender = Recommender(
                self._config, self._catalogue, counters, self._shelf.index, users=self._users
            )
        self._recommender.refresh(time_ms)
        self._by.append(user)
        self._seen.update(taken.shown)
        for score in SCORES:
            self._recommender.use(self._serving(score))
            self._make(self._recommender, "slate", score, user, row, time_ms, taken)
            if "shown" in self._views:
                # Those that are shown for the first time just here too.
                rows = self._catalogue.index.rows(taken.shown)
                out = self._catalogue.in_catalogue[rows]
                self._catalogue.in_catalogue[rows] = True
                self._make(self._recommender, "shown", score, user, row, time_ms, taken)
                self._catalogue.in_catalogue[rows] = out

    def rows(self, seed: int) -> Iterator[Row]:
        """Yield the figures of every view, score and setting so far."""
        for (view, score, setting), tally in self._tallies.items():
            possible = len(self._shelf) if view == "slate" else len(self._seen)
            found = figures(tally, self._tallies[view, score, OFF], self._by, possible, self._popularity, seed)
            yield Row(view, score, setting.knob, setting.strength, **found)

    def _make(
        self,
        recommender: Recommender,
        view: View,
        score: Score,
        user: str,
        row: Rows,
        time_ms: int,
        taken: Taken,
    ) -> None:
        candidates = taken.shown if view == "shown" else None
        settings, seed = self._settings[view], hash64(f"{user} {time_ms}")
        requests = [
            SlateRequest(user, 0, surface=s.surface, k=self._k, candidates=candidates, slot_seed=seed) for s in settings
        ]
        slates = recommender.recommend(row, requests, time_ms)
        places = self._k if view == "slate" else FIRST_PLACES
        for setting, slate in zip(settings, slates, strict=True):
            items = [item.item_id for item in slate.items]
            tally = self._tallies[view, score, setting]
            tally.take(items, taken.clicked, self._k, places)
            vectors, known = self._catalogue.vectors_of(self._catalogue.index.rows(items[:places]))
            vectors = vectors[known]
            if len(vectors) > 1:
                pairs = np.triu_indices(len(vectors), 1)
                tally.alike.append(float((vectors @ vectors.T)[pairs].mean()))

    def _serving(self, score: Score) -> ServingModel:
        scorer, features = (self._model.scorer, self._model.features) if score == "model" else (None, None)
        vectors, index = self._catalogue.space_vectors, self._shelf.index
        return ServingModel(score, 1, self._space, scorer, features, vectors, index)


def sampled(examples: LogExamples, survey: Survey, slates: int) -> dict[int, Taken]:
    """Return ``slates`` evenly spaced scored impressions with a click, by their place in the log."""
    scored = set(survey.offsets.tolist())
    clicked = [
        (record, labels)
        for record, labels in zip(examples.records, examples.labels, strict=True)
        if record.offset in scored and bool((labels > 0).any())
    ]
    wanted = set(sample(np.array([record.offset for record, _ in clicked], np.int64), slates).tolist())
    names = {hash64(item): item for item in survey.first_shown_ms}
    found: dict[int, Taken] = {}
    for record, labels in clicked:
        if record.offset in wanted:
            items = [names[item] for item in np.frombuffer(record.items, "<u8").tolist()]
            found[record.offset] = Taken(items, [items[i] for i in np.flatnonzero(labels > 0).tolist()])
    return found


def measure(args: argparse.Namespace, cache: Path, show: Show) -> list[Row]:
    """Read the log, train, read it again with slates; raises ReplayError, LogFormatError and EncoderError."""
    source = find_parts(args.kind, args.paths)
    delay = duration_seconds(args.feedback_delay, "--feedback-delay")
    config = ReplayConfig(
        delays_seconds=(delay,), unclicked_weight=args.unclicked_weight, slates=args.slates, seed=args.seed
    )
    reader = source.open()
    survey = survey_log(
        reader, source.open_scored(), config.score_share, lambda done: show("looking through the log", done, None)
    )
    encoder = None if args.no_texts else EncoderConfig()
    space = space_config(config)
    items = item_vectors(reader, survey, encoder, cache, space.history_items, show)
    items = learned_spaces(reader, survey.start_ms, items, [delay], space, show)[delay]
    log = Delay(source, survey, items, config, delay, show)
    examples = log.examples("reading", False)
    schedule = Schedule.of(
        survey.start_ms, delay, config.user_state, config.warm_up_share, config.unclicked_weight, config.seed
    )
    recipe = head_recipe(items.scorer is not None, thinned=config.unclicked_weight > 1)
    model = Learner(examples, items, schedule, recipe, lambda step, done, of: show(step, done, of)).first()
    taken = sampled(examples, survey, args.slates)
    if not taken:
        raise ReplayError("no impression of the scored part has a click: there is nothing to make slates for")
    catalogue = whole_catalogue(source.open(), survey, items.table())
    every = np.arange(len(catalogue.index), dtype=np.int32)
    has_dates = bool((catalogue.published_at_ms[every] != NOT_GIVEN_MS).any())
    settings = grid(items.has_vectors, bool(catalogue.category_codes(every).any()), has_dates)
    maker = Tradeoffs(
        catalogue, survey, items.space, config.user_state, model, settings, taken, config.k, args.half_trust_exposure
    )
    done = 0

    def on_reads(reads: Reads) -> None:
        nonlocal done
        for i, offset in enumerate(reads.offsets):
            if offset in taken:
                user = reads.events[i].event.user_id
                maker.take(offset, int(reads.times_ms[i]), user, reads.rows[i : i + 1], reads.counters)
                done += 1
                show("slates", done, len(taken))

    log.examples("reading again", False, on_reads, frozenset(taken), catalogue)
    return list(maker.rows(args.seed))


def table(rows: Sequence[Row], view: View) -> Table:
    """Return the rows of a view as a table that a Markdown page takes as it is."""
    names = ("score", "setting", "nDCG@10, 95 %", "cost, 95 %", "recall@10", "items", "coverage", "Gini", "tail")
    made = Table(*names, "novelty, bits", "diversity", box=box.MARKDOWN)
    for row in rows:
        if row.view != view:
            continue
        off, cost = row.strength == 0, row.cost
        made.add_row(
            row.score,
            "all off" if off else f"{row.knob} {row.strength:g}",
            f"{row.ndcg.mean:.3f} [{row.ndcg.low:.3f}, {row.ndcg.high:.3f}]",
            "" if off else f"{cost.mean:+.3f} [{cost.low:+.3f}, {cost.high:+.3f}]",
            f"{row.recall:.3f}",
            f"{row.items:,}",
            f"{row.coverage:.3f}",
            f"{row.gini:.3f}",
            f"{row.tail_share:.3f}",
            f"{row.novelty:.2f}",
            "–" if math.isnan(row.intra_list_diversity) else f"{row.intra_list_diversity:.3f}",
        )
    return made


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line asks for; ``arguments`` None: this process's own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=("ebnerd", "mind", "jsonl"))
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--feedback-delay", default="0s")
    parser.add_argument("--unclicked-weight", type=float, default=1.0)
    parser.add_argument("--slates", type=int, default=500)
    parser.add_argument("--half-trust-exposure", type=float, default=2.0)
    parser.add_argument("--no-texts", action="store_true")
    parser.add_argument("--cache", type=Path, help="folder for the encodings of texts; default: none are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="picture, PNG")
    return parser.parse_args(arguments)


def main() -> int:
    """Print a table for each view; return 0, or 2 where the log or an option cannot be used."""
    args = options()
    torch.set_num_threads(1)
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="millstream-tradeoffs-") as folder, progress(sys.stderr) as show:
            rows = measure(args, args.cache or Path(folder), show)
        if args.json:
            args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", "utf-8")
        if args.plot:
            args.plot.write_bytes(
                draw(f"What more diverse slates cost ({args.kind}, {rows[0].impressions:,} impressions)", rows)
            )
    except (MillstreamError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for view in dict.fromkeys(row.view for row in rows):
        print(f"\n{view}: {rows[0].impressions:,} impressions")
        Console(width=200).print(table(rows, view))
    print(f"{time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

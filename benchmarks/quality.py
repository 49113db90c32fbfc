"""``python -m benchmarks.quality mind PATH``: is a fine-tuned encoder worth more than the frozen one?

    python -m benchmarks.quality mind PATH [--seeds 3] [--features text|all] [--encoder top|lora] [--cache FOLDER]

PATH holds the parts `train` and `validation` of MIND's layout. The log goes through the pure core in time order, by the
hour; both arms learn from the same histories (clicks before the first impression) and then from the impressions of
`train`, with the same steps, rates, losses and seeds. They differ in one switch, TrainingConfig.encoder, in one of the
passes over the histories (trainer/space_learning.py). Nothing of
`validation` but its users' histories is learned from. Printed: mean AUC over impressions of `validation` of each arm
and their paired difference, seeds averaged, with a bootstrap interval clustered by user.

``text``: item texts and the 16 items of the row, nothing else. ``all``: every live feature, on each text arm; the
log goes through the core again with rows and similarities in that arm's space, as they are after a swap
(``--unclicked-weight``: impressions that an unclicked item of `validation` stands for: one of each slate was kept).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from models.bootstrap import Space, find_or_compute_space
from models.bundle import ItemEncodings
from models.encoder import EncoderConfig, TextEncoder, item_text
from models.encoder_delta import EncoderDelta
from models.errors import LogFormatError, MillstreamError
from models.evaluation import auc_per_impression, bootstrap_mean
from models.examples import FeaturesRecord
from models.hashing import hash64
from models.logs import LogReader, open_log
from trainer.batches import TrainingSet
from trainer.encodings import OutputCache, base_encodings, delta_encodings
from trainer.finetune import StartingPoint, Trained, train
from trainer.log_examples import LogConfig, LogExamples, catalogue_of, log_examples, thinned
from trainer.scoring import ItemTable, encode_items, score
from trainer.space_learning import LearnedSpace, SpaceConfig, learn_space, with_features
from trainer.training_config import TrainingConfig

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Arm = Literal["frozen", "top", "lora"]
Progress = Callable[[str], None]

HOUR_SECONDS: Final = 3_600.0
CACHE_BYTES: Final = 8 << 30


@dataclass(frozen=True, slots=True)
class Recipe:
    """What both arms do, in the order in which they do it."""

    max_tokens: int = 32
    space: SpaceConfig = field(default_factory=SpaceConfig)
    """How the space is learned from histories; the second pass with the arm's encoder."""
    text_unclicked: int = 8
    text: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            epochs=4,
            batch_impressions=128,
            learning_rate=5e-4,
            projection_learning_rate=5e-4,
            cross_entropy_weight=0.0,
            residuals=False,
            positions=0,
            held_back_share=0.08,
            calibration_share=0.04,
            stop_on="loss",
        )
    )
    """The projection on impressions of `train`, each click with ``text_unclicked`` items of its slate."""
    pairs_per_click: int = 4
    heads: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            epochs=6,
            batch_impressions=256,
            learning_rate=1e-3,
            projection=False,
            cross_entropy_weight=0.0,
            residuals=False,
            positions=0,
            dropout=0.3,
            held_back_share=0.08,
            calibration_share=0.04,
            stop_on="auc",
        )
    )
    """On pairs of a click and an unclicked item, in the space as it is then."""


@dataclass(slots=True)
class Data:
    """What both arms learn from and are judged on."""

    encoder: TextEncoder
    space: Space
    texts: dict[int, str]
    """Of items shown, and of the latest items of histories."""
    train: LogExamples
    validation: LogExamples
    cache: Path
    replay: Callable[[Space, ItemEncodings], tuple[LogExamples, LogExamples]]
    """The same impressions, to learn from and to judge on, with the state that they have in another space."""


@dataclass(slots=True)
class Outcome:
    """AUC of each impression of `validation`, for one arm and one seed."""

    aucs: F64
    seconds: float
    note: str


def load(kind: str, path: Path, cache: Path, recipe: Recipe, unclicked_weight: float, say: Progress) -> Data:
    """Read the log through the pure core, its items in the bootstrap space."""
    split_ms = _first_impression_ms(open_log(kind, path / "validation"))
    reader = open_log(kind, path)
    items = {hash64(item.item_id): item for item in reader.items()}
    needed = _needed(reader, recipe.space.history_items)
    texts = {h: item_text(item) for h, item in items.items() if h in needed and item_text(item)}
    encoder = TextEncoder.load(EncoderConfig(max_tokens=recipe.max_tokens, batch_texts=64, device="auto"))
    space = find_or_compute_space(encoder, cache)
    say(f"{len(texts):,} texts to encode with {encoder.encoder_id}")
    config = LogConfig(
        tick_seconds=HOUR_SECONDS, count_history=False, unclicked_weight=unclicked_weight, thinned_from_ms=split_ms
    )

    def replay(space: Space, encodings: ItemEncodings) -> tuple[LogExamples, LogExamples]:
        catalogue = catalogue_of(items.values(), ItemTable(space, encodings))
        made = log_examples(reader, catalogue, space.space_id, config)
        later = np.array([record.time_ms >= split_ms for record in made.records])
        return made.part(~later), made.part(later)

    before, after = replay(space, encode_items(encoder, texts, OutputCache(cache, CACHE_BYTES)))
    return Data(encoder, space, texts, before, after, cache, replay)


def _first_impression_ms(reader: LogReader) -> int:
    for event in reader.events():
        if not event.is_history:
            return event.time_ms
    raise LogFormatError("the part `validation` has no impressions: nothing can be judged")


def _needed(reader: LogReader, history_items: int) -> set[int]:
    """Return the items shown, and the latest of each history, by hash."""
    shown: set[str] = set()
    histories: dict[str, list[str]] = {}
    for event in reader.events():
        if event.is_history:
            histories.setdefault(event.event.user_id, []).append(getattr(event.event, "item_id"))  # noqa: B009
        else:
            shown.update(item.item_id for item in getattr(event.event, "items", ()))
    for history in histories.values():
        shown.update(history[-history_items:])
    return {hash64(item) for item in shown}


def text_only(examples: LogExamples) -> LogExamples:
    """Return impressions of which nothing is known but items and the user's recent ones.

    Their times are told apart by a millisecond each, so that their order stays and no hour or weekday is seen.
    """
    made = LogExamples(labels=examples.labels, histories=examples.histories)
    for number, record in enumerate(examples.records):
        k = len(record)
        empty: dict[str, Any] = {
            "time_ms": number,
            "counters": bytes(len(record.counters)),
            "sims": bytes(len(record.sims)),
            "shown_counts": bytes(k),
            "shown_age_seconds": np.full(k, np.nan, "<f4").tobytes(),
            "acted_age_seconds": np.full(k, np.nan, "<f4").tobytes(),
            "age_seconds": np.full(k, np.nan, "<f4").tobytes(),
            "first_seen_seconds": np.full(k, np.nan, "<f4").tobytes(),
            "user_counts": (0, 0, 0),
        }
        made.records.append(msgspec.structs.replace(record, **empty))
    return made


class Contest:
    """Both arms, seed by seed."""

    def __init__(self, data: Data, recipe: Recipe, arm: Arm, device: str, say: Progress) -> None:
        self._data, self._recipe, self._arm, self._say = data, recipe, arm, say
        self._device = device
        slates = thinned(data.train, recipe.text_unclicked, 1, seed=0)
        self._text_train, self._text_validation = text_only(slates), text_only(data.validation)
        self._users = np.array([record.user_id for record in data.validation.records])

    def run_seed(self, seed: int, with_all: bool) -> dict[tuple[str, Arm], Outcome]:
        """Return the outcomes of both arms with one seed, by features and arm."""
        outcomes: dict[tuple[str, Arm], Outcome] = {}
        learned: LearnedSpace | None = None
        for arm in ("frozen", self._arm):
            learned = self._space(seed, arm, learned)
            outcomes |= self._run_arm(seed, arm, learned, with_all)
        return outcomes

    def _run_arm(self, seed: int, arm: Arm, learned: LearnedSpace, with_all: bool) -> dict[tuple[str, Arm], Outcome]:
        data, recipe, start = self._data, self._recipe, learned.start
        began = time.perf_counter()
        # Also what the trainings with this encoder frozen find in the cache.
        encodings = self.encodings(start.delta)
        made = self._train(self._text_train, start, self._settled(recipe.text, seed, "frozen"), f"text-{arm}-{seed}")
        aucs = self._aucs(made, encodings, self._text_validation.records)
        seconds = sum(learned.seconds.values()) + time.perf_counter() - began
        outcomes = {("text", arm): self._outcome(f"seed {seed}, {arm}, text", made, aucs, seconds)}
        if with_all:
            began = time.perf_counter()
            before, after = data.replay(made.space, encodings)
            whole = self._train_head(made, before, seed)
            aucs = self._aucs(whole, encodings, after.records)
            seconds += time.perf_counter() - began
            outcomes["all", arm] = self._outcome(f"seed {seed}, {arm}, all", whole, aucs, seconds)
        return outcomes

    def _outcome(self, name: str, made: Trained, aucs: F64, seconds: float) -> Outcome:
        note = f"best epoch {made.course.best_epoch} of {len(made.course.epochs)}"
        self._say(f"{name}: held back {made.course.best.auc:.4f}, AUC {np.nanmean(aucs):.4f}, {note}, {seconds:.0f} s")
        return Outcome(aucs, seconds, note)

    def _settled(self, config: TrainingConfig, seed: int, arm: Arm) -> TrainingConfig:
        device = {"seed": seed, "encoder": arm, "cache_bytes": CACHE_BYTES, "device": self._device}
        return config.model_copy(update=device)

    def _space(self, seed: int, arm: Arm, other: LearnedSpace | None) -> LearnedSpace:
        """Learn the space of an arm; its first pass is that of the ``other``, which was the same."""
        data = self._data
        settings = {"seed": seed, "cache_bytes": CACHE_BYTES, "device": self._device}
        made = learn_space(
            data.train.histories,
            data.texts,
            StartingPoint(data.space, data.encoder),
            self._recipe.space.settled(**settings).with_encoder(arm),
            warm=None if other is None else other.warm,
            cache_folder=data.cache,
        )
        if other is not None:
            made.seconds["warm"] = other.seconds["warm"]
        losses = ", ".join(f"{part} {_course(values)}" for part, values in made.losses.items())
        self._say(f"seed {seed}, {arm}: histories, loss {losses}, {sum(made.seconds.values()):.0f} s")
        return made

    def _train(self, examples: LogExamples, start: StartingPoint, config: TrainingConfig, name: str) -> Trained:
        chosen = TrainingSet(examples.records, examples.labels, self._data.texts)
        return train(chosen, start, config, new_space_id=name, cache_folder=self._data.cache)

    def _train_head(self, text: Trained, examples: LogExamples, seed: int) -> Trained:
        """Train a head with what ``examples`` tell, as it is in the space of ``text``, which stays."""
        data, recipe = self._data, self._recipe
        pairs = thinned(examples, 1, recipe.pairs_per_click, seed=0)
        shown = TrainingSet(pairs.records, pairs.labels, data.texts)
        start = with_features(StartingPoint(text.space, data.encoder, text.delta, text.scorer), shown)
        return self._train(pairs, start, self._settled(recipe.heads, seed, "frozen"), f"head-{seed}")

    def encodings(self, delta: EncoderDelta | None) -> ItemEncodings:
        """Return the base encodings of all texts under an encoder, kept for the trainings with it frozen."""
        data, cache = self._data, OutputCache(self._data.cache, CACHE_BYTES)
        hashes = sorted(data.texts)
        own = [data.texts[item] for item in hashes]
        if delta is None:
            base = base_encodings(data.encoder, own, cache)
        else:
            base = delta_encodings(data.encoder, delta, own, cache)
        return ItemEncodings(np.array(hashes, np.uint64), np.array([hash64(t) for t in own], np.uint64), base)

    def _aucs(self, made: Trained, encodings: ItemEncodings, records: Sequence[FeaturesRecord]) -> F64:
        table = ItemTable(made.space, encodings)
        scores = score(made.scorer, made.features, table, records)
        return auc_of(scores, self._data.validation.labels)

    def verdict(self, outcomes: Sequence[Mapping[tuple[str, Arm], Outcome]], features: str) -> str:
        """Return the figures of all seeds as a line: mean AUCs, and the paired difference with its interval."""
        frozen, tuned = ([o[features, arm] for o in outcomes] for arm in ("frozen", self._arm))
        frozen_mean = np.mean([o.aucs for o in frozen], axis=0)
        tuned_mean = np.mean([o.aucs for o in tuned], axis=0)
        gap = bootstrap_mean(tuned_mean - frozen_mean, self._users)
        one_by_one = ", ".join(
            f"{np.nanmean(t.aucs) - np.nanmean(f.aucs):+.4f}" for f, t in zip(frozen, tuned, strict=True)
        )
        return (
            f"{features}: frozen {np.nanmean(frozen_mean):.4f}, {self._arm} {np.nanmean(tuned_mean):.4f}, "
            f"difference {gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}] over {len(self._users):,} impressions of "
            f"{len(np.unique(self._users)):,} users, {len(outcomes)} seeds ({one_by_one}); "
            f"{np.mean([o.seconds for o in frozen]):.0f} s and {np.mean([o.seconds for o in tuned]):.0f} s a seed"
        )


def auc_of(scores: Sequence[F32], labels: Sequence[F32]) -> F64:
    """Return the AUC of each impression [I], from scores and labels [K] of each."""
    numbers = np.repeat(np.arange(len(scores)), [len(values) for values in scores])
    return auc_per_impression(np.concatenate(scores), np.concatenate(labels), numbers)


def _course(losses: Sequence[float]) -> str:
    return f"{losses[0]:.3f} → {losses[-1]:.3f}"


def main() -> None:
    """Run the contest and print its figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=["mind"])
    parser.add_argument("path", type=Path, help="folder with the parts train and validation")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--features", choices=["text", "all"], default="all", help="all: text and then all features")
    parser.add_argument("--encoder", choices=["top", "lora"], default="top")
    parser.add_argument("--unclicked-weight", type=float, default=10.0)
    parser.add_argument("--tower-steps", type=int, help="steps in which the encoder is trained")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--cache", type=Path, help="keeps encodings for the next run; default: a temporary folder")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    recipe = Recipe()
    if given.tower_steps:
        towers = recipe.space.towers.model_copy(update={"steps": given.tower_steps})
        recipe = replace(recipe, space=recipe.space.model_copy(update={"towers": towers}))
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - began:6.0f} s  {text}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        try:
            data = load(given.kind, given.path, given.cache or Path(folder), recipe, given.unclicked_weight, say)
            say(f"impressions: {len(data.train.records):,} to learn from, {len(data.validation.records):,} to judge on")
            contest = Contest(data, recipe, given.encoder, given.device, say)
            outcomes = []
            for seed in range(given.first_seed, given.first_seed + given.seeds):
                outcomes.append(contest.run_seed(seed, given.features == "all"))
                for features in ("text", "all")[: 1 + (given.features == "all")]:
                    say(contest.verdict(outcomes, features))
        except MillstreamError as error:
            sys.exit(f"{error}")


if __name__ == "__main__":
    main()

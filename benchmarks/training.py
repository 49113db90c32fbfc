"""One round of training on a window of labelled examples: examples a second, and where the time goes.

    python -m benchmarks.training [--examples 100000] [--encoder top] [--threads 2] [--device auto]

An example is an impressed item with its outcome. The window is made up: titles of one topic each, users who like some
topics, popularity as in news (a few items are shown most). Nothing is kept on disk before it starts: the frozen lower
layers are run for every text.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks.results import CpuAccount, Figure
from benchmarks.world import SLATE, WORDS
from models.bootstrap import find_or_compute_space
from models.encoder import EncoderConfig, TextEncoder
from models.examples import FeaturesRecord
from models.hashing import hash64
from models.user_row import POSITIVE, RECENT

if TYPE_CHECKING:
    from benchmarks.stage import Bench
    from trainer.batches import TrainingSet
    from trainer.finetune import Trained

EXAMPLES: Final = 100_000
QUICK_EXAMPLES: Final = 5_000
ITEMS: Final = 5_000
USERS: Final = 2_000
TOPICS: Final = 40
TOPIC_WORDS: Final = 12
TITLE_WORDS: Final = 10
SKEW: Final = 0.7
"""Exponent of popularity over rank."""
ROUND_SECONDS: Final = 600.0
START_MS: Final = 1_700_000_000_000
SEED: Final = 20_240_601
CLICK: Final = 1 | POSITIVE


def titles(items: int, random: np.random.Generator) -> list[str]:
    """Return titles of half topic words, half any."""
    topics = [random.choice(WORDS, TOPIC_WORDS, replace=False) for _ in range(TOPICS)]
    half = TITLE_WORDS // 2
    return [
        " ".join([*random.choice(topics[i % TOPICS], half), *random.choice(WORDS, TITLE_WORDS - half)])
        for i in range(items)
    ]


def window(examples: int, items: int = ITEMS) -> TrainingSet:
    """Return impressions of SLATE items each, ``examples`` items in all, and the texts of everything shown."""
    from trainer.batches import TrainingSet

    random = np.random.default_rng(SEED)
    hashes = np.array([hash64(f"item-{i}") for i in range(items)], np.uint64)
    popularity = (1 + random.permutation(items)) ** -SKEW
    popularity /= popularity.sum()
    likes = random.random((USERS, TOPICS)) < 3 / TOPICS
    liked = [random.permutation(np.flatnonzero(likes[u][np.arange(items) % TOPICS]))[:64] for u in range(USERS)]
    records, labels = [], []
    for number in range(examples // SLATE):
        user = int(random.integers(USERS))
        shown = random.choice(items, SLATE, replace=False, p=popularity)
        recents = random.permutation(liked[user])[: random.integers(0, RECENT + 1)]
        odds = -3.2 + 2.5 * likes[user, shown % TOPICS] + 60 * popularity[shown]
        labels.append((random.random(SLATE) < 1 / (1 + np.exp(-odds))).astype(np.float32))
        records.append(_record(number, user, hashes[shown], hashes[recents], popularity[shown], random))
    return TrainingSet(records, labels, dict(zip(hashes.tolist(), titles(items, random), strict=True)))


def _record(
    number: int, user: int, shown: Any, recents: Any, popularity: Any, random: np.random.Generator
) -> FeaturesRecord:
    counts = np.log1p(
        random.poisson(20_000 * popularity[:, None, None] * np.array([1.0, 0.05, 0.05, 0.1]), (SLATE, 4, 4))
    )
    time_ms = START_MS + 1_000 * number
    return FeaturesRecord(
        impression_id=number + 1,
        user_id=f"user-{user}",
        partition=0,
        offset=number,
        time_ms=time_ms,
        broker_ms=time_ms,
        processed_ms=time_ms,
        flags=0,
        surface="default",
        request_id=None,
        experiment=None,
        policy="external",
        session_id=None,
        context=None,
        space_id="",
        items=shown.tobytes(),
        positions=np.arange(1, SLATE + 1, dtype="<u2").tobytes(),
        propensities=b"",
        counters=counts.astype("<f2").tobytes(),
        age_seconds=random.exponential(86_400, SLATE).astype("<f4").tobytes(),
        first_seen_seconds=random.exponential(86_400, SLATE).astype("<f4").tobytes(),
        sims=np.zeros((SLATE, 2), "<f2").tobytes(),
        shown_counts=np.zeros(SLATE, "u1").tobytes(),
        shown_age_seconds=np.full(SLATE, np.nan, "<f4").tobytes(),
        acted_age_seconds=np.full(SLATE, np.nan, "<f4").tobytes(),
        recent_items=recents.tobytes(),
        recent_age_seconds=np.sort(random.exponential(86_400, len(recents))).astype("<f4").tobytes(),
        recent_codes=np.full(len(recents), CLICK, "u1").tobytes(),
        user_counts=(100, 5, 5),
        scores=[],
        model_version="bootstrap-0",
    )


def measure(
    examples: int, encoder: str, threads: int, device: str, folder: Path, **changed: Any
) -> tuple[float, Trained]:
    """Train one round; return its seconds, without making the window and loading the encoder, and what it made."""
    import torch

    from trainer.finetune import StartingPoint, TrainingConfig, train

    torch.set_num_threads(threads)
    loaded = TextEncoder.load(
        EncoderConfig(threads=threads, device="auto" if device == "auto" else "cpu", batch_texts=32)
    )
    torch.set_num_threads(threads)
    start = StartingPoint(find_or_compute_space(loaded, folder), loaded)
    settings: dict[str, Any] = {"encoder": encoder, "epochs": 3, "encoder_interval": 16, "device": device, **changed}
    made = window(examples)
    began = time.perf_counter()
    trained = train(made, start, TrainingConfig(**settings), cache_folder=folder / "layers", on_progress=show)
    return time.perf_counter() - began, trained


def show(step: str, done: int, total: int | None) -> None:
    """Print the end of each step where somebody looks."""
    if done == total and sys.stderr.isatty():
        print(f"  {step}: {done:,}", file=sys.stderr)


def describe(trained: Trained, seconds: float, examples: int) -> str:
    """Return where the time went and what was learned, in one sentence."""
    parts = ", ".join(f"{name} {part:.1f} s" for name, part in sorted(trained.seconds.items(), key=lambda p: -p[1]))
    metrics = trained.metrics
    return (
        f"{seconds:.0f} s for {examples:,} examples: {parts}; {metrics['epochs']:.0f} epochs, held-back AUC "
        f"{metrics['start_auc_held_back']:.3f} at the start, {metrics['auc_held_back']:.3f} at the end"
    )


async def run(bench: Bench) -> None:
    """Measure a round with a frozen encoder and one with its top layer trained, on two threads."""
    examples = QUICK_EXAMPLES if bench.sizes.items < ITEMS * 2 else EXAMPLES
    for encoder, name in (("frozen", "head, projection"), ("top", "top layer, lower ones frozen")):
        account = CpuAccount()
        folder = bench.folder / f"training-{encoder}"
        folder.mkdir()
        seconds, trained = await asyncio.to_thread(measure, examples, encoder, 2, "auto", folder)
        note = describe(trained, seconds, examples)
        bench.report.beside["training"] = account.describe()
        bench.report.figures.append(
            Figure(f"training round, {name}", seconds, "s", at_most=ROUND_SECONDS * examples / EXAMPLES, note=note)
        )
        bench.report.figures.append(Figure(f"training, {name}", examples / seconds, "examples/s"))


def main() -> int:
    """Measure one round and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="impressed items of the window")
    parser.add_argument("--encoder", choices=["frozen", "top", "lora"], default="top")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--encoder-interval", type=int, default=16, help="steps of the head for one of the encoder")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    options = parser.parse_args()
    account = CpuAccount()
    with tempfile.TemporaryDirectory(prefix="millstream-training-") as folder:
        seconds, trained = measure(
            options.examples,
            options.encoder,
            options.threads,
            options.device,
            Path(folder),
            epochs=options.epochs,
            encoder_interval=options.encoder_interval,
            precision=options.precision,
        )
    print(describe(trained, seconds, options.examples))
    print(f"{options.examples / seconds:.0f} examples/s; {account.describe()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

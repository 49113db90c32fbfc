"""A tiny BERT of random weights, and impressions of users who each like the items of one topic."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from models.bootstrap import Space, pca
from models.encoder import EncoderConfig, TextEncoder
from models.examples import FeaturesRecord
from models.hashing import hash64
from models.user_row import POSITIVE
from trainer.finetune import StartingPoint, TrainingSet

TOPICS = (
    ("goal", "match", "team", "coach", "league", "cup", "player", "score"),
    ("bank", "stock", "market", "money", "trade", "price", "fund", "loan"),
    ("film", "actor", "scene", "movie", "stage", "drama", "star", "show"),
)
ITEMS = 90
CLICK = 1 | POSITIVE
START_MS = 1_700_000_000_000


def write_bert(folder: Path) -> Path:
    """Write a BERT of 2 layers and 32 dimensions with weights drawn from a fixed seed."""
    from transformers import BertConfig, BertModel

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "of", "new", *(w for t in TOPICS for w in t)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 64}), "utf-8"
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = BertConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        )
        BertModel(config).save_pretrained(str(folder))
    return folder


def load_bert(folder: Path) -> TextEncoder:
    """Load what ``write_bert`` wrote."""
    return TextEncoder.load(EncoderConfig(model=str(folder), device="cpu", max_tokens=16))


def item_hash(item: int) -> int:
    return hash64(f"item-{item}")


def item_text(item: int) -> str:
    """Return three words of the item's topic."""
    words, random = TOPICS[item % len(TOPICS)], np.random.default_rng(item)
    return " ".join(["the", *random.choice(words, 3, replace=False)])


def texts() -> dict[int, str]:
    return {item_hash(item): item_text(item) for item in range(ITEMS)}


def starting_point(encoder: TextEncoder, dim: int = 8) -> StartingPoint:
    base = encoder.encode(list(texts().values()))
    return StartingPoint(Space("start", encoder.encoder_id, pca([base], dim)), encoder)


def record(
    number: int,
    user: int,
    items: list[int],
    recents: list[int],
    time_ms: int,
    counts: float = 0.0,
    negative_rate: float | None = None,
) -> FeaturesRecord:
    """Return an impression without any counters but ``counts`` for all."""
    k = len(items)
    return FeaturesRecord(
        impression_id=number + 1,
        user_id=f"user-{user}",
        partition=0,
        offset=number,
        time_ms=time_ms,
        broker_ms=time_ms,
        processed_ms=time_ms,
        flags=0,
        surface="home",
        request_id=None,
        experiment=None,
        policy="external",
        session_id=None,
        context=None,
        space_id="start",
        items=np.array([item_hash(i) for i in items], "<u8").tobytes(),
        positions=np.arange(1, k + 1, dtype="<u2").tobytes(),
        propensities=b"",
        counters=np.full((k, 4, 4), counts, "<f2").tobytes(),
        age_seconds=np.full(k, np.nan, "<f4").tobytes(),
        first_seen_seconds=np.full(k, np.nan, "<f4").tobytes(),
        sims=np.zeros((k, 2), "<f2").tobytes(),
        shown_counts=np.zeros(k, "u1").tobytes(),
        shown_age_seconds=np.full(k, np.nan, "<f4").tobytes(),
        acted_age_seconds=np.full(k, np.nan, "<f4").tobytes(),
        recent_items=np.array([item_hash(i) for i in recents], "<u8").tobytes(),
        recent_age_seconds=np.full(len(recents), 60.0, "<f4").tobytes(),
        recent_codes=np.full(len(recents), CLICK, "u1").tobytes(),
        user_counts=(0, 0, 0),
        scores=[],
        model_version="bootstrap-0",
        negative_rate=negative_rate,
    )


def impressions(count: int, seed: int = 0, preference: float = 0.9, items: int = 6) -> TrainingSet:
    """Return impressions of users who click one item of their topic with probability ``preference``, else any."""
    random = np.random.default_rng(seed)
    records, labels = [], []
    for number in range(count):
        user = int(random.integers(30))
        topic = user % len(TOPICS)
        own = [i for i in range(ITEMS) if i % len(TOPICS) == topic]
        shown = random.choice(ITEMS, items, replace=False).tolist()
        recents = random.choice(own, int(random.integers(1, 6)), replace=False).tolist()
        liked = [at for at, item in enumerate(shown) if item % len(TOPICS) == topic]
        wants = liked if liked and random.random() < preference else list(range(items))
        clicked = np.zeros(items, np.float32)
        if random.random() < 0.8:
            clicked[random.choice(wants)] = 1
        records.append(record(number, user, shown, recents, START_MS + 1_000 * number))
        labels.append(clicked)
    return TrainingSet(records, labels, texts())

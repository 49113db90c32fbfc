"""Text encoder: texts per second by batch size, and the time of one query. Run: python -m benchmarks.encoder"""

from __future__ import annotations

import time

import numpy as np

from models import bootstrap
from models.encoder import EncoderConfig, TextEncoder

TEXTS = 520


def main() -> None:
    """Print the figures of the default encoder with one thread."""
    began = time.perf_counter()
    encoder = TextEncoder.load(EncoderConfig(threads=1))
    print(f"{encoder.encoder_id} on {encoder.config.device}, loaded in {time.perf_counter() - began:.1f} s")
    titles = bootstrap.TITLES.read_text("utf-8").splitlines()
    texts = [titles[i % len(titles)] for i in range(TEXTS)]
    encoder.encode(texts[:64])
    for batch_texts in (1, 8, 16, 32, 64):
        encoder.config = encoder.config.model_copy(update={"batch_texts": batch_texts})
        began = time.perf_counter()
        encoder.encode(texts)
        print(f"titles, batches of {batch_texts}: {TEXTS / (time.perf_counter() - began):.0f} texts/s")
    long_texts = [". ".join(titles[i : i + 6]) for i in range(128)]
    encoder.config = encoder.config.model_copy(update={"batch_texts": 16})
    began = time.perf_counter()
    encoder.encode(long_texts)
    print(
        f"texts of {encoder.config.max_tokens} tokens, batches of 16: {128 / (time.perf_counter() - began):.0f} texts/s"
    )
    times = []
    for text in titles[:50]:
        began = time.perf_counter()
        encoder.encode([text])
        times.append(time.perf_counter() - began)
    print(f"one query: median {np.median(times) * 1e3:.1f} ms")


if __name__ == "__main__":
    main()

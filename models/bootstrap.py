"""Version 0 of the embedding space: a fixed, uncentred PCA of an encoder's base encodings.

The matrix must be the same for everyone and come from text that we may use. It is fitted on two texts of equal
weight: seeded combinations of the encoder's own whole words (breadth) and 260 titles that were written for this
(what titles look like). MiniLM's is shipped beside this file; another encoder's is computed by the same recipe at the
first start and kept in the data folder. Legend of shapes: B = dimensions of a base encoding, D = dimensions of the
space, n = any number.

``python -m models.bootstrap FILE`` writes the shipped matrix again.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from models.encoder import EncoderConfig, TextEncoder
from models.errors import EncoderError

RECIPE: Final = 1
"""Version of the recipe; a change of anything that changes the matrix raises it, and with it the space id."""
SPACE_DIM: Final = 64
TEXTS: Final = 8_192
SHORTEST_WORDS, LONGEST_WORDS = 2, 4
SEED: Final = 20_240_601
EMBEDDING_WEIGHT: Final = 0.5
"""Weight of a client's own embedding beside the text's unit vector."""
TITLES: Final = Path(__file__).with_name("bootstrap-titles.txt")
SHIPPED: Final = Path(__file__).with_name("bootstrap-minilm.safetensors")

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """An embedding space: which encoder it is of, the projection into it, and what single items add to it.

    The vector of an item with text is unit(base @ projection + residual[item]); that of any other text has no
    residual.
    """

    space_id: str
    encoder_id: str
    projection: Floats
    """float32 [B, D]."""
    residual_items: Hashes = field(default_factory=lambda: np.zeros(0, np.uint64))
    """uint64 [r], 64-bit hashes of the items that have a residual, distinct; kept here in rising order."""
    residuals: Floats = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """float32 [r, D]."""
    dim: int = field(init=False)
    base_dim: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_dim", int(self.projection.shape[0]))
        object.__setattr__(self, "dim", int(self.projection.shape[1]))
        items = np.asarray(self.residual_items, np.uint64)
        given = np.asarray(self.residuals, np.float32).reshape(len(items), -1 if len(items) else self.dim)
        if given.shape != (len(items), self.dim):
            raise ValueError(f"residuals of shape {given.shape} for {len(items)} items of {self.dim} dimensions")
        order = np.argsort(items, kind="stable")
        object.__setattr__(self, "residual_items", items[order])
        object.__setattr__(self, "residuals", given[order])

    def same_as(self, other: Space) -> bool:
        """Return whether ``other`` puts every item where this space puts it; the ids are not looked at."""
        return (
            self.encoder_id == other.encoder_id
            and np.array_equal(self.projection, other.projection)
            and np.array_equal(self.residual_items, other.residual_items)
            and np.array_equal(self.residuals, other.residuals)
        )

    def vectors(self, base: Floats | Halves) -> Floats:
        """Return base encodings [n, B] as vectors of the space, float32 [n, D], unit norm (zero stays zero)."""
        return unit(np.asarray(base, np.float32) @ self.projection)

    def item_vectors(self, base: Floats | Halves, items: Hashes) -> Floats:
        """Return the vectors of items by their texts' base encodings [n, B] and 64-bit hashes [n], float32 [n, D].

        Unit norm; an item without an encoding (all zero) has none, whatever its residual.
        """
        encodings = np.asarray(base, np.float32)
        projected: Floats = encodings @ self.projection
        if len(self.residual_items):
            places = np.minimum(np.searchsorted(self.residual_items, items), len(self.residual_items) - 1)
            has = (self.residual_items[places] == items) & encodings.any(axis=1)
            projected[has] += self.residuals[places[has]]
        return unit(projected)

    def item_vector(
        self, base: Floats | Halves | None, embedding: Sequence[float] | None, item: int | None = None
    ) -> Floats | None:
        """Return an item's vector, float32 [D], from its text's base encoding [B], its own embedding, or both.

        The embedding goes through a seeded random projection (Johnson and Lindenstrauss 1984), which keeps the angles
        between embeddings of one length; beside a text it is added with EMBEDDING_WEIGHT. None where there is neither.
        ``item``: the item's 64-bit hash, by which its residual is found.
        """
        text: Floats | None = None
        if base is not None and item is not None:
            text = self.item_vectors(base[None, :], np.array([item], np.uint64))[0]
        elif base is not None:
            text = self.vectors(base[None, :])[0]
        if embedding is None:
            return text
        projected: Floats = np.asarray(embedding, np.float32)[None] @ _random_projection(len(embedding), self.dim)
        own: Floats = unit(projected)[0]
        if text is None:
            return own
        both: Floats = unit((text + EMBEDDING_WEIGHT * own)[None])[0]
        return both


def unit(vectors: Floats) -> Floats:
    """Return rows [n, D] scaled to unit norm; rows without length or with values that are not finite become zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    usable = np.isfinite(norms) & (norms > 1e-12)
    return np.where(usable, vectors / np.where(usable, norms, 1.0), 0.0).astype(np.float32)


def pca(corpora: Sequence[Floats], dim: int = SPACE_DIM) -> Floats:
    """Return the first ``dim`` principal directions of corpora of base encodings [n, B] about the origin: [B, dim].

    Uncentred: cosines between projected vectors then approximate those of the encodings. Every corpus has the same
    weight, whatever its size. The sign of each direction is fixed, so that two machines get the same matrix.
    """
    moments = [c.T @ c / len(c) for c in (corpus.astype(np.float64) for corpus in corpora)]
    _, directions = np.linalg.eigh(sum(moments[1:], moments[0]))
    first = directions[:, ::-1][:, :dim]
    signs = np.sign(first[np.abs(first).argmax(0), np.arange(first.shape[1])])
    return np.asarray(first * signs, np.float32)


def vocabulary_texts(vocabulary: dict[str, int], n: int = TEXTS) -> list[str]:
    """Return ``n`` seeded combinations of the whole words of a tokenizer's vocabulary.

    Raises EncoderError for a vocabulary without enough whole words to stand for text.
    """
    words = whole_words(vocabulary)
    if len(words) < 1_000:
        raise EncoderError(
            f"the encoder's vocabulary has {len(words)} whole words, too few for the bootstrap space; "
            "take an encoder with an English or multilingual word-piece vocabulary"
        )
    # RandomState's stream is frozen by NumPy; that of Generator may change between versions.
    random = np.random.RandomState(SEED)
    lengths = random.randint(SHORTEST_WORDS, LONGEST_WORDS + 1, n)
    picks = random.randint(0, len(words), int(lengths.sum())).tolist()
    texts, start = [], 0
    for length in lengths.tolist():
        texts.append(" ".join(words[i] for i in picks[start : start + length]))
        start += length
    return texts


def whole_words(vocabulary: dict[str, int]) -> list[str]:
    """Return the whole words of three letters or more in a vocabulary, sorted.

    WordPiece marks what continues a word (##ing); SentencePiece and byte-level BPE mark what begins one.
    """
    begins = ("\u2581", "\u0120")
    marked = sum(token.startswith(begins) for token in vocabulary) > len(vocabulary) // 10
    tokens = {t[1:] for t in vocabulary if t.startswith(begins)} if marked else set(vocabulary)
    return sorted(t for t in tokens if len(t) >= 3 and t.isalpha())


def compute(encoder: TextEncoder, dim: int = SPACE_DIM) -> Space:
    """Return the bootstrap space of an encoder: some TEXTS encodings, about a minute on a CPU.

    Raises EncoderError as ``vocabulary_texts`` does.
    """
    words = encoder.encode(vocabulary_texts(encoder.vocabulary()))
    titles = encoder.encode(TITLES.read_text("utf-8").splitlines())
    return Space(space_id(encoder.encoder_id, dim), encoder.encoder_id, pca([words, titles], min(dim, encoder.dim)))


def space_id(encoder_id: str, dim: int = SPACE_DIM) -> str:
    """Return the id of an encoder's bootstrap space: it names the encoder, the recipe and the size."""
    return f"bootstrap-{RECIPE}-{dim}:{encoder_id}"


def find_space(encoder_id: str, folder: Path, dim: int = SPACE_DIM) -> Space | None:
    """Return the bootstrap space of an encoder, shipped or kept in ``folder``, or None where it must be computed.

    Raises EncoderError for a file that is not one.
    """
    shipped = load_space(SHIPPED) if SHIPPED.is_file() and dim == SPACE_DIM else None
    # The matrix depends on the weights, not on how many tokens are read of a long text.
    if shipped is not None and _weights_of(shipped.encoder_id) == _weights_of(encoder_id):
        return Space(space_id(encoder_id, dim), encoder_id, shipped.projection)
    kept = _kept_file(encoder_id, folder, dim)
    return load_space(kept) if kept.is_file() else None


def find_or_compute_space(encoder: TextEncoder, folder: Path, dim: int = SPACE_DIM) -> Space:
    """Return the bootstrap space of a loaded encoder; computed at the first start, then kept in ``folder``."""
    found = find_space(encoder.encoder_id, folder, dim)
    if found is None:
        found = compute(encoder, dim)
        save_space(found, _kept_file(encoder.encoder_id, folder, dim))
    return found


def save_space(space: Space, file: Path) -> None:
    """Write a space so that a reader sees all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"space_id": space.space_id, "encoder_id": space.encoder_id}
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_bytes(save({"projection": space.projection}, metadata))
    os.replace(aside, file)


def load_space(file: Path) -> Space:
    """Read a space that ``save_space`` wrote. Raises EncoderError for anything else."""
    try:
        with safe_open(str(file), framework="numpy") as stored:
            stored_any: Any = stored
            metadata = stored_any.metadata() or {}
            projection = np.asarray(stored_any.get_tensor("projection"), np.float32)
        return Space(metadata["space_id"], metadata["encoder_id"], projection)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise EncoderError(f"{file} is not a projection of ours: {error}; delete it, it is computed again") from error


def _kept_file(encoder_id: str, folder: Path, dim: int) -> Path:
    name = hashlib.sha256(space_id(encoder_id, dim).encode()).hexdigest()[:16]
    return folder / f"bootstrap-{name}.safetensors"


def _weights_of(encoder_id: str) -> str:
    # "name@weights/mean64" without the number of tokens.
    return encoder_id.rstrip("0123456789")


@lru_cache(maxsize=16)
def _random_projection(length: int, dim: int) -> Floats:
    random = np.random.RandomState(SEED + length)
    return np.asarray(random.standard_normal((length, dim)) / np.sqrt(dim), np.float32)


def main(file: Path) -> None:
    """Compute the shipped matrix of the default encoder and write it to ``file``."""
    space = compute(TextEncoder.load(EncoderConfig(batch_texts=32)))
    save_space(space, file)
    print(f"{file}: {space.space_id}, {file.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else SHIPPED)

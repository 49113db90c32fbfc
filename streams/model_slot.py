"""What one worker serves with: space, catalogue, index, and their version. Today the bootstrap bundle.

A hot swap replaces the slot by one assignment between two batches; the bundle of the trainer comes with the
learning loop.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import structlog

from models.bootstrap import Space, find_space
from models.catalogue import Catalogue
from models.encoder import identify
from models.errors import EncoderError
from models.hashing import hash64
from models.item_index import ItemIndex
from models.retrieval import VectorIndex
from streams.settings import Settings

log = structlog.get_logger(__name__)

BOOTSTRAP_VERSION = "bootstrap-0"
SPACE_WAIT_SECONDS = 600.0
"""Another encoder than the default one has its projection computed by the encoder process at its first start."""
POLL_SECONDS = 0.5


@dataclass(slots=True)
class ModelSlot:
    """One version: its space, and the catalogue and index that lie in it."""

    version: str
    generation: int
    space: Space
    index: ItemIndex
    catalogue: Catalogue
    vector_index: VectorIndex

    @property
    def space_id(self) -> str:
        """Return the id of the embedding space."""
        return self.space.space_id

    @property
    def space_hash(self) -> int:
        """Return the form of ``space_id`` that user rows carry."""
        return hash64(self.space.space_id)

    @classmethod
    def bootstrap(cls, settings: Settings) -> ModelSlot:
        """Return the bootstrap version: the encoder's fixed projection and an empty catalogue.

        Waits for the encoder process where it must compute the projection first. Raises EncoderError when it does not.
        """
        encoder_id = identify(settings.encoder)
        folder = settings.worker.data_folder
        deadline = time.monotonic() + SPACE_WAIT_SECONDS
        space = find_space(encoder_id, folder)
        while space is None:
            if time.monotonic() > deadline:
                raise EncoderError(
                    f"no projection of {encoder_id} in {folder} after {SPACE_WAIT_SECONDS:.0f} s: look at the log of "
                    "the encoder process (`python -m streams.encoder_process`), which computes it at its first start"
                )
            log.info("waiting_for_projection", encoder=encoder_id)
            time.sleep(POLL_SECONDS)
            space = find_space(encoder_id, folder)
        index = ItemIndex()
        return cls(
            version=BOOTSTRAP_VERSION,
            generation=0,
            space=space,
            index=index,
            catalogue=Catalogue(index, space.dim),
            vector_index=VectorIndex(space.dim, settings.retrieval),
        )

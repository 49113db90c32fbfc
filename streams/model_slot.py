"""What one worker serves with: the catalogue, and the models that have a role over it.

A hot swap is the assignment of ``live`` between two batches; ``streams.model_watch`` decides when.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import structlog

from models.bootstrap import Space, find_space
from models.catalogue import Catalogue
from models.encoder import identify
from models.errors import EncoderError
from models.item_index import ItemIndex
from models.manifest import BOOTSTRAP_VERSION
from models.retrieval import VectorIndex
from models.serving import ServingModel
from streams.settings import Settings

__all__ = ["BOOTSTRAP_VERSION", "ModelSlot"]

log = structlog.get_logger(__name__)

SPACE_WAIT_SECONDS = 600.0
"""Another encoder than the default one has its projection computed by the encoder process at its first start."""
POLL_SECONDS = 0.5


@dataclass(slots=True)
class ModelSlot:
    """The models of one worker by role, over one catalogue."""

    index: ItemIndex
    catalogue: Catalogue
    bootstrap_space: Space
    live: ServingModel
    candidate: ServingModel | None = None
    previous: ServingModel | None = None
    arms: dict[str, ServingModel] = field(default_factory=dict)
    """By version: models that score for arms of the experiment, as far as they are prepared."""

    @property
    def version(self) -> str:
        """Return the version that serves."""
        return self.live.version

    @property
    def generation(self) -> int:
        """Return the generation that rows are stamped with."""
        return self.live.generation

    @property
    def space(self) -> Space:
        """Return the space that is served in."""
        return self.live.space

    @property
    def space_id(self) -> str:
        """Return the id of the space that is served in."""
        return self.live.space_id

    @property
    def space_hash(self) -> int:
        """Return the form of ``space_id`` that user rows carry."""
        return self.live.space_hash

    @property
    def vector_index(self) -> VectorIndex:
        """Return the index that is searched."""
        return self.live.vector_index

    def by_role(self) -> dict[str, ServingModel]:
        """Return the models that have a role."""
        named = {"live": self.live, "candidate": self.candidate, "previous": self.previous}
        return {role: model for role, model in named.items() if model is not None}

    def shadows(self) -> list[ServingModel]:
        """Return the models that are scored beside the live one: candidate and previous, each version once."""
        return [m for m in (self.candidate, self.previous) if m is not None and m.version != self.live.version]

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
        catalogue = Catalogue(index, space.dim)
        live = ServingModel(
            version=BOOTSTRAP_VERSION,
            generation=0,
            space=space,
            scorer=None,
            features=None,
            vectors=catalogue.space_vectors,
            vector_index=VectorIndex(space.dim, settings.retrieval),
        )
        return cls(index, catalogue, space, live)

"""A space learned from histories, kept on disk for the next replay: its id names all that it was learned from.

A folder ``<space id>`` holds ``start.safetensors`` (projection and scorer), ``start.json`` and, where the encoder was
trained, ``encoder/`` with its delta. It appears whole or not at all; one that cannot be read is learned again.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from safetensors.numpy import save

from models.atomic import make_folder, remove_folder
from models.bootstrap import Space
from models.ctr import CtrConfig, CtrScorer
from models.encoder_delta import EncoderDelta
from models.errors import MillstreamError
from models.features import FeatureConfig
from models.tensor_file import views
from trainer.finetune import StartingPoint

log = logging.getLogger(__name__)

TENSORS_FILE: Final = "start.safetensors"
FACTS_FILE: Final = "start.json"
ENCODER_FOLDER: Final = "encoder"
PROJECTION: Final = "projection"
SCORER: Final = "scorer."


class _Facts(msgspec.Struct, forbid_unknown_fields=True):
    """What is kept beside the tensors."""

    encoder_id: str
    scorer: dict[str, Any]
    features: dict[str, Any]


def keep_space(folder: Path, start: StartingPoint) -> None:
    """Keep a starting point with a scorer under the id of its space; a disk that refuses costs only the keeping."""
    if start.scorer is None:
        raise ValueError("a starting point without a scorer was not learned")
    scorer, features = start.scorer, start.features or FeatureConfig()
    tensors = {PROJECTION: start.space.projection, **{f"{SCORER}{n}": t for n, t in scorer.tensors.items()}}
    facts = _Facts(start.space.encoder_id, scorer.config.model_dump(mode="json"), features.model_dump(mode="json"))

    def fill(aside: Path) -> None:
        (aside / TENSORS_FILE).write_bytes(save({n: np.ascontiguousarray(t) for n, t in tensors.items()}))
        (aside / FACTS_FILE).write_bytes(msgspec.json.encode(facts))
        if start.delta is not None:
            (aside / ENCODER_FOLDER).mkdir()
            for name, content in start.delta.files().items():
                (aside / ENCODER_FOLDER / name).write_bytes(content)

    try:
        make_folder(folder / start.space.space_id, fill)
    except OSError as error:
        log.warning("the learned space could not be kept in %s (%s): the next replay learns it", folder, error)


def kept_space(folder: Path, space_id: str, start: StartingPoint) -> StartingPoint | None:
    """Return what was learned from ``start`` and kept under an id; None where nothing is, or it cannot be read.

    What cannot be read is removed. Raises OSError where that is refused.
    """
    own = folder / space_id
    if not own.is_dir():
        return None
    try:
        facts = msgspec.json.decode((own / FACTS_FILE).read_bytes(), type=_Facts)
        tensors: dict[str, npt.NDArray[Any]] = {
            n: t.copy() for n, t in views((own / TENSORS_FILE).read_bytes()).items()
        }
        delta = EncoderDelta.load(own / ENCODER_FOLDER) if (own / ENCODER_FOLDER).is_dir() else None
        if facts.encoder_id != (start.space.encoder_id if delta is None else delta.encoder_id):
            raise ValueError(f"it is of the encoder {facts.encoder_id}")
        config = CtrConfig(**facts.scorer)
        scorer = CtrScorer(config, {n.removeprefix(SCORER): t for n, t in tensors.items() if n.startswith(SCORER)})
        space = Space(space_id, facts.encoder_id, tensors[PROJECTION])
        return replace(start, space=space, delta=delta, scorer=scorer, features=FeatureConfig(**facts.features))
    except (OSError, ValueError, KeyError, msgspec.DecodeError, ValidationError, MillstreamError) as error:
        log.warning("the kept space %s is unreadable (%s): it is learned again", own, error)
        remove_folder(own)
        return None

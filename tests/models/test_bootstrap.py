from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models import bootstrap
from models.bootstrap import Space
from models.errors import EncoderError

VOCABULARY = {f"word{chr(97 + i // 26 % 26)}{chr(97 + i % 26)}{chr(97 + i // 676)}": i for i in range(2_000)}


def space(dim: int = 3) -> Space:
    return Space("a-space", "an-encoder", np.eye(8, dim, dtype=np.float32))


def test_projected_encodings_have_unit_norm() -> None:
    vectors = space().vectors(np.arange(16, dtype=np.float32).reshape(2, 8))
    assert np.linalg.norm(vectors, axis=1).tolist() == pytest.approx([1, 1])


def test_zero_encoding_stays_zero() -> None:
    assert not space().vectors(np.zeros((1, 8), np.float32)).any()


def test_pca_is_about_the_origin_and_not_about_the_mean() -> None:
    base = np.array([[10, 0.1, 0], [10, -0.1, 0], [10, 0, 0.01]], np.float32)
    assert np.abs(bootstrap.pca([base], 1)[:, 0]).argmax() == 0


def test_pca_has_orthonormal_columns() -> None:
    matrix = bootstrap.pca([np.random.default_rng(1).standard_normal((100, 8)).astype(np.float32)], 4)
    assert np.allclose(matrix.T @ matrix, np.eye(4), atol=1e-5)


def test_small_corpus_weighs_as_much_as_a_large_one() -> None:
    large = np.tile(np.array([[1, 0, 0]], np.float32), (1_000, 1))
    small = np.array([[0, 2, 0]], np.float32)
    assert np.abs(bootstrap.pca([large, small], 1)[:, 0]).argmax() == 1


def test_sign_of_each_direction_does_not_depend_on_the_order_of_the_texts() -> None:
    base = np.random.default_rng(1).standard_normal((100, 8)).astype(np.float32)
    assert np.allclose(bootstrap.pca([base], 4), bootstrap.pca([base[::-1]], 4), atol=1e-4)


def test_vocabulary_texts_are_the_same_each_time() -> None:
    assert bootstrap.vocabulary_texts(VOCABULARY, 50) == bootstrap.vocabulary_texts(dict(VOCABULARY), 50)


def test_vocabulary_without_words_is_refused() -> None:
    with pytest.raises(EncoderError, match="0 whole words"):
        bootstrap.vocabulary_texts({"##ing": 1, "[CLS]": 2, "1999": 3, "of": 4})


def test_whole_words_of_a_word_piece_vocabulary_are_those_that_continue_nothing() -> None:
    assert bootstrap.whole_words({"river": 0, "##ing": 1, "[PAD]": 2, "of": 3}) == ["river"]


def test_whole_words_of_a_sentence_piece_vocabulary_are_those_that_begin_one() -> None:
    assert bootstrap.whole_words({"\u2581river": 0, "ing": 1, "<s>": 2}) == ["river"]


def test_item_with_text_alone_has_the_projection_of_its_encoding() -> None:
    base = np.array([0, 3, 4, 0, 0, 0, 0, 9], np.float32)
    vector = space().item_vector(base, None)
    assert vector is not None
    assert vector.tolist() == pytest.approx([0, 0.6, 0.8])


def test_item_with_nothing_has_no_vector() -> None:
    assert space().item_vector(None, None) is None


def test_embeddings_that_are_close_stay_close() -> None:
    wide = Space("a-space", "an-encoder", np.eye(384, 64, dtype=np.float32))
    one, other, far = np.random.default_rng(2).standard_normal((3, 512))
    vectors = [wide.item_vector(None, list(map(float, e))) for e in (one, one + 0.1 * other, far)]
    assert vectors[0] is not None
    assert vectors[1] is not None
    assert vectors[2] is not None
    assert float(vectors[0] @ vectors[1]) > 0.97
    assert abs(float(vectors[0] @ vectors[2])) < 0.5


def test_embedding_moves_the_vector_of_a_text_but_does_not_replace_it() -> None:
    base = np.array([1, 0, 0, 0, 0, 0, 0, 0], np.float32)
    vector = space().item_vector(base, [5.0, -1.0, 2.0, 2.0])
    assert vector is not None
    assert 0.4 < float(vector[0]) < 1.0
    assert float(np.linalg.norm(vector)) == pytest.approx(1)


def test_embedding_is_mapped_alike_by_every_process() -> None:
    vector = space().item_vector(None, [1.0, 2.0])
    assert vector is not None
    bootstrap._random_projection.cache_clear()
    again = space().item_vector(None, [1.0, 2.0])
    assert again is not None
    assert vector.tolist() == again.tolist()


def test_saved_space_is_read_back(tmp_path: Path) -> None:
    bootstrap.save_space(space(), tmp_path / "s.safetensors")
    loaded = bootstrap.load_space(tmp_path / "s.safetensors")
    assert (loaded.space_id, loaded.encoder_id, loaded.dim, loaded.base_dim) == ("a-space", "an-encoder", 3, 8)
    assert (loaded.projection == space().projection).all()


def test_damaged_space_file_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    bootstrap.save_space(space(), file)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(EncoderError, match=r"s\.safetensors is not a projection of ours"):
        bootstrap.load_space(file)


def test_space_of_an_unknown_encoder_is_not_there_yet(tmp_path: Path) -> None:
    assert bootstrap.find_space("folder@abc/mean64", tmp_path) is None


def test_space_id_names_encoder_recipe_and_size() -> None:
    assert bootstrap.space_id("e@1/mean64") != bootstrap.space_id("e@2/mean64")
    assert bootstrap.space_id("e@1/mean64", 32) != bootstrap.space_id("e@1/mean64", 64)


def test_shipped_matrix_serves_its_encoder_with_any_number_of_tokens(tmp_path: Path) -> None:
    shipped = bootstrap.load_space(bootstrap.SHIPPED)
    weights = shipped.encoder_id.removesuffix("64")
    found = bootstrap.find_space(weights + "128", tmp_path)
    assert found is not None
    assert (found.base_dim, found.dim) == (384, 64)
    assert found.space_id == bootstrap.space_id(weights + "128")
    assert np.allclose(found.projection.T @ found.projection, np.eye(64), atol=1e-4)

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ctr import F32, CtrConfig, CtrScorer, fit_calibration, tensor_shapes
from models.ctr_module import CtrModule, first_tensors, loss_sums
from models.errors import ModelError
from models.user_row import NEGATIVE, POSITIVE

CLICK = 1 | POSITIVE
HIDE = 4 | NEGATIVE


def random_tensors(config: CtrConfig, seed: int) -> dict[str, F32]:
    random = np.random.default_rng(seed)
    tensors = {n: random.standard_normal(s).astype(np.float32) * 0.4 for n, s in tensor_shapes(config).items()}
    tensors["feature_std"] = np.abs(tensors["feature_std"]) + np.float32(0.5)
    return tensors


def unit(vectors: npt.NDArray[Any]) -> F32:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32)


def inputs(config: CtrConfig, slates: int, items: int, recents: int, seed: int) -> dict[str, npt.NDArray[Any]]:
    """Slates of which some have no recents, and some items no vector."""
    random = np.random.default_rng(seed)
    vectors = unit(random.standard_normal((slates, items, config.dim)))
    vectors[random.random((slates, items)) < 0.2] = 0
    known = random.random((slates, recents)) < 0.6
    known[random.random(slates) < 0.3] = False
    age = random.exponential(86_400, (slates, recents)).astype(np.float32)
    age[~known] = np.nan
    return {
        "x_SCF": random.standard_normal((slates, items, config.features)).astype(np.float32) * 3,
        "items_SCD": vectors,
        "recents_SRD": unit(random.standard_normal((slates, recents, config.dim))),
        "recent_known_SR": known,
        "recent_age_SR": age,
        "recent_codes_SR": random.choice(np.array([CLICK, HIDE, 8], np.uint8), (slates, recents)),
    }


def torch_logits(module: CtrModule, slate: dict[str, npt.NDArray[Any]]) -> F32:
    with torch.no_grad():
        return np.asarray(module(**{name: torch.from_numpy(value) for name, value in slate.items()}).numpy())


@settings(max_examples=60, deadline=None)
@given(
    slates=st.integers(1, 5),
    items=st.integers(1, 30),
    recents=st.integers(1, 16),
    features=st.integers(0, 20),
    dim=st.sampled_from([3, 16, 64]),
    hidden=st.sampled_from([(8,), (16, 4), (128, 32, 8)]),
    activation=st.sampled_from(["sigmoid", "silu", "relu"]),
    seed=st.integers(0, 1_000),
)
def test_numpy_and_torch_give_the_same_logits(
    slates: int, items: int, recents: int, features: int, dim: int, hidden: tuple[int, ...], activation: Any, seed: int
) -> None:
    config = CtrConfig(features=features, dim=dim, hidden=hidden, activation=activation, attention_dim=8)
    tensors = random_tensors(config, seed)
    slate = inputs(config, slates, items, recents, seed)
    served, _ = CtrScorer(config, tensors).logits(**slate)
    assert served.dtype == np.float32
    np.testing.assert_allclose(served, torch_logits(CtrModule(config, tensors), slate), atol=1e-4, rtol=1e-4)


def test_module_gives_back_the_tensors_that_it_was_made_of() -> None:
    config = CtrConfig(features=3, hidden=(8, 4))
    tensors = random_tensors(config, 1)
    again = CtrModule(config, tensors).tensors()
    assert set(again) == set(tensors)
    assert all(np.array_equal(again[name], tensors[name]) for name in tensors)


def test_user_without_recents_has_no_part_in_the_logit() -> None:
    config = CtrConfig(features=2, dim=8, hidden=(4,))
    tensors = random_tensors(config, 2)
    slate = inputs(config, 2, 5, 4, 2)
    slate["recent_known_SR"][:] = False
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        before, _ = CtrScorer(config, tensors).logits(**slate)
    slate["recents_SRD"] = -slate["recents_SRD"]
    tensors["head.user"] = -tensors["head.user"]
    tensors["head.scale"] = -tensors["head.scale"]
    assert np.array_equal(before, CtrScorer(config, tensors).logits(**slate)[0])


def test_padding_of_recents_and_items_changes_nothing() -> None:
    config = CtrConfig(features=2, dim=8, hidden=(4,))
    scorer = CtrScorer(config, random_tensors(config, 3))
    slate = inputs(config, 2, 5, 4, 3)
    short, _ = scorer.logits(**slate)
    padded = {name: np.pad(value, [(0, 0), (0, 3)] + [(0, 0)] * (value.ndim - 2)) for name, value in slate.items()}
    np.testing.assert_allclose(scorer.logits(**padded)[0][:, :5], short, atol=1e-5)


def test_attention_is_the_softmax_over_known_recents_and_nothing() -> None:
    config = CtrConfig(features=0, dim=2, hidden=(1,), attention_dim=4)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(config).items()}
    tensors["feature_std"] = np.ones(0, np.float32)
    tensors["attention.query"][:2, :2] = np.eye(2)
    tensors["attention.key"][:2, :2] = np.eye(2) * 4
    tensors["attention.kind"][CLICK] = 0.5
    tensors["attention.decay"][0] = 1.0
    tensors["attention.nothing"][0] = 0.25
    _, weights = CtrScorer(config, tensors).logits(
        x_SCF=np.zeros((1, 2, 0), np.float32),
        items_SCD=np.array([[[1, 0], [0, 1]]], np.float32),
        recents_SRD=np.array([[[1, 0], [0, 1], [1, 0]]], np.float32),
        recent_known_SR=np.array([[True, True, False]]),
        recent_age_SR=np.array([[0, 60, 0]], np.float32),
        recent_codes_SR=np.array([[CLICK, 8, CLICK]], np.uint8),
    )
    # q·k/√4 + bias − ln(1 + minutes), and 0.25 for nothing.
    expected = [[np.exp(2 + 0.5), np.exp(-np.log(2)), 0], [np.exp(0.5), np.exp(2 - np.log(2)), 0]]
    expected = [np.array(row) / (sum(row) + np.exp(0.25)) for row in expected]
    np.testing.assert_allclose(weights[0], expected, rtol=1e-5)


def test_new_model_prefers_what_is_like_the_item_that_was_clicked() -> None:
    config = CtrConfig(features=0, dim=4)
    tensors = first_tensors(config, np.zeros(0, np.float32), np.ones(0, np.float32), 0.05, seed=0)
    here = np.array([[[1, 0, 0, 0], [0, 1, 0, 0]]], np.float32)
    logits, _ = CtrScorer(config, tensors).logits(
        np.zeros((1, 2, 0), np.float32),
        here,
        here[:, :1],
        np.ones((1, 1), np.bool_),
        np.zeros((1, 1), np.float32),
        np.array([[CLICK]], np.uint8),
    )
    assert logits[0, 0] > logits[0, 1] + 1


def test_new_model_avoids_what_is_like_the_item_that_was_hidden() -> None:
    config = CtrConfig(features=0, dim=4)
    tensors = first_tensors(config, np.zeros(0, np.float32), np.ones(0, np.float32), 0.05, seed=0)
    here = np.array([[[1, 0, 0, 0], [0, 1, 0, 0]]], np.float32)
    logits, _ = CtrScorer(config, tensors).logits(
        np.zeros((1, 2, 0), np.float32),
        here,
        here[:, :1],
        np.ones((1, 1), np.bool_),
        np.zeros((1, 1), np.float32),
        np.array([[HIDE]], np.uint8),
    )
    assert logits[0, 0] < logits[0, 1] - 0.5


def test_missing_tensor_is_named() -> None:
    config = CtrConfig(features=2)
    tensors = random_tensors(config, 4)
    del tensors["head.out"]
    with pytest.raises(ModelError, match=r"head\.out"):
        CtrScorer(config, tensors)


def test_tensor_of_another_shape_is_refused() -> None:
    config = CtrConfig(features=2)
    tensors = random_tensors(config, 4) | {"head.out": np.zeros(3, np.float32)}
    with pytest.raises(ModelError, match=r"\(3,\)"):
        CtrScorer(config, tensors)


def test_tensor_that_is_not_finite_is_refused() -> None:
    config = CtrConfig(features=2)
    tensors = random_tensors(config, 4)
    tensors["head.base"][0] = np.nan
    with pytest.raises(ModelError, match="not finite"):
        CtrScorer(config, tensors)


def test_calibration_finds_the_log_odds_that_labels_were_drawn_from() -> None:
    random = np.random.default_rng(0)
    z = random.standard_normal(40_000)
    labels = random.random(40_000) < 1 / (1 + np.exp(-(0.5 * z - 2.0)))
    np.testing.assert_allclose(fit_calibration(z, labels), [0.5, -2.0], atol=0.05)


def test_calibration_never_turns_the_order_around() -> None:
    a, _ = fit_calibration([3.0, 2.0, 1.0, 0.0], [0, 0, 1, 1])
    assert a > 0


def test_calibration_without_a_click_lowers_every_probability_by_a_shift() -> None:
    a, b = fit_calibration(np.linspace(-1, 1, 50), np.zeros(50))
    assert a == 1
    assert b < -2


def test_calibration_without_examples_changes_nothing() -> None:
    assert fit_calibration([], []).tolist() == [1, 0]


def test_listwise_loss_of_equal_scores_is_the_log_of_the_slate_length() -> None:
    logits, labels = torch.zeros(1, 4), torch.tensor([[1.0, 0, 0, 0]])
    sums = loss_sums(logits, labels, torch.ones(1, 4))
    assert float(sums.listwise) == pytest.approx(np.log(4))


def test_slate_without_a_click_has_no_listwise_loss() -> None:
    sums = loss_sums(torch.randn(2, 4), torch.zeros(2, 4), torch.ones(2, 4))
    assert float(sums.listwise) == 0
    assert float(sums.clicked_slates) == 0


def test_item_of_weight_three_counts_as_three_items() -> None:
    one = loss_sums(torch.tensor([[0.3, -0.2]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 3.0]]))
    three = loss_sums(torch.tensor([[0.3] + [-0.2] * 3]), torch.tensor([[1.0, 0, 0, 0]]), torch.ones(1, 4))
    assert float(one.listwise) == pytest.approx(float(three.listwise))
    assert float(one.cross_entropy) == pytest.approx(float(three.cross_entropy))


def test_padded_places_have_no_loss() -> None:
    short = loss_sums(torch.tensor([[0.3, -0.2]]), torch.tensor([[1.0, 0.0]]), torch.ones(1, 2))
    weights = torch.tensor([[1.0, 1.0, 0.0]])
    padded = loss_sums(torch.tensor([[0.3, -0.2, 50.0]]), torch.tensor([[1.0, 0.0, 0.0]]), weights)
    assert float(short.mean(1, 1)) == pytest.approx(float(padded.mean(1, 1)))


def test_offset_of_sampling_moves_the_cross_entropy_and_not_the_listwise_loss() -> None:
    logits, labels, weights = torch.tensor([[0.3, -0.2]]), torch.tensor([[1.0, 0.0]]), torch.ones(1, 2)
    plain, moved = loss_sums(logits, labels, weights), loss_sums(logits, labels, weights, torch.full((1, 2), 2.0))
    assert float(plain.listwise) == float(moved.listwise)
    assert float(moved.cross_entropy) == pytest.approx(float(loss_sums(logits + 2, labels, weights).cross_entropy))


def test_position_moves_the_logit_in_training_only_and_not_where_it_is_unknown_or_first() -> None:
    config = CtrConfig(features=1, dim=4, hidden=(4,), positions=3)
    module = CtrModule(config, random_tensors(config, 5))
    slate = {n: torch.from_numpy(v) for n, v in inputs(config, 1, 4, 2, 5).items()}
    with torch.no_grad():
        moved = module(**slate, positions_SC=torch.tensor([[0, 1, 2, 9]])) - module(**slate)
    table = module.get_parameter("position").detach()
    np.testing.assert_allclose(moved[0].numpy(), [0, 0, float(table[2]), float(table[3])], atol=1e-6)

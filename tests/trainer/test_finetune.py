from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from models.ctr import CtrScorer
from models.encoder import TextEncoder
from models.errors import TrainingError
from tests.trainer.tiny_world import ITEMS, TOPICS, impressions, item_hash, record, starting_point, texts
from trainer import bases
from trainer.encodings import OutputCache, SplitEncoder
from trainer.finetune import ItemTable, StartingPoint, Trained, TrainingConfig, TrainingSet, encode_items, score, train
from trainer.fit import Fitter, Measures


def settings(**changed: Any) -> TrainingConfig:
    return TrainingConfig(**{"epochs": 3, "batch_impressions": 32, "encoder_learning_rate": 1e-3, **changed})


def same_tensors(one: Trained, other: Trained, *, but: str = "") -> bool:
    names = [name for name in one.scorer.tensors if name != but]
    return all(np.array_equal(one.scorer.tensors[name], other.scorer.tensors[name]) for name in names)


class FailsOnce:
    """Calls through to ``function``, but the call at ``at`` (from 1) raises first."""

    def __init__(self, function: Callable[..., Any], error: Exception, at: int = 1, always: bool = False) -> None:
        self.function, self.error, self.at, self.always, self.calls = function, error, at, always, 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        if self.calls == self.at or (self.always and self.calls > self.at):
            raise self.error
        return self.function(*arguments, **named)


def with_method(cls: type, name: str, wrapper: FailsOnce, monkeypatch: pytest.MonkeyPatch) -> FailsOnce:
    monkeypatch.setattr(cls, name, lambda self, *arguments, **named: wrapper(self, *arguments, **named))
    return wrapper


@pytest.mark.parametrize("mode", ["frozen", "top", "lora"])
def test_training_finds_the_preference_that_the_clicks_were_drawn_from(bert: TextEncoder, mode: Any) -> None:
    trained = train(impressions(500), starting_point(bert), settings(encoder=mode, epochs=6))
    metrics = trained.metrics
    assert metrics["loss_held_back"] < metrics["start_loss_held_back"]
    assert metrics["auc_held_back"] > metrics["start_auc_held_back"]
    assert metrics["auc_calibration"] > 0.8


def test_training_of_the_top_layer_beats_the_frozen_encoder_where_the_texts_hide_the_topic(bert: TextEncoder) -> None:
    window = impressions(500)
    frozen, top = (
        train(window, starting_point(bert, dim=2), settings(encoder=mode, projection=False, residuals=False, epochs=6))
        for mode in ("frozen", "top")
    )
    assert top.metrics["loss_held_back"] < frozen.metrics["loss_held_back"]


@pytest.mark.parametrize("mode", ["frozen", "top", "lora"])
def test_same_window_gives_the_same_weights_bit_for_bit(bert: TextEncoder, mode: Any) -> None:
    config = settings(encoder=mode, epochs=2, encoder_dropout=0.1)
    one, other = (train(impressions(120), starting_point(bert), config) for _ in range(2))
    assert same_tensors(one, other)
    assert one.space.same_as(other.space)
    assert one.delta is None or one.delta.encoder_id == (other.delta and other.delta.encoder_id)


def test_another_seed_gives_other_weights(bert: TextEncoder) -> None:
    one, other = (train(impressions(120), starting_point(bert), settings(seed=seed)) for seed in (1, 2))
    assert not same_tensors(one, other)


def test_stopping_at_the_end_takes_the_last_weights_whatever_the_held_back_slice_says_of_the_epochs(
    bert: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0, 0.5, 0.7, 0.9])
    monkeypatch.setattr(Fitter, "measure", lambda self, impressions: Measures(next(losses), 0.5))
    trained = train(impressions(120), starting_point(bert), settings(stop_on="end"))
    assert trained.course.best_epoch == 3


def test_stopping_at_the_end_keeps_the_start_where_loss_and_auc_are_worse(
    bert: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    measures = iter([Measures(1.0, 0.7), Measures(0.5, 0.8), Measures(0.6, 0.8), Measures(1.1, 0.6)])
    monkeypatch.setattr(Fitter, "measure", lambda self, impressions: next(measures))
    trained = train(impressions(120), starting_point(bert), settings(stop_on="end"))
    assert trained.course.best_epoch == 0
    assert trained.space.same_as(starting_point(bert).space)


def test_training_leaves_torch_as_it_was(bert: TextEncoder) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    train(impressions(60), starting_point(bert), settings(epochs=1))
    assert torch.equal(torch.rand(1), expected)
    assert not torch.are_deterministic_algorithms_enabled()


def test_impressions_are_taken_in_time_order_however_they_are_given(bert: TextEncoder) -> None:
    window = impressions(120)
    backwards = TrainingSet(window.records[::-1], window.labels[::-1], window.texts)
    one, other = (train(given, starting_point(bert), settings(epochs=1)) for given in (window, backwards))
    assert same_tensors(one, other)


def test_labels_of_the_calibration_slice_move_nothing_but_the_calibration(bert: TextEncoder) -> None:
    window = impressions(200)
    turned = TrainingSet(window.records, [*window.labels[:180], *(1 - y for y in window.labels[180:])], window.texts)
    one, other = (train(given, starting_point(bert), settings()) for given in (window, turned))
    assert same_tensors(one, other, but="calibration")
    assert not np.array_equal(one.scorer.tensors["calibration"], other.scorer.tensors["calibration"])


def test_mean_probability_of_the_calibration_slice_is_its_click_rate(bert: TextEncoder) -> None:
    window = impressions(600)
    trained = train(window, starting_point(bert), settings())
    table = ItemTable(trained.space, encode_items(bert, window.texts, OutputCache(None, 0)))
    odds = np.concatenate(score(trained.scorer, trained.features, table, window.records[540:]))
    labels = np.concatenate(window.labels[540:])
    assert float((1 / (1 + np.exp(-odds))).mean()) == pytest.approx(float(labels.mean()), abs=0.01)


def test_score_of_an_impression_does_not_depend_on_what_else_is_asked(bert: TextEncoder) -> None:
    window = impressions(60)
    trained = train(window, starting_point(bert), settings(epochs=1))
    table = ItemTable(trained.space, encode_items(bert, window.texts, OutputCache(None, 0)))
    together = score(trained.scorer, trained.features, table, window.records)
    alone = score(trained.scorer, trained.features, table, window.records[7:8])
    np.testing.assert_allclose(together[7], alone[0], atol=1e-5)


def test_metrics_are_those_of_the_scores_that_the_bundle_gives(bert: TextEncoder) -> None:
    window = impressions(200)
    trained = train(window, starting_point(bert), settings())
    table = ItemTable(trained.space, encode_items(bert, window.texts, OutputCache(None, 0)))
    odds = score(trained.scorer, trained.features, table, window.records[180:])
    losses = [np.logaddexp(0, z) - y * z for z, y in zip(odds, window.labels[180:], strict=True)]
    assert trained.metrics["log_loss_calibration"] == pytest.approx(float(np.concatenate(losses).mean()), abs=1e-5)


# --- what stays -------------------------------------------------------------------------------------------------------


def test_frozen_encoder_does_not_move_and_brings_no_delta(bert: TextEncoder) -> None:
    before = bert.encode(["new goal", "the bank"])
    trained = train(impressions(120), starting_point(bert), settings())
    assert trained.delta is None
    assert trained.encodings is None
    assert np.array_equal(bert.encode(["new goal", "the bank"]), before)


@pytest.mark.parametrize("mode", ["top", "lora"])
def test_encoder_of_the_start_does_not_move_when_a_copy_of_it_is_trained(bert: TextEncoder, mode: Any) -> None:
    before = bert.encode(["new goal", "the bank"])
    train(impressions(120), starting_point(bert), settings(encoder=mode))
    assert np.array_equal(bert.encode(["new goal", "the bank"]), before)


def test_head_alone_leaves_the_space_under_its_id(bert: TextEncoder) -> None:
    start = starting_point(bert)
    trained = train(impressions(120), start, settings(projection=False, residuals=False), new_space_id="space-2")
    assert trained.space is start.space
    assert trained.carry is None


def test_trained_projection_makes_a_space_with_the_new_id_and_a_map_from_the_old_one(bert: TextEncoder) -> None:
    start = starting_point(bert)
    trained = train(impressions(200), start, settings(residuals=False), new_space_id="space-2")
    assert trained.space.space_id == "space-2"
    assert trained.carry is not None
    base = bert.encode(list(texts().values()))
    old, new = start.space.vectors(base), trained.space.vectors(base)
    assert np.linalg.norm(old @ trained.carry - new) < np.linalg.norm(old - new)


def with_sims(examples: TrainingSet, seed: int) -> TrainingSet:
    """Return the examples with other similarities to their users' vectors."""
    random = np.random.default_rng(seed)
    records = [
        msgspec.structs.replace(r, sims=random.uniform(-1, 1, (len(r), 2)).astype("<f2").tobytes())
        for r in examples.records
    ]
    return TrainingSet(records, examples.labels, examples.texts)


@pytest.mark.parametrize("changed", [{"residuals": False}, {"projection": False}])
def test_a_model_of_a_new_space_takes_no_notice_of_similarities_in_the_old_one(
    bert: TextEncoder, changed: dict[str, bool]
) -> None:
    examples = with_sims(impressions(120), 1)
    for options, is_same in ((changed, True), ({"projection": False, "residuals": False}, False)):
        trained = train(examples, starting_point(bert), settings(**options))
        table = ItemTable(trained.space, encode_items(bert, texts(), OutputCache(None, 0)))
        first, second = (
            np.concatenate(score(trained.scorer, trained.features, table, with_sims(examples, seed).records))
            for seed in (1, 2)
        )
        assert np.allclose(first, second, atol=1e-5) == is_same


def test_only_shown_items_have_a_residual_and_a_rare_one_has_less(bert: TextEncoder) -> None:
    window = impressions(200)
    weak = train(window, starting_point(bert), settings(residual_strength=1e6))
    strong = train(window, starting_point(bert), settings(residual_strength=1.0))
    shown = {h for r in window.records[:160] for h in np.frombuffer(r.items, "<u8").tolist()}
    assert set(strong.space.residual_items.tolist()) == shown
    assert np.abs(weak.space.residuals).max() < 1e-3 < np.abs(strong.space.residuals).max()


def test_start_that_is_better_than_all_that_follows_is_kept(bert: TextEncoder) -> None:
    window = impressions(300)
    start = starting_point(bert)
    first = train(window, start, settings(projection=False, residuals=False))
    parent = StartingPoint(start.space, bert, scorer=first.scorer, features=first.features)
    turned = TrainingSet(window.records, [*(1 - y for y in window.labels[:240]), *window.labels[240:]], window.texts)
    worse = train(turned, parent, settings())
    assert worse.metrics["best_epoch"] == 0
    assert same_tensors(first, worse, but="calibration")
    assert worse.space is start.space


def test_training_stops_when_the_held_back_slice_gets_no_better(bert: TextEncoder) -> None:
    window = impressions(150)
    noise = np.random.default_rng(0)
    labels = [noise.permutation(y) for y in window.labels]
    trained = train(
        TrainingSet(window.records, labels, window.texts), starting_point(bert), settings(epochs=60, learning_rate=0.05)
    )
    assert trained.metrics["epochs"] == trained.metrics["best_epoch"] + 2


# --- encoder deltas ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["top", "lora"])
def test_encoder_with_the_delta_gives_the_encodings_of_the_bundle(bert: TextEncoder, mode: Any) -> None:
    trained = train(impressions(200), starting_point(bert), settings(encoder=mode))
    assert trained.delta is not None
    assert trained.encodings is not None
    encoder = bert.copy().with_delta(trained.delta)
    assert encoder.encoder_id == trained.space.encoder_id
    expected = encoder.encode([texts()[item] for item in trained.encodings.items.tolist()])
    np.testing.assert_allclose(trained.encodings.base.astype(np.float32), expected, atol=2e-3)
    assert np.abs(bert.encode([texts()[trained.encodings.items.tolist()[0]]]) - expected[0]).max() > 2e-3
    through_the_cache = encode_items(bert, texts(), OutputCache(None, 0), delta=trained.delta)
    np.testing.assert_allclose(through_the_cache.base.astype(np.float32), expected, atol=2e-3)


def test_lora_delta_is_two_small_matrices_for_query_and_value(bert: TextEncoder) -> None:
    trained = train(impressions(60), starting_point(bert), settings(encoder="lora", lora_rank=2))
    assert trained.delta is not None
    names = {f"encoder.layer.1.attention.self.{part}.lora_{x}" for part in ("query", "value") for x in "AB"}
    assert set(trained.delta.tensors) == names
    assert sum(v.size for v in trained.delta.tensors.values()) == 4 * 2 * 32


@pytest.mark.parametrize(("first", "second"), [("lora", "lora"), ("top", "top"), ("lora", "top"), ("top", "lora")])
def test_next_round_starts_from_the_encoder_of_its_parent(bert: TextEncoder, first: Any, second: Any) -> None:
    window = impressions(200)
    parent = train(window, starting_point(bert), settings(encoder=first))
    start = StartingPoint(parent.space, bert, parent.delta, parent.scorer, parent.features)
    child = train(
        window, start, settings(encoder=second, encoder_learning_rate=1e-9, learning_rate=1e-3, stop_on="auc")
    )
    assert child.metrics["start_auc_held_back"] == pytest.approx(parent.metrics["auc_held_back"], abs=0.01)
    if child.delta is not None and child.encodings is not None and parent.encodings is not None:
        assert child.delta.base_encoder_id == bert.encoder_id
        np.testing.assert_allclose(child.encodings.base, parent.encodings.base, atol=2e-3)
        again = bert.copy().with_delta(child.delta).encode([texts()[child.encodings.items.tolist()[0]]])
        np.testing.assert_allclose(again[0], child.encodings.base[0].astype(np.float32), atol=2e-3)


def test_frozen_round_keeps_the_encoder_of_its_parent(bert: TextEncoder) -> None:
    window = impressions(200)
    parent = train(window, starting_point(bert), settings(encoder="top"))
    start = StartingPoint(parent.space, bert, parent.delta, parent.scorer, parent.features)
    child = train(window, start, settings(encoder="frozen"), new_space_id="space-3")
    assert child.delta is parent.delta
    assert child.space.encoder_id == parent.space.encoder_id


def test_space_of_another_encoder_is_refused(bert: TextEncoder) -> None:
    parent = train(impressions(60), starting_point(bert), settings(encoder="top"))
    with pytest.raises(TrainingError, match="encoder: the space is of"):
        train(impressions(60), StartingPoint(parent.space, bert), settings())


def test_text_of_a_group_of_steps_passes_the_trained_layers_once(
    bert: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = SplitEncoder.forward

    def counted(self: SplitEncoder, rows: Any) -> Any:
        if torch.is_grad_enabled():
            seen.extend(rows.tolist())
        return forward(self, rows)

    monkeypatch.setattr(SplitEncoder, "forward", counted)
    train(impressions(100), starting_point(bert), settings(encoder="top", epochs=1, encoder_interval=1_000))
    assert len(seen) == len(set(seen)) > 0.5 * len(set(texts().values()))


def test_texts_that_are_run_again_for_their_gradient_give_the_same_weights(
    bert: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(encoder="top", encoder_dropout=0.2, encoder_batch_texts=8)
    kept = train(impressions(100), starting_point(bert), config)
    monkeypatch.setattr(bases, "GRAPH_TOKENS", 0)
    again = train(impressions(100), starting_point(bert), config)
    assert kept.delta is not None
    assert again.delta is not None
    for name, value in kept.delta.tensors.items():
        np.testing.assert_allclose(again.delta.tensors[name], value, atol=1e-6)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_batch_that_memory_does_not_hold_is_halved_and_learned_the_same(
    bert: TextEncoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from models.ctr_module import CtrModule

    config = settings(dropout=0.0, epochs=1)
    whole = train(impressions(150), starting_point(bert), config)
    error = torch.OutOfMemoryError("CUDA out of memory")
    failing = with_method(CtrModule, "forward", FailsOnce(CtrModule.forward, error, at=3), monkeypatch)
    halves = train(impressions(150), starting_point(bert), config)
    assert failing.calls > 3
    assert "going on with 16" in caplog.text
    np.testing.assert_allclose(halves.scorer.tensors["head.item"], whole.scorer.tensors["head.item"], atol=1e-4)


def test_half_of_a_step_before_memory_ended_is_not_counted_twice(
    bert: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.ctr_module import CtrModule

    # Call 1 measures the start, call 2 is the first batch of the first step, call 3 the second.
    config = settings(encoder="top", dropout=0.0, epochs=1, accumulate=2)
    whole = train(impressions(150), starting_point(bert), config)
    error = torch.OutOfMemoryError("CUDA out of memory")
    with_method(CtrModule, "forward", FailsOnce(CtrModule.forward, error, at=3), monkeypatch)
    halves = train(impressions(150), starting_point(bert), config)
    assert whole.delta is not None
    assert halves.delta is not None
    for name, value in whole.delta.tensors.items():
        np.testing.assert_allclose(halves.delta.tensors[name], value, atol=1e-4)


def test_encoder_pass_that_memory_does_not_hold_is_halved(
    bert: TextEncoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = train(impressions(100), starting_point(bert), settings(encoder="top", epochs=1))
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")
    with_method(SplitEncoder, "forward", FailsOnce(SplitEncoder.forward, error, at=4), monkeypatch)
    halves = train(impressions(100), starting_point(bert), settings(encoder="top", epochs=1))
    assert "going on with" in caplog.text
    assert whole.metrics["auc_held_back"] == pytest.approx(halves.metrics["auc_held_back"], abs=0.02)


def test_backward_pass_that_memory_does_not_hold_is_run_again_in_halves(
    bert: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(encoder="top", epochs=1)
    whole = train(impressions(100), starting_point(bert), config)
    error = RuntimeError("CUDA out of memory")
    failing = FailsOnce(bases.TrainedBase._backward_pass, error, at=2)
    with_method(bases.TrainedBase, "_backward_pass", failing, monkeypatch)
    halves = train(impressions(100), starting_point(bert), config)
    assert whole.delta is not None
    assert halves.delta is not None
    for name, value in whole.delta.tensors.items():
        np.testing.assert_allclose(halves.delta.tensors[name], value, atol=1e-4)


def test_single_impression_that_memory_does_not_hold_ends_the_training(
    bert: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.ctr_module import CtrModule

    error = torch.OutOfMemoryError("CUDA out of memory")
    with_method(CtrModule, "forward", FailsOnce(CtrModule.forward, error, at=3, always=True), monkeypatch)
    with pytest.raises(TrainingError, match="out-of-memory"):
        train(impressions(150), starting_point(bert), settings())


def test_other_errors_of_torch_are_not_taken_for_lack_of_memory(
    bert: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.ctr_module import CtrModule

    with_method(CtrModule, "forward", FailsOnce(CtrModule.forward, RuntimeError("shapes differ"), at=3), monkeypatch)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(impressions(150), starting_point(bert), settings())


def test_loss_that_is_not_finite_ends_the_training(bert: TextEncoder) -> None:
    start = starting_point(bert)
    first = train(impressions(60), start, settings(epochs=1, projection=False, residuals=False))
    huge = CtrScorer(
        first.scorer.config,
        {**first.scorer.tensors, "head.scale": np.full(1, 3e38, np.float32), "head.out": np.full(32, 3e38, np.float32)},
    )
    with pytest.raises(TrainingError, match="loss-not-finite"):
        train(impressions(60), StartingPoint(start.space, bert, scorer=huge, features=first.features), settings())


def test_window_without_a_click_is_refused(bert: TextEncoder) -> None:
    window = impressions(60)
    with pytest.raises(TrainingError, match="labels: all labels"):
        train(TrainingSet(window.records, [0 * y for y in window.labels], window.texts), starting_point(bert))


def test_window_of_nine_impressions_is_refused(bert: TextEncoder) -> None:
    with pytest.raises(TrainingError, match="window-too-small"):
        train(impressions(9), starting_point(bert))


def test_labels_that_do_not_fit_their_impression_are_refused(bert: TextEncoder) -> None:
    window = impressions(60)
    with pytest.raises(TrainingError, match="labels: impression 1"):
        train(TrainingSet(window.records, [y[1:] for y in window.labels], window.texts), starting_point(bert))


def test_what_progress_raises_ends_the_training(bert: TextEncoder) -> None:
    def stop(step: str, done: int, total: int | None) -> None:
        if step.startswith("epoch 2"):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(impressions(60), starting_point(bert), settings(), on_progress=stop)


# --- variants ---------------------------------------------------------------------------------------------------------


def test_accumulated_batches_make_fewer_steps(bert: TextEncoder) -> None:
    totals: dict[int, int | None] = {}
    for accumulate in (1, 2):

        def note(step: str, done: int, total: int | None, accumulate: int = accumulate) -> None:
            if step.startswith("epoch"):
                totals[accumulate] = total

        train(impressions(200), starting_point(bert), settings(epochs=1, accumulate=accumulate), on_progress=note)
    assert totals == {1: 5, 2: 3}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_learns_nearly_the_same(bert: TextEncoder, precision: Any) -> None:
    window = impressions(300)
    config = settings(encoder="top", epochs=3)
    full = train(window, starting_point(bert), config)
    half = train(window, starting_point(bert), config.model_copy(update={"precision": precision}))
    assert half.metrics["loss_held_back"] == pytest.approx(full.metrics["loss_held_back"], abs=0.1)


def test_cuda_without_a_gpu_is_refused(bert: TextEncoder) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(TrainingError, match="finds no GPU"):
        train(impressions(60), starting_point(bert), settings(device="cuda"))


def test_drawn_negatives_do_not_lift_the_probability(bert: TextEncoder) -> None:
    """One of 20 items is clicked; a log that keeps one in four of the others must not say one in five."""
    random = np.random.default_rng(0)
    records, labels = [], []
    for number in range(1_000):
        shown = random.choice(ITEMS, 5, replace=False).tolist()
        records.append(record(number, number % 30, shown, [], 1_700_000_000_000 + number, negative_rate=4 / 19))
        labels.append(np.array([1, 0, 0, 0, 0], np.float32))
    window = TrainingSet(records, labels, texts())
    trained = train(window, starting_point(bert), settings(epochs=2, projection=False, residuals=False))
    table = ItemTable(trained.space, encode_items(bert, window.texts, OutputCache(None, 0)))
    odds = np.concatenate(score(trained.scorer, trained.features, table, records[-100:]))
    assert float((1 / (1 + np.exp(-odds))).mean()) == pytest.approx(1 / 20, abs=0.01)


def test_item_without_a_text_can_be_shown_and_clicked(bert: TextEncoder) -> None:
    window = impressions(200)
    some = {h: t for h, t in window.texts.items() if h % 3}
    trained = train(TrainingSet(window.records, window.labels, some), starting_point(bert), settings(encoder="top"))
    assert np.isfinite(trained.metrics["log_loss_calibration"])
    assert not set(trained.space.residual_items.tolist()) - set(some)


def test_vector_that_an_item_brings_counts_in_training_as_in_serving(bert: TextEncoder) -> None:
    window = impressions(300)
    topic = {item_hash(i): np.eye(3)[i % len(TOPICS)].tolist() for i in range(ITEMS)}
    plain, helped = (
        train(TrainingSet(window.records, window.labels, {}, embeddings=own), starting_point(bert), settings())
        for own in ({}, topic)
    )
    assert helped.metrics["auc_calibration"] > plain.metrics["auc_calibration"] + 0.1

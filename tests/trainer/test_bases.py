from __future__ import annotations

import numpy as np
import torch

from models.encoder import TextEncoder
from trainer.bases import TrainedBase, warm_up_and_decay
from trainer.encodings import OutputCache, SplitEncoder
from trainer.training_config import TrainingConfig

TEXTS = ["the goal of the team", "bank", "new film star"]
NO_TEXT = 3
CPU = torch.device("cpu")


def cut(bert: TextEncoder) -> SplitEncoder:
    split = SplitEncoder(bert, None, TrainingConfig(encoder="top"), CPU, "float32")
    split.load(TEXTS, OutputCache(None, 0))
    return split


def trained_base(split: SplitEncoder, clip_norm: float = 1e6) -> TrainedBase:
    """Items 0, 1 and 2 have a text each, item 3 none; plain gradient descent."""
    optimiser = torch.optim.SGD(split.parameters, lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainedBase(split, np.array([0, 1, 2, -1]), CPU, optimiser, schedule, clip_norm, scaler)


def weights(split: SplitEncoder) -> list[torch.Tensor]:
    return [p.detach().clone() for p in split.parameters]


def test_layers_take_one_step_along_the_mean_gradient_of_a_groups_steps(bert: TextEncoder) -> None:
    direction = torch.linspace(-1, 1, bert.dim)
    expected = cut(bert)
    encoded = expected.encode(np.arange(3))
    torch.autograd.backward(((encoded[0] @ direction) + 3 * (encoded[1] @ direction)) / 2)
    gradients = [p.grad for p in expected.parameters]

    split = cut(bert)
    before = weights(split)
    base = trained_base(split)
    base.begin(np.array([0, 1, 2, NO_TEXT]))
    for item, factor in ((0, 1.0), (1, 3.0)):
        torch.autograd.backward(factor * (base.of(np.array([item]))[0] @ direction))
        base.take_gradient(1.0)
    base.end()
    for after, old, gradient in zip(weights(split), before, gradients, strict=True):
        assert gradient is not None
        np.testing.assert_allclose((old - after).numpy(), 0.1 * gradient.numpy(), atol=1e-6)


def test_unfinished_step_leaves_nothing_behind(bert: TextEncoder) -> None:
    split = cut(bert)
    before = weights(split)
    base = trained_base(split)
    base.begin(np.array([0, 1]))
    torch.autograd.backward(base.of(np.array([0])).sum())
    base.drop_gradient()
    base.end()
    assert all(torch.equal(a, b) for a, b in zip(weights(split), before, strict=True))


def test_item_without_a_text_has_a_zero_encoding(bert: TextEncoder) -> None:
    base = trained_base(cut(bert))
    base.begin(np.array([1, NO_TEXT]))
    assert base.of(np.array([NO_TEXT])).abs().sum() == 0
    assert base.evaluate(np.array([NO_TEXT, 1])).abs().sum(1).bool().tolist() == [False, True]


def test_gradient_beyond_the_longest_is_shortened(bert: TextEncoder) -> None:
    split = cut(bert)
    before = weights(split)
    base = trained_base(split, clip_norm=0.5)
    base.begin(np.array([0]))
    torch.autograd.backward(1e4 * base.of(np.array([0]))[0, 0])
    base.take_gradient(1.0)
    base.end()
    moved = torch.cat([(a - b).flatten() for a, b in zip(weights(split), before, strict=True)])
    assert abs(float(moved.norm()) - 0.1 * 0.5) < 1e-4


def test_rates_rise_and_then_fall_to_nothing() -> None:
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = warm_up_and_decay(optimiser, 10, 0.4)
    rates = []
    for _ in range(11):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    np.testing.assert_allclose(rates, [0.2, 0.4, 0.6, 0.8, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0], atol=1e-9)

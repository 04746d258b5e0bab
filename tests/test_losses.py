"""Policy and value losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from trainer import losses

LOW, HIGH = 0.2, 0.28


def logs(*ratios: float) -> torch.Tensor:
    return torch.tensor([math.log(r) for r in ratios], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        # l = -min(r A, clip(r) A); slope = dl / dlog pi
        (1.0, 2.0, -2.0, -2.0, False),
        (1.27, 2.0, -2.54, -2.54, False),
        (1.5, 2.0, -2.56, 0.0, True),  # too good already: no gradient
        (0.5, 2.0, -1.0, -1.0, False),  # a good action became rarer: full gradient
        (0.81, -1.0, 0.81, 0.81, False),
        (0.5, -1.0, 0.8, 0.0, True),
        (1.5, -1.0, 1.5, 1.5, False),  # a bad action became likelier: full gradient
    ],
)
def test_ppo_around_its_clip(ratio: float, advantage: float, loss: float, slope: float, clipped: bool) -> None:
    new = logs(ratio)
    found = losses.ppo(new, torch.zeros(1), torch.tensor([advantage]), LOW, HIGH)
    found.loss_T.sum().backward()
    assert found.loss_T.item() == pytest.approx(loss)
    assert new.grad is not None
    assert new.grad.item() == pytest.approx(slope)
    assert found.clipped_T.item() is clipped


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        # window (0.2, 4.0): clip_low 0.8, clip_high 3.0; slope = -f(x) A
        (1.0, 2.0, -2.0),
        (3.99, 1.0, -3.99),
        (4.01, 1.0, 0.0),
        (0.21, -1.0, 0.21),
        (0.19, -1.0, 0.0),
        (4.01, -1.0, 0.0),  # masked on both sides whatever the sign
    ],
)
def test_dis_masks_both_sides(ratio: float, advantage: float, slope: float) -> None:
    new = logs(ratio)
    found = losses.dis(new, torch.zeros(1), torch.tensor([advantage]), 0.8, 3.0)
    found.loss_T.sum().backward()
    assert new.grad is not None
    assert new.grad.item() == pytest.approx(slope)
    assert found.clipped_T.item() is (slope == 0.0)


def test_on_policy_ppo_and_dis_have_the_policy_gradient() -> None:
    advantages = torch.tensor([0.5, -2.0, 3.0])
    for loss in (losses.ppo, losses.dis):
        new = torch.tensor([-0.1, -2.0, -5.0], requires_grad=True)
        loss(new, new.detach(), advantages, LOW, HIGH).loss_T.sum().backward()
        assert new.grad is not None
        torch.testing.assert_close(new.grad, -advantages)


def test_value_loss_is_half_the_squared_error_or_the_larger_clipped_one() -> None:
    values, old, returns = torch.tensor([0.9, 0.1]), torch.tensor([0.1, 0.1]), torch.tensor([1.0, 1.0])
    torch.testing.assert_close(losses.value(values, old, returns, 0.0), torch.tensor([0.005, 0.405]))
    # moved by .8, clipped to old + .2 = .3: error .7 instead of .1
    torch.testing.assert_close(losses.value(values, old, returns, 0.2), torch.tensor([0.245, 0.405]))

"""The value head: one fp32 number per token, bounded or not."""

from __future__ import annotations

import math

import pytest
import torch

from critic.head import bounded, value_head
from trainer.config import LayoutConfig, Precision
from trainer.megatron.config import MegatronConfig
from trainer.megatron.model import transformer_config
from trainer.megatron.modules.head import ValueHead
from trainer.models.shape import ModelShape

SHAPE = ModelShape(
    num_layers=1,
    hidden=6,
    heads=2,
    kv_heads=1,
    head_dim=4,
    ffn=8,
    vocab=10,
    norm_eps=1e-6,
    rope_base=1e4,
    tied=True,
    qk_norm=True,
    max_positions=16,
)
RANGES = [(0.0, 1.0), (-1.0, 1.0), (-0.3, 0.7), (1000.0, 1001.0), (-5.0, 1e-3), (0.0, 1e-30)]


def head(
    init_std: float = 0.0, value_range: tuple[float, ...] = (), precision: Precision = Precision.fp32
) -> ValueHead:
    config = transformer_config(SHAPE, LayoutConfig(precision=precision), MegatronConfig())
    return ValueHead(config, value_head(init_std, value_range), 0)


def test_bounded_by_hand() -> None:
    x = torch.tensor([-math.sqrt(3), -1.0, 0.0, 1.0, math.sqrt(3)])  # angles of -60, -45, 0, 45 and 60 degrees
    wanted = torch.tensor([2 + 2 / 3, 3.0, 4.0, 5.0, 5 + 1 / 3])
    torch.testing.assert_close(bounded(x, 2.0, 6.0), wanted)


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_bounded_is_strictly_inside_and_never_falls(low: float, high: float) -> None:
    sizes = torch.logspace(-6, 38, 500)
    x = torch.cat([-sizes.flip(0), torch.zeros(1), sizes, torch.tensor([float("inf")])])
    v = bounded(x, low, high)
    bounds = torch.tensor([low, high], dtype=torch.float32)
    assert bool(((v > bounds[0]) & (v < bounds[1])).all())
    assert bool((v.diff() >= 0).all())
    if abs(low) < 10 * (high - low):  # otherwise fp32 has few numbers in the range
        near = x.abs() < 100
        assert bool((v[near & (x.abs() > 1e-3)].diff() > 0).all())


def test_bounded_has_its_gradient_everywhere_also_where_fp32_reaches_the_bound() -> None:
    x = torch.tensor([-1e12, -3.0, 0.0, 0.5, 3.0, 1e9], requires_grad=True)
    (slope,) = torch.autograd.grad(bounded(x, -1.0, 3.0).sum(), x)
    torch.testing.assert_close(slope, 4.0 / math.pi / (1 + x.detach() ** 2), rtol=1e-5, atol=0)
    assert bool((slope > 0).all())
    far = torch.tensor([float("inf"), -3e38], requires_grad=True)
    (slope,) = torch.autograd.grad(bounded(far, -1.0, 3.0).sum(), far)
    assert slope.tolist() == [0.0, 0.0]  # 1 / x^2 is less than fp32 can say; not NaN


@pytest.mark.parametrize("value_range", [(1.0, 1.0 + 1e-8), (1.0, 1.0), (2.0, 1.0), (1e39, 1e40)])
def test_range_without_numbers_is_refused(value_range: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="as float32 both must be finite, with other numbers between"):
        head(value_range=value_range)


def test_zero_head_says_zero_or_the_middle_and_learns() -> None:
    hidden = torch.randn(5, 1, 6, generator=torch.Generator().manual_seed(0))
    assert head()(hidden)[0].tolist() == [[[0.0]]] * 5
    bounded_head = head(value_range=(-1.0, 2.0))
    value, none = bounded_head(hidden)
    assert none is None
    assert value.shape == (5, 1, 1)
    assert value.flatten().tolist() == [0.5] * 5
    value.sum().backward()
    torch.testing.assert_close(bounded_head.weight.grad, 3 / math.pi * hidden.sum((0, 1))[None])
    torch.testing.assert_close(bounded_head.bias.grad, torch.tensor([5 * 3 / math.pi]))


def test_bounded_head_is_the_bound_of_the_linear_one() -> None:
    hidden = 3 * torch.randn(7, 1, 6, generator=torch.Generator().manual_seed(1))
    linear = head(init_std=0.5)(hidden)[0]
    assert float(linear.detach().abs().max()) > 1
    torch.testing.assert_close(head(0.5, (-2.0, 1.0))(hidden)[0], bounded(linear, -2.0, 1.0))


def test_head_computes_in_fp32_below_a_bf16_model() -> None:
    hidden = torch.randn(4, 1, 6, generator=torch.Generator().manual_seed(2)).bfloat16()
    for value_range in [(), (-1.0, 1.0)]:
        coarse = head(0.5, value_range, Precision.bf16)
        value = coarse(hidden)[0]
        assert value.dtype == torch.float32
        assert torch.equal(value, head(0.5, value_range)(hidden.float())[0])

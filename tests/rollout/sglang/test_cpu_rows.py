"""Products whose rows do not depend on the rows beside them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rollout.sglang.cpu import rows as blocked_rows
from rollout.sglang.cpu.rows import MAX_ROWS, ROWS, BlockedEmbedding, BlockedLinear, install, largest_block, linear


def test_rows_are_those_of_the_whole_product() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(48, 40, generator=generator), torch.randn(48, generator=generator)
    for shape in ((0, 40), (1, 40), (16, 40), (33, 40), (2, 3, 40)):
        x = torch.randn(shape, generator=generator)
        for offset in (None, bias):
            torch.testing.assert_close(linear(x, weight, offset), torch.nn.functional.linear(x, weight, offset))


@pytest.mark.parametrize(("num_in", "num_out"), [(128, 128), (320, 128), (128, 640), (1024, 4096), (3072, 1024)])
@pytest.mark.parametrize("biased", [True, False])
def test_a_row_has_the_same_bits_alone_and_among_others(num_in: int, num_out: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(num_in)
    x, weight = torch.randn(300, num_in, generator=generator), torch.randn(num_out, num_in, generator=generator)
    bias = torch.randn(num_out, generator=generator) if biased else None
    block = largest_block(weight)
    together = linear(x, weight, bias, block)
    for begin, end in ((0, 1), (7, 8), (299, 300), (3, 9), (50, 66), (1, 100), (17, 300)):
        assert torch.equal(linear(x[begin:end], weight, bias, block), together[begin:end]), (begin, end)


def test_blocks_are_small_where_large_ones_round_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(48, 40)

    def rounds_otherwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return plain(x, weight, bias) * (1 + 1e-6 * (len(x) == 7 * ROWS))

    plain = torch.nn.functional.linear
    monkeypatch.setattr(blocked_rows.torch.nn.functional, "linear", rounds_otherwise)
    assert largest_block(weight) == ROWS


def test_every_product_of_a_model_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers, head and experts; other modules keep what they have."""
    from sglang.srt.layers.moe import fused_moe_native
    from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod

    monkeypatch.setattr(fused_moe_native, "F", fused_moe_native.F)
    model: Any = torch.nn.Sequential(*(torch.nn.Identity() for _ in range(3)))
    model[0].quant_method, model[1].quant_method = UnquantizedLinearMethod(), UnquantizedEmbeddingMethod()
    model[0].weight = model[1].weight = torch.nn.Parameter(torch.randn(48, 40), requires_grad=False)
    install(model)
    assert [type(module.quant_method) for module in model[:2]] == [BlockedLinear, BlockedEmbedding]
    assert model[0].quant_method.block in (ROWS, MAX_ROWS)
    assert not hasattr(model[2], "quant_method")
    assert fused_moe_native.F.linear is linear


def test_experts_answer_a_token_alike_alone_and_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 experts, 2 a token, as SGLang computes them on a CPU."""
    from sglang.srt.layers.moe import fused_moe_native

    monkeypatch.setattr(fused_moe_native, "F", SimpleNamespace(linear=linear))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 128, generator=generator)
    weights, ids = torch.softmax(torch.randn(50, 4, generator=generator), -1).topk(2)
    layer = SimpleNamespace(
        num_experts=4,
        w13_weight=torch.randn(4, 640, 128, generator=generator),
        w2_weight=torch.randn(4, 128, 320, generator=generator),
    )
    config = SimpleNamespace(apply_router_weight_on_input=False, activation="silu", gemm1_alpha=None)
    monkeypatch.setattr(fused_moe_native, "SiluAndMul", lambda: silu_and_mul)

    def answers(rows: slice) -> torch.Tensor:
        return fused_moe_native.moe_forward_native(layer, x[rows], (weights[rows], ids[rows], None), config)

    together = answers(slice(None))
    for row in range(50):
        assert torch.equal(answers(slice(row, row + 1))[0], together[row])


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up

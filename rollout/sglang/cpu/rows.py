"""Linear layers of an engine on a CPU whose rows do not depend on what is computed beside them.

A matrix product with few rows adds in another order than one with many, so that a token's log-probability would depend
on how many requests run at once. Here a product has 16, 32, ... or 128 rows: a batch is filled up with zeros to a
multiple of 16, and cut into blocks of 128. When a model is loaded, each of these sizes is tried with each of its
weights; where one gives other bits than 16 rows do, the blocks are of 16. Importing this module imports SGLang.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.moe import fused_moe_native
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod

ROWS = 16  # of the smallest product
MAX_ROWS = 128  # of the largest one: it takes half the time of eight small ones


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, block: int = ROWS) -> torch.Tensor:
    """Return x W^T + b [..., N] of x [..., K], weight [N, K] and bias [N], at most `block` rows at a time."""
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if missing := -count % ROWS:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
    if len(rows) <= block:
        out = torch.nn.functional.linear(rows, weight, bias)
    else:
        out = torch.cat([torch.nn.functional.linear(part, weight, bias) for part in rows.split(block)])
    return out[:count].view(*x.shape[:-1], len(weight))


def largest_block(weight: torch.Tensor) -> int:
    """Return how many rows a product with this weight may have: MAX_ROWS, or ROWS where larger ones round otherwise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(MAX_ROWS, weight.shape[1], generator=generator).to(weight.dtype)
    for bias in (None, torch.randn(len(weight), generator=generator).to(weight.dtype)):
        moved, expected = x.roll(1, 0), linear(x, weight, bias).roll(1, 0)
        for rows in range(2 * ROWS, MAX_ROWS + 1, ROWS):
            if not torch.equal(linear(moved[:rows], weight, bias, rows), expected[:rows]):
                return ROWS
    return MAX_ROWS


class BlockedLinear(UnquantizedLinearMethod):
    """SGLang's linear layer without quantization, in blocks of rows."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(x, layer.weight, bias, self.block)


class BlockedEmbedding(UnquantizedEmbeddingMethod):
    """SGLang's embedding, which is also the head: for a class of another name than its own it calls `apply`."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(x, layer.weight, bias, self.block)


BLOCKED = {UnquantizedLinearMethod: BlockedLinear, UnquantizedEmbeddingMethod: BlockedEmbedding}


def install(model: torch.nn.Module) -> None:
    """Let all products of a loaded model go through `linear`: layers, head, and experts."""
    blocks: dict[torch.Size, int] = {}
    module: Any  # SGLang's layers have a quant_method
    for module in model.modules():
        if blocked := BLOCKED.get(type(getattr(module, "quant_method", None))):
            shape = module.weight.shape
            if shape not in blocks:
                blocks[shape] = largest_block(module.weight)
            module.quant_method = blocked(blocks[shape])
    fused_moe_native.F = SimpleNamespace(linear=linear)  # all that a product of experts takes from there

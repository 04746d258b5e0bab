"""The value head: hidden state -> one number per token, in fp32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from trainer.megatron import cpu

cpu.enable()

from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # noqa: E402


class ValueHead(MegatronModule):
    """Stands where GPTModel's vocabulary projection stood and is called like it.

        v = w h + b                        or, with value_range = [low, high], `bounded` of that

    [T, 1, hidden] (or its sequence-parallel slice) -> [T, 1, 1]. The weights are replicated over
    tensor-parallel ranks and drawn from the same seed on all of them; std 0 starts every value at 0, or in
    the middle of its range. ValueError: see `bounded`.
    """

    def __init__(
        self, config: TransformerConfig, init_std: float, seed: int, value_range: Sequence[float] = ()
    ) -> None:
        super().__init__(config=config)
        if value_range:
            bounded(torch.zeros(1), *value_range)  # refuses here what it would refuse at the first forward pass
        self.value_range = tuple(value_range)
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(1, config.hidden_size, generator=generator) * init_std)
        self.bias = torch.nn.Parameter(torch.zeros(1))
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = bool(config.sequence_parallel)

    def forward(
        self, hidden: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, None]:
        value = F.linear(hidden.float(), self.weight.float(), self.bias.float())
        if self.value_range:
            value = bounded(value, *self.value_range)
        if self.config.sequence_parallel:
            value = gather_from_sequence_parallel_region(value, tensor_parallel_output_grad=False)
        return value, None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        own = {"weight": self.weight, "bias": self.bias}
        return make_sharded_tensors_for_checkpoint(own, prefix, {}, sharded_offsets)


def bounded(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Any number to one strictly between low and high, rising, in fp32.

        v     = (low + high) / 2 + (high - low) / pi * atan(x)
        dv/dx = (high - low) / pi / (1 + x^2)

    x = 0 is the middle, |x| = 1 half the way to a bound. Bounding values by atan is BPCO's idea (arXiv 2608.23566); the
    constants are ours. Where fp32 would round v to a bound it is the nearest number inside; the gradient is the one
    above everywhere: small far out (0 only where x^2 is beyond fp32), but never cut off as by a clamp.

    ValueError: no fp32 number lies between the bounds, or they are too large for fp32.
    """
    with np.errstate(over="ignore"):
        bottom, top = np.float32(low), np.float32(high)
    first, last = np.nextafter(bottom, top), np.nextafter(top, bottom)
    if not bottom < first <= last < top or np.isinf(top - bottom):
        raise ValueError(f"value_range=[{low}, {high}]: as float32 these must be finite, with others between them")
    v = (low + high) / 2 + (high - low) / math.pi * torch.atan(x.float())
    with torch.no_grad():
        back = v.clamp(float(first), float(last)) - v  # at most a rounding error
    return v + back

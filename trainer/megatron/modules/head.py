"""The scalar head: hidden state -> one fp32 number per token."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from trainer.engine import ScalarHead
from trainer.megatron import cpu

cpu.enable()

from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # noqa: E402

from trainer.megatron.modules.attention import mark_sequence_parallel  # noqa: E402


class ValueHead(MegatronModule):
    """A head that replaces GPTModel's vocabulary projection and has the same call signature.

        v = activation(w h + b)

    [T, 1, hidden] (or its sequence-parallel slice) -> [T, 1, 1]. The weights are replicated over tensor-parallel ranks
    and drawn from the same seed on all of them.
    """

    def __init__(self, config: TransformerConfig, head: ScalarHead, seed: int) -> None:
        super().__init__(config=config)
        self.activation = head.activation
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(1, config.hidden_size, generator=generator) * head.init_std)
        self.bias = torch.nn.Parameter(torch.zeros(1))
        for parameter in (self.weight, self.bias):
            mark_sequence_parallel(parameter, config)

    def forward(
        self, hidden: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, None]:
        value = F.linear(hidden.float(), self.weight.float(), self.bias.float())
        if self.activation is not None:
            value = self.activation(value)
        if self.config.sequence_parallel:
            value = gather_from_sequence_parallel_region(value, tensor_parallel_output_grad=False)
        return value, None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        own = {"weight": self.weight, "bias": self.bias}
        return make_sharded_tensors_for_checkpoint(own, prefix, {}, sharded_offsets)

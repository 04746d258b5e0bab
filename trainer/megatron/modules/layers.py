"""Modules of single model families that megatron-core lacks, or has only with Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from trainer.megatron import cpu

cpu.enable()

from megatron.core.tensor_parallel.layers import RowParallelLinear  # noqa: E402
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region  # noqa: E402
from megatron.core.transformer import multi_latent_attention  # noqa: E402
from megatron.core.transformer.moe import moe_utils, token_dispatcher  # noqa: E402
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig  # noqa: E402

from trainer.megatron.modules.attention import PackedAttention, RMSNorm, mark_sequence_parallel  # noqa: E402

if not hasattr(moe_utils, "te_general_gemm"):  # the router reads it even without Transformer Engine
    moe_utils.te_general_gemm = None


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Replace megatron-core's own function, which returns a CPU tensor unchanged even if its caller needs numpy."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


if not torch.cuda.is_available():
    token_dispatcher.maybe_move_tensor_to_cpu = _on_host


class RowThenNorm(RowParallelLinear):
    """A row-parallel projection whose summed output is normed before it is added to the residual stream (GLM-4)."""

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        self.norm = RMSNorm(config, self.output_size, config.layernorm_epsilon)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = super().forward(input_)
        return self.norm(output), bias


class LatentNorm(RMSNorm):
    """A norm of latent vectors with its own eps, which does not follow the model's (transformers' DeepSeek-V3)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(config, hidden_size, 1e-6)


class LatentDown(torch.nn.Module):
    """A projection to a small latent vector, whole on every tensor-parallel rank.

    If the sequence is not split over the ranks, the key that all heads share (the last dimensions of the projection for
    keys and values) is used by each rank's own heads without a parallel layer in between, so its gradient is summed
    over the ranks here; the other dimensions pass through a column-parallel layer, which sums their gradient.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: MLATransformerConfig,
        tp_comm_buffer_name: str,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        mark_sequence_parallel(self.weight, config)
        keys = tp_comm_buffer_name == "kv_down_proj" and not config.sequence_parallel
        self.shared_dims = config.qk_pos_emb_head_dim if keys else 0

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        latent = F.linear(hidden, self.weight)
        if not self.shared_dims:
            return latent, None
        own, shared = latent.split([latent.shape[-1] - self.shared_dims, self.shared_dims], dim=-1)
        return torch.cat([own, copy_to_tensor_model_parallel_region(shared)], dim=-1), None


# The attention layer accepts a projection of this kind only under the name of Transformer Engine's class.
multi_latent_attention.TELinear = LatentDown


class LatentAttention(PackedAttention):
    """Packed attention whose values are narrower than queries and keys; kernels need equal widths."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        heads, width = value.shape[-2:]
        wide = F.pad(value, (0, query.shape[-1] - width))
        out = super().forward(query, key, wide, *args, **kwargs)
        return out.unflatten(-1, (heads, -1))[..., :width].flatten(-2)

"""The modules that a GPT layer is made of here: RMSNorm and packed attention.

megatron-core's own choices need Transformer Engine or Apex; these need only PyTorch, on CPU and CUDA.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

# torch 2.11 takes fewer key and value heads than queries as they are; later versions want it said.
_VARLEN_ASKS_FOR_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


class RMSNorm(torch.nn.Module):
    """Root mean square norm; its gradient is summed over TP where each rank sees a slice of the sequence."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = bool(config.sequence_parallel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Packing(PackedSeqParams):
    """Borders of the sequences in one packed micro-batch, with the index map that attention on a CPU needs.

    `slot_T[t]` is the place of packed token t in a [sequences * longest] grid padded on the right.
    """

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        lengths_N = torch.tensor(lengths, dtype=torch.int32)
        borders = F.pad(lengths_N.cumsum(0), (1, 0)).to(device=device, dtype=torch.int32)
        longest = int(lengths_N.max())
        super().__init__(
            qkv_format="thd",
            cu_seqlens_q=borders,
            cu_seqlens_kv=borders,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        self.num_sequences = len(lengths)
        self.position_T = torch.cat([torch.arange(length) for length in lengths]).to(device)
        row_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths_N).to(device)
        self.slot_T = row_T * longest + self.position_T


class PackedAttention(MegatronModule):
    """Causal attention inside each packed sequence, none across borders.

    CUDA: `torch.nn.attention.varlen`. CPU (which has no such kernel): one padded batch.
    Query [T, heads, d], key and value [T, kv_heads, d] -> [T, heads * d]. Source: Dao 2023 (varlen), Vaswani 2017.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Packing | None = None,
    ) -> torch.Tensor:
        assert packed_seq_params is not None, "every micro-batch here is packed"
        p = packed_seq_params
        grouped = query.shape[1] != key.shape[1]
        if query.is_cuda:
            return varlen_attn(
                query,
                key,
                value,
                p.cu_seqlens_q,
                p.cu_seqlens_kv,
                p.max_seqlen_q,
                p.max_seqlen_kv,
                scale=self.scale,
                window_size=(-1, 0),
                **({"enable_gqa": grouped} if _VARLEN_ASKS_FOR_GQA else {}),
            ).flatten(1)
        shape = (p.num_sequences, p.max_seqlen_q)
        q, k, v = (_pad(x, p.slot_T, shape) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, p.slot_T).flatten(1)


def _pad(x_THD: torch.Tensor, slot_T: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """[T, H, D] -> [sequences, H, longest, D], zero in the padding."""
    grid = x_THD.new_zeros((shape[0] * shape[1], *x_THD.shape[1:])).index_copy(0, slot_T, x_THD)
    return grid.unflatten(0, shape).transpose(1, 2)

"""RMSNorm and packed attention, the modules of our GPT layers.

megatron-core's own modules need Transformer Engine or Apex; these need only PyTorch, on CPU and CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import distributed as dist
from torch.nn import functional as F

from trainer.batching import Packing, held_pieces, pieces
from trainer.megatron.modules.flash import causal_attention


def mark_sequence_parallel(parameter: Any, config: TransformerConfig) -> None:
    """Tell Megatron whether a parameter's gradient is summed over TP, since each rank has a slice of the sequence."""
    parameter.sequence_parallel = bool(config.sequence_parallel)


class RMSNorm(torch.nn.Module):
    """Root mean square norm; its gradient is summed over TP if each rank has a slice of the sequence."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        mark_sequence_parallel(self.weight, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class PackedSequences(PackedSeqParams):
    """A `Packing` in the form that megatron-core and `PackedAttention` read.

    Boundaries and `max_seqlen` are those of whole sequences, which megatron-core's rope needs.
    """

    def __init__(self, packing: Packing) -> None:
        lengths_N, device, size = packing.lengths_N, packing.device, packing.context_size
        borders = F.pad(lengths_N.cumsum(0), (1, 0)).to(device=device, dtype=torch.int32)
        longest = int(lengths_N.max())
        super().__init__(
            qkv_format="thd",
            cu_seqlens_q=borders,
            cu_seqlens_kv=borders,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        self.calls: list[Call] = []
        self.back_T: torch.Tensor | None = None  # index of each query in the concatenation of the calls' queries
        if packing.place_A is None:
            self.calls.append(Call(lengths_N, lengths_N, device))
            return
        piece_N = lengths_N // (2 * size)
        own_start_N = torch.cumsum(2 * piece_N, 0) - 2 * piece_N
        queries = [pieces(own_start_N, piece_N, [second]) for second in range(2)]
        for number, of_piece in zip(held_pieces(size)[packing.context_rank], queries, strict=True):
            keys = packing.place_A[pieces(packing.start_N, (number + 1) * piece_N, [0])]
            self.calls.append(Call(piece_N, (number + 1) * piece_N, device, of_piece, keys))
        self.back_T = torch.cat(queries).argsort().to(device)


class Call:
    """One call of an attention kernel: consecutive queries of each sequence and the keys up to the last of them.

    `queries` and `keys` are indices into this process's queries and into all processes' keys; None: all of them.
    """

    def __init__(
        self,
        queries_N: torch.Tensor,
        keys_N: torch.Tensor,
        device: torch.device,
        queries: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
    ) -> None:
        self.queries = None if queries is None else queries.to(device)
        self.keys = None if keys is None else keys.to(device)
        self.longest_q, self.longest_k = int(queries_N.max()), int(keys_N.max())
        self.borders_q, self.borders_k = (
            F.pad(n.cumsum(0), (1, 0)).to(device=device, dtype=torch.int32) for n in (queries_N, keys_N)
        )
        if device.type == "cpu":  # for attention in plain torch: indices into a grid [sequences * longest]
            self.slot_q, self.slot_k = _slots(queries_N), _slots(keys_N)
            self.mask = None if keys is None else _bottom_right(queries_N, keys_N)

    def __call__(
        self, q_THD: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """Attend causally: [T, H, D]; the last query of a sequence attends to all its keys."""
        if q_THD.is_cuda:
            borders = self.borders_q, self.borders_k, self.longest_q, self.longest_k
            return causal_attention(q_THD, k_SGD, v_SGD, *borders, scale)
        sequences = len(self.borders_q) - 1
        q = _pad(q_THD, self.slot_q, (sequences, self.longest_q))
        k, v = (_pad(x, self.slot_k, (sequences, self.longest_k)) for x in (k_SGD, v_SGD))
        out = F.scaled_dot_product_attention(
            q, k, v, self.mask, is_causal=self.mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2).flatten(0, 1).index_select(0, self.slot_q)


class PackedAttention(MegatronModule):
    """Causal attention within each packed sequence, never across boundaries.

    CUDA: trainer/megatron/modules/flash.py. CPU (which has no such kernel): one padded batch.
    Query [T, heads, d], key and value [T, kv_heads, d] -> [T, heads * d]. Sources: Dao 2023 (varlen), Vaswani 2017.
    With context parallelism keys and values of all processes are gathered; a process computes its own queries.
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
        packed_seq_params: PackedSequences | None = None,
    ) -> torch.Tensor:
        assert packed_seq_params is not None, "every micro-batch here is packed"
        calls = packed_seq_params.calls
        if len(calls) == 1:
            return calls[0](query, key, value, self.scale).flatten(1)
        pairs_A2GD = _Gather.apply(torch.stack([key, value], 1), parallel_state.get_context_parallel_group())
        assert packed_seq_params.back_T is not None, "several calls have an order"
        out = []
        for call in calls:
            assert call.keys is not None
            assert call.queries is not None
            k_SGD, v_SGD = pairs_A2GD.index_select(0, call.keys).unbind(1)
            out.append(call(query.index_select(0, call.queries), k_SGD, v_SGD, self.scale))
        return torch.cat(out).index_select(0, packed_seq_params.back_T).flatten(1)


class _Gather(torch.autograd.Function):
    """All-gather of [T, ...] over a group, concatenated in rank order; backward is a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        found = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(found, x.contiguous(), group=group)
        return found

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        own = grad.new_empty((grad.shape[0] // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own, None


def _slots(lengths_N: torch.Tensor) -> torch.Tensor:
    """Return the index of each packed token in a [sequences * longest] grid padded on the right."""
    rows_N = torch.arange(len(lengths_N)) * lengths_N.max() - (lengths_N.cumsum(0) - lengths_N)
    return torch.arange(int(lengths_N.sum())) + torch.repeat_interleave(rows_N, lengths_N)


def _bottom_right(queries_N: torch.Tensor, keys_N: torch.Tensor) -> torch.Tensor:
    """Return bool [sequences, 1, longest query, longest key]: True where a key is not later than the query."""
    at_Q, at_K = torch.arange(int(queries_N.max())), torch.arange(int(keys_N.max()))
    last_NQ = (keys_N - queries_N)[:, None] + at_Q
    return (at_K <= last_NQ[:, :, None])[:, None]


def _pad(x_THD: torch.Tensor, slot_T: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Reshape [T, H, D] -> [sequences, H, longest, D], zero in the padding."""
    grid = x_THD.new_zeros((shape[0] * shape[1], *x_THD.shape[1:])).index_copy(0, slot_T, x_THD)
    return grid.unflatten(0, shape).transpose(1, 2)

"""Causal attention of packed sequences on CUDA: FlashAttention 4 if it is installed, else torch's own kernel.

FlashAttention 4 (PyPI: flash-attn-4) is made for Hopper and Blackwell; the kernel inside torch is FlashAttention 2
(Dao 2023), which reaches less than half of what a Hopper GPU can do (benchmarks/gpu/RESULTS.md).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn

# torch 2.11 accepts fewer key and value heads than query heads by default; later versions need a flag.
_VARLEN_ASKS_FOR_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters
_FA4 = "flash_attn.cute"
_FA4_CAPABILITIES = (9, 10)  # Hopper, Blackwell


@functools.cache
def flash_attention_4() -> Callable[..., Any] | None:
    """Return FlashAttention 4's function for packed sequences; None if not installed or not for this GPU."""
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec(_FA4) is None:
        return None
    if torch.cuda.get_device_capability()[0] not in _FA4_CAPABILITIES:
        return None
    found: Callable[..., Any] = importlib.import_module(_FA4).flash_attn_varlen_func
    return found


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders_q: torch.Tensor,
    borders_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    scale: float | None,
) -> torch.Tensor:
    """Attend causally: query [T, H, d], key and value [S, G, d] in bf16 -> [T, H, d].

    Borders are int32 [sequences + 1], starting with 0. If a sequence has fewer queries than keys, its last query is at
    the position of its last key.
    """
    fa4 = flash_attention_4()
    if fa4 is not None:
        out: torch.Tensor = fa4(
            query,
            key,
            value,
            cu_seqlens_q=borders_q,
            cu_seqlens_k=borders_k,
            max_seqlen_q=longest_q,
            max_seqlen_k=longest_k,
            softmax_scale=scale,
            causal=True,
        )[0]
        return out
    grouped: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if _VARLEN_ASKS_FOR_GQA else {}
    attended = varlen_attn(
        query, key, value, borders_q, borders_k, longest_q, longest_k, scale=scale, window_size=(-1, 0), **grouped
    )
    assert isinstance(attended, torch.Tensor), "nothing else was asked for"
    return attended

"""Batched attention for an engine on a CPU; each query is computed as if it were alone.

SGLang's own attention in plain torch runs one product per request and layer, so Python's overhead dominates. Here the
queries of a forward pass are put into *groups* with the same padded number of keys, and each group is one gather of
keys and values from the paged cache and one masked product:

    out[b, h] = sum_j softmax_j(scale q[b, h] . k[b, g(h), j] + mask[b, j]) v[b, g(h), j]

with mask 0 where j is at or before query b in its request, and -inf otherwise. The order of the sums depends on the
padded number of keys, so a query's own position alone decides that: its output has the same bits whether it is decoded
or part of a prompt, alone or beside others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

KEY_BLOCK = 128  # the number of keys is padded to a multiple of it
GROUP_SLOTS = 4096  # padded cache slots of one group: about what a core's cache holds of a small model's keys


@dataclass(frozen=True)
class Group:
    """E queries with L keys each: their own, or for queries that follow each other in one request the same ones."""

    query_rows: torch.Tensor  # int64[E] row of each query
    slots: torch.Tensor  # int64[E * L] or int64[L] cache slot of each key; padding is slot 0, which holds no request
    mask: torch.Tensor  # [E, 1, 1, L] added to the scores: 0 or -inf


def build_groups(
    prefix_lens: Sequence[int],
    new_lens: Sequence[int],
    slot_table: torch.Tensor,
    dtype: torch.dtype,
    max_slots: int = GROUP_SLOTS,
) -> list[Group]:
    """Return the groups of B requests with `prefix_lens` cached and `new_lens` new tokens, whose rows are consecutive.

    `slot_table` int[B, C]: cache slot of each position of each request. Queries of different requests are put together
    up to `max_slots` padded keys.
    """
    groups: list[Group] = []
    single: dict[int, list[tuple[int, int, int]]] = {}  # padded number of keys -> (row, request, number of keys)
    row = 0
    for request, (prefix, new) in enumerate(zip(prefix_lens, new_lens, strict=True)):
        first, end = prefix + 1, prefix + new  # numbers of keys of the next and of the last query
        while first <= end:
            length = -(-first // KEY_BLOCK) * KEY_BLOCK
            count = min(end, length) - first + 1
            if count == 1:
                single.setdefault(length, []).append((row, request, first))
            else:
                num_keys = torch.arange(first, first + count)
                rows = torch.arange(row, row + count)
                groups.append(_group(rows, slot_table[request, None], num_keys, length, dtype))
            first, row = first + count, row + count
    for length, queries in single.items():
        size = max(1, max_slots // length)
        for here in torch.tensor(queries).split(size):
            groups.append(_group(here[:, 0], slot_table[here[:, 1]], here[:, 2], length, dtype))
    return groups


def _group(rows: torch.Tensor, slots: torch.Tensor, num_keys: torch.Tensor, length: int, dtype: torch.dtype) -> Group:
    """`slots` int[E or 1, C]: of the requests."""
    key = torch.arange(length)
    padding = key >= num_keys[:, None]
    slots = slots[:, :length].to(torch.int64)
    slots = torch.nn.functional.pad(slots, (0, length - slots.shape[1]))
    slots.masked_fill_(key >= (num_keys[:, None] if len(slots) > 1 else num_keys.max()), 0)
    mask = torch.zeros(padding.shape, dtype=dtype).masked_fill_(padding, float("-inf"))
    return Group(rows.contiguous(), slots.reshape(-1), mask[:, None, None])


def attend(
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    groups: Sequence[Group],
    scale: float | None,
) -> None:
    """Write the attention of all groups into `output`.

    query [T, H, D], output [T, H, D'], k_cache [S, K, D], v_cache [S, K, D'] with H divisible by K.
    """
    num_heads, num_kv_heads = query.shape[1], k_cache.shape[1]
    for group in groups:
        size, length = len(group.query_rows), group.mask.shape[-1]
        # The query heads of a key head take the place of queries: no key is copied for them.
        q = query.index_select(0, group.query_rows).view(size, num_kv_heads, num_heads // num_kv_heads, -1)
        k, v = (
            cache.index_select(0, group.slots)
            .view(-1, length, num_kv_heads, cache.shape[-1])
            .transpose(1, 2)
            .to(q.dtype)
            .expand(size, -1, -1, -1)
            for cache in (k_cache, v_cache)
        )
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=group.mask, scale=scale)
        output.index_copy_(0, group.query_rows, out.reshape(size, num_heads, -1))

"""Attention of an engine on a CPU: many requests at once.

SGLang's own attention in plain torch runs one product per request and layer, so its time is Python's. Here the
requests of a forward pass are cut into *groups* of similar length, and each group is one gather of its keys and
values from the paged cache, padded to its longest request, and one masked product:

    out[b, h, i] = sum_j softmax_j(scale q[b, h, i] . k[b, g(h), j] + mask[b, i, j]) v[b, g(h), j]

with mask 0 where j is at or before query i of request b, and -inf otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

GROUP_SLOTS = 4096  # padded cache slots of one group: about what a core's cache holds of a small model's keys
QUERY_BLOCK = 64  # queries of one request in one group


@dataclass(frozen=True)
class Span:
    """Consecutive queries of one request."""

    request: int  # index in the batch
    first_token: int  # row of its first query among the batch's query rows
    first_position: int  # position of its first query in the request, from 0
    num_queries: int

    @property
    def num_keys(self) -> int:
        """Return keys that its last query sees."""
        return self.first_position + self.num_queries


@dataclass(frozen=True)
class Group:
    """G spans, padded to E queries and L keys."""

    query_rows: torch.Tensor  # int64[G * E] row of each query; padding repeats row 0
    slots: torch.Tensor  # int64[G * L] cache slot of each key; padding is slot 0, which holds no request
    mask: torch.Tensor  # [G, 1, E, L] added to the scores: 0 or -inf
    real: torch.Tensor | None  # int64 indices into G * E of the queries that are no padding; None: all

    @property
    def shape(self) -> tuple[int, int, int]:
        size, _, num_queries, num_keys = self.mask.shape
        return size, num_queries, num_keys


def spans_of_extend(prefix_lens: Sequence[int], new_lens: Sequence[int], block: int = QUERY_BLOCK) -> list[Span]:
    """Return spans of at most `block` queries of requests with `prefix_lens` cached and `new_lens` new tokens."""
    spans, row = [], 0
    for request, (prefix, new) in enumerate(zip(prefix_lens, new_lens, strict=True)):
        for start in range(0, new, block):
            spans.append(Span(request, row + start, prefix + start, min(block, new - start)))
        row += new
    return spans


def group_spans(spans: Sequence[Span], max_slots: int = GROUP_SLOTS) -> list[list[Span]]:
    """Return spans of similar length together, with at most `max_slots` padded keys in a group (or a single span)."""
    groups: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: (span.num_keys, span.num_queries), reverse=True):
        if groups and (len(groups[-1]) + 1) * groups[-1][0].num_keys <= max_slots:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def build_group(spans: Sequence[Span], slot_table: torch.Tensor, dtype: torch.dtype) -> Group:
    """Return the index tensors of one group. `slot_table` int[B, C]: cache slot of each position of each request."""
    request, row, position, count = np.array(
        [(span.request, span.first_token, span.first_position, span.num_queries) for span in spans], dtype=np.int64
    ).T
    num_queries, num_keys = int(count.max()), int((position + count).max())
    step = np.arange(num_queries)
    padding = step >= count[:, None]
    query_rows = np.where(padding, 0, row[:, None] + step).reshape(-1)
    key = torch.arange(num_keys)
    keys_in_use = key < torch.from_numpy(position + count)[:, None]
    slots = slot_table[torch.from_numpy(request), :num_keys].to(torch.int64).masked_fill_(~keys_in_use, 0)
    visible = key <= torch.from_numpy(position[:, None] + step)[:, :, None]
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))[:, None]
    real = torch.from_numpy(np.flatnonzero(~padding.reshape(-1))) if padding.any() else None
    return Group(torch.from_numpy(query_rows), slots.reshape(-1), mask, real)


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
        size, num_queries, num_keys = group.shape
        q = query.index_select(0, group.query_rows)
        k = k_cache.index_select(0, group.slots).view(size, num_keys, num_kv_heads, -1).transpose(1, 2).to(q.dtype)
        v = v_cache.index_select(0, group.slots).view(size, num_keys, num_kv_heads, -1).transpose(1, 2).to(q.dtype)
        if num_queries == 1:  # the query heads of a key head take the place of queries: no key is copied for them
            q = q.view(size, num_kv_heads, num_heads // num_kv_heads, -1)
        else:
            q = q.view(size, num_queries, num_heads, -1).transpose(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=group.mask, scale=scale, enable_gqa=q.shape[1] != num_kv_heads
        )
        if num_queries > 1:
            out = out.transpose(1, 2)
        out = out.reshape(size * num_queries, num_heads, -1)
        if group.real is None:
            output.index_copy_(0, group.query_rows, out)
        else:
            output.index_copy_(0, group.query_rows[group.real], out[group.real])

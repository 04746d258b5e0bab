"""Attention of many requests at once against one request at a time."""

from __future__ import annotations

import pytest
import torch

from rollout.sglang.cpu.attention import Span, attend, build_group, group_spans, spans_of_extend


def test_spans_cover_each_new_token_once() -> None:
    spans = spans_of_extend([0, 5, 7], [70, 0, 3], block=64)
    assert spans == [Span(0, 0, 0, 64), Span(0, 64, 64, 6), Span(2, 70, 7, 3)]
    assert [span.num_keys for span in spans] == [64, 70, 10]


def test_groups_stay_below_the_limit() -> None:
    lens = [1, 50, 300, 20, 60, 55, 2]
    groups = group_spans([Span(i, i, n - 1, 1) for i, n in enumerate(lens)], max_slots=128)
    assert [[span.num_keys for span in group] for group in groups] == [[300], [60, 55], [50, 20], [2, 1]]


@pytest.mark.parametrize("decode", [True, False])
def test_grouped_attention_equals_one_request_at_a_time(decode: bool) -> None:
    """4 query heads on 2 key heads; slots are scattered, slot 0 is poison unless it is masked."""
    generator = torch.Generator().manual_seed(int(decode))
    prefix, new = [3, 0, 40, 9, 130], [1, 1, 1, 1, 1] if decode else [5, 70, 1, 0, 12]
    keys, values = torch.randn(512, 2, 8, generator=generator), torch.randn(512, 2, 6, generator=generator)
    keys[0], values[0] = 1e4, 1e4
    slots = torch.randperm(511, generator=generator)[: sum(prefix) + sum(new)] + 1
    table = torch.zeros(len(new), 256, dtype=torch.int32)
    query = torch.randn(sum(new), 4, 8, generator=generator)
    expected, used, row = torch.empty(sum(new), 4, 6), 0, 0
    for request, (p, n) in enumerate(zip(prefix, new, strict=True)):
        mine = slots[used : used + p + n]
        table[request, : p + n] = mine.int()
        for i in range(n):
            seen = mine[: p + i + 1]
            for head in range(4):
                weight = torch.softmax(keys[seen, head // 2] @ query[row + i, head] * 0.3, 0)
                expected[row + i, head] = weight @ values[seen, head // 2]
        used, row = used + p + n, row + n
    spans = group_spans(spans_of_extend(prefix, new, block=16), max_slots=300)
    output = torch.full_like(expected, torch.nan)
    attend(query, output, keys, values, [build_group(group, table, torch.float32) for group in spans], 0.3)
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=0)

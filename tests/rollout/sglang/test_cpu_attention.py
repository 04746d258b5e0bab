"""Batched attention equals attention of one head and one query at a time, whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch

from rollout.sglang.cpu.attention import KEY_BLOCK, attend, build_groups


def batch(prefix: list[int], new: list[int], dim: int = 8) -> tuple[torch.Tensor, ...]:
    """Query, keys, values and slot table: 4 query heads on 2 key heads; slots are scattered, slot 0 is poison."""
    generator = torch.Generator().manual_seed(len(prefix))
    keys, values = torch.randn(2048, 2, dim, generator=generator), torch.randn(2048, 2, dim, generator=generator)
    keys[0], values[0] = 1e4, 1e4
    slots = torch.randperm(2047, generator=generator)[: sum(prefix) + sum(new)] + 1
    table = torch.zeros(len(new), 600, dtype=torch.int32)
    for row, mine in zip(table, slots.split([p + n for p, n in zip(prefix, new, strict=True)]), strict=True):
        row[: len(mine)] = mine
    return torch.randn(sum(new), 4, dim, generator=generator), keys, values, table


def test_queries_are_grouped_by_their_own_number_of_keys() -> None:
    """Those of one request that need equally many share their keys; single ones of several requests come together."""
    table = torch.arange(1, 4 * 300 + 1, dtype=torch.int32).view(4, 300)
    groups = build_groups([0, 127, 253, 4], [3, 2, 4, 1], table, torch.float32)
    assert [group.query_rows.tolist() for group in groups] == [[0, 1, 2], [5, 6, 7], [3, 9], [4], [8]]
    assert [group.mask.shape[-1] for group in groups] == [128, 256, 128, 256, 384]
    assert [len(group.slots) for group in groups] == [128, 256, 2 * 128, 256, 384]
    seen = [(group.mask[:, 0, 0] == 0).sum(-1).tolist() for group in groups]
    assert seen == [[1, 2, 3], [254, 255, 256], [128, 5], [129], [257]]
    assert groups[-1].slots.tolist() == [*range(601, 601 + 257), *[0] * 127]
    assert groups[0].slots.tolist() == [1, 2, 3, *[0] * 125]


def test_single_queries_stay_below_the_limit() -> None:
    table = torch.zeros(7, 512, dtype=torch.int32)
    lens = [1, 50, 300, 20, 60, 55, 2]
    groups = build_groups([length - 1 for length in lens], [1] * 7, table, torch.float32, max_slots=4 * KEY_BLOCK)
    assert [group.query_rows.tolist() for group in groups] == [[0, 1, 3, 4], [5, 6], [2]]


@pytest.mark.parametrize("decode", [True, False])
def test_grouped_attention_equals_one_request_at_a_time(decode: bool) -> None:
    prefix, new = [3, 0, 40, 9, 130], [1, 1, 1, 1, 1] if decode else [5, 70, 1, 0, 12]
    query, keys, values, table = batch(prefix, new)
    expected, row = torch.empty(sum(new), 4, 8), 0
    for request, (p, n) in enumerate(zip(prefix, new, strict=True)):
        for i in range(n):
            seen = table[request, : p + i + 1].long()
            for head in range(4):
                weight = torch.softmax(keys[seen, head // 2] @ query[row + i, head] * 0.3, 0)
                expected[row + i, head] = weight @ values[seen, head // 2]
        row += n
    output = torch.full_like(expected, torch.nan)
    attend(query, output, keys, values, build_groups(prefix, new, table, torch.float32, max_slots=300), 0.3)
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_a_query_has_the_same_bits_alone_and_in_any_batch(dim: int) -> None:
    """A prompt in one piece, in two, token by token, and beside other requests; up to 580 keys."""
    prefix, new = [0, 17, 300], [580, 40, 1]
    query, keys, values, table = batch(prefix, new, dim)

    def outputs(prefix: list[int], new: list[int], rows: slice, max_slots: int = 4096) -> torch.Tensor:
        output = torch.full_like(query, torch.nan)
        groups = build_groups(prefix, new, table[: len(new)], torch.float32, max_slots)
        attend(query[rows], output[rows], keys, values, groups, None)
        return output[rows]

    together = outputs(prefix, new, slice(None))
    assert torch.equal(outputs([0], [580], slice(580), max_slots=1000), together[:580])
    assert torch.equal(outputs([0], [300], slice(300)), together[:300])
    assert torch.equal(outputs([300], [280], slice(300, 580)), together[300:580])
    for position in range(0, 580, 7):
        assert torch.equal(outputs([position], [1], slice(position, position + 1))[0], together[position])

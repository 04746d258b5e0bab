"""Layouts without processes: what is refused and what is named instead, who holds which layers, tensors and tokens."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from roles import layout_of, sub_trace
from torch.nn import functional as F

from trainer.batching import MicroBatch, Packing, length_multiples, micro_batch, per_sub_trace
from trainer.config import Loss, PolicyConfig, RoleConfig
from trainer.layout import check_layout, chunks_of, pipeline_rank_of
from trainer.megatron.hf import _own_part
from trainer.megatron.modules.attention import PackedSequences
from trainer.models.entries import Entry, Merge, Split, entries, padded_vocab
from trainer.models.mapping import merge, shard
from trainer.models.shape import ModelShape, MoeShape

CPU = torch.device("cpu")
DENSE = ModelShape(36, 4096, 32, 8, 128, 12288, 151936, 1e-6, 1e6, tied=False, qk_norm=True, max_positions=40960)
EXPERTS = MoeShape(experts=128, top_k=8, ffn=768, layers=(True,) * 48)
SPARSE = replace(DENSE, num_layers=48, kv_heads=4, moe=EXPERTS)


def layout(**numbers: Any) -> RoleConfig:
    return RoleConfig(*layout_of({"num_processes": 8} | numbers))


def cured(numbers: dict[str, Any], message: str) -> RoleConfig:
    """The layout that a refusal names; constructing it is refused when it does not work."""
    named = re.search(r": the nearest that works is ([^:]*)$", message)
    assert named is not None, message
    pairs = (part.split("=") for part in named[1].split(", "))
    return layout(**numbers | {key.removeprefix("layout."): json.loads(text) for key, text in pairs})


@pytest.mark.parametrize(
    ("numbers", "parts"),
    [
        ({"num_processes": 0}, ["num_processes=0", "works is num_processes=1"]),
        ({"expert_parallel": 0, "virtual_stages": -1}, ["virtual_stages=-1, expert_parallel=0"]),
        ({"num_processes": 3, "tensor_parallel": 2}, ["num_processes=3", "=2*1*1", "works is layout.num_processes=4"]),
        (
            {"tensor_parallel": 2, "pipeline_parallel": 2, "context_parallel": 3},
            ["num_processes=8", "=2*2*3", "works is context_parallel=2"],
        ),
        ({"sequence_parallel": True}, ["sequence_parallel=true", "works is sequence_parallel=false"]),
        ({"virtual_stages": 2}, ["virtual_stages=2", "works is virtual_stages=1"]),
        (
            {"pipeline_parallel": 2, "expert_parallel": 3},
            ["expert_parallel=3", "4 processes of a pipeline stage", "works is expert_parallel=4"],
        ),
    ],
)
def test_a_layout_that_works_for_no_model(numbers: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError, match="nearest") as caught:
        layout(**numbers)
    for part in parts:
        assert part in str(caught.value)
    cured(numbers, str(caught.value))


@pytest.mark.parametrize(
    ("shape", "numbers", "parts"),
    [
        (DENSE, {"num_processes": 6, "tensor_parallel": 3}, ["tensor_parallel=3", "num_attention_heads=32", "=2"]),
        (DENSE, {"num_processes": 16, "tensor_parallel": 16}, ["num_key_value_heads=8", "tensor_parallel=8"]),
        (replace(DENSE, ffn=12287), {"tensor_parallel": 2}, ["intermediate_size=12287", "works is tensor_parallel=1"]),
        (replace(DENSE, vocab=5), {"tensor_parallel": 4}, ["vocab_size=5", "works is tensor_parallel=2"]),
        (
            replace(DENSE, num_layers=7),
            {"pipeline_parallel": 8},
            ["=8*1 leaves a process without", "num_hidden_layers=7", "works is pipeline_parallel=4"],
        ),
        (
            DENSE,
            {"pipeline_parallel": 4, "virtual_stages": 10},
            ["=4*10", "num_hidden_layers=36", "works is virtual_stages=9"],
        ),
        (DENSE, {"expert_parallel": 2}, ["expert_parallel=2", "without experts", "works is expert_parallel=1"]),
        (
            replace(SPARSE, moe=replace(EXPERTS, experts=100)),
            {"expert_parallel": 8},
            ["expert_parallel=8", "num_experts=100", "works is expert_parallel=4"],
        ),
        (SPARSE, {"tensor_parallel": 2}, ["sequence_parallel=false", "works is sequence_parallel=true"]),
        (
            replace(SPARSE, moe=replace(EXPERTS, ffn=769)),
            {"tensor_parallel": 2, "sequence_parallel": True},
            ["moe_intermediate_size=769", "works is expert_parallel=2"],
        ),
    ],
)
def test_a_layout_that_does_not_work_for_a_model(shape: ModelShape, numbers: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError, match="nearest") as caught:
        check_layout(shape, layout(**numbers).sizes())
    for part in parts:
        assert part in str(caught.value)
    check_layout(shape, cured(numbers, str(caught.value)).sizes())


def test_layouts_that_work() -> None:
    for numbers in (
        {"tensor_parallel": 4, "sequence_parallel": True, "pipeline_parallel": 2, "virtual_stages": 9},
        {"pipeline_parallel": 8, "virtual_stages": 4},
        {"context_parallel": 8},
        {"tensor_parallel": 2, "pipeline_parallel": 2, "context_parallel": 2},
    ):
        check_layout(DENSE, layout(**numbers).sizes())
    assert layout(tensor_parallel=2, context_parallel=2).data_parallel == 2
    of_experts = layout(tensor_parallel=2, sequence_parallel=True, pipeline_parallel=2, expert_parallel=4)
    check_layout(SPARSE, of_experts.sizes())
    assert (of_experts.row_size, of_experts.data_parallel, of_experts.megatron.expert_tensor_parallel) == (4, 2, 1)


def test_losses_of_whole_sequences_refuse_context_parallelism() -> None:
    with pytest.raises(ValueError, match="context_parallel=2 cuts them"):
        PolicyConfig(*layout_of({"num_processes": 8, "context_parallel": 2}), loss=Loss("gspo"))


@pytest.mark.parametrize(
    ("num_layers", "pipeline", "virtual", "sizes"),
    [
        (24, 1, 1, [24]),
        (24, 2, 1, [12, 12]),
        (24, 3, 2, [4, 4, 4, 4, 4, 4]),
        (24, 4, 3, [2] * 12),
        (61, 2, 1, [31, 30]),
        (61, 4, 1, [15, 16, 15, 15]),
        (61, 8, 1, [7, 8, 8, 8, 8, 8, 7, 7]),
        (7, 4, 1, [2, 2, 2, 1]),
        (5, 2, 2, [1, 2, 1, 1]),
        (6, 6, 1, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_every_layer_has_one_place(num_layers: int, pipeline: int, virtual: int, sizes: list[int]) -> None:
    chunks = chunks_of(num_layers, pipeline, virtual)
    assert list(itertools.chain.from_iterable(chunks)) == list(range(num_layers))
    assert [len(layers) for layers in chunks] == sizes
    for number, layers in enumerate(chunks):
        assert {pipeline_rank_of(layer, num_layers, pipeline, virtual) for layer in layers} == {number % pipeline}


# ------------------------------------------------------- which part of a tensor


class Counting:
    """A tensor in a file; counts the numbers that are read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.read = tensor, 0

    def __getitem__(self, part: Any) -> torch.Tensor:
        found = self.tensor[part]
        self.read += found.numel()
        return found


SMALL = replace(DENSE, num_layers=1, hidden=16, heads=8, kv_heads=4, head_dim=2, ffn=24, vocab=97)
FUSED = Entry("fused", ("gate_up",), ((48, 16),), split=Split.GATED)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("entry", [*entries(replace(SMALL, qkv_bias=True)), FUSED], ids=lambda entry: entry.ours)
def test_a_process_reads_its_part_alone(entry: Entry, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(shape, generator=generator) for shape in entry.shapes]
    full = merge(whole, entry, SMALL, size)
    for rank in range(size):
        files = [Counting(tensor) for tensor in whole]
        part = _own_part(files, entry, SMALL, size, rank)
        assert torch.equal(part, shard(full, entry.split, size, rank))
        if entry.split is not Split.NONE:
            padding = padded_vocab(SMALL.vocab, size) if entry.merge is Merge.VOCAB else 0
            assert sum(file.read for file in files) <= max(full.numel(), padding * SMALL.hidden) // size


# ------------------------------------------------------- which tokens of a micro-batch

LENGTHS = [50, 7, 33, 2]


def parts_of(size: int, tensor: int = 1) -> list[MicroBatch]:
    rng = np.random.default_rng(0)
    traces = {i: sub_trace(rng, length, i) for i, length in enumerate(LENGTHS)}
    columns = {"place": {i: 100.0 * i + np.arange(len(t.tokens), dtype=np.float32) for i, t in traces.items()}}
    multiples = length_multiples(tensor, tensor > 1, size)
    return [micro_batch(range(4), traces, columns, CPU, multiples, (size, rank)) for rank in range(size)]


@pytest.mark.parametrize(("size", "tensor"), [(1, 1), (1, 4), (2, 1), (3, 2), (4, 1), (2, 4)])
def test_every_prediction_is_one_processs(size: int, tensor: int) -> None:
    whole, parts = parts_of(1)[0], parts_of(size, tensor)
    assert len({part.tokens_1P.shape for part in parts}) == 1
    assert parts[0].tokens_1P.shape[1] % tensor == 0
    assert sum(part.num_actions for part in parts) == whole.num_actions
    for read in (lambda b: b.labels_1P[0], lambda b: b.columns["place"], lambda b: b.packing.position_T):
        wanted = per_sub_trace(whole, read(whole).float())
        found = per_sub_trace(parts[0], torch.cat([read(part).float() for part in parts]))
        assert all(np.array_equal(found[i], wanted[i]) for i in range(4))
    for part in parts:
        for p in torch.nonzero(part.action_P)[:, 0].tolist():
            episode, index = divmod(int(part.columns["place"][p]), 100)
            assert part.name_of(p).endswith(f", index {index}")
            assert part.name_of(p).startswith(part.names[episode])
            assert int(part.sequence_P[p]) == episode


def test_an_empty_micro_batch_has_a_length_and_no_actions() -> None:
    for size, tensor in ((1, 1), (2, 4)):
        empty = micro_batch((), {}, {}, CPU, length_multiples(tensor, tensor > 1, size), (size, 0))
        assert empty.tokens_1P.shape[1] >= 1
        assert empty.tokens_1P.shape[1] % tensor == 0
        assert empty.num_actions == 0
        assert per_sub_trace(empty, torch.zeros(empty.tokens_1P.shape[1] * size)) == {}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_attention_of_pieces_is_attention(size: int) -> None:
    """Forward and backward, with the keys as the processes' all-gather lines them up."""
    lengths = [2 * size * n for n in (3, 1, 5)]
    generator = torch.Generator().manual_seed(0)
    draw = lambda heads: torch.randn(sum(lengths), heads, 8, generator=generator, dtype=torch.float64)  # noqa: E731
    q, k, v = (draw(heads).requires_grad_() for heads in (4, 2, 2))
    starts = np.cumsum([0, *lengths])
    wanted = torch.cat(
        [
            F.scaled_dot_product_attention(
                q[a:b].transpose(0, 1), k[a:b].transpose(0, 1), v[a:b].transpose(0, 1), is_causal=True, enable_gqa=True
            ).transpose(0, 1)
            for a, b in itertools.pairwise(starts)
        ]
    )
    packings = [Packing(lengths, CPU, size, rank) for rank in range(size)]
    packed = [PackedSequences(packing) for packing in packings]
    order = torch.cat([packing.own_T for packing in packings])
    found = torch.empty_like(wanted)
    work = []
    for packing, of_rank in zip(packings, packed, strict=True):
        own = q[packing.own_T]
        out = [call(own[call.queries], k[order][call.keys], v[order][call.keys], None) for call in of_rank.calls]
        found = found.index_copy(0, packing.own_T, torch.cat(out)[of_rank.back_T])
        work.append(sum(call.longest_q * call.longest_k for call in of_rank.calls))
    assert len(set(work)) == 1, "all processes have the same work"
    torch.testing.assert_close(found, wanted)
    weights = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    mine = torch.autograd.grad((found * weights).sum(), (q, k, v))
    theirs = torch.autograd.grad((wanted * weights).sum(), (q, k, v))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)

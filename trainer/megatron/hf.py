"""Bit-exact transfer of weights between a Hugging Face folder and this process's Megatron chunks, in both directions.

trainer/models/entries.py maps the tensors, and trainer/models/files.py locates their files. No process ever holds a
whole model: when loading, a process reads only its own shard from the files; when exporting, one whole tensor at a time
goes to the role's rank 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import distributed as dist

from trainer.layout import pipeline_rank_of
from trainer.megatron import cpu

cpu.enable()

from megatron.core import parallel_state  # noqa: E402

from trainer.models.entries import Entry, Merge, Split, entries, padded_vocab  # noqa: E402
from trainer.models.files import check_headers, headers  # noqa: E402
from trainer.models.mapping import merge, tensors, unmerge  # noqa: E402
from trainer.models.shape import ModelShape  # noqa: E402


def named(models: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Return this process's tensors under their names in the whole model (`Entry.ours`).

    Megatron numbers layers within a chunk and experts within a process. On the last pipeline stage a tied projection is
    a copy of the embedding and has the embedding's name.
    """
    found: dict[str, torch.Tensor] = {}
    for model in models:
        tied = model.share_embeddings_and_output_weights
        numbers = {i: layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
        for name, tensor in tensors(model).items():
            words = name.split(".")
            if words[:2] == ["decoder", "layers"]:
                words[2] = str(numbers[int(words[2])])
            if "local_experts" in words:
                at = words.index("local_experts")
                experts = model.config.num_moe_experts // model.config.expert_model_parallel_size
                words[at + 1] = str(int(words[at + 1]) + experts * parallel_state.get_expert_model_parallel_rank())
            tied_copy = tied and words[0] == "output_layer"
            found["embedding.word_embeddings.weight" if tied_copy else ".".join(words)] = tensor
    return found


def load(models: Sequence[Any], shape: ModelShape, folder: Path, value_head: bool = False) -> None:
    """Read a folder's weights into this process's chunks.

    ValueError, on all processes alike: see `headers` and `check_headers`.
    """
    own = named(models)
    found, wanted = headers(folder), entries(shape, value_head)
    check_headers(folder, found, wanted, shape)
    with ExitStack() as stack:
        files = {f: stack.enter_context(safe_open(f, "pt")) for f in sorted({header.file for header in found.values()})}
        for entry in wanted:
            target = own.pop(entry.ours, None)
            if target is None:
                continue  # another process's
            group = _group(entry)
            read = [files[found[name].file].get_slice(name) for name in entry.theirs]
            part = _own_part(read, entry, shape, group.size(), group.rank())
            assert part.shape == target.shape, (entry, part.shape, target.shape)
            with torch.no_grad():
                target.copy_(part)
            # Megatron sets this during the initialization that we skip; the gradient norm uses it to count shards.
            marked: Any = target
            marked.tensor_model_parallel = entry.expert is not None or entry.split is not Split.NONE
    left = [name for name in own if not (value_head and name.startswith("output_layer."))]
    assert not left, f"parameters without a mapping: {left}"


def _group(entry: Entry) -> Any:
    """Return the group of processes over which a tensor is split."""
    if entry.expert is not None:
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def _own_part(read: Sequence[Any], entry: Entry, shape: ModelShape, size: int, rank: int) -> torch.Tensor:
    """Return the shard of process `rank` of `size`. `read[i][rows, columns]` reads from the file of `theirs[i]`."""
    if entry.split is Split.NONE:
        slices = [r[:] for r in read]
    elif entry.split is Split.COLUMNS:
        columns = entry.shapes[0][1] // size
        slices = [r[:, rank * columns : (rank + 1) * columns] for r in read]
    elif entry.merge is Merge.VOCAB:
        rows = padded_vocab(shape.vocab, size) // size
        own = read[0][rank * rows : min((rank + 1) * rows, shape.vocab)]
        return torch.nn.functional.pad(own, (0, 0, 0, rows - len(own)))
    else:
        halves = 2 if entry.split is Split.GATED and entry.merge is Merge.ONE else 1
        slices = []
        for r, (rows, *_) in zip(read, entry.shapes, strict=True):
            each = rows // halves // size
            for half in range(halves):
                first = half * (rows // halves) + rank * each
                slices.append(r[first : first + each])
    if entry.merge is Merge.QKV:
        return merge(slices, entry, replace(shape, kv_heads=shape.kv_heads // size), size)
    return torch.cat(slices) if len(slices) > 1 else slices[0]


def export(models: Sequence[Any], shape: ModelShape, value_head: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor under its Hugging Face name, in the order of `entries`.

    All processes of the role must iterate. On the role's rank 0 tensors are whole, on its device. Other ranks get
    tensors of the same shapes and dtypes on the device "meta", which hold no data.
    """
    own, dtype = named(models), models[0].config.params_dtype
    for entry in entries(shape, value_head):
        kind = torch.float32 if entry.float32 else dtype
        full = _collect(own.get(entry.ours), entry, shape, kind, models[0].config)
        if full is None:
            found = [torch.empty(size, dtype=kind, device="meta") for size in entry.shapes]
        else:
            found = unmerge(full, entry, shape)
        yield from zip(entry.theirs, found, strict=True)


def _collect(own: torch.Tensor | None, entry: Entry, shape: ModelShape, dtype: torch.dtype, config: Any) -> Any:
    """Return the whole tensor on rank 0, None elsewhere.

    The processes of its first data-parallel copy gather it, and the first of them sends it to rank 0. Ranks are ordered
    with tensor parallelism fastest and pipeline stages slowest; for experts, data-parallel copies are second slowest.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    stages = config.pipeline_model_parallel_size
    if entry.layer is None:
        stage = 0 if entry.ours.startswith("embedding.") else stages - 1
    else:
        virtual = config.virtual_pipeline_model_parallel_size or 1
        stage = pipeline_rank_of(entry.layer, shape.num_layers, stages, virtual)
    leader = stage * (world // stages)
    group = _group(entry)
    if entry.expert is not None:
        leader += entry.expert // (config.num_moe_experts // config.expert_model_parallel_size) * group.size()
    full = None
    if leader <= rank < leader + group.size():
        assert own is not None, (entry.ours, rank)
        full = _gather(own.detach(), entry.split, group, leader)
    if leader == 0:
        return full if rank == 0 else None
    if rank == leader:
        assert full is not None
        dist.send(full.contiguous(), 0)
    if rank != 0:
        return None
    rows = sum(size[0] for size in entry.shapes)
    if entry.merge is Merge.VOCAB:
        rows = padded_vocab(shape.vocab, config.tensor_model_parallel_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    full = torch.empty((rows, *entry.shapes[0][1:]), dtype=dtype, device=device)
    dist.recv(full, leader)
    return full


def _gather(part: torch.Tensor, split: Split, group: Any, leader: int) -> torch.Tensor | None:
    """Return the whole tensor on rank `leader`, None on the other ranks of the group."""
    first = dist.get_rank() == leader
    if split is Split.NONE or group.size() == 1:
        return part if first else None
    shards = [torch.empty_like(part) for _ in range(group.size())] if first else None
    dist.gather(part.contiguous(), shards, dst=leader, group=group)
    if shards is None:
        return None
    if split is Split.COLUMNS:
        return torch.cat(shards, dim=1)
    if split is Split.ROWS:
        return torch.cat(shards)
    halves = [shard.chunk(2) for shard in shards]
    return torch.cat([half[i] for i in range(2) for half in halves])

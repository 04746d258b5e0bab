"""Weights between a Hugging Face folder and this process's Megatron shard, both ways, bit for bit.

Mapped: Qwen3 (dense). Per tensor: the Megatron name, the Hugging Face names that are merged into it,
and how tensor parallelism splits it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import distributed as dist

from trainer.megatron import cpu

cpu.enable()

from megatron.core import parallel_state  # noqa: E402

from trainer.megatron.model import ModelShape, padded_vocab  # noqa: E402


class Split(Enum):
    """How a full tensor is spread over tensor-parallel ranks."""

    NONE = "replicated"
    ROWS = "dim 0"
    COLUMNS = "dim 1"
    GATED = "dim 0 of each half"  # fc1 = [gate; up]


class Merge(Enum):
    """How Hugging Face tensors become one."""

    ONE = "the tensor itself"
    QKV = "per key/value group: its queries, key, value"
    STACK = "one below the other"
    VOCAB = "rows padded with zeros"


@dataclass(frozen=True)
class Entry:
    ours: str
    theirs: tuple[str, ...]
    merge: Merge
    split: Split


def entries(shape: ModelShape, value_head: bool = False) -> list[Entry]:
    """Every tensor of the model; with `value_head` the vocabulary projection is left out."""
    found = [
        Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Merge.VOCAB, Split.ROWS),
        Entry("decoder.final_layernorm.weight", ("model.norm.weight",), Merge.ONE, Split.NONE),
    ]
    if not shape.tied and not value_head:
        found.append(Entry("output_layer.weight", ("lm_head.weight",), Merge.VOCAB, Split.ROWS))
    for layer in range(shape.num_layers):
        m, h = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        attention = h + "self_attn."
        qkv = tuple(f"{attention}{x}_proj.weight" for x in "qkv")
        gated = (h + "mlp.gate_proj.weight", h + "mlp.up_proj.weight")
        found += [
            Entry(m + "self_attention.linear_qkv.weight", qkv, Merge.QKV, Split.ROWS),
            Entry(m + "self_attention.linear_proj.weight", (attention + "o_proj.weight",), Merge.ONE, Split.COLUMNS),
            Entry(m + "self_attention.q_layernorm.weight", (attention + "q_norm.weight",), Merge.ONE, Split.NONE),
            Entry(m + "self_attention.k_layernorm.weight", (attention + "k_norm.weight",), Merge.ONE, Split.NONE),
            Entry(m + "input_layernorm.weight", (h + "input_layernorm.weight",), Merge.ONE, Split.NONE),
            Entry(m + "pre_mlp_layernorm.weight", (h + "post_attention_layernorm.weight",), Merge.ONE, Split.NONE),
            Entry(m + "mlp.linear_fc1.weight", gated, Merge.STACK, Split.GATED),
            Entry(m + "mlp.linear_fc2.weight", (h + "mlp.down_proj.weight",), Merge.ONE, Split.COLUMNS),
        ]
    return found


def _group_rows(shape: ModelShape) -> list[int]:
    """Rows of queries, key and value in one key/value group."""
    d = shape.head_dim
    return [shape.heads // shape.kv_heads * d, d, d]


def _merge(parts: list[torch.Tensor], entry: Entry, shape: ModelShape, tp: int) -> torch.Tensor:
    if entry.merge is Merge.ONE:
        return parts[0]
    if entry.merge is Merge.STACK:
        return torch.cat(parts)
    if entry.merge is Merge.VOCAB:
        missing = padded_vocab(shape.vocab, tp) - shape.vocab
        return torch.nn.functional.pad(parts[0], (0, 0, 0, missing))
    grouped = [part.unflatten(0, (shape.kv_heads, -1)) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _unmerge(full: torch.Tensor, entry: Entry, shape: ModelShape) -> list[torch.Tensor]:
    if entry.merge is Merge.ONE:
        return [full]
    if entry.merge is Merge.STACK:
        return list(full.chunk(len(entry.theirs)))
    if entry.merge is Merge.VOCAB:
        return [full[: shape.vocab]]
    parts = full.unflatten(0, (shape.kv_heads, -1)).split(_group_rows(shape), dim=1)
    return [part.flatten(0, 1) for part in parts]


def _shard(full: torch.Tensor, split: Split, tp: int, rank: int) -> torch.Tensor:
    if split is Split.NONE:
        return full
    if split is Split.COLUMNS:
        return full.chunk(tp, dim=1)[rank]
    if split is Split.ROWS:
        return full.chunk(tp)[rank]
    return torch.cat([half.chunk(tp)[rank] for half in full.chunk(2)])


def _gather(shard: torch.Tensor, split: Split) -> torch.Tensor:
    group = parallel_state.get_tensor_model_parallel_group()
    if split is Split.NONE or group.size() == 1:
        return shard
    parts = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(parts, shard.contiguous(), group=group)
    if split is Split.COLUMNS:
        return torch.cat(parts, dim=1)
    if split is Split.ROWS:
        return torch.cat(parts)
    halves = [part.chunk(2) for part in parts]
    return torch.cat([half[i] for i in range(2) for half in halves])


def load(model: torch.nn.Module, shape: ModelShape, folder: Path, value_head: bool = False) -> None:
    """Reads a folder's weights into this rank's shard. ValueError: a tensor is missing or misshapen."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    parameters = dict(model.named_parameters())
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(f, "pt")) for f in sorted(folder.glob("*.safetensors"))]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (no mapping)
        for entry in entries(shape, value_head):
            missing = [name for name in entry.theirs if name not in where]
            if missing:
                raise ValueError(f"{folder}: tensor {missing[0]} is missing ({len(where)} tensors found)")
            full = _merge([where[name].get_tensor(name) for name in entry.theirs], entry, shape, tp)
            shard = _shard(full, entry.split, tp, rank)
            target = parameters.pop(entry.ours)
            if shard.shape != target.shape:
                raise ValueError(
                    f"{folder}: {entry.theirs[0]} gives {tuple(shard.shape)}, the model has {tuple(target.shape)}"
                )
            with torch.no_grad():
                target.copy_(shard)
            # Megatron sets this in the initialisation that we skip; the gradient norm counts shards by it.
            target.tensor_model_parallel = entry.split is not Split.NONE
    left = [name for name in parameters if not (value_head and name.startswith("output_layer."))]
    assert not left, f"parameters without a mapping: {left}"


def export(model: torch.nn.Module, shape: ModelShape) -> Iterator[tuple[str, torch.Tensor]]:
    """Full tensors under their Hugging Face names, gathered over tensor-parallel ranks (all must iterate)."""
    parameters = dict(model.named_parameters())
    for entry in entries(shape):
        full = _gather(parameters[entry.ours].detach(), entry.split)
        yield from zip(entry.theirs, _unmerge(full, entry, shape), strict=True)


def weight_shapes(shape: ModelShape, dtype: str) -> list[tuple[str, str, list[int]]]:
    """(name, dtype, shape) of what `export` yields, in its order, without weights."""
    h, d = shape.hidden, shape.head_dim
    rows = {
        "q_proj": [shape.heads * d, h],
        "k_proj": [shape.kv_heads * d, h],
        "v_proj": [shape.kv_heads * d, h],
        "o_proj": [h, shape.heads * d],
        "q_norm": [d],
        "k_norm": [d],
        "gate_proj": [shape.ffn, h],
        "up_proj": [shape.ffn, h],
        "down_proj": [h, shape.ffn],
        "embed_tokens": [shape.vocab, h],
        "lm_head": [shape.vocab, h],
    }
    names = [name for entry in entries(shape) for name in entry.theirs]
    return [(name, dtype, rows.get(name.split(".")[-2], [h])) for name in names]


def save(weights: dict[str, torch.Tensor], source: Path, folder: Path) -> None:
    """A Hugging Face folder with these weights and the config and tokenizer of `source`; whole or not at all."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix in {".json", ".txt", ".model", ".jinja"} and not file.name.endswith(".index.json"):
            shutil.copy(file, part / file.name)
    save_file({name: tensor.contiguous().cpu() for name, tensor in weights.items()}, part / "model.safetensors")
    config = json.loads((part / "config.json").read_text())
    config["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    (part / "config.json").write_text(json.dumps(config, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)

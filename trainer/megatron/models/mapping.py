"""Every tensor of a model: its Megatron name, the Hugging Face names that are merged into it, and how it is spread.

Mapped: Qwen3 (dense).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from trainer.megatron.models.shape import ModelShape


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


def merge(parts: list[torch.Tensor], entry: Entry, shape: ModelShape, tp: int) -> torch.Tensor:
    if entry.merge is Merge.ONE:
        return parts[0]
    if entry.merge is Merge.STACK:
        return torch.cat(parts)
    if entry.merge is Merge.VOCAB:
        missing = padded_vocab(shape.vocab, tp) - shape.vocab
        return torch.nn.functional.pad(parts[0], (0, 0, 0, missing))
    grouped = [part.unflatten(0, (shape.kv_heads, -1)) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def unmerge(full: torch.Tensor, entry: Entry, shape: ModelShape) -> list[torch.Tensor]:
    if entry.merge is Merge.ONE:
        return [full]
    if entry.merge is Merge.STACK:
        return list(full.chunk(len(entry.theirs)))
    if entry.merge is Merge.VOCAB:
        return [full[: shape.vocab]]
    parts = full.unflatten(0, (shape.kv_heads, -1)).split(_group_rows(shape), dim=1)
    return [part.flatten(0, 1) for part in parts]


def shard(full: torch.Tensor, split: Split, tp: int, rank: int) -> torch.Tensor:
    if split is Split.NONE:
        return full
    if split is Split.COLUMNS:
        return full.chunk(tp, dim=1)[rank]
    if split is Split.ROWS:
        return full.chunk(tp)[rank]
    return torch.cat([half.chunk(tp)[rank] for half in full.chunk(2)])


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


def padded_vocab(vocab: int, tensor_parallel_size: int) -> int:
    """The vocabulary rounded up so that every rank holds the same number of rows."""
    return -(-vocab // tensor_parallel_size) * tensor_parallel_size

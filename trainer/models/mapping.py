"""Conversion between the tensors of Hugging Face folders and those of Megatron (entries.py has the names of both)."""

from __future__ import annotations

import torch

from trainer.models.entries import Entry, Merge, Split, padded_vocab
from trainer.models.shape import ModelShape


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return every tensor of a model that has an entry: parameters, and the correction buffers of routers."""
    corrections = {name: t for name, t in model.named_buffers() if name.endswith(".router.expert_bias")}
    return dict(model.named_parameters()) | corrections


def merge(parts: list[torch.Tensor], entry: Entry, shape: ModelShape, tp: int) -> torch.Tensor:
    """Return the Megatron tensor of an entry from its Hugging Face tensors; the vocabulary is padded for `tp` ranks."""
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
    """Return the Hugging Face tensors of an entry from its Megatron tensor, without padding."""
    if entry.merge is Merge.ONE:
        return [full]
    rows = [s[0] for s in entry.shapes]
    if entry.merge is Merge.STACK:
        return list(full.split(rows))
    if entry.merge is Merge.VOCAB:
        return [full[: rows[0]]]
    grouped = full.unflatten(0, (shape.kv_heads, -1)).split([n // shape.kv_heads for n in rows], dim=1)
    return [tensor.flatten(0, 1) for tensor in grouped]


def shard(full: torch.Tensor, split: Split, tp: int, rank: int) -> torch.Tensor:
    """Return the shard of a merged tensor that rank `rank` of `tp` holds."""
    if split is Split.NONE:
        return full
    if split is Split.COLUMNS:
        return full.chunk(tp, dim=1)[rank]
    if split is Split.ROWS:
        return full.chunk(tp)[rank]
    return torch.cat([half.chunk(tp)[rank] for half in full.chunk(2)])

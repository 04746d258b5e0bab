"""Weights between a Hugging Face folder and this process's Megatron shard, both ways, bit for bit.

Which tensor is which stands in models/mapping.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import distributed as dist

from trainer.megatron import cpu

cpu.enable()

from megatron.core import parallel_state  # noqa: E402

from trainer.megatron.models.mapping import Split, entries, merge, shard, unmerge  # noqa: E402
from trainer.megatron.models.shape import ModelShape  # noqa: E402


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
            full = merge([where[name].get_tensor(name) for name in entry.theirs], entry, shape, tp)
            own = shard(full, entry.split, tp, rank)
            target = parameters.pop(entry.ours)
            if own.shape != target.shape:
                raise ValueError(
                    f"{folder}: {entry.theirs[0]} gives {tuple(own.shape)}, the model has {tuple(target.shape)}"
                )
            with torch.no_grad():
                target.copy_(own)
            # Megatron sets this in the initialisation that we skip; the gradient norm counts shards by it.
            target.tensor_model_parallel = entry.split is not Split.NONE
    left = [name for name in parameters if not (value_head and name.startswith("output_layer."))]
    assert not left, f"parameters without a mapping: {left}"


def export(model: torch.nn.Module, shape: ModelShape) -> Iterator[tuple[str, torch.Tensor]]:
    """Full tensors under their Hugging Face names, gathered over tensor-parallel ranks (all must iterate)."""
    parameters = dict(model.named_parameters())
    for entry in entries(shape):
        full = _gather(parameters[entry.ours].detach(), entry.split)
        yield from zip(entry.theirs, unmerge(full, entry, shape), strict=True)


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

"""Megatron distributed checkpoints: weights and optimizer state, loadable in another layout.

The caller owns atomicity: it saves into a folder of its own and renames that when every role is done.
"""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from trainer.megatron import cpu

cpu.enable()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402

# The default format of megatron-core 0.16.1 fails on load; this one also reshards over TP and DP.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}


def _sharded(model: Any, optimizer: Any, loading: bool) -> dict[str, Any]:
    weights = model.module.sharded_state_dict(prefix="model.")
    state = optimizer.sharded_state_dict(weights, is_loading=loading, metadata=_METADATA)
    return {"weights": weights, "optimizer": state}


def save(folder: Path, model: Any, optimizer: Any, extra: dict[str, int]) -> None:
    """All ranks call it; returns when the files are on disk. `model` is the DDP-wrapped one."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    # A synchronous save collects its results in this process. The default queue lives in a server process
    # that is spawned for it, imports everything again (15 s) and outlives the job.
    filesystem_async._results_queue = queue.Queue()
    state = _sharded(model, optimizer, loading=False) | {"extra": extra}
    dist_checkpointing.save(state, str(folder), content_metadata=_METADATA)
    dist.barrier()


def load(folder: Path, model: Any, optimizer: Any) -> dict[str, int]:
    """All ranks call it. Returns `extra`. ValueError: no complete checkpoint there."""
    if not (folder / "metadata.json").is_file():
        raise ValueError(f"{folder}: not a complete checkpoint (metadata.json is missing)")
    state = _sharded(model, optimizer, loading=True) | {"extra": {}}
    loaded = dist_checkpointing.load(state, str(folder))
    with torch.no_grad():
        model.module.load_state_dict({name.removeprefix("model."): t for name, t in loaded["weights"].items()})
        optimizer.load_state_dict(loaded["optimizer"])
    return dict(loaded["extra"])

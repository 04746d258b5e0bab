"""Conversion of optimizer state between flat slices on data-parallel ranks and tensors of the parameters' shapes.

Each rank of megatron-core's distributed optimizer holds an arbitrary slice of a flat buffer: master weights and Adam's
two moments. A checkpoint for any layout stores them like the weights. megatron-core's own format for that
(`fully_reshardable` in 0.16.1) confuses the states of two parameters if a padded bucket is followed by a second one, as
on the last pipeline stage of a model with tied embeddings, and it holds the whole state of a model shard in the memory
of every rank, both when saving and when loading. Here the first data-parallel rank gathers the state, one tensor at a
time, and a rank reads only the parameters of its own slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import distributed as dist

from trainer.megatron import cpu

cpu.enable()

from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory  # noqa: E402

_KEYS = ("param", "exp_avg", "exp_avg_sq")  # in float32


def _optimizers(optimizer: Any) -> list[Any]:
    """Return Megatron's optimizers: under expert parallelism the experts have a separate one."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _local(optimizer: Any) -> dict[Any, Any]:
    """Return each parameter of which this rank holds a slice, with that slice."""
    found = {}
    for of_buffer in optimizer.gbuf_ranges:
        for of_buckets in of_buffer.values():
            for of_bucket in of_buckets:
                found.update({p: ranges["param"] for p, ranges in of_bucket["param_map"].items()})
    return found


def _stored(base: Any, key: str, data: torch.Tensor) -> Any:
    """Return the description of a weight's optimizer state, derived from the description of the weight."""
    dtype = {"dtype": data.dtype} if isinstance(base, ShardedTensor) else {}
    return replace(base, key=f"optimizer.state.{key}.{base.key}", data=data, **dtype)


def _descriptions(weights: dict[str, Any]) -> dict[Any, Any]:
    kinds = ShardedTensor, ShardedTensorFactory
    return {value.data: value for value in nested_values(weights) if isinstance(value, kinds)}


def gather(optimizer: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """Return the optimizer state that this rank saves, on the CPU; all ranks call it.

    `weights`: the sharded state dicts of this rank's chunks. The state must exist: call it after a step.
    """
    of_weight = _descriptions(weights)
    found: dict[str, Any] = {}
    for single in _optimizers(optimizer):
        local, group = _local(single), single.data_parallel_group
        first = dist.get_global_rank(group, 0)
        for buffer in single.buffers:
            for param in buffer.param_index_map:
                own = single._get_main_param_and_optimizer_states(param) if param in local else {}
                for key in _KEYS:
                    whole = torch.zeros(param.numel(), dtype=torch.float32, device=param.device)
                    if own:
                        whole[local[param].start : local[param].end] = own[key].detach().to(param.device)
                    if group.size() > 1:
                        dist.reduce(whole, first, group=group)  # one rank's slice and zeros: exact
                    if dist.get_rank() == first:
                        found[f"{len(found)}"] = _stored(of_weight[param], key, whole.cpu().view(param.shape))
    return found


def wanted(optimizer: Any, weights: dict[str, Any], updates_done: int) -> dict[str, Any]:
    """Return the tensors that this rank must read, in the order of `put`; allocate them in the optimizer."""
    of_weight = _descriptions(weights)
    found: dict[str, Any] = {}
    for single in _optimizers(optimizer):
        state = single.state_dict()
        for group in state["optimizer"]["param_groups"]:
            group["step"] = updates_done  # no optimizer step is ever skipped
        single.load_state_dict(state)
        for param in _local(single):
            for key in _KEYS:
                found[f"{len(found)}"] = _stored(of_weight[param], key, torch.empty(param.shape, dtype=torch.float32))
    return found


@torch.no_grad()
def put(optimizer: Any, read: dict[str, torch.Tensor]) -> None:
    """Load the tensors that were read for `wanted` into the optimizer."""
    tensors: Iterator[torch.Tensor] = iter(read[f"{i}"] for i in range(len(read)))
    for single in _optimizers(optimizer):
        for param, own in _local(single).items():
            mine = {key: next(tensors).flatten()[own.start : own.end] for key in _KEYS}
            single._set_main_param_and_optimizer_states(param, mine)

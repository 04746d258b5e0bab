"""The engine side of a delta update: SGLang receives only the changed elements (format: trainer/publish/delta.py).

SGLang's loaders copy whole tensors, under their Hugging Face names, into SGLang's fused and sharded tensors. A delta
uses the same loaders: each received tensor is NaN where nothing changed, and during loading a copy skips the NaN
elements. Copies are exact, so the result equals a load of the whole weights, bit for bit.

`install` runs inside an engine's processes, from the platform plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

LOAD_FORMAT = "slime_delta"  # of an update that contains only changed elements
_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"


class Changes(list[tuple[str, torch.Tensor]]):
    """(name, tensor) pairs in the form that a loader takes; NaN marks an unchanged element."""


class KeepUnderNaN(TorchDispatchMode):
    """Makes `target.copy_(source)` keep the target's element wherever source is NaN."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            target, source = args[:2]
            source = source.to(target.device)
            return func(target, torch.where(torch.isnan(source), target, source.to(target.dtype)))
        return func(*args, **(kwargs or {}))


def decode(
    names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]], receive: Callable[..., torch.Tensor]
) -> Changes:
    """Return a bucket's tensors. `receive(size, dtype)` returns the next broadcast, a tensor of `size` elements."""
    kinds = [getattr(torch, dtype) for dtype in dtypes]
    sizes = [torch.Size(shape) for shape in shapes]
    counts = receive(len(names), torch.int64).tolist()
    num_values = [size.numel() if count < 0 else count for size, count in zip(sizes, counts, strict=True)]
    num_bytes = [number * kind.itemsize for number, kind in zip(num_values, kinds, strict=True)]
    num_places = [max(count, 0) for count in counts]
    places = receive(sum(num_places), torch.int32).split(num_places)
    values = receive(sum(num_bytes), torch.uint8).split(num_bytes)
    found = Changes()
    for name, kind, size, count, place, value in zip(names, kinds, sizes, counts, places, values, strict=True):
        numbers = value.clone().view(kind)  # a copy, because a view with wider elements needs an aligned address
        if count >= 0:
            flat = torch.full((size.numel(),), torch.nan, dtype=kind, device=value.device)
            flat[place.long()] = numbers
            numbers = flat
        found.append((name, numbers.reshape(size)))
    return found


def _receive(original: Callable[..., Any], updater: Any, **request: Any) -> Any:
    """Replace `WeightUpdater.receive_weights_from_distributed`."""
    if request.get("load_format") != LOAD_FORMAT:
        return original(updater, **request)
    group = updater._model_update_group[request["group_name"]]

    def receive(size: int, dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(size, dtype=dtype, device=updater.device)
        if size:
            dist.broadcast(tensor, 0, group=group)
        return tensor

    return decode(request["names"], request["dtypes"], request["shapes"], receive)


def _load(original: Callable[..., Any], updater: Any, named_tensors: Any) -> Any:
    """Replace `WeightUpdater.load_weights_from_distributed`."""
    if not isinstance(named_tensors, Changes):
        return original(updater, named_tensors)
    with KeepUnderNaN():
        return original(updater, named_tensors)


def install() -> None:
    """Set both replacements in SGLang. Call it before SGLang loads its model."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{_UPDATER}.receive_weights_from_distributed", _receive, HookType.AROUND)
    HookRegistry.register(f"{_UPDATER}.load_weights_from_distributed", _load, HookType.AROUND)

"""The engine's end of a delta: SGLang receives only the elements that changed (format: trainer/publish/delta.py).

SGLang's loaders copy whole tensors under their Hugging Face names into their own, fused and sharded as it holds them.
A delta goes the same way, so that no loader has to be known: a tensor is filled with NaN where nothing changed, and
while it is loaded, a copy leaves alone what NaN would fall on. Copies of numbers are exact, so the result is that of
whole weights, bit for bit.

`install` runs inside an engine's processes, from the platform plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

LOAD_FORMAT = "slime_delta"  # of an update that carries changes only
_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"


class Changes(list[tuple[str, torch.Tensor]]):
    """(name, tensor) as a loader takes them; NaN is an element that stays as it is."""


class KeepUnderNaN(TorchDispatchMode):
    """Within it `target.copy_(source)` leaves an element of target alone where source is NaN."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            target, source = args[:2]
            source = source.to(target.device)
            return func(target, torch.where(torch.isnan(source), target, source.to(target.dtype)))
        return func(*args, **(kwargs or {}))


def decode(
    names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]], receive: Callable[..., torch.Tensor]
) -> Changes:
    """Return a bucket's tensors. `receive(size, dtype)` returns the next broadcast, of so many elements."""
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
        numbers = value.clone().view(kind)  # at an address of its own, which a view of wider elements must have
        if count >= 0:
            flat = torch.full((size.numel(),), torch.nan, dtype=kind, device=value.device)
            flat[place.long()] = numbers
            numbers = flat
        found.append((name, numbers.reshape(size)))
    return found


def _receive(original: Callable[..., Any], updater: Any, **request: Any) -> Any:
    """In the place of `WeightUpdater.receive_weights_from_distributed`."""
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
    """In the place of `WeightUpdater.load_weights_from_distributed`."""
    if not isinstance(named_tensors, Changes):
        return original(updater, named_tensors)
    with KeepUnderNaN():
        return original(updater, named_tensors)


def install() -> None:
    """Put both into SGLang, before it loads its model."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{_UPDATER}.receive_weights_from_distributed", _receive, HookType.AROUND)
    HookRegistry.register(f"{_UPDATER}.load_weights_from_distributed", _load, HookType.AROUND)

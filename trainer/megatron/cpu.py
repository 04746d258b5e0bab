"""Support for megatron-core on a machine without CUDA.

megatron-core 0.16 uses the device, streams, events and generators of `torch.cuda` without checking that
there is a device. Without CUDA, every `megatron.core` module gets a stand-in for its global name `torch`:
factories put their tensors on the CPU, and `torch.cuda` is a CPU whose work is always done. The stand-in
is limited to megatron-core, except for `Tensor.cuda` and `Tensor.type`, which are methods and can't be
scoped. With CUDA `enable` does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

_PREFIX = "megatron.core"
_FACTORIES = (
    *("zeros", "ones", "empty", "full", "eye", "arange", "linspace", "rand", "randn", "randint", "randperm"),
    *("tensor", "as_tensor", "empty_like", "zeros_like", "ones_like", "full_like"),
)


class _Event:
    """A CUDA event on a device whose work is always done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return 0.0


class _Stream:
    """A CUDA stream that runs everything at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, *args: Any) -> _Event:
        return _Event()


class _Generators:
    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator


class _Fallback(types.ModuleType):
    """A module with some attributes of its own that takes all others from another module."""

    def __init__(self, name: str, behind: types.ModuleType, **own: Any) -> None:
        super().__init__(name)
        self.__dict__.update(own, _behind=behind)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_behind"], name)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda"))


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return make


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _zero(*args: Any, **kwargs: Any) -> int:
    return 0


def _cuda_stand_in() -> types.ModuleType:
    stream = _Stream()

    def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    return _Fallback(
        "torch.cuda",
        torch.cuda,
        current_device=lambda: torch.device("cpu"),
        device_count=lambda: 1,
        is_available=lambda: False,
        is_current_stream_capturing=lambda: False,
        synchronize=_nothing,
        set_device=_nothing,
        empty_cache=_nothing,
        current_stream=lambda *a, **k: stream,
        default_stream=lambda *a, **k: stream,
        stream=lambda *a: contextlib.nullcontext(),
        memory_allocated=_zero,
        max_memory_allocated=_zero,
        manual_seed=torch.default_generator.manual_seed,
        initial_seed=torch.initial_seed,
        get_rng_state=get_rng_state,
        set_rng_state=set_rng_state,
        Event=_Event,
        Stream=_Stream,
        default_generators=_Generators(),
        random=types.SimpleNamespace(get_rng_state=get_rng_state, set_rng_state=set_rng_state),
        nvtx=types.SimpleNamespace(range_push=_nothing, range_pop=_nothing),
    )


class _PatchAfterImport(importlib.abc.MetaPathFinder):
    """An import hook that patches megatron modules loaded after `enable` (checkpoint strategies load late)."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(_PREFIX):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            _patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _patch(module: types.ModuleType) -> None:
    names = module.__dict__
    if names.get("torch") is torch:
        names["torch"] = _stand_in()
    if "_lazy_call" in names and "_lazy_init" in names:  # tensor_parallel.random queues its seeding for CUDA
        names["_lazy_call"] = lambda call, **kwargs: call()
        names["_lazy_init"] = _nothing


@functools.cache
def _stand_in() -> types.ModuleType:
    factories = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    return _Fallback("torch", torch, cuda=_cuda_stand_in(), **factories)


_tensor_type = torch.Tensor.type


def _type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return the CUDA type name for `Tensor.type()` inside megatron-core, whose DDP groups its buckets by it."""
    answer = _tensor_type(self, *args, **kwargs)
    if args or kwargs or f"{_PREFIX}.".replace(".", "/") not in sys._getframe(1).f_code.co_filename:
        return answer
    return answer.replace("torch.", "torch.cuda.", 1)


@functools.cache
def enable() -> None:
    """Make `import megatron.core` work without CUDA; call it before that import. Idempotent."""
    # Each module of megatron-core warns at import that Apex and Transformer Engine are absent; we don't use them.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"megatron\.")
    if torch.cuda.is_available():
        return
    tensor: Any = torch.Tensor  # its own methods are replaced
    tensor.type = _type
    tensor.cuda = lambda self, *args, **kwargs: self
    sys.meta_path.insert(0, _PatchAfterImport())
    for name, module in list(sys.modules.items()):
        if name.startswith(_PREFIX) and module is not None:
            _patch(module)

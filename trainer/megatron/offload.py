"""Offloading of device memory to host memory while a role does not need it.

    weights     parameters and buffers of the model       away while the role is idle         (offload: role)
    gradients   of all parameters, in fp32                away except during updates          (offload: role)
    state       fp32 weights and Adam's moments           away except during optimizer steps  (offload: optimizer)

Storages are emptied in place: every tensor and every view that megatron-core holds remains the same object and has its
values again after the bytes are restored. Gradients are not kept; they are restored as zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from trainer.config import Offload
from trainer.engine import Memory

PIECE = 1 << 28  # bytes; a power of two, because pinned host memory is allocated in powers of two

AWAY = {  # memory that is offloaded outside of the work that needs it
    Offload.none: frozenset[Memory](),
    Offload.optimizer: frozenset({Memory.state}),
    Offload.role: frozenset(Memory),
}


class Shelf:
    """Host memory for the contents of storages, which are empty in the meantime."""

    def __init__(self) -> None:
        self._kept: list[tuple[torch.UntypedStorage, int, list[torch.Tensor]]] = []

    def put(self, storages: Sequence[torch.UntypedStorage], keep: bool = True) -> None:
        """Take the bytes of storages (only their sizes without `keep`) and empty them. The shelf must be free."""
        assert not self._kept, "the shelf is taken"
        for storage in storages:
            size, pieces = storage.nbytes(), []
            if keep:
                for chunk in _bytes(storage).split(PIECE):
                    pieces.append(torch.empty(chunk.shape, dtype=torch.uint8, pin_memory=storage.device.type == "cuda"))
                    pieces[-1].copy_(chunk, non_blocking=True)
            self._kept.append((storage, size, pieces))
        _finish_copies()
        for storage, _, _ in self._kept:
            storage.resize_(0)

    def give_back(self) -> None:
        """Fill the storages again, with their old contents or with zeros."""
        for storage, size, pieces in self._kept:
            storage.resize_(size)
            if not pieces:
                _bytes(storage).zero_()
                continue
            for chunk, piece in zip(_bytes(storage).split(PIECE), pieces, strict=True):
                chunk.copy_(piece, non_blocking=True)
        _finish_copies()
        self._kept = []


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """Return a uint8 view of a whole storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _finish_copies() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def storages(tensors: Iterable[torch.Tensor], but: Iterable[torch.Tensor] = ()) -> list[torch.UntypedStorage]:
    """Return the non-empty storages of tensors, each once, without those of the tensors `but`."""
    seen = {0, *(tensor.untyped_storage().data_ptr() for tensor in but)}
    found = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            found.append(storage)
    return found


def weights_of(chunks: Sequence[Any]) -> list[torch.Tensor]:
    """Return the parameters and buffers of a rank's model chunks, which may be wrapped for data parallelism."""
    models = [getattr(chunk, "module", chunk) for chunk in chunks]
    return [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]


def gradients_of(chunks: Sequence[Any]) -> list[torch.Tensor]:
    """Return the buffers in which megatron-core sums gradients; none for bare models."""
    wrapped = [chunk for chunk in chunks if hasattr(chunk, "module")]
    return [buffer.grad_data for chunk in wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def state_of(optimizer: Any) -> list[torch.Tensor]:
    """Return the weights that Megatron's optimizer updates and its moments. In fp32 it updates views of the weights."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    inner = [one.optimizer for one in chained if getattr(one, "optimizer", None) is not None]
    steps_on = [parameter for one in inner for group in one.param_groups for parameter in group["params"]]
    remembers = [value for one in inner for of_one in one.state.values() for value in of_one.values()]
    return [tensor for tensor in (*steps_on, *remembers) if isinstance(tensor, torch.Tensor)]


class Residence:
    """The state of a rank's memory: on its device or offloaded. All of it is on the device at construction."""

    def __init__(self, offload: Offload, chunks: Sequence[Any], optimizer: Any | None) -> None:
        """Offload the memory that `AWAY` lists. `optimizer`: None for a frozen role."""
        self._chunks = chunks
        self._optimizer = optimizer
        self._shelves = {kind: Shelf() for kind in Memory}
        self._goes = AWAY[offload]
        self.away: frozenset[Memory] = frozenset()
        self._send_away(self._goes)

    @contextmanager
    def present(self, *memory: Memory) -> Iterator[None]:
        """Keep the memory on the device inside the block, and after it if it was there before."""
        wanted = self.away.intersection(memory)
        for kind in Memory:
            if kind in wanted:
                self._shelves[kind].give_back()
        self.away -= wanted
        try:
            yield
        finally:
            self._send_away(wanted)

    def _send_away(self, memory: frozenset[Memory]) -> None:
        for kind in Memory:
            if kind in memory:
                self._shelves[kind].put(self._storages(kind), keep=kind is not Memory.gradients)
        self.away |= memory
        if Memory.weights in memory and torch.cuda.is_available():
            torch.cuda.empty_cache()  # for the other processes on the GPU

    def _storages(self, kind: Memory) -> list[torch.UntypedStorage]:
        if kind is Memory.weights:
            return storages(weights_of(self._chunks))
        if kind is Memory.gradients:
            return storages(gradients_of(self._chunks))
        if self._optimizer is None:
            return []
        return storages(state_of(self._optimizer), but=weights_of(self._chunks))

"""Megatron distributed checkpoints of weights, optimizer state and generators, written in the background.

    begin    all ranks together   copies the contents of the checkpoint into host memory; training may continue
    result   each rank            None while its file is being written, then the description of its file
    finish   rank 0               writes the index over all ranks' files, which completes the folder

A thread of the rank's own process writes (file I/O releases the interpreter lock), and between `begin` and `finish` no
rank waits for another: a failed rank blocks no other. megatron-core's own asynchronous save forks a process with CUDA
and network threads in it, and finishes with a collective that has to run between two training steps on all ranks.

The caller is responsible for atomicity: it saves into a separate folder and renames it when every role is done. `load`
reads into any layout; the generators' states are restored only in the layout that they were saved in.
"""

from __future__ import annotations

import os
import pickle
import queue
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from shutil import disk_usage
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item

from trainer.megatron import cpu
from trainer.megatron.storage import moments
from trainer.megatron.storage.stored import cut_off, read_index

cpu.enable()

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.core import (  # noqa: E402
    CheckpointingConfig,
    CheckpointingException,
    save_config,
)
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import (  # noqa: E402
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy  # noqa: E402
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker  # noqa: E402

_FORMAT = {
    "non_homogeneous_layers": True
}  # each layer's tensor has its own name; layers are not stacked into one tensor
_UNREADABLE = (CheckpointException, CheckpointingException, OSError, RuntimeError, EOFError, pickle.UnpicklingError)


class _Strategy(TorchDistSaveShardedStrategy):
    """A save strategy that plans like megatron-core and leaves the writing to `Writing`."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Sequence[Any]) -> Any:
        self.writer, self.index = writer, planned[1]
        return super()._get_save_and_finalize_callbacks(writer, planned)


class Writing:
    """One rank's share of a checkpoint that is being written to disk."""

    def __init__(self, folder: Path, strategy: _Strategy, live: set[int]) -> None:
        self._folder = folder
        self._writer = strategy.writer
        self._index = strategy.index
        if self._index is not None:  # rank 0's
            vars(self._index).pop("all_local_plans", None)  # as large as the index, and not needed by readers
        buckets = self._writer.write_buckets
        self._writer.write_buckets = None
        files = [(Path(path), key, [*objects, *_staged(tensors, live)]) for path, key, (objects, tensors) in buckets]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._written: list[Any] = []
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._write, args=(files,), name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, files: list[tuple[Path, str, list[tuple[Any, Any]]]]) -> None:
        for path, key, items in files:
            try:
                with path.open("wb") as stream:
                    items.reverse()
                    while items:  # memory is freed as it is written
                        item, data = items.pop()
                        one = _write_item(
                            self._writer.transforms, stream, data, item, key, SerializationFormat.TORCH_SAVE
                        )
                        self._written.append(one)
                    stream.flush()
                    os.fsync(stream.fileno())
            except (OSError, RuntimeError) as error:  # RuntimeError: from torch's zip writer, when a write fails
                cause = error if isinstance(error, OSError) else error.__context__
                number = cause.errno if isinstance(cause, OSError) else None
                self._error = OSError(number, os.strerror(number) if number else str(error), str(path))
                return

    def result(self) -> bytes | None:
        """Return this rank's input of `finish`; None while it is being written. OSError: it could not be written."""
        if self._thread.is_alive():
            return None
        if self._error is not None:
            raise self._error
        return pickle.dumps(self._written)

    def finish(self, of_ranks: Sequence[bytes]) -> None:
        """Write the index, on rank 0, from the results of all ranks in rank order. OSError: it can't be written."""
        self._writer.finish(self._index, [pickle.loads(one) for one in of_ranks])
        save_config(CheckpointingConfig("torch_dist", 1), str(self._folder))


def _staged(tensors: Sequence[tuple[Any, torch.Tensor]], live: set[int]) -> Iterator[tuple[Any, torch.Tensor]]:
    """Return tensors that no later step changes: copies, except for tensors made for this checkpoint alone."""
    for item, tensor in tensors:
        if tensor.device.type != "cpu":
            yield item, tensor.to("cpu", non_blocking=True)
        else:
            yield item, tensor.clone() if tensor.untyped_storage().data_ptr() in live else tensor


def begin(folder: Path, chunks: Sequence[Any], optimizer: Any, updates_done: int) -> Writing:
    """Begin to write a checkpoint of the current state; all ranks call it with their DDP-wrapped chunks.

    It needs as much free host memory as this rank writes. OSError, on all ranks: the folder can't be created, or the
    disk is too full.
    """
    problem = ""
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = str(error)
    weights = _weights(chunks)
    state = weights | {"optimizer": moments.gather(optimizer, weights) if updates_done else {}}
    state["generators"] = _generators_object()
    size = sum(t.data.nbytes for t in _tensors(state) if t.data is not None and is_main_replica(t.replica_id))
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (problem, size))
    _require_room(folder, found)
    # Otherwise megatron-core starts a server process for results that imports everything again and outlives the job.
    filesystem_async._results_queue = queue.Queue()
    strategy = _Strategy()
    common = {"extra": {"updates_done": updates_done, "layout": _layout()}}
    dist_checkpointing.save(
        state | common, str(folder), strategy, async_sharded_save=True, content_metadata=dict(_FORMAT)
    )
    tensors = [t for chunk in chunks for t in (*chunk.module.parameters(), *chunk.module.buffers())]
    return Writing(folder, strategy, {t.untyped_storage().data_ptr() for t in tensors})


def _require_room(folder: Path, found: Sequence[tuple[str, int]]) -> None:
    """Require room on the shared disk. OSError, on all ranks: a rank had a problem, or all bytes do not fit."""
    problem = next((text for text, _ in found if text), "")
    if problem:
        raise OSError(f"{folder}: {problem}")
    need, free = sum(size for _, size in found), disk_usage(folder).free
    answer: list[Any] = [free]
    dist.broadcast_object_list(answer, src=0)  # other ranks may have an outdated view of a shared disk
    if answer[0] < need:
        raise OSError(f"{folder}: the checkpoint needs {need:,} bytes, the disk has {answer[0]:,} free")


def load(folder: Path, chunks: Sequence[Any], optimizer: Any) -> int:
    """Load a checkpoint and return `updates_done`; all ranks call it, in any layout.

    ValueError, on all ranks: the checkpoint is incomplete, a file is truncated or can't be read, a tensor is missing or
    has another shape; the message names the file or tensor.
    """
    problem, index, extra = "", None, {}
    try:
        index = read_index(folder)
        extra = dist_checkpointing.load_common_state_dict(str(folder))["extra"]
    except ValueError as error:
        problem = str(error)
    except (*_UNREADABLE, KeyError) as error:
        problem = f"{folder / 'common.pt'}: can't be read: {error}"
    _require_same(problem)
    updates_done = int(extra["updates_done"])
    weights = _weights(chunks)
    state = weights | {"optimizer": moments.wanted(optimizer, weights, updates_done) if updates_done else {}}
    same_layout = extra["layout"] == _layout()
    if same_layout:
        state["generators"] = _generators_object()
    _require_same(_mismatch(folder, state, index))
    problem = ""
    try:
        # Skip the check that all ranks together read everything: each reads the optimizer state of its own slices.
        loaded = dist_checkpointing.load(state, str(folder), validate_access_integrity=False)
    except _UNREADABLE as error:
        failures = getattr(error, "failures", None)
        cause = next(iter(failures.values()))[0] if failures else error
        problem = f"{folder}: can't be read: {cause}"
    _require_same(problem)
    with torch.no_grad():
        for i, chunk in enumerate(chunks):
            own = {name.removeprefix("model."): tensor for name, tensor in loaded[f"model{i}"].items()}
            chunk.module.load_state_dict(own)
        if updates_done:
            moments.put(optimizer, loaded["optimizer"])
        else:
            optimizer.reload_model_params()
    if same_layout:
        _set_generators(loaded["generators"])
    return updates_done


def _weights(chunks: Sequence[Any]) -> dict[str, Any]:
    return {
        f"model{i}": chunk.module.sharded_state_dict(prefix="model.", metadata=dict(_FORMAT))
        for i, chunk in enumerate(chunks)
    }


def _tensors(state: Any) -> Iterator[Any]:
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from nested_values(value.build())
        elif isinstance(value, ShardedTensor):
            yield value


def _mismatch(folder: Path, state: dict[str, Any], index: Any) -> str:
    """Return why the checkpoint can't be loaded into this rank's shard of the model; "" if it can."""
    wanted = set()
    for tensor in _tensors(state):
        stored = index.state_dict_metadata.get(tensor.key)
        if stored is None:
            return f"{folder}: tensor {tensor.key} is missing ({len(index.state_dict_metadata)} tensors found)"
        shapes = tuple(stored.size), tuple(tensor.global_shape)
        if tensor.allow_shape_mismatch:  # padding of the vocabulary, which depends on the layout
            shapes = shapes[0][1:], shapes[1][1:]
        if shapes[0] != shapes[1]:
            return (
                f"{folder}: tensor {tensor.key} has shape {tuple(stored.size)}, "
                f"the model's is {tuple(tensor.global_shape)}"
            )
        wanted.add(tensor.key)
    return cut_off(folder, index, wanted)


def _require_same(problem: str) -> None:
    """Raise the problem of one rank on all ranks, so that no rank waits for another. ValueError: a rank has one."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    for text in found:
        if text:
            raise ValueError(text)


def _layout() -> list[int]:
    """Return the sizes of the process groups: all, tensor, pipeline, context, expert."""
    return [
        dist.get_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    ]


def _generators_object() -> ShardedObject:
    numpy_state: Any = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "model_parallel": get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("generators", states, (dist.get_world_size(),), (dist.get_rank(),))


def _set_generators(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    kind, words, *rest = states["numpy"]
    np.random.set_state((kind, np.array(words, np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["model_parallel"])

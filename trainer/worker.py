"""One process of a training role: an engine, and the calls that arrive through Ray.

    driver --(references of sub-traces, their grid)--> every rank of the role
    a rank fetches only the sub-traces of its own data-parallel row

`PolicyWorker` and `critic.worker.CriticWorker` define what is computed from the model's output; the engine computes it.
A worker does not depend on its caller: it gets everything as arguments.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from buffer.types import Grid, SubTrace, TokenColumn
from machine.ports import ReservedPort
from machine.stacks import listen
from machine.waits import objects
from trainer.batching import MicroBatch, micro_batch, per_sub_trace
from trainer.engine import Engine, LossFunction, Memory, Saving, needs

FETCH_TIMEOUT_S = 600.0  # for the sub-traces of a rank
Columns = Mapping[str, TokenColumn]  # per-token inputs of a loss, by name


@dataclass(frozen=True)
class UpdateResult:
    """The measurements of one rank in one or more optimizer steps."""

    sums: dict[str, float]  # over this rank's tokens, "tokens" is their number; empty if another rank reports them
    maxima: dict[str, float]  # over the same tokens
    grad_norms: tuple[float, ...]  # of each optimizer step, all ranks together
    lrs: tuple[float, ...]


class Worker:
    """Base class of the roles' workers. `start` must have returned on all ranks before any other call."""

    def __init__(self, engine: Engine) -> None:
        listen()
        self.engine = engine
        self._ports: list[ReservedPort] = []
        self._saving: Saving | None = None

    def address(self) -> tuple[str, int]:
        """Return the host and a reserved port of this process, where a group will meet."""
        self._ports.append(ReservedPort(""))
        return ray.util.get_node_ip_address(), self._ports[-1].number

    @needs(*Memory)
    def start(self, master: str, port: int) -> int:
        """Join the process group, build the model, read its weights; return the model's hidden size."""
        self.engine.start(master, port)
        return self.engine.shape.hidden

    def _micro_batches(
        self, row: Sequence[Sequence[int]], sub_traces: Mapping[int, SubTrace], columns: Columns
    ) -> Iterator[MicroBatch]:
        share = self.engine.share
        missing = -len(row) % share.batch_multiple
        for indices in [*row, *([()] * missing)]:
            yield micro_batch(indices, sub_traces, columns, self.engine.device, share.length_multiples, share.context)

    def _predict(self, refs: Sequence[Any], grid: Grid) -> TokenColumn:
        """Predict: float32 [T] for each sub-trace of this rank's row (empty on ranks that do not report it)."""
        row = grid[self.engine.share.row]
        found = self.engine.forward(list(self._micro_batches(row, fetch(refs, row), {})))
        return TokenColumn.joined(per_sub_trace(batch, out_A) for batch, out_A in found)

    def _own(self, columns: Sequence[Any]) -> Columns:
        """Return the columns of this rank's data-parallel row. `columns`: a `Columns`, or a reference, for each row."""
        own: Columns = resolved([columns[self.engine.share.row]])[0]
        return own

    def _update(self, refs: Sequence[Any], columns: Columns, grids: Sequence[Grid], loss: LossFunction) -> UpdateResult:
        """Take one optimizer step for each grid."""
        rows = [grid[self.engine.share.row] for grid in grids]
        steps = (list(self._micro_batches(row, fetch(refs, row), columns)) for row in rows)
        results = self.engine.update(steps, loss)
        sums: dict[str, float] = {}
        maxima: dict[str, float] = {}
        for found in (one for result in results for one in result.losses):
            for name, number in found.sums.items():
                sums[name] = sums.get(name, 0.0) + float(number)
            for name, number in found.maxima.items():
                maxima[name] = max(maxima.get(name, float("-inf")), float(number))
        return UpdateResult(sums, maxima, tuple(one.grad_norm for one in results), tuple(one.lr for one in results))

    @needs(*Memory)
    def save(self, folder: str) -> float:
        """Copy weights, optimizer state and generators and write them in the background.

        Returns the seconds for which training was blocked. All ranks call it. OSError: the disk is full.
        """
        began = time.perf_counter()
        self._saving = self.engine.save(Path(folder))
        return time.perf_counter() - began

    def saved(self) -> bytes | None:
        """Return this rank's input of `finish_save`; None while `save` is still writing. OSError: it failed."""
        assert self._saving is not None
        return self._saving.result()

    def finish_save(self, of_ranks: Sequence[bytes]) -> None:
        """Complete the checkpoint, on rank 0, from the results of all ranks."""
        assert self._saving is not None
        self._saving.finish(of_ranks)

    @needs(*Memory)
    def load(self, folder: str) -> None:
        """Read a checkpoint that `save` wrote in any layout. ValueError: see the engine's `load`."""
        self.engine.load(Path(folder))

    def peak_memory_gb(self) -> float:
        """Return the peak memory of this process in 1e9 bytes: on GPU since the last call, on CPU since its start."""
        if not torch.cuda.is_available():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024e-9  # Linux counts in KiB
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak * 1e-9

    def free_cache(self) -> None:
        """Free cached GPU memory for the other processes on the GPU."""
        torch.cuda.empty_cache()

    def stop(self) -> None:
        """Leave the process group; another worker may start in this process."""
        self.engine.stop()
        for port in self._ports:
            port.close()


def fetch(refs: Sequence[Any], row: Sequence[Sequence[int]]) -> dict[int, SubTrace]:
    """Return the sub-traces of one data-parallel row, by index."""
    wanted = sorted({index for indices in row for index in indices})
    return dict(zip(wanted, resolved([refs[index] for index in wanted]), strict=True))


def resolved(refs: list[Any]) -> list[Any]:
    """Return the objects behind references; other objects (in unit tests) are returned unchanged."""
    if refs and isinstance(refs[0], ray.ObjectRef):
        return objects("sub-traces of a rank", refs, FETCH_TIMEOUT_S)
    return refs

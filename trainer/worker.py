"""One process of a training role: a shard of a Megatron model, its optimizer, forward and update.

    driver --(references of sub-traces, their grid)--> every rank of the role
    a rank fetches only the sub-traces of its own data-parallel row

`PolicyWorker` and `critic.worker.CriticWorker` say what is computed from the model's output; this class
knows neither. Its caller is unknown to it: all it needs comes in as arguments.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from torch import distributed as dist

from buffer.types import Float32, Grid, SubTrace
from machine.ports import ReservedPort
from trainer.batching import MicroBatch, length_multiples, micro_batch, per_sub_trace
from trainer.config import LayoutConfig, OptimizerConfig
from trainer.layout import check_layout
from trainer.megatron import cpu
from trainer.offload import Part, Residence, needs

cpu.enable()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import finalize_model_grads  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

from trainer.megatron import hf, model, optimizer  # noqa: E402
from trainer.megatron.storage import checkpoint  # noqa: E402
from trainer.models.entries import entries  # noqa: E402
from trainer.models.shape import read_shape  # noqa: E402

Fields = dict[str, dict[int, Float32]]
# output of the model (log-probabilities and entropies [2, P], or values [1, P]) and its micro-batch -> summed loss,
# sums and maxima for the metrics
LossFunction = Callable[
    [torch.Tensor, MicroBatch], tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]
]


@dataclass(frozen=True)
class WorkerSettings:
    """What one process of a role is told at birth."""

    rank: int
    layout: LayoutConfig
    optimizer: OptimizerConfig
    model_folder: str
    seed: int
    threads: int
    timeout_s: float
    frozen: bool = False  # only ever asked to predict: no gradients, no optimizer
    options: Mapping[str, Any] = field(default_factory=dict)  # of Megatron's TransformerConfig, beside ours


class MegatronWorker:
    """Base of the roles. `start` must have returned on all ranks before anything else is asked."""

    value_head_std: float | None = None  # a number: a scalar head replaces the vocabulary projection
    freeze: Sequence[str] = ()  # patterns of parameters that are not trained

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.updates_done = 0  # optimizer steps
        self._ports: list[ReservedPort] = []

    def address(self) -> tuple[str, int]:
        """Host and a port of this process, kept free, where a group is about to meet."""
        self._ports.append(ReservedPort(""))
        return ray.util.get_node_ip_address(), self._ports[-1].number

    def start(self, master: str, port: int) -> int:
        """Joins the process group, builds the model, reads its weights. Returns the model's hidden size."""
        s = self.settings
        self.shape = read_shape(Path(s.model_folder))
        check_layout(self.shape, s.layout)
        model.start_process(s.rank, s.layout, master, port, s.seed, s.timeout_s, s.threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.chunks: list[Any] = model.build_models(self.shape, s.layout, self._output_layer(), s.options)
        self._read_weights(self.chunks)
        self.run_schedule = get_forward_backward_func()
        if s.frozen:
            for chunk in self.chunks:
                chunk.requires_grad_(False)
            self.residence = Residence(s.layout.offload, self.chunks, None)
            return self.shape.hidden
        optimizer.freeze(self.chunks, hf.named(self.chunks), self._parameter_names(), self.freeze)
        self.chunks = optimizer.wrap_ddp(self.chunks)
        self.optimizer = optimizer.build_optimizer(self.chunks, s.optimizer, s.layout.precision)
        self.chunks[0].config.finalize_model_grads_func = finalize_model_grads
        self.chunks[0].config.grad_scale_func = self.optimizer.scale_loss
        self.residence = Residence(s.layout.offload, self.chunks, self.optimizer)
        return self.shape.hidden

    def _read_weights(self, models: Sequence[torch.nn.Module]) -> None:
        folder = Path(self.settings.model_folder)
        hf.load(models, self.shape, folder, value_head=self.value_head_std is not None)

    @property
    def models(self) -> list[Any]:
        """The bare models of this rank's chunks."""
        return [chunk if self.settings.frozen else chunk.module for chunk in self.chunks]

    def _output_layer(self) -> Any:
        return None

    def _parameter_names(self) -> list[str]:
        """Of the whole model, whichever process has them."""
        head = [] if self.value_head_std is None else ["output_layer.weight", "output_layer.bias"]
        return [entry.ours for entry in entries(self.shape, bool(head))] + head

    @property
    def _counts(self) -> bool:
        """One process for each slice of the tokens tells their sums; only the last pipeline stage knows them."""
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        return bool(last) and parallel_state.get_tensor_model_parallel_rank() == 0

    @property
    def _speaks(self) -> bool:
        """One process of every data-parallel row answers for it."""
        return self._counts and parallel_state.get_context_parallel_rank() == 0

    def _own_row(self, grid: Grid) -> list[list[int]]:
        return grid[parallel_state.get_data_parallel_rank()]

    def _micro_batches(
        self, row: Sequence[Sequence[int]], sub_traces: dict[int, SubTrace], fields: Fields
    ) -> Iterator[MicroBatch]:
        layout = self.settings.layout
        multiples = length_multiples(layout.tensor_parallel, layout.sequence_parallel, layout.context_parallel)
        context = layout.context_parallel, parallel_state.get_context_parallel_rank()
        # Virtual stages take micro-batches in groups as large as the pipeline; empty ones fill the last group.
        missing = -len(row) % layout.pipeline_parallel if layout.virtual_stages > 1 else 0
        for indices in [*row, *([()] * missing)]:
            yield micro_batch(indices, sub_traces, fields, self.device, multiples, context)

    def _run(self, batches: list[MicroBatch], loss: LossFunction | None) -> list[Any]:
        """All micro-batches through all chunks; what comes of each on the last pipeline stage, nothing elsewhere.

        That is the first row of the model's output [C, P], or, with a loss, sums and maxima for the metrics.
        """

        def step(iterator: Iterator[MicroBatch], gpt: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
            batch = next(iterator)

            def reduce(out: torch.Tensor, non_loss_data: bool = False) -> Any:
                if loss is None:
                    return batch, out[0].detach()
                total, sums, maxima = loss(out, batch)
                return total, torch.tensor(batch.num_actions, dtype=torch.int), (sums, maxima)

            position_1P = batch.packing.position_T[None]
            out = gpt(batch.tokens_1P, position_1P, None, labels=batch.labels_1P, packed_seq_params=batch.packing)
            return out, reduce

        return self.run_schedule(
            forward_step_func=step,
            data_iterator=[iter(batches) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=max(batch.tokens_1P.shape[1] for batch in batches),
            micro_batch_size=1,
            forward_only=loss is None,
            collect_non_loss_data=loss is None,
        )

    @needs(Part.weights)
    def predict(self, refs: Sequence[Any], grid: Grid) -> dict[int, Float32]:
        """Forward only: float32 [T] for each sub-trace of this rank's row (empty on ranks that do not speak)."""
        row = self._own_row(grid)
        sub_traces = fetch(refs, row)
        batches = list(self._micro_batches(row, sub_traces, {}))
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            found = [(batch, self._whole(out_P)) for batch, out_P in self._run(batches, None)]
        for chunk in self.chunks:
            chunk.train()
        if not self._speaks:
            return {}
        return {index: out for batch, out_A in found for index, out in per_sub_trace(batch, out_A).items()}

    def _whole(self, out_P: torch.Tensor) -> torch.Tensor:
        """[A]: the outputs of all processes that share the sequences, one process's after the other's."""
        group = parallel_state.get_context_parallel_group()
        if group.size() == 1:
            return out_P
        parts = [torch.empty_like(out_P) for _ in range(group.size())]
        dist.all_gather(parts, out_P.contiguous(), group=group)
        return torch.cat(parts)

    @needs(Part.weights, Part.gradients)
    def _update(self, refs: Sequence[Any], fields: Fields, grids: Sequence[Grid], loss: LossFunction) -> dict[str, Any]:
        """One optimizer step for each grid. Returns sums and maxima over this rank's tokens, lists over the steps."""
        sums: dict[str, float] = {}
        maxima: dict[str, float] = {}
        steps: dict[str, list[float]] = {"grad_norm": [], "lr": []}
        for grid in grids:
            row = self._own_row(grid)
            sub_traces = fetch(refs, row)
            lr = optimizer.learning_rate(self.settings.optimizer, self.updates_done)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            found = self._run(list(self._micro_batches(row, sub_traces, fields)), loss)
            with self.residence.present(Part.state):
                done, grad_norm, _ = self.optimizer.step()
            if not done or not grad_norm < float("inf"):
                raise RuntimeError(f"optimizer step {self.updates_done}: gradient norm {grad_norm} is not finite")
            self.updates_done += 1
            steps["grad_norm"].append(float(grad_norm))
            steps["lr"].append(lr)
            for of_sums, of_maxima in found:
                for name, number in of_sums.items():
                    sums[name] = sums.get(name, 0.0) + float(number)
                for name, number in of_maxima.items():
                    maxima[name] = max(maxima.get(name, float("-inf")), float(number))
        optimizer.gather_weights(self.chunks)
        if not self._counts:
            sums, maxima = {}, {}
        return {"sums": sums, "maxima": maxima, "steps": steps}

    @needs(*Part)
    def save(self, folder: str) -> float:
        """Takes weights, optimizer state and generators as they are now and writes them in the background.

        Returns the seconds for which training stood still. All ranks call it; OSError: no room on the disk.
        """
        began = time.perf_counter()
        self.writing = checkpoint.begin(Path(folder), self.chunks, self.optimizer, self.updates_done)
        return time.perf_counter() - began

    def saved(self) -> bytes | None:
        """None while `save` is still writing, then what `finish_save` wants. OSError: it could not be written."""
        return self.writing.result()

    def finish_save(self, of_ranks: Sequence[bytes]) -> None:
        """On rank 0: makes the files of all ranks one checkpoint."""
        self.writing.finish(of_ranks)

    @needs(*Part)
    def load(self, folder: str) -> None:
        """Reads what `save` wrote, in this or another layout. ValueError: see `checkpoint.load`."""
        self.updates_done = checkpoint.load(Path(folder), self.chunks, self.optimizer)

    def peak_memory_gb(self) -> float:
        """Most memory this process has held, in 1e9 bytes: on its GPU since the last call, on a CPU since its start."""
        if not torch.cuda.is_available():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024e-9  # Linux counts in KiB
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak * 1e-9

    def free_cache(self) -> None:
        """Gives GPU memory that is not in use back to the other processes on the GPU."""
        torch.cuda.empty_cache()

    def stop(self) -> None:
        """Leaves the process group; another worker may start in this process."""
        optimizer.unwrap_ddp(self.chunks)
        model.leave_process()
        for port in self._ports:
            port.close()


def fetch(refs: Sequence[Any], row: Sequence[Sequence[int]]) -> dict[int, SubTrace]:
    """The sub-traces of one data-parallel row, by index. References are resolved; plain ones pass through."""
    wanted = sorted({index for indices in row for index in indices})
    found = [refs[index] for index in wanted]
    if found and isinstance(found[0], ray.ObjectRef):
        found = ray.get(found, timeout=600)
    return dict(zip(wanted, found, strict=True))

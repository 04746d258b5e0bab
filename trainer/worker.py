"""One process of a training role: a shard of a Megatron model, its optimizer, forward and update.

    driver --(references of sub-traces, their grid)--> every rank of the role
    a rank fetches only the sub-traces of its own data-parallel row

`PolicyWorker` and `critic.worker.CriticWorker` say what is computed from the model's output; this class
knows neither. Its caller is unknown to it: all it needs comes in as arguments.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from torch import distributed as dist

from buffer.types import Float32, Grid, SubTrace
from trainer.batching import MicroBatch, micro_batch, per_sub_trace
from trainer.config import LayoutConfig, OptimizerConfig
from trainer.megatron import cpu

cpu.enable()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import finalize_model_grads  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

from trainer.megatron import checkpoint, hf, model, optimizer  # noqa: E402
from trainer.megatron.models.shape import read_shape  # noqa: E402

Fields = dict[str, dict[int, Float32]]
# output of the model [C, P] and its micro-batch -> summed loss, sums and maxima for the metrics
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


class MegatronWorker:
    """Base of the roles. `start` must have returned on all ranks before anything else is asked."""

    value_head_std: float | None = None  # a number: a scalar head replaces the vocabulary projection
    freeze: Sequence[str] = ()  # patterns of parameters that are not trained

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.updates_done = 0  # optimizer steps

    def address(self) -> tuple[str, int]:
        """Host and a free port of this process, where the role's ranks meet."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, master: str, port: int) -> None:
        """Joins the process group, builds the model, reads its weights."""
        s = self.settings
        model.start_process(s.rank, s.layout, master, port, s.seed, s.timeout_s, s.threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.shape = read_shape(Path(s.model_folder))
        gpt = model.build_gpt(self.shape, s.layout, self._output_layer())
        self._read_weights(gpt)
        self.run_schedule = get_forward_backward_func()
        if s.frozen:
            self.ddp = gpt.requires_grad_(False)
            return
        optimizer.freeze(gpt, self.freeze)
        self.ddp = optimizer.wrap_ddp(gpt)
        self.optimizer = optimizer.build_optimizer(self.ddp, s.optimizer, s.layout.precision)
        self.ddp.config.finalize_model_grads_func = finalize_model_grads
        self.ddp.config.grad_scale_func = self.optimizer.scale_loss

    def _read_weights(self, gpt: torch.nn.Module) -> None:
        folder = Path(self.settings.model_folder)
        hf.load(gpt, self.shape, folder, value_head=self.value_head_std is not None)

    def _output_layer(self) -> Any:
        return None

    @property
    def _speaks(self) -> bool:
        """One rank of every data-parallel row answers for it."""
        return parallel_state.get_tensor_model_parallel_rank() == 0

    def _own_row(self, grid: Grid) -> list[list[int]]:
        return grid[parallel_state.get_data_parallel_rank()]

    def _micro_batches(
        self, row: Sequence[Sequence[int]], sub_traces: dict[int, SubTrace], fields: Fields
    ) -> Iterator[MicroBatch]:
        layout = self.settings.layout
        multiple = layout.tensor_parallel if layout.sequence_parallel else 1
        for indices in row:
            yield micro_batch(indices, sub_traces, fields, self.device, multiple)

    def _forward(self, batch: MicroBatch, gpt: Any) -> torch.Tensor:
        """[C, P] per predicted token: what the role reads off the model. `predict` returns the first of the C."""
        raise NotImplementedError

    def _run(self, batches: list[MicroBatch], loss: LossFunction | None) -> list[Any]:
        def step(iterator: Iterator[MicroBatch], gpt: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
            batch = next(iterator)

            def reduce(out: torch.Tensor, non_loss_data: bool = False) -> Any:
                if loss is None:
                    return per_sub_trace(batch, out[0])
                total, sums, maxima = loss(out, batch)
                return total, torch.tensor(batch.num_actions, dtype=torch.int), (sums, maxima)

            return self._forward(batch, gpt), reduce

        return self.run_schedule(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=self.ddp,
            num_microbatches=len(batches),
            seq_length=max(batch.tokens_1P.shape[1] for batch in batches),
            micro_batch_size=1,
            forward_only=loss is None,
            collect_non_loss_data=loss is None,
        )

    def predict(self, refs: Sequence[Any], grid: Grid) -> dict[int, Float32]:
        """Forward only: float32 [T] for each sub-trace of this rank's row (empty on ranks that do not speak)."""
        row = self._own_row(grid)
        sub_traces = fetch(refs, row)
        self.ddp.eval()
        with torch.no_grad():
            found: list[dict[int, Float32]] = self._run(list(self._micro_batches(row, sub_traces, {})), None)
        self.ddp.train()
        return {index: out for part in found for index, out in part.items()} if self._speaks else {}

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
            self.ddp.zero_grad_buffer()
            self.optimizer.zero_grad()
            found = self._run(list(self._micro_batches(row, sub_traces, fields)), loss)
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
        if not self._speaks:
            sums, maxima = {}, {}
        return {"sums": sums, "maxima": maxima, "steps": steps}

    def save(self, folder: str) -> float:
        """Writes weights and optimizer state; returns seconds."""
        began = time.perf_counter()
        checkpoint.save(Path(folder), self.ddp, self.optimizer, {"updates_done": self.updates_done})
        return time.perf_counter() - began

    def load(self, folder: str) -> None:
        """Reads what `save` wrote, in this or another layout."""
        self.updates_done = checkpoint.load(Path(folder), self.ddp, self.optimizer)["updates_done"]

    def free_cache(self) -> None:
        """Gives GPU memory that is not in use back to the other processes on the GPU."""
        torch.cuda.empty_cache()

    def stop(self) -> None:
        """Leaves the process group."""
        dist.destroy_process_group()


def fetch(refs: Sequence[Any], row: Sequence[Sequence[int]]) -> dict[int, SubTrace]:
    """The sub-traces of one data-parallel row, by index. References are resolved; plain ones pass through."""
    wanted = sorted({index for indices in row for index in indices})
    found = [refs[index] for index in wanted]
    if found and isinstance(found[0], ray.ObjectRef):
        found = ray.get(found, timeout=600)
    return dict(zip(wanted, found, strict=True))

"""The Megatron engine: tensor, pipeline, context, expert and data parallelism with a distributed optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from trainer.batching import MicroBatch, length_multiples
from trainer.engine import (
    EngineSettings,
    LossFunction,
    Memory,
    RankShare,
    Saving,
    ScalarHead,
    StepResult,
    SummedLoss,
    learning_rate,
    require_finite_norm,
)
from trainer.layout import Sizes, check_layout
from trainer.megatron import cpu
from trainer.megatron.offload import Residence
from trainer.models.entries import entries, weight_shapes
from trainer.models.families import read_shape

cpu.enable()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import finalize_model_grads  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

from trainer.megatron import hf, model, optimizer  # noqa: E402
from trainer.megatron.modules.attention import PackedSequences  # noqa: E402
from trainer.megatron.modules.head import ValueHead  # noqa: E402
from trainer.megatron.storage import checkpoint  # noqa: E402


class MegatronEngine:
    """A shard of a megatron-core GPT model; see trainer/engine.py."""

    def __init__(self, settings: EngineSettings, head: ScalarHead | None = None, freeze: Sequence[str] = ()) -> None:
        self.settings = settings
        self.head = head
        self.freeze = freeze
        self.updates_done = 0  # optimizer steps
        self.residence: Residence | None = None

    def start(self, master: str, port: int) -> None:
        """Join the process group, build this rank's chunks of the model, read their weights.

        ValueError: the model's folder is bad, or the layout does not fit the model.
        """
        s = self.settings
        self.shape = read_shape(Path(s.model_folder))
        check_layout(self.shape, Sizes.of(s.layout.num_processes, s.megatron))
        model.start_process(s, master, port)
        self.share = self._share()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.chunks: list[Any] = model.build_models(self.shape, s.layout, s.megatron, self._output_layer(), s.options)
        self._read_weights()
        self.run_schedule = get_forward_backward_func()
        if s.frozen:
            for chunk in self.chunks:
                chunk.requires_grad_(False)
            self.residence = Residence(s.layout.offload, self.chunks, None)
            return
        optimizer.freeze(self.chunks, hf.named(self.chunks), self._parameter_names(), self.freeze)
        self.chunks = optimizer.wrap_ddp(self.chunks)
        self.optimizer = optimizer.build_optimizer(self.chunks, s.optimizer, s.layout.precision)
        self.chunks[0].config.finalize_model_grads_func = finalize_model_grads
        self.chunks[0].config.grad_scale_func = self.optimizer.scale_loss
        self.residence = Residence(s.layout.offload, self.chunks, self.optimizer)

    def _share(self) -> RankShare:
        config = self.settings.megatron
        return RankShare(
            parallel_state.get_data_parallel_rank(),
            length_multiples(config.tensor_parallel, config.sequence_parallel, config.context_parallel),
            (config.context_parallel, parallel_state.get_context_parallel_rank()),
            # With virtual stages micro-batches are processed in groups as large as the pipeline.
            config.pipeline_parallel if config.virtual_stages > 1 else 1,
        )

    def _output_layer(self) -> Callable[[Any], ValueHead] | None:
        head = self.head
        return None if head is None else lambda config: ValueHead(config, head, self.settings.seed)

    def _read_weights(self) -> None:
        hf.load(self.chunks, self.shape, Path(self.settings.model_folder), value_head=self.head is not None)

    @property
    def models(self) -> list[Any]:
        """Return the bare models of this rank's chunks."""
        return [chunk if self.settings.frozen else chunk.module for chunk in self.chunks]

    def _parameter_names(self) -> list[str]:
        """Return the parameter names of the whole model, over all processes."""
        head = [] if self.head is None else ["output_layer.weight", "output_layer.bias"]
        return [entry.ours for entry in entries(self.shape, bool(head))] + head

    @property
    def _reports_losses(self) -> bool:
        """Return whether this process reports losses: one on the last pipeline stage for each slice of the tokens."""
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        return bool(last) and parallel_state.get_tensor_model_parallel_rank() == 0

    @property
    def _reports_outputs(self) -> bool:
        """Return whether this process reports outputs: one process of every data-parallel row."""
        return self._reports_losses and parallel_state.get_context_parallel_rank() == 0

    def _run(self, batches: Sequence[MicroBatch], loss: LossFunction | None) -> list[Any]:
        """Run all micro-batches through all chunks; return their results on the last pipeline stage, [] elsewhere.

        A result is the micro-batch and the first row of the model's output [C, P], or, with a loss, the loss's result.
        """

        packed = [(batch, PackedSequences(batch.packing)) for batch in batches]

        def step(iterator: Iterator[Any], gpt: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
            batch, sequences = next(iterator)

            def reduce(out: torch.Tensor, non_loss_data: bool = False) -> Any:
                if loss is None:
                    return batch, out[0].detach()
                found = loss(out, batch)
                detached = SummedLoss(found.total.detach(), found.sums, found.maxima)
                return found.total, torch.tensor(batch.num_actions, dtype=torch.int), detached

            position_1P = batch.packing.position_T[None]
            out = gpt(batch.tokens_1P, position_1P, None, labels=batch.labels_1P, packed_seq_params=sequences)
            return out, reduce

        found: list[Any] = self.run_schedule(
            forward_step_func=step,
            data_iterator=[iter(packed) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=max(batch.tokens_1P.shape[1] for batch in batches),
            micro_batch_size=1,
            forward_only=loss is None,
            collect_non_loss_data=loss is None,
        )
        return found

    def forward(self, batches: Sequence[MicroBatch]) -> list[tuple[MicroBatch, torch.Tensor]]:
        """Return log-probabilities, or values, [A] of each micro-batch, on one process of every data-parallel row."""
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            found = [(batch, self._whole(out_P)) for batch, out_P in self._run(batches, None)]
        for chunk in self.chunks:
            chunk.train()
        return found if self._reports_outputs else []

    def _whole(self, out_P: torch.Tensor) -> torch.Tensor:
        """Return [A]: the outputs of all processes that share the sequences, concatenated in rank order."""
        group = parallel_state.get_context_parallel_group()
        if group.size() == 1:
            return out_P
        shares = [torch.empty_like(out_P) for _ in range(group.size())]
        dist.all_gather(shares, out_P.contiguous(), group=group)
        return torch.cat(shares)

    def update(self, steps: Iterable[Sequence[MicroBatch]], loss: LossFunction) -> list[StepResult]:
        """Take one optimizer step for each list of micro-batches. RuntimeError: a gradient that is not finite."""
        results = [self._step(batches, loss) for batches in steps]
        optimizer.gather_weights(self.chunks)
        return results

    def _step(self, batches: Sequence[MicroBatch], loss: LossFunction) -> StepResult:
        lr = learning_rate(self.settings.optimizer, self.updates_done)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self._run(batches, loss)
        with self.present(Memory.state):
            done, grad_norm, _ = self.optimizer.step()
        require_finite_norm(float(grad_norm) if done else float("nan"), self.updates_done)
        self.updates_done += 1
        return StepResult(float(grad_norm), lr, tuple(losses) if self._reports_losses else ())

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Return every tensor except the head's under its Hugging Face name; see trainer/megatron/hf.py."""
        return hf.export(self.models, self.shape, value_head=self.head is not None)

    def weight_shapes(self) -> list[tuple[str, str, list[int]]]:
        """Return (Hugging Face name, dtype, shape) of every tensor of the model."""
        return weight_shapes(self.shape, str(model.DTYPES[self.settings.layout.precision]).removeprefix("torch."))

    def save(self, folder: Path) -> Saving:
        """Begin a checkpoint; see trainer/megatron/storage/checkpoint.py."""
        return checkpoint.begin(folder, self.chunks, self.optimizer, self.updates_done)

    def load(self, folder: Path) -> None:
        """Read a checkpoint written in any layout. ValueError: see `checkpoint.load`."""
        self.updates_done = checkpoint.load(folder, self.chunks, self.optimizer)

    def present(self, *memory: Memory) -> AbstractContextManager[None]:
        """Keep the memory on the device inside the block (trainer/megatron/offload.py)."""
        return nullcontext() if self.residence is None else self.residence.present(*memory)

    def stop(self) -> None:
        """Leave the process group; another engine may start in this process."""
        optimizer.unwrap_ddp(self.chunks)
        model.leave_process()

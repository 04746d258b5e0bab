"""Megatron's distributed optimizer with an Adam whose state can be saved and loaded in any layout."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from trainer.config import OptimizerConfig, Precision
from trainer.engine import frozen_names
from trainer.megatron import cpu

cpu.enable()

import megatron.core.optimizer as megatron_optimizer  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.optimizer import (  # noqa: E402
    ParamKey,
    ParamPredicate,
    distrib_optimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)

from trainer.megatron.model import DTYPES  # noqa: E402

BUCKET_SIZE: int | None = None  # parameters communicated together; None: megatron-core's default, at least 40 million


class GroupStepAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) that counts steps per parameter group.

    Megatron's checkpoints expect the conventions of Apex's FusedAdam: `step` in the group, only
    exp_avg and exp_avg_sq per parameter. torch's AdamW keeps a step per parameter and can't be loaded back.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._rule: Callable[..., None] = adamw if adam_w_mode else adam

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # Megatron has no closure
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            done = group.get("step", 0)
            group["step"] = done + 1
            if not parameters:
                continue
            for p in parameters:
                if not self.state[p]:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            device = parameters[0].device
            self._rule(
                parameters,
                [p.grad for p in parameters],
                [self.state[p]["exp_avg"] for p in parameters],
                [self.state[p]["exp_avg_sq"] for p in parameters],
                [],
                [torch.tensor(float(done), device=device) for _ in parameters],
                foreach=device.type == "cpu",
                fused=device.type == "cuda",  # one pass over state and gradient, no temporaries of their size
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


@functools.cache
def _use_group_step_adam() -> None:
    """Replace megatron-core's Adam where neither Transformer Engine nor Apex is installed."""
    if not megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        return
    megatron_optimizer.Adam = GroupStepAdam
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = GroupStepAdam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True


def freeze(
    models: Sequence[Any], own: Mapping[str, torch.Tensor], names: Sequence[str], patterns: Sequence[str]
) -> None:
    """Set `requires_grad` to False for parameters whose name in the whole model matches one of the patterns.

    Call it before `wrap_ddp`, with this process's chunks, its tensors by name, and the names of all processes'
    tensors. ValueError: see `frozen_names`.
    """
    for name in frozen_names(names, patterns):
        if name in own:
            own[name].requires_grad_(False)
    for model in models:
        if patterns and model.pre_process and not any(p.requires_grad for p in model.embedding.parameters()):
            # A recomputed layer computes no gradient of its own weights unless its input requires one.
            model.embedding.register_forward_hook(lambda module, args, out: out.requires_grad_())


def wrap_ddp(models: Sequence[Any]) -> list[DistributedDataParallel]:
    """Put Megatron's data parallelism around each of this rank's chunks, with gradients summed in fp32.

    If several ranks sum gradients, one bucket is reduced while the gradients of earlier layers are computed. All
    pipeline stages and virtual stages except the first use a single bucket, because they have time to reduce it. After
    an optimizer step the next forward pass gathers the weights, one bucket ahead of the layers that read them: call
    `gather_weights` before anything other than a forward pass reads them.
    """
    several = parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=several,
        overlap_param_gather=several,
        bucket_size=BUCKET_SIZE,
    )
    chunks = [
        DistributedDataParallel(model.config, settings, model, disable_bucketing=number > 0)
        for number, model in enumerate(models)
    ]
    if several:  # gradients are reduced once all micro-batches have been added
        each = [chunk.no_sync for chunk in chunks]
        chunks[0].config.no_sync_func = each if len(each) > 1 else each[0]
    return chunks


def unwrap_ddp(chunks: Sequence[Any]) -> None:
    """Empty the wrappers, which can't be used afterward; frozen chunks have none.

    Wrapper -> autograd's nodes -> megatron's hooks on them -> wrapper is a reference cycle that the garbage collector
    can't find. It keeps the model, the optimizer, and the process groups with their threads alive.
    """
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel):
            vars(chunk).clear()


def gather_weights(chunks: Sequence[DistributedDataParallel]) -> None:
    """Update the weights on all ranks to those of the last optimizer step; all ranks call it."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def build_optimizer(chunks: Sequence[DistributedDataParallel], config: OptimizerConfig, precision: Precision) -> Any:
    """Return Megatron's distributed optimizer over this rank's model chunks."""
    _use_group_step_adam()
    settings = megatron_optimizer.OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        weight_decay=config.weight_decay,
        clip_grad=config.max_grad_norm,
        use_distributed_optimizer=True,
        bf16=precision is Precision.bf16,
        params_dtype=DTYPES[precision],
    )
    return get_megatron_optimizer(settings, list(chunks), _groups(settings))


def _groups(settings: megatron_optimizer.OptimizerConfig) -> dict[ParamKey, Any]:
    """Return Megatron's parameter groups (no weight decay of norms and biases), each with a single precision.

    The distributed optimizer moves a group's fp32 parameters before the others but looks them up in the old order: it
    would save the value head of a bf16 critic as another parameter. The override repeats the learning rate, which is
    the same everywhere, only to create a group.
    """
    found: dict[ParamKey, Any] = get_standard_config_overrides(settings)
    if settings.bf16:
        in_fp32 = ParamPredicate(name="fp32", fn=lambda parameter: parameter.dtype is torch.float32)
        found[ParamKey(predicate=in_fp32)] = {"max_lr": settings.lr}
    return found

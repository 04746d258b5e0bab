"""Joint computation of a layer's experts: two grouped products instead of two small products for each expert.

Parameters, their names and their order are those of megatron-core's SequentialMLP, so that mapping, checkpoints,
publishing and gradient buffers need no changes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from trainer.megatron import cpu

cpu.enable()

from megatron.core.transformer.mlp import MLP  # noqa: E402
from megatron.core.transformer.moe.experts import SequentialMLP  # noqa: E402

# torch has a kernel for these generations, Hopper and Blackwell; on others its grouped product is a loop.
_CAPABILITIES = (9, 10)
_ALIGNED_BYTES = 16  # rows of both factors must begin at multiples of it


def grouped_product_takes(dtype: torch.dtype, device: torch.device, widths: Sequence[int]) -> bool:
    """Return whether torch's grouped product can be used for rows of `widths` numbers.

    It can for bf16 on Hopper and Blackwell GPUs, and for bf16 and fp32 on a CPU, where it is a loop over plain
    products.
    """
    if any(width * dtype.itemsize % _ALIGNED_BYTES for width in widths):
        return False
    if device.type == "cuda":
        return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in _CAPABILITIES
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float32)


class GroupedProduct(torch.autograd.Function):
    """Grouped product x_e W_e^T of each group e of rows, [T, O].

    Inputs: x [T, I], the counts of E groups of rows, their ends int32 [E], E weights [O, I]. The kernel needs the
    weights of all experts as one tensor, which Megatron's buffers do not hold in this order. They are copied for each
    product and not kept: kept copies would double the memory of the weights of all layers. Each weight gets a gradient,
    zero without rows, because the overlapped reduction waits for every parameter.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TI: torch.Tensor, counts: list[int], ends_E: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TI, ends_E, *weights)
        ctx.counts = counts
        if not len(x_TI):
            return x_TI.new_zeros((0, weights[0].shape[0]))
        return F.grouped_mm(x_TI, torch.stack(weights).transpose(1, 2), offs=ends_E)

    @staticmethod
    def backward(ctx: Any, grad_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TI, ends_E, *weights = ctx.saved_tensors
        if not len(x_TI):
            return torch.zeros_like(x_TI), None, None, *(torch.zeros_like(w) for w in weights)
        grad_TO = grad_TO.contiguous()
        grad_x_TI = F.grouped_mm(grad_TO, torch.stack(weights), offs=ends_E)
        grads_EOI = F.grouped_mm(grad_TO.t(), x_TI, offs=ends_E)
        empty = [i for i, count in enumerate(ctx.counts) if not count]
        if empty:  # the kernels for Blackwell leave uninitialized memory there
            grads_EOI.index_fill_(0, torch.tensor(empty, device=grads_EOI.device), 0.0)
        return grad_x_TI, None, None, *grads_EOI.unbind()


class GroupedExperts(SequentialMLP):
    """megatron-core's SequentialMLP with a forward pass over all experts at once where torch has a grouped product."""

    def forward(
        self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the experts' outputs [T, hidden], without bias.

        Inputs: rows [T, hidden] sorted by expert, their number int64 [experts] per expert, router weights [T].
        """
        first: Any = self.local_experts[0]
        weight: torch.Tensor = first.linear_fc1.weight
        widths = [*weight.shape, *first.linear_fc2.weight.shape]
        if (
            self.num_local_experts == 1
            or self.config.moe_apply_probs_on_input
            or not grouped_product_takes(weight.dtype, weight.device, widths)
        ):
            found: Any = super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
            return found
        counts = tokens_per_expert.tolist()
        ends_E = torch.tensor(counts).cumsum(0).to(weight.device, torch.int32)
        together = SimpleNamespace(
            config=self.config,
            activation_func=first.activation_func,
            linear_fc1=functools.partial(_linear, [e.linear_fc1 for e in self.local_experts], counts, ends_E),
            linear_fc2=functools.partial(_linear, [e.linear_fc2 for e in self.local_experts], counts, ends_E),
        )
        # Activation and router weights are applied as for a single expert, including its fused kernels.
        answer: Any = MLP.forward(together, permuted_local_hidden_states, permuted_probs)
        return answer


def _linear(
    layers: Sequence[Any], counts: list[int], ends_E: torch.Tensor, x_TI: torch.Tensor
) -> tuple[torch.Tensor, None]:
    """Return the outputs of the experts' `layers` for their rows. An expert's linear layer does not communicate."""
    for layer in layers:
        for before_forward in layer._forward_pre_hooks.values():
            before_forward(layer, ())  # waits for a gather of its weights; the layer is not called
    return GroupedProduct.apply(x_TI.contiguous(), counts, ends_E, *(layer.weight for layer in layers)), None

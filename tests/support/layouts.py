"""Layouts of a role that have to give the same numbers."""

from __future__ import annotations

from typing import Any

from trainer.config import OptimizerConfig, Recompute

ADAM = OptimizerConfig(lr=0.1, eps=0.1, max_grad_norm=1.0)
ONE: dict[str, Any] = {"max_tokens_per_micro_batch": 70}
LAYOUTS: dict[str, dict[str, Any]] = {
    # As long as the longest sub-trace; what is computed again is the same, too.
    "unpacked": {"max_tokens_per_micro_batch": 60, "recompute": Recompute.mlp},
    "TP2": {"num_processes": 2, "tensor_parallel": 2},
    "TP2+SP": {"num_processes": 2, "tensor_parallel": 2, "sequence_parallel": True},
    "PP2": {"num_processes": 2, "pipeline_parallel": 2},
    "PP2 of 2 stages": {"num_processes": 2, "pipeline_parallel": 2, "virtual_stages": 2},
    "CP2": {"num_processes": 2, "context_parallel": 2},
    "DP2": {"num_processes": 2},
    "EP2": {"num_processes": 2, "expert_parallel": 2},
    "TP2+SP x EP2": {"num_processes": 2, "tensor_parallel": 2, "sequence_parallel": True, "expert_parallel": 2},
    "TP2+SP x PP2": {"num_processes": 4, "tensor_parallel": 2, "sequence_parallel": True, "pipeline_parallel": 2},
    "TP2+SP x CP2": {"num_processes": 4, "tensor_parallel": 2, "sequence_parallel": True, "context_parallel": 2},
    "PP2 x EP2": {"num_processes": 4, "pipeline_parallel": 2, "virtual_stages": 2, "expert_parallel": 2},
}

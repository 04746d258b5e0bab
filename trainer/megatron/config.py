"""Megatron's own settings of a training role. Imports nothing of Megatron: the configuration is read without it."""

from __future__ import annotations

from dataclasses import dataclass

from machine.settings import setting


@dataclass(frozen=True)
class MegatronConfig:
    """Settings of Megatron alone: how the processes of a role share its model and its tokens.

    The product of tensor, pipeline and context parallelism is the number of processes that share one data-parallel row.
    Experts are spread over the processes of a pipeline stage: `expert_parallel` divides num_processes /
    pipeline_parallel.
    """

    tensor_parallel: int = setting(
        1, "Processes that share the tensors of each layer.", bounds="[1, inf)", unit="processes"
    )
    sequence_parallel: bool = setting(
        False, "Split the tokens of layer norms over the processes of tensor_parallel: less memory."
    )
    pipeline_parallel: int = setting(
        1, "Pipeline stages; each holds some of the layers.", bounds="[1, inf)", unit="processes"
    )
    virtual_stages: int = setting(
        1, "Chunks of non-adjacent layers that each pipeline process holds.", bounds="[1, inf)"
    )
    context_parallel: int = setting(
        1, "Processes that share the tokens of a sequence.", bounds="[1, inf)", unit="processes"
    )
    expert_parallel: int = setting(
        1,
        "Processes over which experts are spread; 1: tensor_parallel splits them like other layers.",
        bounds="[1, inf)",
        unit="processes",
    )

    @property
    def expert_tensor_parallel(self) -> int:
        """Return the number of processes that share one expert's tensors."""
        return self.tensor_parallel if self.expert_parallel == 1 else 1

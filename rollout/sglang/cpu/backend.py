"""SGLang's attention backend on a CPU. Importing this module imports SGLang."""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from rollout.sglang.cpu.attention import Group, attend, build_groups


class GroupedAttention(TorchNativeAttnBackend):
    """SGLang's attention in plain torch, with `attend` for causal self-attention.

    The parent class handles cross-attention, encoders and sliding windows.
    """

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self.dtype = model_runner.dtype
        self.groups: list[Group] = []

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Build the groups of this forward pass; all its layers share them."""
        super().init_forward_metadata(forward_batch)
        if forward_batch.forward_mode.is_decode_or_idle():
            prefix_lens = (forward_batch.seq_lens - 1).tolist()
            new_lens = [1] * len(prefix_lens)
        else:
            prefix_lens = forward_batch.extend_prefix_lens.tolist()
            new_lens = forward_batch.extend_seq_lens.tolist()
        table = self.req_to_token_pool.req_to_token[forward_batch.req_pool_indices]
        self.groups = build_groups(prefix_lens, new_lens, table, self.dtype)

    def _run_sdpa_forward_extend(
        self, query: Any, output: Any, k_cache: Any, v_cache: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not kwargs["causal"] or kwargs["sliding_window_size"] is not None or args[5] is not None:
            return super()._run_sdpa_forward_extend(query, output, k_cache, v_cache, *args, **kwargs)
        attend(query, output, k_cache, v_cache, self.groups, kwargs["scaling"])
        return output

    def _run_sdpa_forward_decode(
        self, query: Any, output: Any, k_cache: Any, v_cache: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if kwargs["is_cross_attn"] or kwargs["sliding_window_size"] is not None or args[3] is not None:
            return super()._run_sdpa_forward_decode(query, output, k_cache, v_cache, *args, **kwargs)
        attend(query, output, k_cache, v_cache, self.groups, kwargs["scaling"])
        return output

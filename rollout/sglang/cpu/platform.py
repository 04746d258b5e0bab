"""SGLang's platform class for a CPU. SGLang imports this module during its own import."""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """The platform for a CPU without SGLang's own kernels: everything runs in plain torch."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def init_backend(self) -> None:
        """Install sampling by seeds, and register GroupedAttention under the name of SGLang's torch backend, whose
        settings (no graphs) it needs.
        """
        from sglang.srt.layers.attention.attention_registry import register_attention_backend

        from rollout.sglang.cpu import sampling
        from rollout.sglang.cpu.backend import GroupedAttention

        register_attention_backend("torch_native")(GroupedAttention)
        sampling.install()

    def post_load_model(self, model: Any) -> None:
        """Let the model's products have rows that do not depend on each other."""
        from rollout.sglang.cpu import rows

        rows.install(model)

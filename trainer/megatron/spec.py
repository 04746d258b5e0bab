"""Megatron layer specs: the modules that the layers of a model consist of."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.megatron import cpu

cpu.enable()

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # noqa: E402
from megatron.core.models.backends import LocalSpecProvider  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend  # noqa: E402
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402
from megatron.core.transformer.mlp import MLPSubmodules  # noqa: E402
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules  # noqa: E402
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules  # noqa: E402

from trainer.megatron.modules.attention import PackedAttention, RMSNorm  # noqa: E402
from trainer.megatron.modules.experts import GroupedExperts  # noqa: E402
from trainer.megatron.modules.layers import LatentAttention, LatentDown, LatentNorm, RowThenNorm  # noqa: E402
from trainer.models.shape import ModelShape  # noqa: E402


class _Backend(LocalSpecProvider):
    def __init__(self, sandwich: bool = False) -> None:
        self.sandwich = sandwich

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return PackedAttention

    def row_parallel_linear(self) -> type:
        row: type = RowThenNorm if self.sandwich else super().row_parallel_linear()
        return row

    def grouped_mlp_modules(self, *choice: bool) -> tuple[type, MLPSubmodules]:
        _, linears = super().grouped_mlp_modules(False, False)
        return GroupedExperts, linears


def _attention(shape: ModelShape, backend: _Backend) -> ModuleSpec:
    params = {"attn_mask_type": AttnMaskType.causal}
    column, row = backend.column_parallel_linear(), backend.row_parallel_linear()
    if shape.mla:
        latent = MLASelfAttentionSubmodules(
            linear_q_proj=column,
            linear_q_down_proj=LatentDown,
            linear_q_up_proj=column,
            linear_kv_down_proj=LatentDown,
            linear_kv_up_proj=column,
            core_attention=LatentAttention,
            linear_proj=row,
            q_layernorm=LatentNorm,
            kv_layernorm=LatentNorm,
        )
        return ModuleSpec(module=MLASelfAttention, params=params, submodules=latent)
    head_norm = RMSNorm if shape.qk_norm else IdentityOp
    heads = SelfAttentionSubmodules(
        linear_qkv=column,
        core_attention=PackedAttention,
        linear_proj=row,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    return ModuleSpec(module=SelfAttention, params=params, submodules=heads)


def _layer(shape: ModelShape, experts: int | None) -> ModuleSpec:
    backend = _Backend(shape.sandwich)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=_attention(shape, backend),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=get_mlp_module_spec_for_backend(backend=backend, num_experts=experts, moe_grouped_gemm=False),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(shape: ModelShape, layers: Sequence[int]) -> TransformerBlockSubmodules:
    """Return the spec of a decoder block with the layers `layers`, numbered from 0 over the whole model."""
    dense = _layer(shape, None)
    sparse = _layer(shape, shape.moe.experts) if shape.moe else dense
    specs = [sparse if shape.has_experts(layer) else dense for layer in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)

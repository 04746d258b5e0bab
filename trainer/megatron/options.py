"""Translation of a model's shape into the options of megatron-core's configuration that depend on the model."""

from __future__ import annotations

from typing import Any

from trainer.megatron import cpu

cpu.enable()

from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig  # noqa: E402

from trainer.models.rope import inverse_frequencies  # noqa: E402
from trainer.models.shape import MlaShape, ModelShape, MoeShape  # noqa: E402


def config_class(shape: ModelShape) -> type[TransformerConfig]:
    """Return the configuration class for `model_options`."""
    return MLATransformerConfig if shape.mla else TransformerConfig


def model_options(shape: ModelShape) -> dict[str, Any]:
    """Return the arguments of `config_class(shape)` that depend on the model and not on the layout."""
    options = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.kv_heads,
        "kv_channels": shape.head_dim,
        "ffn_hidden_size": shape.ffn,
        "layernorm_epsilon": shape.norm_eps,
        "qk_layernorm": shape.qk_norm,
        "add_qkv_bias": shape.qkv_bias,
        "rotary_interleaved": shape.rotary_pairs,
    }
    if shape.moe:
        options |= _moe_options(shape.moe)
    if shape.mla:
        options |= _mla_options(shape, shape.mla)
    return options


def finish(model: GPTModel, shape: ModelShape) -> None:
    """Set the position embedding's frequencies in a newly built model."""
    if shape.mla:
        return  # each layer has its own position embedding, made from the configuration
    rotary = model.rotary_pos_emb
    rotary.inv_freq = inverse_frequencies(shape).to(rotary.inv_freq.device)
    if shape.rope.kind == "yarn":  # megatron-core's attention reads the scale of cosine and sine here
        model.config.yarn_rotary_scaling_factor = shape.rope.factor
        model.config.yarn_mscale = shape.rope.mscale
        model.config.yarn_mscale_all_dim = shape.rope.mscale_all


def _moe_options(moe: MoeShape) -> dict[str, Any]:
    grouped = moe.top_groups < moe.groups
    return {
        "num_moe_experts": moe.experts,
        "moe_ffn_hidden_size": moe.ffn,
        "moe_shared_expert_intermediate_size": moe.shared_ffn or None,
        # checkpoints must record that layers differ
        "moe_layer_freq": 1 if all(moe.layers) else [int(has) for has in moe.layers],
        "moe_router_topk": moe.top_k,
        "moe_router_score_function": "sigmoid" if moe.sigmoid else "softmax",
        "moe_router_pre_softmax": not moe.normalized,  # a softmax over the chosen logits is the normalized one
        "moe_router_topk_scaling_factor": None if moe.scale == 1.0 else moe.scale,
        "moe_router_num_groups": moe.groups if grouped else None,
        "moe_router_group_topk": moe.top_groups if grouped else None,
        "moe_router_enable_expert_bias": moe.correction,
        "moe_router_bias_update_rate": 0.0,  # the loaded correction does not change
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",  # reinforcement learning adds no loss of its own
    }


def _mla_options(shape: ModelShape, mla: MlaShape) -> dict[str, Any]:
    options: dict[str, Any] = {
        "q_lora_rank": mla.q_rank,
        "kv_lora_rank": mla.kv_rank,
        "qk_head_dim": mla.plain_dim,
        "qk_pos_emb_head_dim": mla.rotary_dim,
        "v_head_dim": mla.value_dim,
        "rope_type": "rope",
        "rotary_base": shape.rope_base,
        "rotary_scaling_factor": 1.0,
    }
    if shape.rope.kind == "yarn":
        options |= {
            "rope_type": "yarn",
            "rotary_scaling_factor": shape.rope.factor,
            "original_max_position_embeddings": shape.rope.original,
            "beta_fast": shape.rope.high,
            "beta_slow": shape.rope.low,
            "mscale": shape.rope.mscale,
            "mscale_all_dim": shape.rope.mscale_all,
        }
    return options

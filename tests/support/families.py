"""Tiny random models of every supported family, as Hugging Face folders in float32 or bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCAB = 97  # odd: tensor parallelism has to pad it

_DENSE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_QWEN3_MOE = _DENSE | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}
_GLM4_MOE = _DENSE | {
    "num_hidden_layers": 3,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
    "use_qk_norm": True,
    "attention_bias": True,
    "pad_token_id": None,
    "num_nextn_predict_layers": 1,
}
_DEEPSEEK_V3 = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 20,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 128,
    "num_nextn_predict_layers": 1,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 8.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {k: v for k, v in _DENSE.items() if k != "head_dim"}),
    "qwen3, tied": ("qwen3", _DENSE | {"tie_word_embeddings": True}),
    "qwen3, yarn": ("qwen3", _DENSE | {"rope_parameters": _YARN}),
    "qwen3_moe": ("qwen3_moe", _QWEN3_MOE),
    "qwen3_moe, first layer dense, weights not normalised": (
        "qwen3_moe",
        _QWEN3_MOE | {"mlp_only_layers": [0], "num_hidden_layers": 3, "norm_topk_prob": False},
    ),
    "llama, llama3": ("llama", _DENSE | {"rope_parameters": _LLAMA3}),
    "llama, linear": ("llama", _DENSE | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "glm4": ("glm4", _DENSE | {"pad_token_id": None}),
    "glm4_moe": ("glm4_moe", _GLM4_MOE),
    "glm4_moe, no norm of heads": ("glm4_moe", _GLM4_MOE | {"use_qk_norm": False, "attention_bias": False}),
    "deepseek_v3": ("deepseek_v3", _DEEPSEEK_V3),
    "deepseek_v3, plain queries and positions": (
        "deepseek_v3",
        _DEEPSEEK_V3 | {"q_lora_rank": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
}


def random_model(name: str, path: Path, dtype: str = "float32", num_layers: int = 0) -> Path:
    """Writes the Hugging Face folder of a model of `FAMILIES`; the same weights each time, norms and biases too.

    `num_layers`, if it is not 0, is another number of layers.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, fields = FAMILIES[name]
    if num_layers:
        fields = fields | {"num_hidden_layers": num_layers}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in key:
                continue
            if "correction" in key:
                tensor.data = tensor.float()  # published folders have it in float32
            if tensor.dim() == 1:
                tensor.add_(0.3 * torch.randn_like(tensor))
            else:
                tensor.normal_(std=0.3 / (1 + ("experts" in key)))
    model.save_pretrained(path)
    return path

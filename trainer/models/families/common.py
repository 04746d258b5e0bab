"""Readers of `config.json` that several families share."""

from __future__ import annotations

from typing import Any

from trainer.models.reading import JsonObject
from trainer.models.shape import MoeShape, Rope


def rope(f: JsonObject) -> dict[str, Any]:
    """Read `rope_parameters`, or the `rope_scaling` and `rope_theta` of older folders."""
    r = f.inside("rope_parameters") or f.inside("rope_scaling")
    base = r.float("rope_theta", f.float("rope_theta", 10000.0))
    kind = r.value("rope_type", r.value("type", "default"))
    if kind == "default":
        return {"rope_base": base}
    found = Rope(kind, r.float("factor"))
    if kind == "llama3":
        original = r.int("original_max_position_embeddings")
        found = Rope(kind, r.float("factor"), original, r.float("low_freq_factor"), r.float("high_freq_factor"))
    elif kind == "yarn":
        r.absent("attention_factor")
        r.only("truncate", True)
        mscale, mscale_all = r.float("mscale", 0.0), r.float("mscale_all_dim", 0.0)
        if mscale_all and not mscale:
            raise r.refused("mscale_all_dim", mscale_all, "0, or with mscale")
        found = Rope(
            kind,
            r.float("factor"),
            r.int("original_max_position_embeddings"),
            r.float("beta_slow", 1.0),
            r.float("beta_fast", 32.0),
            mscale if mscale_all else 1.0,
            mscale_all,
        )
    elif kind != "linear":
        raise r.refused("rope_type", kind, "default, linear, llama3, yarn")
    return {"rope_base": base, "rope": found}


def decoder(f: JsonObject) -> dict[str, Any]:
    """Read the fields that every supported decoder has."""
    f.only("hidden_act", "silu")
    f.only("use_sliding_window", False)
    f.absent("quantization_config")
    if any(kind != "full_attention" for kind in f.list("layer_types")):
        raise f.refused("layer_types", f.list("layer_types"), "full_attention in every layer")
    heads, hidden = f.count("num_attention_heads"), f.count("hidden_size")
    return rope(f) | {
        "num_layers": f.count("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": f.count("num_key_value_heads", heads),
        "head_dim": f.count("head_dim", hidden // heads),
        "ffn": f.count("intermediate_size"),
        "vocab": f.count("vocab_size"),
        "norm_eps": f.float("rms_norm_eps"),
        "tied": f.bool("tie_word_embeddings"),
        "qk_norm": False,
        "max_positions": f.count("max_position_embeddings"),
    }


def sigmoid_moe(f: JsonObject, num_layers: int) -> MoeShape:
    """Read the router of DeepSeek-V3 and GLM-4.5."""
    f.only("scoring_func", "sigmoid")
    f.only("topk_method", "noaux_tc")
    f.only("moe_layer_freq", 1)
    f.only("norm_topk_prob", True)
    top_k, groups, top_groups = f.int("num_experts_per_tok"), f.int("n_group", 1), f.int("topk_group", 1)
    if top_k == 1:
        raise f.refused("num_experts_per_tok", top_k, "2 or more")
    if top_groups < groups and top_k // top_groups != 2:
        raise f.refused("topk_group", top_groups, f"{top_k // 2} with num_experts_per_tok {top_k}, or {groups}")
    ffn, dense = f.int("moe_intermediate_size"), f.int("first_k_dense_replace")
    return MoeShape(
        experts=f.count("n_routed_experts" if "n_routed_experts" in f else "num_local_experts"),
        top_k=top_k,
        ffn=ffn,
        layers=tuple(i >= dense for i in range(num_layers)),
        scale=f.float("routed_scaling_factor"),
        shared_ffn=ffn * f.int("n_shared_experts", 0),
        sigmoid=True,
        correction=True,
        groups=groups,
        top_groups=top_groups,
    )


def num_mtp(f: JsonObject) -> int:
    """Return the number of multi-token-prediction layers after the last layer."""
    return f.int("num_nextn_predict_layers", f.int("num_mtp_layers", 0))

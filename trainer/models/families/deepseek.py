"""The family of DeepSeek-V3: latent attention, and a router with sigmoid scores."""

from __future__ import annotations

from trainer.models.entries import Entry, Layer, Split, mlp_or_experts, norms
from trainer.models.families.common import decoder, num_mtp, sigmoid_moe
from trainer.models.reading import JsonObject
from trainer.models.shape import MlaShape, ModelShape, Rope


def _deepseek_v3(f: JsonObject) -> ModelShape:
    f.only("attention_bias", False)
    f.only("rope_interleave", True)
    common = decoder(f)
    kind = common.get("rope", Rope()).kind
    if kind not in ("default", "yarn"):
        raise f.refused("rope_type", kind, "default or yarn")
    mla = MlaShape(
        q_rank=f.int("q_lora_rank") if "q_lora_rank" in f else None,
        kv_rank=f.int("kv_lora_rank"),
        plain_dim=f.int("qk_nope_head_dim"),
        rotary_dim=f.int("qk_rope_head_dim"),
        value_dim=f.int("v_head_dim"),
    )
    if common["kv_heads"] != common["heads"]:
        raise f.refused("num_key_value_heads", common["kv_heads"], f"num_attention_heads, {common['heads']}")
    common["head_dim"] = mla.plain_dim + mla.rotary_dim
    return ModelShape(
        **common, moe=sigmoid_moe(f, common["num_layers"]), mla=mla, num_mtp=num_mtp(f), layer_entries=_layer
    )


def _layer(shape: ModelShape, layer: Layer) -> list[Entry]:
    assert shape.mla is not None
    return [*_latent_attention(shape, shape.mla, layer), *norms(shape, layer), *mlp_or_experts(shape, layer)]


def _latent_attention(shape: ModelShape, mla: MlaShape, layer: Layer) -> list[Entry]:
    h, heads = shape.hidden, shape.heads
    m, t = "self_attention.", "self_attn."
    queries, values = heads * shape.head_dim, heads * mla.value_dim
    both = heads * (mla.plain_dim + mla.value_dim)
    down = mla.kv_rank + mla.rotary_dim
    if mla.q_rank is None:
        found = [layer.entry(f"{m}linear_q_proj.weight", f"{t}q_proj.weight", (queries, h), split=Split.ROWS)]
    else:
        r = mla.q_rank
        found = [
            layer.entry(f"{m}linear_q_down_proj.weight", f"{t}q_a_proj.weight", (r, h)),
            layer.entry(f"{m}q_layernorm.weight", f"{t}q_a_layernorm.weight", (r,)),
            layer.entry(f"{m}linear_q_up_proj.weight", f"{t}q_b_proj.weight", (queries, r), split=Split.ROWS),
        ]
    return [
        *found,
        layer.entry(f"{m}linear_kv_down_proj.weight", f"{t}kv_a_proj_with_mqa.weight", (down, h)),
        layer.entry(f"{m}kv_layernorm.weight", f"{t}kv_a_layernorm.weight", (mla.kv_rank,)),
        layer.entry(f"{m}linear_kv_up_proj.weight", f"{t}kv_b_proj.weight", (both, mla.kv_rank), split=Split.ROWS),
        layer.entry(f"{m}linear_proj.weight", f"{t}o_proj.weight", (h, values), split=Split.COLUMNS),
    ]


READERS = {"deepseek_v3": _deepseek_v3}

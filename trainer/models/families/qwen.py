"""The family of Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE."""

from __future__ import annotations

from trainer.models.families.common import decoder
from trainer.models.reading import JsonObject
from trainer.models.shape import ModelShape, MoeShape


def _qwen2(f: JsonObject) -> ModelShape:
    f.only("use_mrope", False)
    return ModelShape(**decoder(f), qkv_bias=True)


def _qwen3(f: JsonObject) -> ModelShape:
    f.only("attention_bias", False)
    return ModelShape(**decoder(f) | {"qk_norm": True})


def _qwen3_moe(f: JsonObject) -> ModelShape:
    f.only("attention_bias", False)
    common = decoder(f) | {"qk_norm": True}
    step, dense = f.int("decoder_sparse_step", 1), f.list("mlp_only_layers")
    normalized = f.bool("norm_topk_prob")
    if normalized and f.int("num_experts_per_tok") == 1:
        raise f.refused("norm_topk_prob", normalized, "False where num_experts_per_tok is 1")
    moe = MoeShape(
        experts=f.count("num_experts" if "num_experts" in f else "num_local_experts"),
        top_k=f.int("num_experts_per_tok"),
        ffn=f.int("moe_intermediate_size"),
        layers=tuple(i not in dense and (i + 1) % step == 0 for i in range(common["num_layers"])),
        normalized=normalized,
    )
    return ModelShape(**common, moe=moe)


READERS = {"qwen2": _qwen2, "qwen3": _qwen3, "qwen3_moe": _qwen3_moe}

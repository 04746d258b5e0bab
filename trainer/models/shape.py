"""The numbers of a model, read from its Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.models.reading import JsonObject


@dataclass(frozen=True)
class Rope:
    """How the frequencies of the position embedding are stretched for long contexts (see rope.py).

    `low` and `high` border the stretched part: wave lengths per `original` positions (llama3), or rotations (yarn).
    """

    kind: str = "default"  # default, linear, llama3, yarn
    factor: float = 1.0
    original: int = 0  # positions that the model was first trained for
    low: float = 0.0
    high: float = 0.0
    mscale: float = 1.0  # yarn: grows cosine and sine with ln `factor`
    mscale_all: float = 0.0  # yarn: grows the attention's logits with ln `factor`; cosine and sine grow that much less


@dataclass(frozen=True)
class MoeShape:
    """Layers whose tokens each go to `top_k` of `experts` small MLPs, chosen by a router."""

    experts: int
    top_k: int
    ffn: int  # of one expert
    layers: tuple[bool, ...]  # True: this layer has experts, False: one dense MLP of `ModelShape.ffn`
    normalised: bool = True  # the weights of a token's experts add up to `scale`
    scale: float = 1.0
    shared_ffn: int = 0  # of the MLP that every token passes besides its experts; 0: there is none
    sigmoid: bool = False  # scores are sigmoids of the router's logits, not a softmax over them
    correction: bool = False  # a bias per expert is added to the scores for the choice, not for the weights
    groups: int = 1  # experts stand in groups; a token's experts come from
    top_groups: int = 1  # this many of them, those with the largest sum of their two best scores


@dataclass(frozen=True)
class MlaShape:
    """Multi-head latent attention: keys and values are made from one small vector per token."""

    q_rank: int | None  # None: queries are made from the hidden state itself
    kv_rank: int
    plain_dim: int  # of a head's query and key, without positions
    rotary_dim: int  # of a head's query, and of the one key that all heads share, with positions
    value_dim: int


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder."""

    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    norm_eps: float
    rope_base: float
    tied: bool
    qk_norm: bool
    max_positions: int
    qkv_bias: bool = False
    rope: Rope = Rope()
    rotary_fraction: float = 1.0  # of a head's dimensions, the first ones
    rotary_pairs: bool = False  # dimension 2i turns with 2i + 1, not with the one half a head further
    sandwich: bool = False  # also the outputs of attention and MLP are normed, and gate and up are one tensor
    moe: MoeShape | None = None
    mla: MlaShape | None = None
    num_mtp: int = 0  # layers after the last that predict further tokens: kept as they are, not trained

    def has_experts(self, layer: int) -> bool:
        """Whether layer `layer`, counted from 0 over the whole model, has experts."""
        return self.moe is not None and self.moe.layers[layer]


def _rope(f: JsonObject) -> dict[str, Any]:
    """`rope_parameters`, or `rope_scaling` and its neighbours as older folders have it."""
    r = f.inside("rope_parameters") or f.inside("rope_scaling")
    base = r.float("rope_theta", f.float("rope_theta", 10000.0))
    kind = r.value("rope_type", r.value("type", "default"))
    if kind == "default":
        return {"rope_base": base}
    rope = Rope(kind, r.float("factor"))
    if kind == "llama3":
        original = r.int("original_max_position_embeddings")
        rope = Rope(kind, r.float("factor"), original, r.float("low_freq_factor"), r.float("high_freq_factor"))
    elif kind == "yarn":
        r.absent("attention_factor")
        r.only("truncate", True)
        mscale, mscale_all = r.float("mscale", 0.0), r.float("mscale_all_dim", 0.0)
        if mscale_all and not mscale:
            raise r.refused("mscale_all_dim", mscale_all, "0, or with mscale")
        rope = Rope(
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
    return {"rope_base": base, "rope": rope}


def _common(f: JsonObject) -> dict[str, Any]:
    """What every mapped decoder has."""
    f.only("hidden_act", "silu")
    f.only("use_sliding_window", False)
    f.absent("quantization_config")
    if any(kind != "full_attention" for kind in f.list("layer_types")):
        raise f.refused("layer_types", f.list("layer_types"), "full_attention in every layer")
    heads, hidden = f.count("num_attention_heads"), f.count("hidden_size")
    return _rope(f) | {
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


def _qwen2(f: JsonObject) -> ModelShape:
    f.only("use_mrope", False)
    return ModelShape(**_common(f), qkv_bias=True)


def _qwen3(f: JsonObject) -> ModelShape:
    f.only("attention_bias", False)
    return ModelShape(**_common(f) | {"qk_norm": True})


def _qwen3_moe(f: JsonObject) -> ModelShape:
    f.only("attention_bias", False)
    common = _common(f) | {"qk_norm": True}
    step, dense = f.int("decoder_sparse_step", 1), f.list("mlp_only_layers")
    normalised = f.bool("norm_topk_prob")
    if normalised and f.int("num_experts_per_tok") == 1:
        raise f.refused("norm_topk_prob", normalised, "False where num_experts_per_tok is 1")
    moe = MoeShape(
        experts=f.count("num_experts" if "num_experts" in f else "num_local_experts"),
        top_k=f.int("num_experts_per_tok"),
        ffn=f.int("moe_intermediate_size"),
        layers=tuple(i not in dense and (i + 1) % step == 0 for i in range(common["num_layers"])),
        normalised=normalised,
    )
    return ModelShape(**common, moe=moe)


def _llama(f: JsonObject) -> ModelShape:
    f.only("attention_bias", False)
    f.only("mlp_bias", False)
    return ModelShape(**_common(f))


def _partial(f: JsonObject) -> float:
    """The part of a head that has positions, in both GLM families."""
    return f.inside("rope_parameters").float("partial_rotary_factor", f.float("partial_rotary_factor", 0.5))


def _glm4(f: JsonObject) -> ModelShape:
    bias = f.bool("attention_bias", True)
    return ModelShape(**_common(f), qkv_bias=bias, rotary_fraction=_partial(f), rotary_pairs=True, sandwich=True)


def _sigmoid_moe(f: JsonObject, num_layers: int) -> MoeShape:
    """The router of DeepSeek-V3 and GLM-4.5."""
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


def _num_mtp(f: JsonObject) -> int:
    return f.int("num_nextn_predict_layers", f.int("num_mtp_layers", 0))


def _glm4_moe(f: JsonObject) -> ModelShape:
    common = _common(f) | {"qk_norm": f.bool("use_qk_norm")}
    return ModelShape(
        **common,
        qkv_bias=f.bool("attention_bias"),
        rotary_fraction=_partial(f),
        moe=_sigmoid_moe(f, common["num_layers"]),
        num_mtp=_num_mtp(f),
    )


def _deepseek_v3(f: JsonObject) -> ModelShape:
    f.only("attention_bias", False)
    f.only("rope_interleave", True)
    common = _common(f)
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
    return ModelShape(**common, moe=_sigmoid_moe(f, common["num_layers"]), mla=mla, num_mtp=_num_mtp(f))


_READERS: dict[str, Callable[[JsonObject], ModelShape]] = {
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "llama": _llama,
    "glm4": _glm4,
    "glm4_moe": _glm4_moe,
    "deepseek_v3": _deepseek_v3,
}


def read_shape(folder: Path) -> ModelShape:
    """ValueError: no config.json, or an architecture or an option of it that is not mapped."""
    fields = JsonObject.read(folder / "config.json")
    kind = fields.value("model_type", None)
    if not isinstance(kind, str) or kind not in _READERS:
        raise ValueError(f"{fields.where}: model_type {kind!r} is not mapped; mapped: {', '.join(_READERS)}")
    return _READERS[kind](fields)

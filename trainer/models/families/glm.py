"""The family of GLM-4 and GLM-4.5."""

from __future__ import annotations

from trainer.models.entries import Entry, Layer, Split, attention, norms
from trainer.models.families.common import decoder, num_mtp, sigmoid_moe
from trainer.models.reading import JsonObject
from trainer.models.shape import ModelShape


def _partial(f: JsonObject) -> float:
    """Return the fraction of a head's dimensions that are rotated."""
    return f.inside("rope_parameters").float("partial_rotary_factor", f.float("partial_rotary_factor", 0.5))


def _glm4(f: JsonObject) -> ModelShape:
    bias = f.bool("attention_bias", True)
    return ModelShape(
        **decoder(f), qkv_bias=bias, rotary_fraction=_partial(f), rotary_pairs=True, sandwich=True, layer_entries=_layer
    )


def _layer(shape: ModelShape, layer: Layer) -> list[Entry]:
    """Return the entries of a GLM-4 layer: outputs of attention and MLP are normed, and gate and up are one tensor."""
    width, gated = (shape.hidden,), (2 * shape.ffn, shape.hidden)
    return [
        *attention(shape, layer),
        *norms(shape, layer),
        layer.entry("self_attention.linear_proj.norm.weight", "post_self_attn_layernorm.weight", width),
        layer.entry("mlp.linear_fc1.weight", "mlp.gate_up_proj.weight", gated, split=Split.GATED),
        layer.entry("mlp.linear_fc2.weight", "mlp.down_proj.weight", (shape.hidden, shape.ffn), split=Split.COLUMNS),
        layer.entry("mlp.linear_fc2.norm.weight", "post_mlp_layernorm.weight", width),
    ]


def _glm4_moe(f: JsonObject) -> ModelShape:
    common = decoder(f) | {"qk_norm": f.bool("use_qk_norm")}
    return ModelShape(
        **common,
        qkv_bias=f.bool("attention_bias"),
        rotary_fraction=_partial(f),
        moe=sigmoid_moe(f, common["num_layers"]),
        num_mtp=num_mtp(f),
    )


READERS = {"glm4": _glm4, "glm4_moe": _glm4_moe}

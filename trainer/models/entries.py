"""Every tensor of a model: its Megatron name, the Hugging Face names that are merged into it, and how it is split.

Arithmetic on names and shapes without torch, so that a folder can be checked before anything starts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from trainer.models.shape import ModelShape, MoeShape


class Split(Enum):
    """The split of a full tensor over tensor-parallel ranks (of the experts' own group, for an expert's tensor)."""

    NONE = "replicated"
    ROWS = "dim 0"
    COLUMNS = "dim 1"
    GATED = "dim 0 of each half"  # fc1 = [gate; up]


class Merge(Enum):
    """The way in which Hugging Face tensors are merged into one."""

    ONE = "the tensor itself"
    QKV = "per key/value group: its queries, key, value"
    STACK = "one below the other"
    VOCAB = "rows padded with zeros"


@dataclass(frozen=True)
class Entry:
    """One tensor. Layers and experts are numbered over the whole model, not over one rank's shard."""

    ours: str
    theirs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # of each of `theirs`
    merge: Merge = Merge.ONE
    split: Split = Split.NONE
    layer: int | None = None  # None: outside the layers
    expert: int | None = None  # None: not part of an expert
    float32: bool = False  # kept and written in float32 at every precision of the model


def entries(shape: ModelShape, value_head: bool = False) -> list[Entry]:
    """Return the entries of all tensors of the model; with `value_head`, without the vocabulary projection."""
    vocab = ((shape.vocab, shape.hidden),)
    found = [
        Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocab, Merge.VOCAB, Split.ROWS),
        Entry("decoder.final_layernorm.weight", ("model.norm.weight",), ((shape.hidden,),)),
    ]
    if not shape.tied and not value_head:
        found.append(Entry("output_layer.weight", ("lm_head.weight",), vocab, Merge.VOCAB, Split.ROWS))
    for layer in range(shape.num_layers):
        found += (shape.layer_entries or decoder_layer)(shape, Layer(layer))
    return found


@dataclass(frozen=True)
class Layer:
    """A factory of the entries of one layer, from names without the layer's prefix."""

    index: int

    def entry(
        self,
        ours: str,
        theirs: tuple[str, ...] | str,
        *shapes: tuple[int, ...],
        merge: Merge = Merge.ONE,
        split: Split = Split.NONE,
        expert: int | None = None,
        float32: bool = False,
    ) -> Entry:
        names = (theirs,) if isinstance(theirs, str) else theirs
        return Entry(
            f"decoder.layers.{self.index}.{ours}",
            tuple(f"model.layers.{self.index}.{name}" for name in names),
            shapes,
            merge,
            split,
            self.index,
            expert,
            float32,
        )

    def mlp(self, ours: str, theirs: str, hidden: int, ffn: int, expert: int | None = None) -> list[Entry]:
        gated = (f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight")
        rows = ((ffn, hidden), (ffn, hidden))
        return [
            self.entry(f"{ours}.linear_fc1.weight", gated, *rows, merge=Merge.STACK, split=Split.GATED, expert=expert),
            self.entry(
                f"{ours}.linear_fc2.weight",
                f"{theirs}.down_proj.weight",
                (hidden, ffn),
                split=Split.COLUMNS,
                expert=expert,
            ),
        ]


def decoder_layer(shape: ModelShape, layer: Layer) -> list[Entry]:
    """Return the entries of the common layer: attention, then one MLP or experts, with a norm before each."""
    return [*attention(shape, layer), *norms(shape, layer), *mlp_or_experts(shape, layer)]


def norms(shape: ModelShape, layer: Layer) -> list[Entry]:
    """Return the entries of the norms before attention and MLP."""
    width = (shape.hidden,)
    return [
        layer.entry("input_layernorm.weight", "input_layernorm.weight", width),
        layer.entry("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", width),
    ]


def mlp_or_experts(shape: ModelShape, layer: Layer) -> list[Entry]:
    """Return the entries of the layer's experts and router, or of its single MLP."""
    if shape.moe and shape.has_experts(layer.index):
        return _experts(shape.hidden, shape.moe, layer)
    return layer.mlp("mlp", "mlp", shape.hidden, shape.ffn)


def attention(shape: ModelShape, layer: Layer) -> list[Entry]:
    """Return the entries of grouped-query attention."""
    h, d = shape.hidden, shape.head_dim
    rows = [shape.heads * d, shape.kv_heads * d, shape.kv_heads * d]

    def qkv(kind: str, *width: int) -> Entry:
        theirs = tuple(f"self_attn.{x}_proj.{kind}" for x in "qkv")
        sizes = [(n, *width) for n in rows]
        return layer.entry(f"self_attention.linear_qkv.{kind}", theirs, *sizes, merge=Merge.QKV, split=Split.ROWS)

    found = [
        qkv("weight", h),
        layer.entry("self_attention.linear_proj.weight", "self_attn.o_proj.weight", (h, rows[0]), split=Split.COLUMNS),
    ]
    if shape.qkv_bias:
        found.append(qkv("bias"))
    if shape.qk_norm:
        found += [layer.entry(f"self_attention.{x}_layernorm.weight", f"self_attn.{x}_norm.weight", (d,)) for x in "qk"]
    return found


def _experts(hidden: int, moe: MoeShape, layer: Layer) -> list[Entry]:
    found = [layer.entry("mlp.router.weight", "mlp.gate.weight", (moe.experts, hidden))]
    if moe.correction:
        bias = "mlp.gate.e_score_correction_bias"
        found.append(layer.entry("mlp.router.expert_bias", bias, (moe.experts,), float32=True))
    if moe.shared_ffn:
        found += layer.mlp("mlp.shared_experts", "mlp.shared_experts", hidden, moe.shared_ffn)
    for n in range(moe.experts):
        found += layer.mlp(f"mlp.experts.local_experts.{n}", f"mlp.experts.{n}", hidden, moe.ffn, n)
    return found


def is_kept(shape: ModelShape, name: str) -> bool:
    """Return whether a Hugging Face tensor is not trained but copied from the source folder to an exported one."""
    return any(name.startswith(f"model.layers.{shape.num_layers + i}.") for i in range(shape.num_mtp))


def strays(shape: ModelShape, names: Iterable[str]) -> list[str]:
    """Return the tensors of a Hugging Face folder that belong to no entry and are neither kept nor tied copies."""
    taken = {name for entry in entries(shape) for name in entry.theirs}
    if shape.tied:
        taken.add("lm_head.weight")  # some folders store the tied matrix twice
    return [n for n in names if n not in taken and not is_kept(shape, n) and not n.endswith("rotary_emb.inv_freq")]


def weight_shapes(shape: ModelShape, dtype: str) -> list[tuple[str, str, list[int]]]:
    """Return (name, dtype, shape) of the tensors that `export` yields, in its order, without reading weights."""
    return [
        (name, "float32" if entry.float32 else dtype, list(size))
        for entry in entries(shape)
        for name, size in zip(entry.theirs, entry.shapes, strict=True)
    ]


def padded_vocab(vocab: int, tensor_parallel_size: int) -> int:
    """Return the vocabulary size rounded up so that every rank holds the same number of rows."""
    return -(-vocab // tensor_parallel_size) * tensor_parallel_size

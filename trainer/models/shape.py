"""The architecture of a model as numbers. trainer/models/families reads them from a `config.json`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.models.entries import Entry, Layer


@dataclass(frozen=True)
class Rope:
    """The scaling of the position embedding's frequencies for long contexts (see rope.py).

    `low` and `high` bound the transition range: wave lengths per `original` positions (llama3), or rotations (yarn).
    """

    kind: str = "default"  # default, linear, llama3, yarn
    factor: float = 1.0
    original: int = 0  # positions in pre-training, before the scaling
    low: float = 0.0
    high: float = 0.0
    mscale: float = 1.0  # yarn: scales cosine and sine up with ln `factor`
    mscale_all: float = 0.0  # yarn: scales attention logits up with ln `factor`, and cosine and sine down by as much


@dataclass(frozen=True)
class MoeShape:
    """Mixture-of-experts layers: a router sends each token to `top_k` of `experts` small MLPs."""

    experts: int
    top_k: int
    ffn: int  # of one expert
    layers: tuple[bool, ...]  # True: this layer has experts, False: one dense MLP of `ModelShape.ffn`
    normalized: bool = True  # the weights of a token's experts add up to `scale`
    scale: float = 1.0
    shared_ffn: int = 0  # of the MLP that all tokens use in addition to their experts; 0: there is none
    sigmoid: bool = False  # scores are sigmoids of the router's logits, not a softmax over them
    correction: bool = False  # a bias per expert is added to the scores to choose experts, not to weight them
    groups: int = 1  # number of groups of experts
    top_groups: int = 1  # groups that a token's experts come from: those with the largest sum of their two best scores


@dataclass(frozen=True)
class MlaShape:
    """Multi-head latent attention: keys and values are computed from one small vector per token."""

    q_rank: int | None  # None: queries are computed from the hidden state itself
    kv_rank: int
    plain_dim: int  # of a head's query and key, without positions
    rotary_dim: int  # of a head's query, and of the one key that all heads share, with positions
    value_dim: int


@dataclass(frozen=True)
class ModelShape:
    """The architecture of a decoder as numbers."""

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
    rotary_pairs: bool = False  # dimension 2i is rotated with 2i + 1, not with the one half a head further
    sandwich: bool = False  # the outputs of attention and MLP are normed, too, and gate and up are one tensor
    moe: MoeShape | None = None
    mla: MlaShape | None = None
    num_mtp: int = 0  # layers for multi-token prediction after the last one: kept unchanged, not trained
    layer_entries: Callable[[ModelShape, Layer], list[Entry]] | None = None  # of a layer; None: the common layer's

    def has_experts(self, layer: int) -> bool:
        """Return whether layer `layer`, numbered from 0 over the whole model, has experts."""
        return self.moe is not None and self.moe.layers[layer]

"""The numbers of a model. What reads them from a `config.json`: trainer/models/families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.models.entries import Entry, Layer


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
    layer_entries: Callable[[ModelShape, Layer], list[Entry]] | None = None  # tensors of a layer; None: the usual ones

    def has_experts(self, layer: int) -> bool:
        """Return whether layer `layer`, counted from 0 over the whole model, has experts."""
        return self.moe is not None and self.moe.layers[layer]

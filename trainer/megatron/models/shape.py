"""The numbers of a model, read from its Hugging Face `config.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a dense decoder, read from a Hugging Face `config.json`."""

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


def read_shape(folder: Path) -> ModelShape:
    """ValueError: no config.json, or an architecture that is not mapped."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a model is a Hugging Face folder")
    c = json.loads(path.read_text())
    if c.get("model_type") != "qwen3":
        raise ValueError(f"{path}: model_type {c.get('model_type')!r} is not mapped; mapped: qwen3")
    rope = c.get("rope_parameters") or {}
    return ModelShape(
        num_layers=c["num_hidden_layers"],
        hidden=c["hidden_size"],
        heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        ffn=c["intermediate_size"],
        vocab=c["vocab_size"],
        norm_eps=c["rms_norm_eps"],
        rope_base=float(rope.get("rope_theta") or c["rope_theta"]),
        tied=bool(c.get("tie_word_embeddings", False)),
        qk_norm=True,
        max_positions=c["max_position_embeddings"],
    )

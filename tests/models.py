"""Small random models for tests."""

from __future__ import annotations

from pathlib import Path


def random_qwen3(path: Path) -> Path:
    """Writes a Hugging Face folder with a Qwen3 of two layers in float32; the same weights each time."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=97,  # odd: tensor parallelism has to pad it
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path

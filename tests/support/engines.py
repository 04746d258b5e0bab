"""A small random model for engines, its requests, and the log-probabilities that transformers gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from buffer.types import Float32
from rollout.config import EngineConfig

VOCAB, CONTEXT = 512, 256
CONFIG = EngineConfig(
    max_running_requests=64, start_timeout_s=300.0, request_timeout_s=120.0, options={"decode_log_interval": 7}
)


def make_model(folder: Path) -> Any:
    """A random 0.6M-parameter Qwen3 in `folder`, and the same model in transformers."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        **{"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 32, "intermediate_size": 320, "vocab_size": VOCAB, "max_position_embeddings": CONTEXT},
        **{"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": VOCAB - 1, "initializer_range": 0.08},
    )
    model = Qwen3ForCausalLM(config).float().eval()
    model.save_pretrained(folder)
    return model


def reference(model: Any, prompt: list[int], output: list[int]) -> Float32:
    """Return transformers' log-probability of each output id, given the prompt and the previous outputs."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    found = torch.log_softmax(logits, -1).gather(1, torch.tensor(output)[:, None])[:, 0]
    return found.numpy()


def prompts_with_shared_prefixes(seed: int) -> list[list[int]]:
    """Return 60 prompts of 1 to 150 ids; every third begins with the same 40 ids, every fifth repeats another."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, VOCAB - 1, 40).tolist()
    prompts: list[list[int]] = []
    for number in range(60):
        body = rng.integers(0, VOCAB - 1, rng.integers(1, 111)).tolist()
        prompts.append(prompts[-5] if number % 5 == 4 and number > 4 else shared * (number % 3 == 0) + body)
    return prompts

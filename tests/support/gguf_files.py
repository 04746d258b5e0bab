"""Writes tiny GGUF files as llama.cpp's converter does: names, order of Llama's rotated rows, stacked experts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file
from transformers.convert_slow_tokenizer import bytes_to_unicode

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
MERGES = ["t h", "th e", "Ġ the", "1 2"]
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*MARKS, *bytes_to_unicode().values(), *(pair.replace(" ", "") for pair in MERGES)]


def write_gguf(
    folder: Path,
    path: Path,
    pre: str = "smollm",
    fields: dict[str, Any] | None = None,
    types: dict[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """Writes a Hugging Face folder as a GGUF file. `fields`: added or, if None, left out; `types`: quantization."""
    config = json.loads((folder / "config.json").read_text())
    kind = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, kind)
    for name, value in (_metadata(config, kind, pre) | (fields or {})).items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    for name, tensor in _tensors(folder, config, kind).items():
        wanted = (types or {}).get(name)
        if wanted is None:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(config: dict[str, Any], kind: str, pre: str) -> dict[str, Any]:
    theirs = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config.get("head_dim"),
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "expert_count": config.get("num_experts", config.get("num_local_experts")),
        "expert_used_count": config.get("num_experts_per_tok"),
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
    }
    return {f"{kind}.{name}": value for name, value in theirs.items()} | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3 if text in MARKS else 1 for text in TOKENS],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    }


def _tensors(folder: Path, config: dict[str, Any], kind: str) -> dict[str, np.ndarray]:
    architecture = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    found: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if kind == "llama" and ".q_proj" in name:
            tensor = _interleaved(tensor, config["num_attention_heads"])
        if kind == "llama" and ".k_proj" in name:
            tensor = _interleaved(tensor, config["num_key_value_heads"])
        one = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        theirs = names.get_name(f"{one[1]}.{one[3]}" if one else name, try_suffixes=(".weight", ".bias"))
        assert theirs, name
        if one:
            experts.setdefault(f"{theirs}.weight", {})[int(one[2])] = tensor
        else:
            found[theirs] = tensor
    return found | {name: np.stack([parts[i] for i in sorted(parts)]) for name, parts in experts.items()}


def _interleaved(tensor: np.ndarray, heads: int) -> np.ndarray:
    """The rows of each head, first half and second half in turn, as in llama.cpp's convert_hf_to_gguf.py."""
    parts = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return np.ascontiguousarray(parts.swapaxes(1, 2).reshape(tensor.shape))
